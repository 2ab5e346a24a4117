"""Step 1's ways to fit into less memory: passes of a few prompts, recomputed activations, adapters, lower precision; and FiD readers in each."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.errors import StoreError
from ragkit.experiment.store import room_in_memory
from ragkit.models.reader import Reader, fine_tune
from ragkit.profile import ReaderSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm."),
    Passage("1", "Port Tarn", "Port Tarn lies by the sea. Orla Venn never saw it."),
]


def draw(rng):
    name, town = (
        rng.choice(["Orla Venn", "Ben Rill", "Ada Mott"]),
        rng.choice(["Ulm", "Tarn", "Port Vell"]),
    )
    return Question("q", f"where was {name} born", (town,), (0,)), [
        Passage("0", name, f"{name} was born in {town}."),
        *PASSAGES[1:],
    ]


def taught(folder, **settings):
    """The losses of a few steps of Step 1, and the folder that holds what came of it."""
    folder.mkdir()
    chosen = ReaderSettings(steps=6, batch=4, checkpoints=1, **settings)
    return fine_tune(Reader.load("embedded", chosen, to_train=True), draw, folder, 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "step1"
    return taught(folder), folder


@pytest.mark.parametrize(
    "settings", [{"at_once": 1}, {"at_once": 3}, {"gradient_checkpointing": True}]
)
def test_less_memory_changes_no_result(tmp_path, plain, settings):
    losses = taught(tmp_path / "step1", **settings)
    assert np.allclose(losses, plain[0], rtol=1e-3)
    one, two = (
        load_file(folder / "model.safetensors") for folder in (plain[1], tmp_path / "step1")
    )
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_half_precision_learns_much_the_same_and_keeps_float32_weights(tmp_path, plain):
    losses = taught(tmp_path / "step1", dtype="bfloat16")
    assert np.allclose(losses, plain[0], rtol=0.05)
    assert losses != plain[0]
    assert {t.dtype for t in load_file(tmp_path / "step1" / "model.safetensors").values()} == {
        torch.float32
    }
    scoring = Reader.load(str(tmp_path / "step1"), ReaderSettings(dtype="bfloat16"))
    assert next(scoring.model.parameters()).dtype == torch.bfloat16


def test_adapters_move_the_linear_layers_only_and_are_merged(tmp_path, plain):
    losses = taught(tmp_path / "step1", lora_rank=4, rate=1e-2)
    assert losses[-1] < losses[0]
    before = dict(Reader.load("embedded", ReaderSettings()).model.named_parameters())
    for kept in (tmp_path / "step1", tmp_path / "step1" / "3"):
        after = dict(
            AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).named_parameters()
        )
        assert after.keys() == before.keys()  # a plain model again: no adapter is left in it
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved
        assert all(
            name.endswith(
                (
                    "query_key_value.weight",
                    "dense.weight",
                    "dense_h_to_4h.weight",
                    "dense_4h_to_h.weight",
                )
            )
            for name in moved
        )
        change = next(after[name] - before[name] for name in sorted(moved))
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 4


def test_memory_that_runs_out_names_stage_and_setting():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ):
        if isinstance(error, torch.OutOfMemoryError) and not torch.cuda.is_available():
            continue
        with (
            pytest.raises(
                StoreError,
                match=r"Stage step1/nq: the memory of .* ran out\. Lower reader\.at_once.*gradient_checkpointing.*lora_rank",
            ),
            room_in_memory("step1/nq"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="something else"), room_in_memory("step1/nq"):
        raise RuntimeError("something else")
