"""Shares of work, checkpoints, and what the machine lacks."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ragkit.errors import ProfileError
from ragkit.models import device


def test_each_process_takes_its_share(monkeypatch):
    """The weights of three processes make the gradients' mean that of the whole batch."""
    assert device.share([1, 2, 3]) == ([1, 2, 3], 1.0)
    assert device.share(torch.arange(4))[0].tolist() == [0, 1, 2, 3]
    batch, seen, total = list(range(7)), [], 0.0
    for rank in range(3):
        here = SimpleNamespace(num_processes=3, process_index=rank)
        monkeypatch.setattr(device, "PartialState", lambda here=here: here)
        mine, weight = device.share(batch)
        seen += mine
        total += weight * float(np.mean(mine)) / 3
    assert sorted(seen) == batch
    assert total == pytest.approx(np.mean(batch))
    # nothing is left for the last one: it computes along, with weight 0
    assert device.share([5, 6]) == ([5], 0.0)


def test_batches_are_of_like_length_and_results_in_order():
    batches = []

    def work(texts):
        batches.append(texts)
        return [text.upper() for text in texts]

    texts = ["a", "bbb", "cc", "dddd", "e"]
    assert device.spread(texts, 2, work, "") == ["A", "BBB", "CC", "DDDD", "E"]
    assert batches == [["dddd", "bbb"], ["cc", "a"], ["e"]]


def test_another_device_than_the_processs_is_refused():
    device.start("cpu", 1)
    with pytest.raises(ProfileError, match=r"device is 'cuda', .* computes on 'cpu'"):
        device.start("cuda", 1)


# Checkpoints


def trained(steps, state=None):
    """A model with dropout and its optimizer, after some more steps from a state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if state is not None:
        torch.manual_seed(99)  # as in a new process: the random state comes from the checkpoint
        saved = device.load_checkpoint(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.ones(2, 4)) - 1).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_a_training_that_goes_on_ends_the_same(tmp_path):
    whole = trained(8)[0]
    model, optimizer = trained(4)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    device.save_checkpoint(tmp_path / "c.pt", {**state, "losses": [0.1, float("nan")]})
    resumed = trained(4, tmp_path / "c.pt")[0]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [0, 10, 500, -1])
def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path, caplog, kept):
    path = tmp_path / "c.pt"
    assert device.load_checkpoint(path) is None
    device.save_checkpoint(path, {"weights": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:kept])
    assert device.load_checkpoint(path) is None
    assert "is damaged" in caplog.text


def test_a_checkpoint_holds_no_code(tmp_path, caplog):
    torch.save({"state": time.sleep, "generators": {}}, tmp_path / "c.pt")
    assert device.load_checkpoint(tmp_path / "c.pt") is None
    assert "is damaged" in caplog.text


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    device.save_checkpoint(path, {"n": 1})

    def full(state, place):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        device.save_checkpoint(path, {"n": 2})
    assert device.load_checkpoint(path) == {"n": 1}
