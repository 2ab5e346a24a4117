"""Processes that work as one: the same results as one process gives, whoever did what; and one that dies."""

import json
import multiprocessing
import shutil
import threading
import time
from collections import defaultdict

import numpy as np
import pytest
import sharding
import torch
import yaml
from safetensors.numpy import load_file

from ragkit.errors import MachineError, ProfileError, RagkitError
from ragkit.experiment.workers import free_port, make_sets
from ragkit.models import device as fleet
from ragkit.profile import MachineSettings, load_profile

PROFILE = """
judge: false
machine: {processes: PROCESSES}
sets: [{source: world, name: almanac, world: almanac, seed: 11, entities: 40, distill: 45, dev: 20, test: 20}]
retriever: {crop_steps: 20, at_once: 16}
index: {shard: 100}
reader: {steps: 6, checkpoints: 1, batch: 5, at_once: 2}
distill: {seeds: [0], epochs: 1, batch: 7}
indicators: {questions: 10}
choices: {variations: [both sides]}
evaluate: {answered: 10}
"""


def write_profile(folder, processes, name=None, **reader):
    """PROFILE with so many processes, and with more settings of the reader."""
    values = yaml.safe_load(PROFILE.replace("PROCESSES", str(processes))) | {
        "name": name or f"with-{processes}"
    }
    values["reader"] |= reader
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same stages made by one process and by two."""
    folder = tmp_path_factory.mktemp("fleet")
    for processes in (1, 2):
        make_sets(write_profile(folder, processes), folder, ["almanac"])
    return folder


def both(runs, name):
    return [runs / f"with-{n}" / "stages" / name for n in (1, 2)]


def test_the_stages_are_the_same(runs):
    one, two = (
        sorted(
            str(p.parent.relative_to(runs / f"with-{n}"))
            for p in (runs / f"with-{n}").rglob("stage.json")
        )
        for n in (1, 2)
    )
    assert one == two
    assert all(path.suffix == ".lock" for path in (runs / "with-2" / "partial").iterdir())


def test_encoding_has_no_gaps_or_repeats_and_the_candidates_agree(runs):
    shards = [sorted(folder.glob("*.npy")) for folder in both(runs, "vectors/almanac")]
    assert [p.name for p in shards[0]] == [p.name for p in shards[1]]
    assert len(shards[0]) > 1
    for a, b in zip(*shards, strict=True):
        assert np.array_equal(np.load(a), np.load(b))
    for one, two in zip(
        *(
            load_file(folder / "candidates.safetensors").values()
            for folder in both(runs, "candidates/almanac")
        ),
        strict=True,
    ):
        assert np.array_equal(one, two)


def test_step_1_learns_the_same(runs):
    """Gradients are added up in another order, so floats differ in their last digits, and these grow over the steps."""
    one, two = (
        json.loads((folder / "losses.json").read_text()) for folder in both(runs, "step1/almanac")
    )
    assert len(one) == 6
    assert np.allclose(one, two, rtol=1e-4)
    one, two = (load_file(folder / "model.safetensors") for folder in both(runs, "step1/almanac"))
    assert one.keys() == two.keys()
    assert all(np.allclose(one[name], two[name], atol=1e-3) for name in one)


@pytest.fixture(scope="module")
def sharded(runs):
    """Step 1 by two processes over which the reader is split."""
    step1 = runs / "sharded" / "stages" / "step1" / "almanac"
    shutil.copytree(runs / "with-2", runs / "sharded")
    shutil.rmtree(step1)
    make_sets(write_profile(runs, 2, "sharded", shard=True), runs, ["almanac"])
    return step1


def test_a_reader_split_over_processes_learns_the_same(runs, sharded):
    """At the start, at each reader kept on the way and at the end."""
    whole = runs / "with-1" / "stages" / "step1" / "almanac"
    one, two = (json.loads((folder / "losses.json").read_text()) for folder in (whole, sharded))
    assert np.allclose(one, two, rtol=1e-4)
    for kept in ("", "3"):
        one, two = (load_file(folder / kept / "model.safetensors") for folder in (whole, sharded))
        assert one.keys() == two.keys()
        assert all(
            one[name].dtype == two[name].dtype and np.allclose(one[name], two[name], atol=1e-3)
            for name in one
        )
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, sharded)
    ]
    for one, two in zip(*logs, strict=True):
        assert {
            name: value for name, value in two.items() if name not in ("seconds", "left")
        } == pytest.approx(
            {name: value for name, value in one.items() if name not in ("seconds", "left")},
            rel=1e-3,
            abs=1e-4,
        )
    assert not list(sharded.glob("checkpoint*"))


def split_reader(folder, dies_at=None):
    """Step 1 of one reader over two processes (see `sharding`); their exit codes."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [
        context.Process(target=sharding.learn, args=(rank, 2, port, folder, dies_at))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def test_a_split_reader_goes_on_from_its_parts(tmp_path):
    """Both processes die at step 5 and go on from step 4; where the parts of the checkpoint are of different steps, from the beginning."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert split_reader(whole) == [0, 0]
    seven = json.loads((whole / "losses.json").read_text())
    assert split_reader(cut, dies_at=5) == [9, 9]
    parts = [cut / f"checkpoint-{rank}.safetensors" for rank in range(2)]
    assert all(
        0.4 < part.stat().st_size / sum(p.stat().st_size for p in parts) < 0.6 for part in parts
    )
    shutil.copytree(cut, tmp_path / "mixed")
    assert split_reader(cut) == [0, 0]
    assert json.loads((cut / "losses.json").read_text()) == seven
    assert split_reader(tmp_path / "older", dies_at=3) == [9, 9]
    shutil.copy(tmp_path / "older" / parts[1].name, tmp_path / "mixed" / parts[1].name)
    assert split_reader(tmp_path / "mixed") == [0, 0]
    assert json.loads((tmp_path / "mixed" / "losses.json").read_text()) == seven


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("teacher/almanac/off-the-shelf", "scores"),
        ("loop/almanac/off-the-shelf", "scores"),
        ("tokens/almanac/off-the-shelf", "tokens"),
    ],
)
def test_a_frozen_readers_scores_agree(runs, stage, file):
    one, two = (load_file(folder / f"{file}.safetensors") for folder in both(runs, stage))
    assert one.keys() == two.keys()
    for name in one:
        assert np.allclose(one[name], two[name], rtol=1e-5, atol=1e-7, equal_nan=True), name


@pytest.mark.parametrize("target", ["oracle", "fine-tuned-attention", "fine-tuned-EMDR2"])
def test_step_2_learns_the_same(runs, target):
    """Nine questions in batches of seven, so one process has more than the other, and in the last batch one has two and the other one."""
    one, two = (
        json.loads((folder / "curve.json").read_text())
        for folder in both(runs, f"step2/almanac/{target}-0")
    )
    assert np.allclose(
        [row["loss"] for row in one[1:]], [row["loss"] for row in two[1:]], rtol=1e-3
    )


def test_answers_agree(runs):
    one, two = (
        json.loads((folder / "answers.json").read_text())
        for folder in both(runs, "answers/almanac/initial-off-the-shelf-0")
    )
    assert one == two


def test_work_is_counted_over_all_processes(runs):
    for stage in ("vectors/almanac", "teacher/almanac/off-the-shelf", "step1/almanac"):
        one, two = (
            json.loads((folder / "stage.json").read_text())["work"] for folder in both(runs, stage)
        )
        assert one.keys() == two.keys()
        assert {what: one[what] for what in one if what != "waited"} == {
            what: two[what] for what in two if what != "waited"
        }


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, runs):
    """SIGKILL to one of two processes at some moment after Step 1 has begun."""
    profile = write_profile(tmp_path, 2)
    killed = []

    def kill():
        while not list(tmp_path.glob("with-2/stages/candidates/almanac")):
            time.sleep(0.02)
        time.sleep(1)
        worker = multiprocessing.active_children()[-1]
        killed.append(worker.pid)
        worker.kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(
        RagkitError,
        match=r"The process that made the stages of almanac \(number \d of 2\) ended with -9.*The same command goes on",
    ):
        make_sets(profile, tmp_path, ["almanac"])
    assert killed
    assert not multiprocessing.active_children()
    make_sets(profile, tmp_path, ["almanac"])
    for name in ("step1/almanac/losses.json", "step2/almanac/oracle-0/curve.json"):
        assert np.array_equal(
            *(
                json.dumps(json.loads((root / "with-2" / "stages" / name).read_text()))
                for root in (tmp_path, runs)
            )
        )


def test_shares_and_weights():
    """As one process: everything, with weight 1; the weights of two processes make the gradients' mean that of the whole batch."""
    assert fleet.share([1, 2, 3]) == ([1, 2, 3], 1.0)
    assert fleet.share(torch.arange(4))[0].tolist() == [0, 1, 2, 3]


def test_each_process_takes_its_share(monkeypatch):
    batch, seen = list(range(7)), []
    monkeypatch.setattr(fleet, "size", lambda: 3)
    total = 0.0
    for rank in range(3):
        monkeypatch.setattr(fleet, "rank", lambda rank=rank: rank)
        mine, weight = fleet.share(batch)
        seen += mine
        total += weight * float(np.mean(mine)) / 3
    assert sorted(seen) == batch
    assert total == pytest.approx(np.mean(batch))
    monkeypatch.setattr(fleet, "rank", lambda: 2)
    assert fleet.share([5, 6]) == (
        [5],
        0.0,
    )  # nothing left for it: it computes along, with weight 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_comes_next_is_made_ahead_on_a_gpu_and_waiting_is_counted(monkeypatch, kind):
    monkeypatch.setattr(fleet, "device", lambda: torch.device(kind))
    monkeypatch.setattr(fleet, "done", defaultdict(float))
    order = []

    def prepare(item):
        order.append(f"prepare {item}")
        time.sleep(0.05)
        return item

    for item in fleet.ahead(range(3), prepare):
        time.sleep(0.1)
        order.append(f"work {item}")
    assert (order.index("prepare 1") < order.index("work 0")) is (kind == "cuda")
    assert [o for o in order if o.startswith("work")] == ["work 0", "work 1", "work 2"]
    assert (0.04 < fleet.counted()["waited"] < 0.14) is (kind == "cuda")  # for the first only
    with pytest.raises(ZeroDivisionError):
        list(fleet.ahead([1, 0], lambda n: 1 / n))


def test_a_stage_opened_within_another_counts_for_itself(monkeypatch):
    monkeypatch.setattr(fleet, "done", defaultdict(float))
    with fleet.counting():
        fleet.done["passages"] += 3
        with fleet.counting():
            fleet.done["passages"] += 7
            assert fleet.counted() == {"passages": 7}
        fleet.done["passages"] += 1
        assert fleet.counted() == {"passages": 4}
    assert fleet.counted() == {}


def test_what_the_machine_lacks_is_said(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match=r"machine.device is 'cuda', but torch finds no GPU"):
            fleet.start(MachineSettings(device="cuda"), 1)
    with pytest.raises(ProfileError, match=r"machine.processes: 9 cannot share a batch"):
        load_profile(write_profile(tmp_path, 9))
    for processes, with_it in ((1, {}), (2, {"lora_rank": 2}), (2, {"dtype": "float16"})):
        with pytest.raises(
            ProfileError,
            match=r"reader.shard: needs several machine.processes, every weight trained",
        ):
            load_profile(write_profile(tmp_path, processes, shard=True, **with_it))
