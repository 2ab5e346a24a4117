"""Intervals against SciPy's bootstrap and the normal approximation."""

import numpy as np
import pytest
from scipy import stats

from ragkit.indicators import measures


def test_the_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(2, 1, 400)
    ours = measures.interval(values)
    half = 1.96 * stats.sem(values)
    assert ours.low == pytest.approx(values.mean() - half, abs=0.03)
    assert ours.high == pytest.approx(values.mean() + half, abs=0.03)
    assert np.isnan(measures.interval(np.array([1.0])).low)
    assert np.isnan(measures.interval(np.array([])).mean)
    same = measures.interval(np.full(5, 0.1))
    assert (same.low, same.high, same.n) == (0.1, 0.1, 5)


def test_a_paired_gain_sees_what_an_unpaired_one_cannot():
    before = np.random.default_rng(0).normal(0, 5, 200)
    gain = measures.paired_gain(before[None] + 0.1, before)
    assert gain.low == pytest.approx(0.1)
    disagreeing = measures.paired_gain(np.stack([before + 1, before - 1]), before)
    assert disagreeing.low < -0.5  # seeds that disagree widen it


def test_a_paired_gain_is_the_bootstrap_of_scipy():
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 2, 300).astype(float), rng.integers(0, 2, 300).astype(float)
    ours = measures.paired_gain(after, before, resamples=4000)
    theirs = stats.bootstrap(
        (after - before,), np.mean, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
