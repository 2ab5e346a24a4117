"""Answers and retrieval measured, with intervals: EM, F1, HR@k, MRR; bootstrap and paired tests from SciPy."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CUTS = (1, 5, 20)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer equals a gold answer after normalisation (SQuAD; best over the gold answers)."""
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Token overlap F1 after normalisation (SQuAD; best over the gold answers)."""
    return max(f1_one(normalise(answer).split(), normalise(gold).split()) for gold in golds)


def f1_one(answer: list[str], gold: list[str]) -> float:
    common = sum((Counter(answer) & Counter(gold)).values())
    if not answer or not gold:
        return float(answer == gold)
    return 2 * common / (len(answer) + len(gold))


def words(text: str) -> list[str]:
    """Lower-case words and signs of a text after NFD, as DPR's simple tokenizer cuts them."""
    return re.findall(r"[^\W_]+(?:[\u0300-\u036f][^\W_]*)*|[^\w\s]|_", unicodedata.normalize("NFD", text).lower())


def holds_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold answer stands in the text as a run of whole words (DPR's has_answer)."""
    spaced = f" {' '.join(words(text))} "
    return any(f" {' '.join(found)} " in spaced for gold in golds if (found := words(gold)))


def hits(found: Sequence[Sequence[int]], golds: Sequence[Sequence[int]], k: int) -> NDArray[np.float64]:
    """1.0 for each question with a gold passage among its first k `[questions]`; HR@k is the mean."""
    return np.array([float(bool(set(gold) & set(row[:k]))) for row, gold in zip(found, golds, strict=True)])


def reciprocal_ranks(found: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """1 / rank of the first gold passage, 0 if none was found `[questions]`; MRR is the mean."""
    ranks = [next((i for i, passage in enumerate(row, 1) if passage in set(gold)), 0) for row, gold in zip(found, golds, strict=True)]
    return np.array([1 / rank if rank else 0.0 for rank in ranks])


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
    """Mean over questions with a percentile bootstrap interval (SciPy). Fewer than two questions give NaN bounds."""
    mean = float(np.mean(values)) if len(values) else float("nan")
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values))
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean, len(values))
    bounds = stats.bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", rng=seed).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(values))


def paired_gain(after: NDArray[np.float64], before: NDArray[np.float64], seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean gain `after - before` over the same questions, bootstrapped over questions.

    `after` may be `[seeds, questions]`: seeds are then resampled too, so that the interval holds both sources of
    chance.
    """
    gains = np.atleast_2d(after) - before[None, :]
    rng = np.random.default_rng(seed)
    n_seeds, n = gains.shape
    # how often each seed and each question is drawn: the mean of a resample is a weighted mean of the table
    seeds_drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    questions_drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    draws = ((seeds_drawn @ gains) * questions_drawn).sum(1) / (n_seeds * n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(gains.mean()), float(low), float(high), n)
