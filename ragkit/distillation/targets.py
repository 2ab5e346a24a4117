"""Distillation: targets over a question's passages, and Step 2, which moves the retriever towards them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BatchEncoding

from ragkit.data.passages import Passage
from ragkit.errors import DistillError
from ragkit.indicators.metrics import holds_answer
from ragkit.models import checkpoint
from ragkit.models import device as fleet
from ragkit.models.retriever import Retriever
from ragkit.profile import DistillSettings

Floats = NDArray[np.float64]
LOOKS = 2  # times an epoch that Step 2 is looked at


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
        raise DistillError(
            "A target's scores are not all numbers: look at the reader that made them."
        )

    def gap(log_t: float) -> float:
        return entropy(softmax(scores, math.exp(log_t))) - share

    if (
        gap(-8) >= 0
    ):  # many questions with equal scores: even the sharpest target is flatter than asked for
        return math.exp(-8)
    return math.exp(brentq(gap, -8, 8))


def from_scores(scores: Floats, share: float) -> Floats:
    """A target from passage scores: standardised, at the temperature that gives it the wanted mean entropy."""
    standard = standardise(scores)
    return softmax(standard, temperature_for(standard, share))


def uniform(n: int, k: int) -> Floats:
    """Every passage the same: a teacher that knows nothing."""
    return np.full((n, k), 1 / k)


def oracle_scores(candidates: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> Floats:
    """1 for gold passages, 0 for others: a teacher that knows all."""
    return np.array(
        [
            [float(passage in gold) for passage in row]
            for row, gold in zip(candidates, golds, strict=True)
        ]
    )


def answer_string_scores(
    candidates: Sequence[Sequence[int]],
    passages: Sequence[Passage],
    answers: Sequence[Sequence[str]],
) -> Floats:
    """1 for passages that contain an answer as text: what string matching alone would teach."""
    return np.array(
        [
            [float(holds_answer(passages[p].text, golds)) for p in row]
            for row, golds in zip(candidates, answers, strict=True)
        ]
    )


def shuffled(targets: Floats, seed: int) -> Floats:
    """Each question's target permuted among its passages: the same entropy, no knowledge."""
    return np.random.default_rng(seed).permuted(targets, axis=1)


def kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(scores / temperature)) over questions `[questions, k]`; the target is detached."""
    target = target.detach()
    return (
        (torch.xlogy(target, target) - target * (scores / temperature).log_softmax(-1))
        .sum(-1)
        .mean()
    )


def reverse_kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(softmax(scores / temperature) || target) over questions `[questions, k]`; the target is detached."""
    logs = (scores / temperature).log_softmax(-1)
    return (logs.exp() * (logs - target.detach().clamp(min=1e-6).log())).sum(-1).mean()


def emdr2_loss(logs: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """EMDR2 (Sachan et al. 2021): minus the mean over answer tokens of log sum_k p(token | question, passage k) p_RETR(k).

    `logs` `[questions, k, tokens]` are the reader's log-probabilities of the answer's tokens given each passage alone, NaN
    behind the answer's end. Unlike a fixed target it asks for any one passage that explains the answer.
    """
    there = logs[:, 0].isfinite()
    mixed = (logs.nan_to_num() + (scores / temperature).log_softmax(-1)[:, :, None]).logsumexp(1)
    return -((mixed * there).sum(1) / there.sum(1)).mean()


Loss = Callable[
    [Tensor, Tensor], Tensor
]  # of the questions chosen `[batch]` and the retriever's scores `[batch, k]`
Report = Callable[
    [list[dict[str, float]], list[float]], None
]  # of the curve so far and the losses since its last row


class Lesson(nn.Module):
    """A retriever as a module whose forward pass is its loss: what Accelerate wraps, so that gradients are shared and precision is mixed."""

    def __init__(
        self, retriever: Retriever, vectors_of: Callable[[Retriever, Tensor], Tensor], loss_of: Loss
    ) -> None:
        super().__init__()
        self.retriever, self.vectors_of, self.loss_of = retriever, vectors_of, loss_of

    def forward(self, tokens: BatchEncoding, chosen: Tensor) -> Tensor:
        """The loss of the questions chosen `[batch]`, given as tokens."""
        scores = torch.einsum(
            "qd,qkd->qk",
            self.retriever(tokens).float(),
            self.vectors_of(self.retriever, chosen).float(),
        )
        return self.loss_of(chosen, scores)


def train(
    retriever: Retriever,
    texts: list[str],
    vectors_of: Callable[[Retriever, Tensor], Tensor],
    loss_of: Loss,
    settings: DistillSettings,
    seed: int,
    folder: Path,
    watch: Callable[[Retriever], dict[str, float]],
    report: Report = lambda curve, losses: None,
) -> list[dict[str, float]]:
    """Step 2: moves the retriever so that the loss of its scores falls.

    `vectors_of` gives the candidates' vectors `[batch, k, d]` of the questions chosen `[batch]`: stored ones train the query
    side only, and the index stays valid; fresh ones train both. Returns a row for the start and for each LOOKS-th of an epoch:
    mean loss, and what `watch` says. The state after each is kept in `folder` until the end, so a killed run goes
    on with the same steps. The processes of a run share each batch. `report` is called where it begins, after each step and at each
    look (see `ragkit.training_log`).
    """
    accelerator = fleet.accelerator(retriever.settings.dtype)
    lesson, optimizer = accelerator.prepare(
        Lesson(retriever, vectors_of, loss_of),
        torch.optim.AdamW(retriever.parameters(), lr=settings.rate, weight_decay=0.01),
    )
    epochs = (
        torch.randperm(len(texts), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for epoch in range(settings.epochs)
    )
    batches = [chosen for order in epochs for chosen in order.split(settings.batch)]
    ends = np.linspace(0, len(batches), LOOKS * settings.epochs + 1).round().astype(int)

    def tokens_of(batch: Tensor) -> BatchEncoding:
        return retriever.tokens([texts[i] for i in fleet.share(batch)[0]])

    curve: list[dict[str, float]] = checkpoint.load(folder, retriever, [optimizer]) or [
        {"epoch": 0, "loss": float("nan"), **watch(retriever)}
    ]
    report(curve, [])
    for look in tqdm(range(len(curve) - 1, len(ends) - 1), desc="Step 2", leave=False):
        losses = []
        retriever.train()
        part = batches[ends[look] : ends[look + 1]]
        for (chosen, weight), tokens in zip(
            map(fleet.share, part), fleet.ahead(part, tokens_of), strict=True
        ):
            loss = lesson(tokens, chosen) * weight
            accelerator.backward(loss)
            losses.append(fleet.mean_over_processes(float(loss.detach())))
            if not math.isfinite(losses[-1]):
                raise DistillError(
                    f"Step 2: the loss is not a number in epoch {look // LOOKS + 1}. Lower distill.rate."
                )
            accelerator.clip_grad_norm_(retriever.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            report(curve, losses)
        fleet.done["questions"] += sum(map(len, part)) if fleet.is_main() else 0
        retriever.eval()
        curve.append(
            {
                "epoch": (look + 1) / LOOKS,
                "loss": float(np.mean(losses)) if losses else float("nan"),
                **watch(retriever),
            }
        )
        report(curve, [])
        if look + 2 < len(ends):
            checkpoint.save(folder, retriever, [optimizer], curve)
    checkpoint.remove(folder)
    return curve
