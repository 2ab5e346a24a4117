"""Step 1: the reader learns to answer from passages; never questions of the measured parts."""

import copy
import json
import logging
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import WEIGHTS_NAME

from ragkit.data.corpus import Asked, Pair, Passage, Question, found_first, passage_text
from ragkit.data.files import write_jsonl
from ragkit.data.worlds import build_world
from ragkit.errors import DataError, ReaderError
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.index import Index
from ragkit.models.reader import Prompt, Reader
from ragkit.models.retriever import Retriever
from ragkit.settings import ReaderSettings, WorldSet

log = logging.getLogger(__name__)
WORLDS = 8  # redrawn to learn from: other names than the measured one, no held-out wording
WORLD: dict[str, Any] = {"entities": 48, "distill": 576, "dev": 1, "test": 1}
SAME_KIND_SHARE = 0.3  # of the draws: all passages state one kind of fact of different entities
MOST = 50  # steps between two checkpoints; in a short training about a ninth of all
METRICS, ROWS = "metrics.jsonl", 80  # of them in a whole training
WARM_UP, DECAY = 30, 0.3  # steps, share of the steps


@dataclass(frozen=True)
class Example:
    """A question, the k passages found for it, its gold ones, others of the same kind of fact."""

    question: Question
    found: list[Passage]
    gold: list[Passage]
    same_kind: list[Passage]

    def draw(self, gold_share: float, rng: random.Random) -> Pair:
        """k passages in random order; if none is gold, one is put in, in `gold_share` of draws."""
        passages, others = list(self.found), len(self.found) - 1
        if self.gold and len(self.same_kind) >= others and rng.random() < SAME_KIND_SHARE:
            passages = [rng.choice(self.gold), *rng.sample(self.same_kind, others)]
        elif self.gold and not any(p in self.gold for p in passages) and rng.random() < gold_share:
            passages[rng.randrange(len(passages))] = rng.choice(self.gold)
        return self.question, rng.sample(passages, len(passages))


def drawn(examples: list[Example], settings: ReaderSettings, rng: random.Random) -> Pair:
    """A question with its passages; in the settings' shares with another's answer or passages."""
    question, passages = rng.choice(examples).draw(settings.gold_share, rng)
    if settings.label_noise and rng.random() < settings.label_noise:
        question = replace(question, answers=rng.choice(examples).question.answers)
    if settings.wrong_passages and rng.random() < settings.wrong_passages:
        passages = rng.choice(examples).draw(settings.gold_share, rng)[1]
    return question, passages


def examples_of(asked: Asked, k: int) -> list[Example]:
    """The questions asked with the first k of their candidates."""
    passages, by_kind, examples = asked.corpus.passages, defaultdict[str, set[int]](set), []
    for q in asked.questions:
        by_kind[q.relation] |= set(q.gold[:1]) if q.relation else set()
    for q, row in zip(asked.questions, asked.candidates.tolist(), strict=True):
        others = sorted(by_kind[q.relation] - set(q.gold))
        places = (row[:k], asked.corpus.gold(q, row), others)
        examples.append(Example(q, *([passages[i] for i in some] for some in places)))
    return examples


class Loss(nn.Module):
    """A reader as a module whose forward pass is the mean of its prompts' losses."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.model, self.reader, self.passes = reader.model, reader, list[float]()

    def forward(self, prompts: list[Prompt]) -> tuple[Tensor]:
        loss = self.reader.losses(prompts).mean()
        self.passes.append(float(loss.detach()))  # of one step
        return (loss,)


class Step1(Trainer):
    """transformers' Trainer, whose checkpoints may hold tied weights."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(exist_ok=True)
            weights = self.accelerator.get_state_dict(self.model)
            torch.save(weights, Path(output_dir) / WEIGHTS_NAME)


class Progress(TrainerCallback):
    """Follows a training: a row a step in the trainer's log, which its checkpoints hold, some of
    them in METRICS, and the readers that are kept. A row holds step, `own` loss, loss (mean since
    the row before in METRICS), rate, seconds, and left: seconds to go by the pace so far."""

    def __init__(self, loss: Loss, folder: Path, keep: Callable[[str], None]) -> None:
        self.loss, self.keep, self.file = loss, keep, folder / METRICS
        self.settings = settings = loss.reader.settings
        self.kept = {*settings.kept_steps, settings.steps}
        self.marks = {*range(0, settings.steps, max(1, settings.steps // ROWS)), *self.kept}
        self.clock = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, steps, history = state.global_step, self.settings.steps, state.log_history
        own = device.mean_over_processes(float(np.mean(self.loss.passes)))
        self.loss.passes.clear()
        if not np.isfinite(own):
            told = f"Step 1: the loss is not a number at step {step - 1}"
            raise ReaderError(f"{told}. Lower reader.rate.")
        began, self.clock = self.clock, time.monotonic()
        seconds = self.clock - began + (history[-1]["seconds"] if history else 0.0)
        before = max(mark for mark in self.marks if mark < step)  # 0, the start, is one
        loss = float(np.mean([*(row["own"] for row in history[before:]), own]))
        row = {"step": step, "loss": loss, "rate": self.settings.peak * scale(step - 1, steps)}
        row |= {"seconds": round(seconds, 3), "left": round(seconds / step * (steps - step), 1)}
        history.append({**row, "own": own})
        if step in self.kept:
            self.keep("fine-tuned" if step == steps else f"step-{step}")
        if step in self.marks and device.is_main():
            write_jsonl(self.file, (row for row in history if row["step"] in self.marks))
        if step == steps:
            control.should_save = False  # it is done


def scale(step: int, steps: int) -> float:
    """The learning rate's share of its peak: it rises over WARM_UP steps, falls over the last."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def arguments(settings: ReaderSettings, folder: Path, seed: int) -> TrainingArguments:
    """Of a training in which every step sees `batch` prompts, at most `at_once` in a pass."""
    mine, odd = divmod(settings.batch, device.size())
    if odd:
        told = f"a multiple of the {device.size()} processes, to share it evenly"
        raise ReaderError(f"reader.batch is {settings.batch}. Make it {told}.")
    in_a_pass = max(n for n in range(1, min(mine, settings.at_once) + 1) if mine % n == 0)
    given: dict[str, Any] = {"max_steps": settings.steps, "train_sampling_strategy": "sequential"}
    given |= {"per_device_train_batch_size": in_a_pass, "remove_unused_columns": False}
    given |= {"gradient_accumulation_steps": mine // in_a_pass, "ddp_find_unused_parameters": True}
    given |= {"bf16": settings.dtype == "bfloat16", "fp16": settings.dtype == "float16"}
    given |= {"save_steps": min(MOST, 1 + settings.steps // 9), "save_total_limit": 1, "seed": seed}
    given |= {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    AcceleratorState._reset_state()  # models may differ in precision; the processes stay connected
    made = TrainingArguments(str(folder), use_cpu=device.device().type == "cpu", **given)
    made._n_gpu = 1  # one a process; else it would share the prompts over all that it sees
    return made


def fine_tune(
    reader: Reader, draw: Callable[[random.Random], Pair], folder: Path, seed: int
) -> None:
    """Teaches the reader to answer questions; its loss is in nats a token. `draw` gives a question
    with its passages. The reader as it stands after each of `kept_steps` is kept in `step-N`, at
    the end in `fine-tuned`, the log in METRICS. A checkpoint lets a killed run go on with the same
    steps. ReaderError if the loss is no number, or the processes cannot share a batch."""
    settings, rank = reader.settings, reader.settings.lora_rank
    torch.manual_seed(seed)
    if rank:  # adapters in the linear layers learn, no other weight
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        adapted: Any = get_peft_model(reader.model, lora)
    if settings.gradient_checkpointing:
        reader.model.activation_checkpointing_enable()
        reader.model.enable_input_require_grads()
    asked: list[Any] = []  # of all steps in a row: the same in every process, and after a kill
    for step in range(settings.steps):
        rng = random.Random(f"step 1 {seed} {step}")
        asked += [draw(rng) for _ in range(settings.batch)]

    def prompts(some: list[Pair]) -> dict[str, list[Prompt]]:
        if settings.answer == "found":
            some = [(found_first(q, found), found) for q, found in some]
        return {"prompts": [reader.prompt(q, found, q.answers[0]) for q, found in some]}

    def keep(name: str) -> None:
        if device.is_main():
            whole = copy.deepcopy(adapted).merge_and_unload() if rank else reader.model
            for part in (whole, reader.tokenizer):
                part.save_pretrained(folder / name)
        device.agreed()

    whole: dict[int, str] = {}  # checkpoints by their steps: its state is written last
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):
            whole[json.loads(state.read_text("utf8"))["global_step"]] = str(state.parent)
    if newest := whole[max(whole)] if whole else None:
        log.info("going on from the checkpoint %s", newest)
    loss = Loss(reader)
    learnt = [weight for weight in loss.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, settings.peak, betas=(0.9, 0.98), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step, settings.steps))
    trainer = Step1(
        model=loss,
        args=arguments(settings, folder, seed),
        train_dataset=asked,
        data_collator=prompts,
        optimizers=(optimizer, rates),
        callbacks=[Progress(loss, folder, keep)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=device.agreed(newest))
    reader.model.eval()
    if device.is_main():
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)


def make_step1(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The reader after Step 1 and on the way. In an embedded world it learns from fresh worlds that
    the initial retriever searches; on real text from the questions of the distill part that stand
    behind those that it will teach from. DataError if there are none."""
    chosen, k, seed = settings["set"], settings["k"], settings["seed"]
    examples = list[Example]()
    if chosen["source"] == "world":
        retriever = Retriever.open(inputs, settings)
        for number in range(WORLDS):
            redrawn = WorldSet(**chosen | WORLD | {"seed": 1000 * seed + number})
            corpus = build_world(redrawn, reserved=False)
            questions = corpus.questions["distill"]
            queries = retriever.encode([q.text for q in questions])
            passages = retriever.encode([passage_text(p) for p in corpus.passages], "passage")
            asked = Asked(corpus, questions, Index(passages).search(queries, k))
            examples += examples_of(asked, k)
    else:
        asked, taught = Asked.open(inputs, "distill"), settings["questions"]
        own = replace(asked, questions=asked.questions[taught:])
        if not own.questions:
            told = "Step 1 would learn from the questions that it then teaches from. Make its"
            more = f"{told} distill greater than distill.questions ({taught})."
            raise DataError(f"set {chosen['name']}: {more}")
        examples = examples_of(replace(own, candidates=asked.candidates[taught:]), k)
    reader = open_reader(inputs, settings, to_train=True)
    fine_tune(reader, lambda rng: drawn(examples, reader.settings, rng), folder, seed)
