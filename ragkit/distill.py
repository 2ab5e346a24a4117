"""Distillation: targets over a question's passages, and Step 2, which moves the retriever towards them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor
from tqdm.auto import tqdm

from ragkit import RagkitError, checkpoint
from ragkit.metrics import holds_answer
from ragkit.profile import DistillSettings
from ragkit.retriever import Retriever

Floats = NDArray[np.float64]


class DistillError(RagkitError):
    """A target or a training step that cannot be used."""


def softmax(scores: Floats, temperature: float) -> Floats:
    """Softmax over passages of `scores / temperature` `[questions, k]`."""
    return torch.tensor(scores / temperature).softmax(-1).numpy()


def entropy(targets: Floats) -> float:
    """Mean entropy over questions as a share of log k: 1 is uniform, 0 is certain."""
    logs = np.log(np.clip(targets, 1e-300, 1))
    return float(-(targets * logs).sum(1).mean() / math.log(targets.shape[1]))


def standardise(scores: Floats) -> Floats:
    """Scores with mean 0 and deviation 1 within each question; a question with equal scores becomes zeros."""
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 1e-12, spread, 1.0)


def temperature_for(scores: Floats, share: float) -> float:
    """The temperature at which the softmax of `scores` has the wanted mean entropy (a share of log k); needs no labels."""
    if not np.isfinite(scores).all():
        raise DistillError("A target's scores are not all numbers: look at the reader that made them.")

    def gap(log_t: float) -> float:
        return entropy(softmax(scores, math.exp(log_t))) - share

    if gap(-8) >= 0:  # many questions with equal scores: even the sharpest target is flatter than asked for
        return math.exp(-8)
    return math.exp(brentq(gap, -8, 8))


def from_scores(scores: Floats, share: float) -> Floats:
    """A target from passage scores: standardised, at the temperature that gives it the wanted mean entropy."""
    standard = standardise(scores)
    return softmax(standard, temperature_for(standard, share))


def uniform(n: int, k: int) -> Floats:
    """Every passage the same: a teacher that knows nothing."""
    return np.full((n, k), 1 / k)


def oracle_scores(candidates: list[list[int]], golds: list[tuple[int, ...]]) -> Floats:
    """1 for gold passages, 0 for others: a teacher that knows all."""
    return np.array([[float(passage in gold) for passage in row] for row, gold in zip(candidates, golds, strict=True)])


def answer_string_scores(candidates: list[list[int]], texts: list[str], answers: list[tuple[str, ...]]) -> Floats:
    """1 for passages that contain an answer as text: what string matching alone would teach."""
    return np.array([[float(holds_answer(texts[p], golds)) for p in row] for row, golds in zip(candidates, answers, strict=True)])


def shuffled(targets: Floats, seed: int) -> Floats:
    """Each question's target permuted among its passages: the same entropy, no knowledge."""
    return np.random.default_rng(seed).permuted(targets, axis=1)


def kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(scores / temperature)) over questions `[questions, k]`; the target is detached."""
    target = target.detach()
    return (torch.xlogy(target, target) - target * (scores / temperature).log_softmax(-1)).sum(-1).mean()


def train_queries(
    retriever: Retriever,
    texts: list[str],
    vectors: Tensor,
    candidates: Tensor,
    targets: Tensor,
    settings: DistillSettings,
    seed: int,
    folder: Path,
    watch: Callable[[Retriever], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Step 2 on the query side: passage vectors `[passages, d]` stay as they are, so the index stays valid.

    `candidates` `[questions, k]` are indices into `vectors`, `targets` `[questions, k]` their distribution. Returns a row
    for each epoch: loss, and what `watch` says. The state after each epoch is kept in `folder` until the end, so a
    killed run goes on with the same steps.
    """
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=settings.rate, weight_decay=0.01)
    curve: list[dict[str, float]] = checkpoint.load(folder, retriever, [optimizer]) or []
    if watch and not curve:
        curve = [{"epoch": 0, "kl": float("nan"), **watch(retriever)}]
    for epoch in tqdm(range(len(curve) if not watch else len(curve) - 1, settings.epochs), desc="Step 2", leave=False):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        losses = []
        retriever.train()
        for chosen in order.split(settings.batch):
            queries = retriever([texts[i] for i in chosen])
            scores = torch.einsum("qd,qkd->qk", queries, vectors[candidates[chosen]])
            loss = kl_loss(targets[chosen], scores, settings.retriever_temperature)
            if not torch.isfinite(loss):
                raise DistillError(f"Step 2: the loss is not a number in epoch {epoch + 1}. Lower distill.rate.")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(retriever.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        retriever.eval()
        curve.append({"epoch": epoch + 1, "kl": float(np.mean(losses)), **(watch(retriever) if watch else {})})
        if epoch + 1 < settings.epochs:
            checkpoint.save(folder, retriever, [optimizer], curve)
    checkpoint.remove(folder)
    return curve
