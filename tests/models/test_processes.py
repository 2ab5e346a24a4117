"""Two processes that work as one: the same results as one process gives."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ragkit.models import device

SCRIPT = Path(__file__).parents[1] / "sharding.py"
ALONE = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same stages made by one process and by two."""
    folders = {}
    for size, launcher in {1: [], 2: TORCHRUN}.items():
        folders[size] = tmp_path_factory.mktemp(f"by{size}")
        root = SCRIPT.parents[1]
        ended = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(folders[size])],
            env=os.environ | ALONE | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    return folders


def read(runs, name):
    return [json.loads((runs[size] / name).read_text()) for size in (1, 2)]


def arrays(runs, name):
    return [load_file(runs[size] / name) for size in (1, 2)]


def test_two_processes_were_at_work(runs):
    one, two = read(runs, "seen.json")
    assert (one["size"], one["started"], one["mean rank"]) == (1, 1, 0)
    assert (two["size"], two["started"], two["mean rank"]) == (2, 2, 0.5)
    assert two["backend"] == "gloo"


def test_vectors_and_candidates_are_the_same(runs):
    one, two = (np.load(runs[size] / "vectors" / "vectors.npy") for size in (1, 2))
    assert len(one) > 100  # several shards
    assert np.allclose(one, two, atol=1e-6)
    one, two = arrays(runs, "candidates/candidates.safetensors")
    for part in ("distill", "dev", "test"):
        assert np.array_equal(one[part], two[part])


def test_answers_are_the_same(runs):
    one, two = read(runs, "answers/answers.json")
    assert one == two


def test_looks_at_shuffled_passages_are_the_same(runs):
    """Every process shuffles all questions, whichever of them it reads."""
    one, two = arrays(runs, "teacher/scores.safetensors")
    assert one.keys() == two.keys()
    assert not np.array_equal(one["places"], np.sort(one["places"]))
    assert all(np.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_step_1_learns_the_same(runs):
    """Gradients are added up in another order, so floats differ in their last digits."""
    logs = [(runs[size] / "step1/metrics.jsonl").read_text().splitlines() for size in (1, 2)]
    one, two = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert len(one) == 6
    assert np.allclose(one, two, rtol=1e-4)
    for kept in ("step-3", "fine-tuned"):
        one, two = arrays(runs, f"step1/{kept}/model.safetensors")
        assert one.keys() == two.keys()
        assert all(np.allclose(one[name], two[name], atol=1e-3) for name in one)
    assert not list(runs[2].glob("step1/checkpoint-*"))


def test_a_frozen_readers_losses_are_the_same(runs):
    one, two = (seen["losses"] for seen in read(runs, "seen.json"))
    assert len(one) == 20
    assert np.allclose(one, two, rtol=1e-4)


def test_the_others_wait_for_a_stage_of_hours():
    assert timedelta(days=2) < device.PATIENCE
