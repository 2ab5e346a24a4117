"""Step 1: the reader learns to answer questions from the passages that the initial retriever
finds.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file
from torch import Tensor, nn

from ragkit.data.files import write_json, write_whole
from ragkit.data.passages import Passage, passage_text
from ragkit.data.questions import Corpus, Question
from ragkit.data.worlds import build_world
from ragkit.errors import ReaderError
from ragkit.models import device
from ragkit.models.fid import fitted, load_reader, reader_folder
from ragkit.models.index import search
from ragkit.models.reader import Prompt, Reader, note_trimmed
from ragkit.models.retriever import Retriever
from ragkit.settings import ReaderSettings, RetrieverSettings, WorldSet

__all__ = ["Lesson", "Lessons", "fine_tune", "make_step1", "reader_folder"]
CHECKPOINT, CHECKPOINT_EVERY = "checkpoint.pt", 50  # steps
METRICS, ROWS = "metrics.jsonl", 80  # of them in a whole training
WARM_UP, DECAY = 30, 0.3  # steps, share of the steps
TRAINING_WORLDS, TRAINING_ENTITIES, TRAINING_QUESTIONS = 8, 48, 576
SAME_KIND_SHARE = (
    0.3  # of the prompts: all passages state the same kind of fact of different entities
)

Draw = Callable[[random.Random], tuple[Question, list[Passage]]]
Report = Callable[[list[float], float], None]


@dataclass(frozen=True)
class Lesson:
    """A question with the passages that were found for it, its gold ones, and others of the same
    kind of fact.
    """

    question: Question
    found: list[Passage]
    gold: list[Passage]
    same_kind: list[Passage]


class Lessons:
    """What Step 1 learns from: questions with k passages, never those of the measured parts."""

    def __init__(self, lessons: Sequence[Lesson], k: int, gold_share: float) -> None:
        self.lessons, self.k, self.gold_share = lessons, k, gold_share

    def draw(self, rng: random.Random) -> tuple[Question, list[Passage]]:
        """A question and k passages in random order; a gold one is put among them in `gold_share`
        of the draws.
        """
        lesson = rng.choice(self.lessons)
        gold, same_kind, k = lesson.gold, lesson.same_kind, self.k
        if gold and len(same_kind) >= k - 1 and rng.random() < SAME_KIND_SHARE:
            passages = [rng.choice(gold), *rng.sample(same_kind, k - 1)]
        else:
            passages = list(lesson.found)
            missed = gold and not any(p in gold for p in passages)
            if missed and rng.random() < self.gold_share:
                passages[rng.randrange(len(passages))] = rng.choice(gold)
        return lesson.question, rng.sample(passages, len(passages))


def corpus_lessons(corpus: Corpus, candidates: Sequence[Sequence[int]], k: int) -> list[Lesson]:
    """The questions for distillation with the first k of their candidates."""
    by_kind: dict[str, set[int]] = {}
    for q in corpus.questions["distill"]:
        if q.relation:
            by_kind.setdefault(q.relation, set()).add(q.gold[0])

    def read(places: Sequence[int]) -> list[Passage]:
        return [corpus.passages[i] for i in places]

    lessons = []
    for q, row in zip(corpus.questions["distill"], candidates, strict=True):
        others = [i for i in sorted(by_kind.get(q.relation, ())) if i not in q.gold]
        gold = corpus.gold(q, list(row))
        lessons.append(Lesson(q, read(row[:k]), read(gold), read(others)))
    return lessons


def world_lessons(settings: WorldSet, retriever: Retriever, k: int, seed: int) -> list[Lesson]:
    """Lessons of freshly drawn training worlds, searched by the initial retriever."""
    lessons: list[Lesson] = []
    for number in range(TRAINING_WORLDS):
        corpus = training_world(settings, 1000 * seed + number)
        queries = retriever.encode([q.text for q in corpus.questions["distill"]])
        encoded = retriever.encode([passage_text(p) for p in corpus.passages], "passage")
        lessons += corpus_lessons(corpus, search(queries, encoded, k)[0].tolist(), k)
    return lessons


def training_world(settings: WorldSet, seed: int) -> Corpus:
    """A small redrawn world for Step 1: other names than the frozen one, no held-out wording."""
    sizes = {"entities": TRAINING_ENTITIES, "distill": TRAINING_QUESTIONS, "dev": 1, "test": 1}
    fresh = settings.model_copy(update={"seed": seed, **sizes})
    return build_world(fresh, reserved=False)


class Loss(nn.Module):
    """A reader as a module whose forward pass is its loss: what Accelerate wraps to share
    gradients.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.model, self.reader = reader.model, reader

    def forward(self, prompts: list[Prompt]) -> Tensor:
        """Sum of the prompts' losses."""
        return self.reader.losses(prompts).sum()


def adapted(model: Any, rank: int) -> Callable[[], Any]:
    """Freezes a model but for adapters of its linear layers (LoRA, Hu et al. 2021); returns what
    makes a merged copy.
    """
    from peft import LoraConfig, get_peft_model

    chosen = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    whole: Any = get_peft_model(model, chosen)
    return lambda: copy.deepcopy(whole).merge_and_unload()


def fine_tune(
    reader: Reader, draw: Draw, folder: Path, seed: int, report: Report = lambda losses, rate: None
) -> list[float]:
    """Teaches the reader to answer questions; returns the loss (nats a token) of each step.

    `draw` gives a question with its passages. The reader as it stands after each of `kept_steps`
    and at the end is kept in its `reader_folder`. A checkpoint lets a killed run go on with the
    same steps. The processes of a run share each batch, `at_once` prompts in a pass. `report` is
    called at the beginning and after each step with the losses so far and the learning rate. Raises
    ReaderError if the loss is not a number.
    """
    settings = reader.settings
    torch.manual_seed(seed)
    rank = settings.lora_rank
    merged = adapted(reader.model, rank) if rank else lambda: reader.model
    if settings.gradient_checkpointing:
        reader.model.activation_checkpointing_enable()
        reader.model.enable_input_require_grads()
    accelerator = device.accelerator(settings.dtype)
    trained = [p for p in reader.model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    loss_of, optimizer = accelerator.prepare(Loss(reader), adam)
    losses: list[float] = []
    trimmed = 0
    if (saved := device.load_checkpoint(folder / CHECKPOINT)) is not None:
        reader.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses, trimmed = saved["losses"], saved["trimmed"]

    def prompts_of(step: int) -> list[Prompt]:
        rng = random.Random(f"step 1 {seed} {step}")
        drawn = [draw(rng) for _ in range(settings.batch)]
        return [reader.prompt(q, found, q.answers[0]) for q, found in drawn]

    def keep(which: str) -> None:
        if device.is_main():
            kept = type(reader)(merged(), reader.tokenizer, settings, reader.style)
            kept.save(reader_folder(folder, which))
            reader.model.train()
        device.wait()

    report(losses, 0.0)
    reader.model.train()
    steps = range(len(losses), settings.steps)
    for step, prompts in zip(steps, device.ahead(steps, prompts_of), strict=True):
        trimmed += sum(p.trimmed > 0 for p in prompts)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * scale(step, settings.steps)
        loss = learn(loss_of, accelerator, prompts, settings.at_once)
        if not math.isfinite(loss):
            raise ReaderError(
                f"Step 1: the loss is not a number at step {step}. Lower reader.rate."
            )
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        done = step + 1
        if done in settings.kept_steps:
            keep(f"step {done}")
        report(losses, optimizer.param_groups[0]["lr"])
        if done % CHECKPOINT_EVERY == 0 and done < settings.steps:
            state = {"model": reader.model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"losses": losses, "trimmed": trimmed}
            device.save_checkpoint(folder / CHECKPOINT, state)
    keep("fine-tuned")
    note_trimmed(trimmed, settings.steps * settings.batch, folder)
    reader.model.eval()
    return losses


def scale(step: int, steps: int) -> float:
    """The learning rate's share of its peak: it rises over WARM_UP steps and falls over the last
    DECAY of them.
    """
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def learn(loss_of: Any, accelerator: Accelerator, prompts: list[Prompt], at_once: int) -> float:
    """The mean loss of a batch of prompts, its gradients added up pass by pass."""
    mine, weight = device.share(prompts)
    total, passes = 0.0, -(-len(prompts) // (device.size() * at_once))
    for number, places in enumerate(np.array_split(np.arange(len(mine)), passes)):
        part = [mine[i] for i in places]
        with accelerator.no_sync(loss_of) if number + 1 < passes else nullcontext():
            loss = loss_of(part or mine[:1]) * (weight / len(mine) if part else 0.0)
            accelerator.backward(loss)
        total += float(loss.detach())
    return device.mean_over_processes(total)


class Metrics:
    """Writes `metrics.jsonl` while a reader learns: rows of step, loss (mean since the row before),
    rate, seconds, left.

    `left` are the seconds to go by the pace so far. Rows beyond the place where a training goes on
    are dropped.
    """

    def __init__(self, folder: Path, settings: ReaderSettings) -> None:
        self.file, self.steps = folder / METRICS, settings.steps
        self.every = max(1, settings.steps // ROWS)
        self.looks = {*settings.kept_steps, settings.steps}
        self.rows: list[dict[str, float]] | None = None

    def __call__(self, losses: list[float], rate: float) -> None:
        """Called at the beginning and after each step, with the losses of all steps so far."""
        step, now = len(losses), time.monotonic()
        if self.rows is None:
            lines = self.file.read_text("utf8").splitlines() if self.file.is_file() else []
            whole = [json.loads(line) for line in lines if line.endswith("}")]  # a kill tears one
            self.rows = [row for row in whole if row["step"] <= step]
            before = self.rows[-1]["seconds"] if self.rows else 0.0
            self.began, self.first = now - before, (now, step)
            if device.is_main():
                write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
            return
        last = int(self.rows[-1]["step"]) if self.rows else 0
        if step <= last or (step % self.every and step not in self.looks):
            return
        pace = (now - self.first[0]) / (step - self.first[1])
        row = {"step": step, "loss": float(np.mean(losses[last:])), "rate": rate}
        row |= {"seconds": round(now - self.began, 2), "left": round(pace * (self.steps - step), 1)}
        self.rows.append(row)
        if device.is_main():
            with self.file.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")


def make_step1(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The reader after Step 1 and on the way; in an embedded world it learns from fresh worlds,
    else from the distill part.
    """
    chosen, k, seed = ReaderSettings(**settings["reader"]), settings["k"], settings["seed"]
    if settings["set"]["source"] == "world":
        retriever = Retriever.load(
            inputs["retriever"] / "model", RetrieverSettings(**settings["retriever"])
        )
        lessons = world_lessons(WorldSet(**settings["set"]), retriever, k, seed)
    else:
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        candidates = load_file(inputs["candidates"] / "candidates.safetensors")
        lessons = corpus_lessons(corpus, candidates["distill"].tolist(), k)
    reader = fitted(load_reader(chosen.model, chosen, to_train=True), inputs)
    draw = Lessons(lessons, k, chosen.gold_share).draw
    losses = fine_tune(reader, draw, folder, seed, Metrics(folder, chosen))
    if device.is_main():
        write_json(folder / "losses.json", losses)
        (folder / CHECKPOINT).unlink(missing_ok=True)
