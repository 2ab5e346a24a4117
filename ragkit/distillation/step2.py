"""Step 2: the retriever moves until its scores say what the target says."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ragkit.data.corpus import Asked, hits, passage_text
from ragkit.data.files import write_jsonl
from ragkit.distillation.targets import Looks, read_looks, scores_of, target_of
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.index import DEPTH, Index
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings, DistillSettings, IndexSettings

METRICS = "metrics.jsonl"
LOOKS = 2  # times an epoch that Step 2 is looked at
LossOf = Callable[[Tensor, Tensor], Tensor]
Row = dict[str, float]


def kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(scores / temperature)), both `[questions, k]`; target detached."""
    target, logs = target.detach(), (scores / temperature).log_softmax(-1)
    return (torch.xlogy(target, target) - target * logs).sum(-1).mean()


def reverse_kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(softmax(scores / temperature) || target); as `kl_loss`, the other direction."""
    logs = (scores / temperature).log_softmax(-1)
    return (logs.exp() * (logs - target.detach().clamp(min=1e-6).log())).sum(-1).mean()


def emdr2_loss(logs: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """EMDR2 (Sachan et al. 2021): -mean over tokens of log sum_k p(token | q, d_k) p_RETR(d_k).
    `logs` `[questions, k, tokens]` are the reader's log-probabilities of the answer's tokens given
    each passage alone, NaN behind its end. Any one passage that explains the answer is enough."""
    there = logs[:, 0].isfinite()
    mixed = (logs.nan_to_num() + (scores / temperature).log_softmax(-1)[:, :, None]).logsumexp(1)
    return -((mixed * there).sum(1) / there.sum(1)).mean()


class Lesson(nn.Module):
    """A retriever and what it is taught, as a module whose forward pass is the loss of Step 2.
    `loss_of` gives the loss of the questions chosen `[batch]` from their scores `[batch, k]`. By
    side 'query' the passages' vectors stay those of the index; else they are made afresh."""

    def __init__(
        self, retriever: Retriever, asked: Asked, index: Index, side: str, loss_of: LossOf
    ) -> None:
        super().__init__()
        self.retriever, self.asked, self.index = retriever, asked, index
        self.stays, self.loss_of = side == "query", loss_of

    def forward(self, chosen: Tensor) -> Tensor:
        """The mean loss of the questions chosen."""
        chosen = chosen.cpu()  # among several processes it may have been moved to a GPU
        queries = self.retriever([self.asked.questions[i].text for i in chosen])
        places = self.asked.candidates[chosen.numpy()]
        if self.stays:
            vectors = torch.from_numpy(self.index.take(places)).to(queries.device)
        else:
            unique, back = np.unique(places, return_inverse=True)
            texts = [passage_text(self.asked.corpus.passages[i]) for i in unique]
            vectors = self.retriever(texts, "passage")[torch.from_numpy(back.reshape(places.shape))]
        scores = torch.einsum("qd,qkd->qk", queries.float(), vectors.float())
        return self.loss_of(chosen, scores)

    def find(self, part: str, depth: int) -> NDArray[np.int64]:
        """The first passages of each question of a part `[questions, depth]`."""
        corpus, encode = self.asked.corpus, self.retriever.encode
        queries = encode([q.text for q in corpus.questions[part]])
        if not self.stays:
            texts = list(map(passage_text, corpus.passages))
            return Index(encode(texts, "passage")).search(queries, depth)
        return device.agreed(self.index.search(queries, depth) if device.is_main() else None)

    def hr(self) -> float:
        """HR@k on dev."""
        k, corpus = self.asked.candidates.shape[1], self.asked.corpus
        found = self.find("dev", k)
        golds = corpus.golds(corpus.questions["dev"], found)
        return float(hits(found.tolist(), golds, k).mean())


def train(lesson: Lesson, settings: DistillSettings, seed: int, folder: Path) -> list[Row]:
    """Step 2: moves the lesson's retriever so that the loss falls. Returns the rows of METRICS in
    `folder`, one for the start and each LOOKS-th of an epoch: mean `loss` since the row before (NaN
    at the start), `hr` on dev, `rate`, `seconds`. RetrieverError if the loss is not a number."""
    retriever = lesson.retriever
    accelerator = device.accelerator(retriever.settings.dtype)
    adam = torch.optim.AdamW(retriever.parameters(), lr=settings.rate, weight_decay=0.01)
    module, optimizer = accelerator.prepare(lesson, adam)
    batches, count = list[Tensor](), len(lesson.asked.questions)
    for epoch in range(settings.epochs):
        order = torch.Generator().manual_seed(1000 * seed + epoch)
        batches += torch.randperm(count, generator=order).split(settings.batch)
    ends = np.linspace(0, len(batches), LOOKS * settings.epochs + 1).round().astype(int)
    rows, began = list[Row](), time.monotonic()
    for look in tqdm(range(len(ends)), desc="Step 2", leave=False):
        losses = []
        retriever.train()
        for batch in batches[ends[look - 1] : ends[look]] if look else []:
            chosen, weight = device.share(batch)
            loss = module(chosen) * weight
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(retriever.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(device.mean_over_processes(float(loss.detach())))
            if not math.isfinite(losses[-1]):
                at = f"Step 2: the loss is not a number before epoch {look / LOOKS:g}"
                raise RetrieverError(f"{at}. Lower distill.rate.")
        retriever.eval()
        row = {"epoch": look / LOOKS, "loss": float(np.mean(losses)) if losses else math.nan}
        seconds = round(time.monotonic() - began, 2)
        rows.append({**row, "hr": lesson.hr(), "rate": settings.rate, "seconds": seconds})
        if device.is_main():
            write_jsonl(folder / METRICS, rows)
    return rows


def loss_of(asked: Asked, looks: Looks, settings: Mapping[str, Any]) -> LossOf:
    """What Step 2 minimises: EMDR2's own loss, or the divergence from a target."""
    distill, target = DistillSettings(**settings["distill"]), settings["target"]
    theta = distill.retriever_temperature
    if target.endswith(" EMDR2"):
        logs = torch.from_numpy(looks["alone"]["answer_logs"]).to(device.device())
        return lambda chosen, scores: emdr2_loss(logs[chosen], scores, theta)
    scores = scores_of(target, looks, asked, AttentionSettings(**settings["attention"]))
    made = target_of(target, scores, distill, settings["shuffle_seed"])
    targets = torch.from_numpy(made).float().to(device.device())
    divergence = kl_loss if distill.direction == "target || retriever" else reverse_kl_loss
    return lambda chosen, scores: divergence(targets[chosen], scores, theta)


def make_step2(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Step 2 for a target and seed: `ranking.safetensors` of test, `curve.json` of HR@k on dev."""
    distill = DistillSettings(**settings["distill"])
    asked = Asked.open(inputs, "distill", distill.questions, settings["k"])
    retriever = Retriever.open(inputs, settings)
    index = Index.open(inputs["vectors"], IndexSettings(**settings["index"]), inputs["index"])
    torch.manual_seed(settings["seed"])
    loss = loss_of(asked, read_looks(inputs), settings)
    lesson = Lesson(retriever, asked, index, distill.side, loss)
    rows = train(lesson, distill, settings["seed"], folder)
    found = lesson.find("test", min(DEPTH, len(asked.corpus.passages)))
    curve = [{name: row[name] for name in ("epoch", "loss", "hr")} for row in rows]
    device.write(folder, {"ranking.safetensors": {"test": found}, "curve.json": curve})
