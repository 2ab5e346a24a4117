"""Targets, their temperature, and Step 2."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipy_entropy

from ragkit import distill
from ragkit.distill import DistillError


@given(arrays(np.float64, (4, 5), elements=st.floats(-50, 50)), st.floats(0.05, 20))
def test_softmax_and_entropy_agree_with_scipy(scores, temperature):
    p = distill.softmax(scores, temperature)
    assert np.allclose(p.sum(1), 1)
    assert distill.entropy(p) == pytest.approx(np.mean(scipy_entropy(p, axis=1)) / np.log(5), abs=1e-9)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_the_temperature_meets_the_entropy(seed, share):
    scores = distill.standardise(np.random.default_rng(seed).normal(size=(50, 5)))
    assert distill.entropy(distill.softmax(scores, distill.temperature_for(scores, share))) == pytest.approx(share, abs=1e-6)


def test_a_shuffled_target_keeps_its_values():
    target = distill.softmax(np.random.default_rng(0).normal(size=(30, 5)), 1.0)
    mixed = distill.shuffled(target, 1)
    assert np.allclose(np.sort(target), np.sort(mixed))
    assert not np.allclose(target, mixed)


def test_oracle_and_answer_string():
    assert distill.oracle_scores([[4, 7], [1, 2]], [(7,), ()]).tolist() == [[0, 1], [0, 0]]
    texts = ["She lived in Ulm.", "Ulmer cake"]
    assert distill.answer_string_scores([[0, 1]], texts, [("ulm",)]).tolist() == [[1, 0]]


def test_kl_equals_torchs_and_sends_no_gradient_to_the_target():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], requires_grad=True)
    scores = torch.randn(2, 3, requires_grad=True)
    ours = distill.kl_loss(target, scores, 0.3)
    theirs = torch.nn.functional.kl_div((scores / 0.3).log_softmax(-1), target.detach(), reduction="batchmean")
    assert torch.isclose(ours, theirs)
    ours.backward()
    assert target.grad is None


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(DistillError, match="not all numbers"):
        distill.temperature_for(np.array([[0.0, np.nan]]), 0.5)


class Table(torch.nn.Module):
    """A stand-in for a retriever: one free vector a question."""

    def __init__(self, n):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.zeros(n, 3))

    def forward(self, texts):
        return self.vectors[[int(t) for t in texts]]


def step2(folder, epochs, watch=None):
    torch.manual_seed(0)
    from ragkit.profile import DistillSettings

    folder.mkdir(exist_ok=True)
    table = Table(6)
    passages = torch.eye(3)
    candidates = torch.tensor([[0, 1, 2]] * 6)
    target = torch.softmax(torch.arange(18.0).reshape(6, 3) % 5, -1)
    chosen = DistillSettings(epochs=epochs, batch=2, rate=0.01, retriever_temperature=0.5)
    curve = distill.train_queries(table, [str(i) for i in range(6)], passages, candidates, target, chosen, 0, folder, watch)
    return table, curve


def test_step2_lowers_the_loss(tmp_path):
    _, curve = step2(tmp_path / "a", 60)
    assert curve[-1]["kl"] < 0.2 * curve[0]["kl"]


def test_a_killed_step2_ends_with_the_same_result(tmp_path):
    whole, curve = step2(tmp_path / "whole", 6)

    class Killed(Exception):
        pass

    calls = []

    def watch(_):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return {}

    with pytest.raises(Killed):
        step2(tmp_path / "cut", 6, watch)
    resumed, again = step2(tmp_path / "cut", 6, lambda _: {})
    assert torch.equal(whole.vectors, resumed.vectors)
    assert [r["kl"] for r in again[1:]] == [r["kl"] for r in curve]


def test_a_loss_that_is_not_a_number_is_refused(tmp_path):
    table = Table(2)
    with torch.no_grad():
        table.vectors.fill_(float("inf"))
    from ragkit.profile import DistillSettings

    with pytest.raises(DistillError, match="not a number"):
        distill.train_queries(table, ["0", "1"], torch.eye(3), torch.tensor([[0, 1]] * 2), torch.full((2, 2), 0.5), DistillSettings(epochs=1), 0, tmp_path)
