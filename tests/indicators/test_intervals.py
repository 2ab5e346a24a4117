"""Intervals against SciPy's bootstrap, the normal approximation and clusters worked out by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ragkit.indicators import measures


def clustered(rng, groups=40, each=6, own=1.0, shared=1.0):
    """Values of which those of one group share a part, true mean 0, and their groups."""
    values = own * rng.normal(size=(groups, each)) + shared * rng.normal(size=(groups, 1))
    return values.ravel(), np.repeat(np.arange(groups), each)


def test_the_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(2, 1, 400)
    ours = measures.interval(values)
    half = 1.96 * stats.sem(values)
    assert ours.low == pytest.approx(values.mean() - half, abs=0.03)
    assert ours.high == pytest.approx(values.mean() + half, abs=0.03)
    assert (len(ours.draws), ours.n) == (2000, 400)
    assert np.isnan(measures.interval(np.array([1.0])).low)
    assert np.isnan(measures.interval(np.array([])).mean)
    same = measures.interval(np.full(5, 0.1))
    assert (same.low, same.high, same.n) == (0.1, 0.1, 5)
    assert ours == measures.interval(values)  # by the numbers, and drawn the same again


def test_groups_of_one_are_the_bootstrap_of_scipy():
    values = np.random.default_rng(1).integers(0, 2, 300).astype(float)
    given = {"n_resamples": 4000, "method": "percentile", "rng": 0}
    theirs = stats.bootstrap((values,), np.mean, **given).confidence_interval
    for groups in (None, np.arange(300)[::-1].astype(str)):
        ours = measures.interval(values, groups, 4000)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_draws_are_all_ways_to_draw_groups():
    """Three groups of other sizes, one value missing: each resample is one of the 27, all come, and
    as often as they should."""
    values, groups = np.array([1.0, 3, np.nan, 10, 20, 6]), np.array(list("aabbbc"))
    members = [values[groups == name] for name in "abc"]
    ways = [
        round(float(np.nanmean(np.concatenate(way))), 12)
        for way in itertools.product(members, repeat=3)
    ]
    found = measures.draws(values, groups, 20_000)
    assert set(found) == set(ways)
    for value in set(ways):
        assert (found == value).mean() == pytest.approx(ways.count(value) / 27, abs=0.01)


def test_rows_are_drawn_together():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(2, 3, 30)), rng.integers(0, 8, 30)
    found = measures.draws(values, groups, 50)
    assert found.shape == (50, 2, 3)
    assert found[:, 1, 2] == pytest.approx(measures.draws(values[1, 2], groups, 50))
    gone = np.where(groups == 3, np.nan, values[0, 0])
    assert np.isfinite(measures.draws(gone, groups, 50)).all()
    assert np.isnan(measures.draws(np.full(30, np.nan), groups, 50)).all()


def test_the_variance_is_that_of_clusters():
    """Independent reference: the variance of a mean of clusters of one size, in closed form."""
    values, groups = clustered(np.random.default_rng(2), groups=200)
    means = values.reshape(200, 6).mean(1)
    expected = means.var() / 200
    assert measures.draws(values, groups, 20_000).var() == pytest.approx(expected, rel=0.05)


def test_intervals_over_groups_cover_and_those_over_questions_do_not():
    rng, covered = np.random.default_rng(3), {"groups": 0, "questions": 0}
    for _ in range(400):
        values, groups = clustered(rng)
        for name, given in (("groups", groups), ("questions", None)):
            found = measures.interval(values, given, 400)
            covered[name] += found.low <= 0 <= found.high
    assert 0.9 < covered["groups"] / 400 < 0.98
    assert covered["questions"] / 400 < 0.8


def test_a_paired_gain_sees_what_an_unpaired_one_cannot():
    before = np.random.default_rng(0).normal(0, 5, 200)
    gain = measures.interval((before[None] + 0.1) - before)
    assert gain.low == pytest.approx(0.1)


def test_seeds_that_disagree_widen_the_interval():
    values = np.random.default_rng(0).normal(size=200)
    alone = measures.interval(values)
    assert measures.interval(np.stack([values, values])).low == pytest.approx(alone.low, abs=1e-9)
    assert measures.interval(np.stack([values + 1, values - 1])).low < alone.low - 0.5


def test_questions_without_a_value_leave_their_groups():
    values, groups = np.array([1.0, 2, np.nan, np.nan, 4, 5]), np.array([0, 0, 1, 1, 2, 2])
    found = measures.interval(values, groups)
    known = np.isfinite(values)
    assert found == measures.interval(values[known], groups[known])
    assert (found.mean, found.n) == (3, 2)
    assert np.isnan(measures.interval(values[:4], groups[:4]).high)  # one group tells nothing
