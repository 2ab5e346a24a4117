"""Checkpoints: a training that goes on from one ends exactly like a training that was never stopped."""

import pytest
import torch
from torch import nn

from ragkit.errors import CheckpointError
from ragkit.models import checkpoint


class Tied(nn.Module):
    """Two layers that share a weight, a buffer and dropout: what real models have."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second, self.drop = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Dropout(0.3),
        )
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        return self.second(self.drop(self.first(x)))


def start(kinds):
    torch.manual_seed(0)
    model = Tied()
    matrices, rest = [model.first.weight], [model.first.bias, model.second.bias]
    make = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9)),
        "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    }
    parts = [matrices, rest] if len(kinds) == 2 else [matrices + rest]
    return model, [make[kind](part) for kind, part in zip(kinds, parts, strict=True)]


def train(model, optimizers, steps):
    for step in steps:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        loss = (model(torch.full((2, 4), float(step))) - 1).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kinds", [["AdamW"], ["SGD"], ["Muon", "AdamW"]])
def test_a_resumed_training_ends_the_same(tmp_path, kinds):
    whole, optimizers = start(kinds)
    train(whole, optimizers, range(4))
    checkpoint.save(tmp_path, whole, optimizers, {"losses": [0.1, float("nan")], "step": 4})
    train(whole, optimizers, range(4, 8))
    resumed, others = start(kinds)
    torch.manual_seed(99)  # as in a new process: the random state comes from the checkpoint
    history = checkpoint.load(tmp_path, resumed, others)
    assert history["step"] == 4
    train(resumed, others, range(4, 8))
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert resumed.first.weight is resumed.second.weight
    assert isinstance(others[-1].param_groups[0].get("betas", ()), tuple)


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    model, optimizers = start(["AdamW"])
    assert checkpoint.load(tmp_path, model, optimizers) is None
    checkpoint.save(tmp_path, model, optimizers, [])
    checkpoint.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path, caplog):
    model, optimizers = start(["AdamW"])
    checkpoint.save(tmp_path, model, optimizers, [])
    whole = (tmp_path / checkpoint.FILE).read_bytes()
    (tmp_path / checkpoint.FILE).write_bytes(whole[: len(whole) // 2])
    assert checkpoint.load(tmp_path, model, optimizers) is None
    assert "is damaged" in caplog.text


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model, optimizers = start(["AdamW"])
    checkpoint.save(tmp_path, model, optimizers, "old")

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, model, optimizers, "new")
    assert checkpoint.load(tmp_path, model, optimizers) == "old"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizers = start(["AdamW"])
    checkpoint.save(tmp_path, model, optimizers, [])
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(tmp_path, other := Tied(width=5), [torch.optim.AdamW(other.parameters())])
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        checkpoint.load(tmp_path, model, [*optimizers, *optimizers])
