"""Means with bootstrap intervals: of values, and of gains over the same questions."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval, and the number of units behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: NDArray[np.float64], resamples: int = 2000) -> Interval:
    """Mean of `values` `[n]` with a percentile interval (SciPy); of fewer than two, NaN bounds."""
    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    low = high = mean if n > 1 else math.nan
    if n > 1 and np.ptp(values) > 0:
        resampling = {"n_resamples": resamples, "method": "percentile", "rng": 0}
        low, high = stats.bootstrap((values,), np.mean, **resampling).confidence_interval
    return Interval(mean, float(low), float(high), n)


def paired_gain(
    after: NDArray[np.float64], before: NDArray[np.float64], resamples: int = 2000
) -> Interval:
    """Mean gain of `after` over `before` `[questions]`, bootstrapped over questions, and over seeds
    where `after` is `[seeds, questions]`: the interval then holds both sources of chance."""
    gains, rng = np.atleast_2d(after) - before[None, :], np.random.default_rng(0)
    # how often each seed and each question is drawn: a resample's mean is weighted by these
    by_seed, by_question = (
        rng.multinomial(size, np.full(size, 1 / size), size=resamples) for size in gains.shape
    )
    draws = ((by_seed @ gains) * by_question).sum(1) / gains.size
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(gains.mean()), float(low), float(high), gains.shape[1])
