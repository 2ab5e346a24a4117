"""Targets: scores of a question's passages become the distributions that Step 2 teaches."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.optimize import brentq

from ragkit.data.corpus import Asked
from ragkit.data.text import holds_answer
from ragkit.errors import DataError
from ragkit.settings import POOLINGS, ROWS, AttentionSettings

Floats = NDArray[np.float64]
Scores = Mapping[str, NDArray[np.float32]]  # the arrays of `teacher.look`, or LOOP's under "loop"

READERS = ("off-the-shelf", "fine-tuned")
UNTAUGHT = ("off-the-shelf", "weaker prompt")  # before Step 1: one model, asked in two ways
SIGNALS = ("attention", "perplexity", "LOOP", "EMDR2")  # a target is named 'reader signal'
TARGETS = {
    "off-the-shelf attention": "the pretrained reader's attention (the paper's first regime)",
    "weaker prompt attention": "the same reader, asked with the prompt that it answers worse",
    "fine-tuned attention": "the attention of the reader after Step 1 (the paper's second regime)",
    "fine-tuned perplexity": "how likely that reader finds the answer given each passage alone",
    "uniform": "control: every passage the same",
    "shuffled": "control: the fine-tuned attention, permuted within each question",
    "answer string": "control: the passages that contain the answer as text",
    "oracle": "control: the gold passages",
}


def teacher_of(target: str) -> tuple[str, str] | None:
    """The reader and the signal of a target; None for a control that needs no reader."""
    reader, _, signal = ("fine-tuned attention" if target == "shuffled" else target).rpartition(" ")
    return (reader, signal) if signal in SIGNALS else None


def softmax(scores: Floats, temperature: float) -> Floats:
    """Softmax over passages of `scores / temperature` `[questions, k]`."""
    return special.softmax(scores / temperature, axis=-1)


def entropy(targets: Floats) -> float:
    """Mean entropy over questions as a share of log k: 1 is uniform, 0 is certain."""
    logs = np.log(np.clip(targets, 1e-300, 1))
    return float(-(targets * logs).sum(1).mean() / math.log(targets.shape[1]))


def standardise(scores: Floats) -> Floats:
    """Scores with mean 0 and deviation 1 in each question; one with equal scores becomes zeros."""
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 1e-12, spread, 1.0)


def temperature_for(scores: Floats, share: float) -> float:
    """The temperature at which the softmax of standardised scores has the wanted mean entropy.

    `share` is that entropy as a share of log k, below 1. Where so many questions have equal scores
    that no temperature meets it: the sharpest. Raises DataError if a score is not a number.
    """
    if not np.isfinite(scores).all():
        raise DataError("A target's scores are not all numbers: look at the reader behind them.")

    def gap(log_t: float) -> float:
        return entropy(softmax(scores, math.exp(log_t))) - share

    return math.exp(-8 if gap(-8) >= 0 else brentq(gap, -8, 8))


def from_scores(scores: Floats, share: float) -> Floats:
    """A target: scores standardised, at the temperature that gives the wanted mean entropy."""
    standard = standardise(scores)
    return softmax(standard, temperature_for(standard, share))


def oracle_scores(candidates: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> Floats:
    """1 for gold passages, 0 for others `[questions, k]`."""
    pairs = zip(candidates, golds, strict=True)
    return np.array([[float(place in gold) for place in row] for row, gold in pairs])


def over_layers(values: NDArray[np.float32], layers: str) -> Floats:
    """Values `[..., layers]` of the first, middle or last layer, or averaged over all."""
    if layers == "all":
        return values.mean(-1).astype(np.float64)
    place = {"first": 0, "middle": (values.shape[-1] - 1) // 2, "last": -1}[layers]
    return values[..., place].astype(np.float64)


def attention_scores(scores: Scores, settings: AttentionSettings) -> Floats:
    """Passage scores `[questions, k]` under one choice of rows, norm, pooling and layers."""
    row, pooling = ROWS.index(settings.rows), POOLINGS.index(settings.pooling)
    picked = scores["attention"][:, row, int(settings.norm), :, pooling]
    return over_layers(np.moveaxis(picked, 1, -1), settings.layers)


def likelihood(scores: Scores) -> Floats:
    """Mean log-probability of the answer's tokens given each passage alone `[questions, k]`."""
    return np.nanmean(scores["answer_logs"], axis=2).astype(np.float64)


def scores_of(
    target: str, look: Scores | None, asked: Asked, attention: AttentionSettings
) -> Floats:
    """What a target is made of `[questions, k]`: a reader's scores, or a control's.

    `look` holds the stored scores of the target's reader; None for a control that needs none.
    """
    if target == "uniform":
        return np.zeros(asked.candidates.shape)
    if target == "oracle":
        golds = asked.corpus.golds(asked.questions, asked.candidates)
        return oracle_scores(asked.candidates.tolist(), golds)
    if target == "answer string":
        pairs = zip(asked.passages, asked.questions, strict=True)
        return np.array([[float(holds_answer(p.text, q.answers)) for p in row] for row, q in pairs])
    _, signal = teacher_of(target) or ("", "")
    if look is None or not signal:
        raise DataError(f"There is no target {target!r}, or its reader's scores are missing.")
    if signal == "LOOP":
        return look["loop"].astype(np.float64)
    return attention_scores(look, attention) if signal == "attention" else likelihood(look)


def target_of(target: str, scores: Floats, share: float, shuffle_seed: int) -> Floats:
    """A named target's distributions over the candidates `[questions, k]`, each summing to 1.

    `scores` are what it is made of, `share` is its mean entropy (see `temperature_for`).
    """
    made = from_scores(scores, share)
    shuffle = np.random.default_rng(shuffle_seed)
    return shuffle.permuted(made, axis=1) if target == "shuffled" else made
