"""Metrics against hand-worked and independent values."""

import numpy as np
import pytest
from scipy import stats

from ragkit.indicators import metrics


@pytest.mark.parametrize(
    ("answer", "golds", "em", "f1"),
    [
        ("The Ulm!", ["ulm"], 1, 1.0),
        ("Old Ulm", ["Ulm"], 0, 2 / 3),
        ("", ["Ulm"], 0, 0.0),
        ("Ulm Ulm", ["Ulm", "Ulm Ulm city"], 0, 0.8),
        ("w", ["W."], 1, 1.0),
    ],
)
def test_em_and_f1(answer, golds, em, f1):
    assert metrics.exact_match(answer, golds) == em
    assert metrics.f1(answer, golds) == pytest.approx(f1)


def test_answers_are_found_as_whole_words():
    assert (
        metrics.holds_answer("Born in Röntgen, Ulm", ["rontgen"]) is False
    )  # DPR normalises to NFD, it does not strip
    assert metrics.holds_answer("Born in Ro\u0308ntgen", ["Röntgen"])
    assert not metrics.holds_answer("Ulmer cake", ["Ulm"])
    assert not metrics.holds_answer("anything", ["  "])


def test_hits_and_ranks():
    found, golds = [[3, 1, 2], [4, 5, 6]], [(2, 9), (7,)]
    assert metrics.hits(found, golds, 2).tolist() == [0, 0]
    assert metrics.hits(found, golds, 3).tolist() == [1, 0]
    assert metrics.reciprocal_ranks(found, golds).tolist() == [1 / 3, 0]


def test_the_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(2, 1, 400)
    ours = metrics.interval(values)
    half = 1.96 * stats.sem(values)
    assert ours.low == pytest.approx(values.mean() - half, abs=0.03)
    assert ours.high == pytest.approx(values.mean() + half, abs=0.03)
    assert np.isnan(metrics.interval(np.array([1.0])).low)


def test_a_paired_gain_sees_what_an_unpaired_one_cannot():
    before = np.random.default_rng(0).normal(0, 5, 200)
    gain = metrics.paired_gain(before[None] + 0.1, before)
    assert gain.low == pytest.approx(0.1)
    assert (
        metrics.paired_gain(np.stack([before + 1, before - 1]), before).low < -0.5
    )  # seeds that disagree widen it


def test_a_paired_gain_is_the_bootstrap_of_scipy():
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 2, 300).astype(float), rng.integers(0, 2, 300).astype(float)
    ours = metrics.paired_gain(after, before, resamples=4000)
    theirs = stats.bootstrap(
        (after - before,), np.mean, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
