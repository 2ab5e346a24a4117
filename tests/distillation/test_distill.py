"""Targets, their temperature, and Step 2."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipy_entropy

from ragkit.data.passages import Passage
from ragkit.distillation import targets as distill
from ragkit.errors import DistillError
from ragkit.profile import DistillSettings, RetrieverSettings


@given(arrays(np.float64, (4, 5), elements=st.floats(-50, 50)), st.floats(0.05, 20))
def test_softmax_and_entropy_agree_with_scipy(scores, temperature):
    p = distill.softmax(scores, temperature)
    assert np.allclose(p.sum(1), 1)
    assert distill.entropy(p) == pytest.approx(
        np.mean(scipy_entropy(p, axis=1)) / np.log(5), abs=1e-9
    )


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_the_temperature_meets_the_entropy(seed, share):
    scores = distill.standardise(np.random.default_rng(seed).normal(size=(50, 5)))
    assert distill.entropy(
        distill.softmax(scores, distill.temperature_for(scores, share))
    ) == pytest.approx(share, abs=1e-6)


def test_a_shuffled_target_keeps_its_values():
    target = distill.softmax(np.random.default_rng(0).normal(size=(30, 5)), 1.0)
    mixed = distill.shuffled(target, 1)
    assert np.allclose(np.sort(target), np.sort(mixed))
    assert not np.allclose(target, mixed)


def test_oracle_and_answer_string():
    assert distill.oracle_scores([[4, 7], [1, 2]], [(7,), ()]).tolist() == [[0, 1], [0, 0]]
    passages = [Passage("0", "", "She lived in Ulm."), Passage("1", "Ulm", "Ulmer cake")]
    assert distill.answer_string_scores([[0, 1]], passages, [("ulm",)]).tolist() == [[1, 0]]


def test_kl_equals_torchs_and_sends_no_gradient_to_the_target():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], requires_grad=True)
    scores = torch.randn(2, 3, requires_grad=True)
    ours = distill.kl_loss(target, scores, 0.3)
    theirs = torch.nn.functional.kl_div(
        (scores / 0.3).log_softmax(-1), target.detach(), reduction="batchmean"
    )
    assert torch.isclose(ours, theirs)
    ours.backward()
    assert target.grad is None


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(DistillError, match="not all numbers"):
        distill.temperature_for(np.array([[0.0, np.nan]]), 0.5)


class Table(torch.nn.Module):
    """A stand-in for a retriever: one free vector a question."""

    settings = RetrieverSettings()

    def __init__(self, n):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.zeros(n, 3))

    def tokens(self, texts):
        return [int(t) for t in texts]

    def forward(self, tokens):
        return self.vectors[tokens]


def step2(folder, epochs, watch=lambda _: {}):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    table = Table(6)
    passages, candidates = torch.eye(3), torch.tensor([[0, 1, 2]] * 6)
    target = torch.softmax(torch.arange(18.0).reshape(6, 3) % 5, -1)
    chosen = DistillSettings(epochs=epochs, batch=2, rate=0.01, retriever_temperature=0.5)
    texts = [str(i) for i in range(6)]
    curve = distill.train(
        table,
        texts,
        lambda _, c: passages[candidates[c]],
        lambda c, scores: distill.kl_loss(target[c], scores, 0.5),
        chosen,
        0,
        folder,
        watch,
    )
    return table, curve


def test_step2_lowers_the_loss(tmp_path):
    _, curve = step2(tmp_path / "a", 60)
    assert [row["epoch"] for row in curve[:4]] == [0, 0.5, 1, 1.5]
    assert curve[-1]["loss"] < 0.2 * curve[1]["loss"]


@pytest.mark.parametrize("look", [2, 4, 5])
def test_a_killed_step2_ends_with_the_same_result(tmp_path, look):
    whole, curve = step2(tmp_path / "whole", 3)

    class Killed(Exception):
        pass

    calls = []

    def watch(_):
        calls.append(1)
        if len(calls) == look:
            raise Killed
        return {}

    with pytest.raises(Killed):
        step2(tmp_path / "cut", 3, watch)
    resumed, again = step2(tmp_path / "cut", 3)
    assert torch.equal(whole.vectors, resumed.vectors)
    assert [r["loss"] for r in again[1:]] == [r["loss"] for r in curve[1:]]


def test_the_reverse_divergence_agrees_with_torch():
    target, scores = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.2]])
    kinds = [torch.distributions.Categorical(probs=p) for p in ((scores / 0.5).softmax(-1), target)]
    assert distill.reverse_kl_loss(target, scores, 0.5) == pytest.approx(
        float(torch.distributions.kl_divergence(*kinds)), abs=1e-6
    )


def test_emdr2_pulls_towards_the_posterior():
    logs, scores = (
        torch.tensor([[[-0.1], [-2.0], [-3.0]]]),
        torch.tensor([[0.1, 0.3, 0.2]], requires_grad=True),
    )
    distill.emdr2_loss(logs, scores, 0.5).backward()
    prior = (scores / 0.5).softmax(-1)
    posterior = prior * logs[..., 0].exp() / (prior * logs[..., 0].exp()).sum()
    assert torch.allclose(scores.grad, (prior - posterior) / 0.5, atol=1e-6)


def test_emdr2_takes_answers_of_unequal_length():
    nan = float("nan")
    logs = torch.tensor([[[-0.1, nan], [-2.0, nan]], [[-0.5, -1.0], [-0.2, -3.0]]])
    scores = torch.tensor([[0.1, 0.3], [0.5, 0.0]], requires_grad=True)
    loss = distill.emdr2_loss(logs, scores, 1.0)
    alone = [
        distill.emdr2_loss(logs[:1, :, :1], scores[:1], 1.0),
        distill.emdr2_loss(logs[1:], scores[1:], 1.0),
    ]
    assert loss.item() == pytest.approx(sum(alone).item() / 2)
    loss.backward()
    assert scores.grad.isfinite().all()


def test_a_loss_that_is_not_a_number_is_refused(tmp_path):
    table = Table(2)
    with torch.no_grad():
        table.vectors.fill_(float("inf"))
    settings = DistillSettings(epochs=1)
    with pytest.raises(DistillError, match="not a number"):
        distill.train(
            table,
            ["0", "1"],
            lambda _, c: torch.eye(3)[:2].expand(len(c), 2, 3),
            lambda c, scores: scores.sum(),
            settings,
            0,
            tmp_path,
            lambda _: {},
        )
