"""Means with bootstrap intervals: of values, and of gains over the same questions."""

from __future__ import annotations

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


def interval(values: NDArray[np.float64], seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean of `values` `[n]` with a percentile interval (SciPy); of fewer than two, NaN bounds."""
    mean = float(np.mean(values)) if len(values) else float("nan")
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values))
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean, len(values))
    bounds = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", rng=seed
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(values))


def paired_gain(
    after: NDArray[np.float64], before: NDArray[np.float64], seed: int = 0, resamples: int = 2000
) -> Interval:
    """Mean gain of `after` over `before` `[questions]`, bootstrapped over questions.

    `after` may be `[seeds, questions]`: then seeds are resampled too, and the interval holds both
    sources of chance.
    """
    gains = np.atleast_2d(after) - before[None, :]
    rng = np.random.default_rng(seed)
    n_seeds, n = gains.shape
    # how often each seed and each question is drawn: a resample's mean is weighted by these
    seeds_drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    questions_drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    draws = ((seeds_drawn @ gains) * questions_drawn).sum(1) / (n_seeds * n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(gains.mean()), float(low), float(high), n)
