"""Targets: scores of a question's passages become the distributions that Step 2 teaches."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import special
from scipy.optimize import brentq

from ragkit.data.corpus import Asked, Passage, Question
from ragkit.data.text import holds_answer
from ragkit.errors import DataError
from ragkit.settings import ROWS, AttentionSettings, DistillSettings, asset

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Scores = Mapping[str, NDArray[Any]]  # the arrays of `teacher.look`, LOOP's `loop`, or `answer_logs`
Looks = Mapping[str, Scores]  # what a target is made of, by role: an order of LOOKS, `heads`, ...

KNOWN = yaml.safe_load(asset("targets.yaml").read_text("utf8"))
TARGETS: dict[str, str] = KNOWN["main"]  # of the main table, and what each is
BY_ATTENTION: dict[str, dict[str, str]] = KNOWN["by_attention"]
LOOKS: dict[str, list[str]] = KNOWN["looks"]
SYSTEMS: dict[str, list[str]] = KNOWN["systems"]
READERS = ("off-the-shelf", "fine-tuned")  # the two regimes, asked by questions
CLOZES = ("off-the-shelf cloze", "fine-tuned cloze")  # the same readers, asked by clozes
ENCODER_DECODER = "encoder-decoder"  # fine-tuned too
UNTAUGHT = (READERS[0], CLOZES[0])  # before Step 1: one model, asked in two ways
SIGNALS = (*BY_ATTENTION, "perplexity", "LOOP", "EMDR2")  # a target is named 'reader signal'
ROLES = ("rank", "reversed", "shuffled", "empty", "heads", "alone", "loop")  # of looks


def read_looks(folders: Mapping[str, Path]) -> dict[str, Scores]:
    """The looks among some stages' folders, by role."""
    files = {role: folders[role] / "scores.safetensors" for role in ROLES if role in folders}
    return {role: load_file(file) for role, file in files.items()}


def teacher_of(target: str) -> tuple[str, str] | None:
    """The reader and the signal of a target; None for a control that needs no reader."""
    target = f"{READERS[1]} attention" if target == "shuffled" else target
    for signal in SIGNALS:
        if target.endswith(f" {signal}"):
            return target.removesuffix(f" {signal}"), signal
    return None


def attention_of(target: str, settings: AttentionSettings) -> AttentionSettings:
    """How the attention behind a target is read."""
    _, signal = teacher_of(target) or ("", "")
    return settings.model_copy(update=BY_ATTENTION.get(signal, {}))


def softmax(scores: Floats, temperature: float) -> Floats:
    """Softmax over passages of `scores / temperature` `[questions, k]`."""
    return special.softmax(scores / temperature, axis=-1)


def entropy(targets: Floats) -> float:
    """Mean entropy over questions as a share of log k: 1 is uniform, 0 is certain."""
    logs = np.log(np.clip(targets, 1e-300, 1))
    return float(-(targets * logs).sum(1).mean() / math.log(targets.shape[1]))


def top(scores: Floats) -> Floats:
    """The passage of most attention, as weights `[..., k]` that sum to 1: a tie shares them."""
    most = scores == scores.max(-1, keepdims=True)
    return most / most.sum(-1, keepdims=True)


def standardise(scores: Floats) -> Floats:
    """Scores with mean 0 and deviation 1 in each question; one with equal scores becomes zeros."""
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 1e-12, spread, 1.0)


def temperature_for(scores: Floats, share: float) -> float:
    """The temperature at which the softmax of standardised scores has the wanted mean entropy.
    `share` is that entropy as a share of log k, below 1. Where so many questions have equal scores
    that no temperature meets it: the sharpest. Raises DataError if a score is not a number."""
    if not np.isfinite(scores).all():
        raise DataError("A target's scores are not all numbers: look at the reader behind them.")

    def gap(log_t: float) -> float:
        return entropy(softmax(scores, math.exp(log_t))) - share

    return math.exp(-8 if gap(-8) >= 0 else brentq(gap, -8, 8))


def from_scores(scores: Floats, share: float, standard: bool = True) -> Floats:
    """A target at the wanted mean entropy, of scores as they are or `standard`ised by question."""
    given = standardise(scores) if standard else scores
    return softmax(given, temperature_for(given, share))


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


def by_head(look: Scores, settings: AttentionSettings) -> NDArray[Any]:
    """Scores by head `[questions, layers, heads, k]` under one choice of rows, norm and pooling."""
    picked = look["attention"][:, ROWS.index(settings.rows), int(settings.norm)]
    mean = settings.pooling == "mean"
    return picked / np.maximum(look["tokens"], 1)[:, None, None] if mean else picked


def shares_of_heads(look: Scores, settings: AttentionSettings) -> Floats:
    """Of the attention that each head pays to a question's passages, the mean share that falls on
    those that hold an answer as text `[layers, heads]`; over questions with such and others."""
    picked, holds = by_head(look, settings).astype(np.float64), look["holds"].astype(bool)
    telling = holds.any(1) & ~holds.all(1)
    share = (picked * holds[:, None, None]).sum(-1) / np.maximum(picked.sum(-1), 1e-12)
    return share[telling].mean(0) if telling.any() else np.zeros(share.shape[1:])


def chosen_heads(look: Scores, settings: AttentionSettings) -> Bools:
    """The `settings.chosen` heads of the greatest `shares_of_heads` `[layers, heads]`, by a look at
    dev: without gold passages. Source: QRHead and CoRe choose by gold ones."""
    shares = shares_of_heads(look, settings)
    best = np.argsort(-shares, axis=None, kind="stable")[: settings.chosen]
    return np.isin(np.arange(shares.size), best).reshape(shares.shape)


def attention_scores(
    look: Scores, settings: AttentionSettings, heads: Bools | None = None
) -> Floats:
    """Passage scores `[questions, k]` under one choice, or of chosen `heads` `[layers, heads]`."""
    picked = by_head(look, settings)
    if heads is not None:
        return picked[:, heads].mean(1).astype(np.float64)
    return over_layers(np.moveaxis(picked.mean(2), 1, -1), settings.layers)


def ordered(looks: Looks, settings: AttentionSettings) -> Floats:
    """Passage scores `[questions, k]` under `settings.order`: how the passages stood in the prompt,
    and what is done against the place's share in the attention. `rank`, `reversed` (best last),
    `shuffled`: one pass, as it is. `balanced`: the mean of the standardised scores in rank and
    reversed order. `calibrated`: minus the scores under an empty question (Zhao et al. 2021; ICR).
    `levelled`: one shuffled pass, minus each place's mean over all questions: label-free."""
    heads = chosen_heads(looks["heads"], settings) if settings.heads == "chosen" else None
    parts = [attention_scores(looks[one], settings, heads) for one in LOOKS[settings.order]]
    if settings.order == "balanced":
        return (standardise(parts[0]) + standardise(parts[1])) / 2
    if settings.order == "calibrated":
        return parts[0] - parts[1]
    if settings.order == "levelled":
        standard, places = standardise(parts[0]), looks["shuffled"]["places"]
        counts = np.bincount(places.ravel())
        return standard - (np.bincount(places.ravel(), standard.ravel()) / counts)[places]
    return parts[0]


def likelihood(scores: Scores) -> Floats:
    """Mean log-probability of the answer's tokens given each passage alone `[questions, k]`."""
    return np.nanmean(scores["answer_logs"], axis=2).astype(np.float64)


def scores_of(target: str, looks: Looks, asked: Asked, attention: AttentionSettings) -> Floats:
    """What a target is made of `[questions, k]`: a reader's scores, or a control's. `looks` are the
    stored scores of the target's reader, by role; empty for a control without one."""
    if target == "uniform":
        return np.zeros(asked.candidates.shape)
    if target == "oracle":
        golds = asked.corpus.golds(asked.questions, asked.candidates)
        return oracle_scores(asked.candidates.tolist(), golds)
    if target == "answer string":
        return holding(asked.questions, asked.passages).astype(np.float64)
    _, signal = teacher_of(target) or ("", "")
    if not looks or not signal:
        raise DataError(f"There is no target {target!r}, or its reader's scores are missing.")
    if signal in BY_ATTENTION:
        return ordered(looks, attention_of(target, attention))
    return looks["loop"]["loop"].astype(float) if signal == "LOOP" else likelihood(looks["alone"])


def holding(questions: Sequence[Question], found: Sequence[Sequence[Passage]]) -> Bools:
    """Which passages hold an answer to their question as text `[questions, k]`."""
    pairs = zip(found, questions, strict=True)
    return np.array([[holds_answer(p.text, q.answers) for p in row] for row, q in pairs])


def target_of(target: str, scores: Floats, distill: DistillSettings, shuffle_seed: int) -> Floats:
    """A named target's distributions over the candidates `[questions, k]`, each summing to 1.
    `scores` are what it is made of; `distill` says its mean entropy (see `temperature_for`)."""
    made = from_scores(scores, distill.entropy, distill.standardise)
    shuffle = np.random.default_rng(shuffle_seed)
    return shuffle.permuted(made, axis=1) if target == "shuffled" else made
