"""Step 2: the retriever moves until its scores say what the target says."""

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

from ragkit.data.asked import Asked
from ragkit.data.files import write_arrays, write_json
from ragkit.data.passages import passage_text
from ragkit.data.questions import hits
from ragkit.distillation.log import LOOKS, Row, write_log
from ragkit.distillation.targets import target_of
from ragkit.errors import DistillError
from ragkit.models import device
from ragkit.models.index import DEPTH, Index
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings, DistillSettings, IndexSettings, RetrieverSettings

CHECKPOINT = "checkpoint.pt"
LossOf = Callable[[Tensor, Tensor], Tensor]


def kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(scores / temperature)) over questions `[questions, k]`.

    The target is detached: only the retriever learns.
    """
    target, logs = target.detach(), (scores / temperature).log_softmax(-1)
    return (torch.xlogy(target, target) - target * logs).sum(-1).mean()


def reverse_kl_loss(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Mean KL(softmax(scores / temperature) || target); as `kl_loss`, the other direction."""
    logs = (scores / temperature).log_softmax(-1)
    return (logs.exp() * (logs - target.detach().clamp(min=1e-6).log())).sum(-1).mean()


def emdr2_loss(logs: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """EMDR2 (Sachan et al. 2021): -mean over tokens of log sum_k p(token | q, d_k) p_RETR(d_k).

    `logs` `[questions, k, tokens]` are the reader's log-probabilities of the answer's tokens given
    each passage alone, NaN behind its end. Any one passage that explains the answer is enough.
    """
    there = logs[:, 0].isfinite()
    mixed = (logs.nan_to_num() + (scores / temperature).log_softmax(-1)[:, :, None]).logsumexp(1)
    return -((mixed * there).sum(1) / there.sum(1)).mean()


class Lesson(nn.Module):
    """A retriever and what it is taught, as a module whose forward pass is the loss of Step 2.

    `loss_of` gives the loss of the questions chosen `[batch]` from their scores `[batch, k]`. By
    side 'query' the passages' vectors stay those of the index; else they are made afresh.
    """

    def __init__(
        self, retriever: Retriever, asked: Asked, index: Index, side: str, loss_of: LossOf
    ) -> None:
        super().__init__()
        self.retriever, self.asked, self.index = retriever, asked, index
        self.stays, self.loss_of = side == "query", loss_of
        self.texts = [question.text for question in asked.questions]

    def forward(self, chosen: Tensor) -> Tensor:
        """The mean loss of the questions chosen."""
        chosen = chosen.cpu()  # where they are spread over several GPUs, they came to this one's
        queries = self.retriever([self.texts[i] for i in chosen]).float()
        vectors = self.vectors(self.asked.candidates[chosen.numpy()]).float()
        return self.loss_of(chosen, torch.einsum("qd,qkd->qk", queries, vectors))

    def vectors(self, places: NDArray[np.int64]) -> Tensor:
        """The vectors of passages `[batch, k, d]`."""
        if self.stays:
            return torch.from_numpy(self.index.take(places)).to(device.device())
        unique, back = np.unique(places, return_inverse=True)
        texts = [passage_text(self.asked.corpus.passages[i]) for i in unique]
        vectors = self.retriever(texts, "passage")
        return vectors[torch.from_numpy(back.reshape(places.shape)).to(device.device())]

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
    """Step 2: moves the lesson's retriever so that the loss falls.

    Returns the rows of its log in `folder`, one for the start and each LOOKS-th of an epoch: mean
    `loss` since the row before (NaN at the start), `hr` on dev, `seconds` since the start, `left`
    by the pace so far. CHECKPOINT in `folder` lets a killed run go on with the same steps; the
    caller removes it. Raises DistillError if the loss is not a number.
    """
    retriever = lesson.retriever
    accelerator = device.accelerator(retriever.settings.dtype)
    adam = torch.optim.AdamW(retriever.parameters(), lr=settings.rate, weight_decay=0.01)
    module, optimizer = accelerator.prepare(lesson, adam)
    kept = {"retriever": retriever, "optimizer": optimizer}
    if accelerator.scaler:  # of float16 on a GPU
        kept["scaler"] = accelerator.scaler
    batches: list[Tensor] = []
    for epoch in range(settings.epochs):
        order = torch.Generator().manual_seed(1000 * seed + epoch)
        batches += torch.randperm(len(lesson.texts), generator=order).split(settings.batch)
    ends = np.linspace(0, len(batches), LOOKS * settings.epochs + 1).round().astype(int)

    def step(batch: Tensor) -> float:
        chosen, weight = device.share(batch)
        loss = module(chosen) * weight
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(retriever.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return device.mean_over_processes(float(loss.detach()))

    if (saved := device.load_checkpoint(folder / CHECKPOINT)) is None:
        rows: list[Row] = [{"epoch": 0, "loss": math.nan, "hr": lesson.hr(), "seconds": 0.0}]
    else:
        for name, part in kept.items():
            part.load_state_dict(saved[name])
        rows = saved["rows"]
    write_log(folder, rows, device.is_main())
    done, before, began = len(rows) - 1, rows[-1]["seconds"], time.monotonic()
    for look in tqdm(range(done + 1, len(ends)), desc="Step 2", leave=False):
        row: Row = {"epoch": look / LOOKS}
        mine, losses = batches[ends[look - 1] : ends[look]], []
        retriever.train()
        for batch in mine:
            losses.append(step(batch))
            if not math.isfinite(losses[-1]):
                at = f"Step 2: the loss is not a number before epoch {row['epoch']:g}"
                row["stopped"] = f"{at}. Lower distill.rate."
                write_log(folder, [*rows, row], device.is_main())
                raise DistillError(row["stopped"])
        retriever.eval()
        row |= {"loss": float(np.mean(losses)) if losses else math.nan, "hr": lesson.hr()}
        passed = time.monotonic() - began
        left = passed * (len(ends) - 1 - look) / (look - done)
        row |= {"rate": settings.rate, "seconds": round(before + passed, 2), "left": round(left, 1)}
        rows.append(row)
        write_log(folder, rows, device.is_main())
        states = {name: part.state_dict() for name, part in kept.items()}
        device.save_checkpoint(folder / CHECKPOINT, {**states, "rows": rows})
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
    with HR@k on dev, and the retriever if `keep` is set."""
    distill = DistillSettings(**settings["distill"])
    asked = Asked.open(inputs, "distill", distill.questions, settings["k"])
    encoding = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(str(inputs["retriever"] / "model"), encoding)
    searched = IndexSettings(**settings["index"])
    index = Index.open(inputs["vectors"], searched, inputs["index"])
    look = load_file(inputs["look"] / "scores.safetensors") if "look" in inputs else None
    torch.manual_seed(settings["seed"])
    lesson = Lesson(retriever, asked, index, distill.side, loss_of(asked, look, settings))
    rows = train(lesson, distill, settings["seed"], folder)
    found = lesson.find("test", min(DEPTH, len(asked.corpus.passages)))
    if settings["keep"]:
        retriever.save(folder / "model")
    if device.is_main():
        write_arrays(folder / "ranking.safetensors", {"test": found})
        curve = [{name: row[name] for name in ("epoch", "loss", "hr")} for row in rows]
        write_json(folder / "curve.json", curve)
        (folder / CHECKPOINT).unlink()
