"""Shares of work, and what the machine lacks."""

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
