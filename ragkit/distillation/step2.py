"""Step 2: the retriever moves until its scores say what the target says (kl_loss, train)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BatchEncoding

from ragkit.data.files import write_arrays, write_json
from ragkit.data.passages import passage_text
from ragkit.data.questions import hits
from ragkit.distillation.asked import Asked
from ragkit.distillation.log import LOOKS, Row, write_log
from ragkit.distillation.targets import target_of
from ragkit.errors import DistillError
from ragkit.models import device
from ragkit.models.index import DEPTH, open_index, search
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings, DistillSettings, IndexSettings, RetrieverSettings

CHECKPOINT = "checkpoint.pt"
LossOf = Callable[[Tensor, Tensor], Tensor]
VectorsOf = Callable[[Retriever, Tensor], Tensor]


def kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(scores / temperature)) over questions `[questions, k]`.

    The target is detached: only the retriever learns.
    """
    target = target.detach()
    logs = (scores / temperature).log_softmax(-1)
    return (torch.xlogy(target, target) - target * logs).sum(-1).mean()


def reverse_kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(softmax(scores / temperature) || target); as `kl_loss`, the other direction."""
    logs = (scores / temperature).log_softmax(-1)
    return (logs.exp() * (logs - target.detach().clamp(min=1e-6).log())).sum(-1).mean()


def emdr2_loss(logs: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """EMDR2 (Sachan et al. 2021): -mean over tokens of log sum_k p(token | q, d_k) p_RETR(d_k).

    `logs` `[questions, k, tokens]` are the reader's log-probabilities of the answer's tokens given
    each passage alone, NaN behind the answer's end. Unlike a fixed target it asks for any one
    passage that explains the answer.
    """
    there = logs[:, 0].isfinite()
    mixed = (logs.nan_to_num() + (scores / temperature).log_softmax(-1)[:, :, None]).logsumexp(1)
    return -((mixed * there).sum(1) / there.sum(1)).mean()


class RetrieverLoss(nn.Module):
    """A retriever as a module whose forward pass is its loss: what Accelerate wraps for training.

    Of the questions chosen `[batch]`, `vectors_of` gives the candidates' vectors `[batch, k, d]`
    (stored ones train the query side only, fresh ones both), `loss_of` the loss of the scores
    `[batch, k]`.
    """

    def __init__(self, retriever: Retriever, vectors_of: VectorsOf, loss_of: LossOf) -> None:
        super().__init__()
        self.retriever, self.vectors_of, self.loss_of = retriever, vectors_of, loss_of

    def forward(self, tokens: BatchEncoding, chosen: Tensor) -> Tensor:
        """The mean loss of the questions chosen, given as tokens."""
        queries = self.retriever(tokens).float()
        vectors = self.vectors_of(self.retriever, chosen).float()
        return self.loss_of(chosen, torch.einsum("qd,qkd->qk", queries, vectors))


def train(
    retriever_loss: RetrieverLoss,
    texts: list[str],
    settings: DistillSettings,
    seed: int,
    folder: Path,
    watch: Callable[[Retriever], dict[str, float]],
) -> list[Row]:
    """Step 2: moves the retriever so that the loss of its scores falls, for questions as `texts`.

    Returns the rows of its log in `folder`, one for the start and for each LOOKS-th of an epoch:
    `epoch`, mean `loss` since the row before (NaN at the start), what `watch` says, `rate`,
    `seconds` since the start, `left` by the pace so far. CHECKPOINT in `folder` lets a killed run
    go on with the same steps; the caller removes it. The processes of a run share each batch.
    Raises DistillError if the loss is not a number.
    """
    retriever = retriever_loss.retriever
    accelerator = device.accelerator(retriever.settings.dtype)
    adam = torch.optim.AdamW(retriever.parameters(), lr=settings.rate, weight_decay=0.01)
    module, optimizer = accelerator.prepare(retriever_loss, adam)
    batches: list[Tensor] = []
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        batches += torch.randperm(len(texts), generator=generator).split(settings.batch)
    ends = np.linspace(0, len(batches), LOOKS * settings.epochs + 1).round().astype(int)

    def tokens_of(batch: Tensor) -> BatchEncoding:
        return retriever.tokens([texts[i] for i in device.share(batch)[0]])

    if (saved := device.load_checkpoint(folder / CHECKPOINT)) is None:
        rows: list[Row] = [{"epoch": 0, "loss": math.nan, **watch(retriever), "seconds": 0.0}]
    else:
        retriever.load_state_dict(saved["retriever"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler:  # of float16 on a GPU
            accelerator.scaler.load_state_dict(saved["scaler"])
        rows = saved["rows"]
    write_log(folder, rows, device.is_main())
    done, before, began = len(rows) - 1, rows[-1]["seconds"], time.monotonic()
    for look in tqdm(range(done + 1, len(ends)), desc="Step 2", leave=False):
        part, losses = batches[ends[look - 1] : ends[look]], []
        retriever.train()
        for batch, tokens in zip(part, device.ahead(part, tokens_of), strict=True):
            chosen, weight = device.share(batch)
            loss = module(tokens, chosen) * weight
            accelerator.backward(loss)
            losses.append(device.mean_over_processes(float(loss.detach())))
            if not math.isfinite(losses[-1]):
                why = f"Step 2: the loss is not a number before epoch {look / LOOKS:g}. "
                stopped = {"epoch": look / LOOKS, "stopped": why + "Lower distill.rate."}
                write_log(folder, [*rows, stopped], device.is_main())
                raise DistillError(stopped["stopped"])
            accelerator.clip_grad_norm_(retriever.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        retriever.eval()
        measured = {"loss": float(np.mean(losses)) if losses else math.nan, **watch(retriever)}
        passed = time.monotonic() - began
        left = passed * (len(ends) - 1 - look) / (look - done)
        times = {"seconds": round(before + passed, 2), "left": round(left, 1)}
        rows.append({"epoch": look / LOOKS, **measured, "rate": settings.rate, **times})
        write_log(folder, rows, device.is_main())
        state = {"retriever": retriever.state_dict(), "optimizer": optimizer.state_dict()}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        device.save_checkpoint(folder / CHECKPOINT, {**state, "scaler": scaler, "rows": rows})
    return rows


def loss_of(
    asked: Asked, look: Mapping[str, NDArray[np.float32]] | None, settings: Mapping[str, Any]
) -> LossOf:
    """What Step 2 minimises: EMDR2's own loss, or the divergence from a target."""
    distill, target = DistillSettings(**settings["distill"]), settings["target"]
    theta = distill.retriever_temperature
    if target.endswith(" EMDR2") and look is not None:
        logs = torch.from_numpy(look["answer_logs"]).to(device.device())
        return lambda chosen, scores: emdr2_loss(logs[chosen], scores, theta)
    attention = AttentionSettings(**settings["attention"])
    made = target_of(target, look, asked, attention, distill.entropy, settings["shuffle_seed"])
    targets = torch.from_numpy(made).float().to(device.device())
    divergence = kl_loss if distill.direction == "target || retriever" else reverse_kl_loss
    return lambda chosen, scores: divergence(targets[chosen], scores, theta)


def make_step2(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Step 2 for one target and seed: `ranking.safetensors` of the test questions, `curve.json`
    with HR@k on dev, and the retriever if `keep` is set.
    """
    k, distill = settings["k"], DistillSettings(**settings["distill"])
    asked = Asked.open(inputs, distill.questions, k)
    encoding = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(str(inputs["retriever"] / "model"), encoding)
    index = open_index(inputs["vectors"], inputs["index"], IndexSettings(**settings["index"]))
    look = load_file(inputs["look"] / "scores.safetensors") if "look" in inputs else None
    corpus, query_side = asked.corpus, distill.side == "query"

    def vectors_of(now: Retriever, chosen: Tensor) -> Tensor:
        places = asked.candidates[chosen.numpy()]
        if query_side:
            return torch.from_numpy(index.vectors.take(places)).to(device.device())
        unique, back = np.unique(places, return_inverse=True)
        vectors = now([passage_text(corpus.passages[i]) for i in unique])
        return vectors[torch.from_numpy(back.reshape(places.shape)).to(device.device())]

    def find(now: Retriever, part: str, depth: int) -> NDArray[np.int64]:
        queries = now.encode([q.text for q in corpus.questions[part]])
        if query_side:
            return device.agreed(index.search(queries, depth)[0] if device.is_main() else None)
        return search(queries, now.encode(list(map(passage_text, corpus.passages))), depth)[0]

    def watch(now: Retriever) -> dict[str, float]:
        found = find(now, "dev", k)
        golds = corpus.golds(corpus.questions["dev"], found)
        return {"hr": float(hits(found.tolist(), golds, k).mean())}

    torch.manual_seed(settings["seed"])
    retriever_loss = RetrieverLoss(retriever, vectors_of, loss_of(asked, look, settings))
    texts = [q.text for q in asked.questions]
    rows = train(retriever_loss, texts, distill, settings["seed"], folder, watch)
    found = find(retriever, "test", min(DEPTH, len(corpus.passages)))
    if settings["keep"]:
        retriever.save(folder / "model")
    if device.is_main():
        write_arrays(folder / "ranking.safetensors", {"test": found})
        curve = [{name: row[name] for name in ("epoch", "loss", "hr")} for row in rows]
        write_json(folder / "curve.json", curve)
        (folder / CHECKPOINT).unlink()
