"""Step 1: the reader learns to answer questions from the passages that the retriever finds."""

import copy
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ragkit.data.files import write_json, write_whole
from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.errors import ReaderError
from ragkit.models import device
from ragkit.models.fid import fitted, load_reader, reader_folder
from ragkit.models.lessons import Lessons, corpus_lessons, world_lessons
from ragkit.models.reader import Prompt, Reader, note_trimmed
from ragkit.models.retriever import Retriever
from ragkit.settings import ReaderSettings, RetrieverSettings, WorldSet

log = logging.getLogger(__name__)
CHECKPOINT_EVERY = 50  # steps
METRICS, ROWS = "metrics.jsonl", 80  # of them in a whole training
WARM_UP, DECAY = 30, 0.3  # steps, share of the steps

Draw = Callable[[random.Random], tuple[Question, list[Passage]]]


class Prompts(Dataset[Prompt]):
    """The prompts of all steps in a row: the same ones in every process, and after a kill."""

    def __init__(self, reader: Reader, draw: Draw, seed: int) -> None:
        self.reader, self.draw, self.seed = reader, draw, seed
        self.step, self.prompts = -1, list[Prompt]()

    def __len__(self) -> int:
        return self.reader.settings.steps * self.reader.settings.batch

    def __getitem__(self, place: int) -> Prompt:
        step, i = divmod(place, self.reader.settings.batch)
        if step != self.step:
            rng = random.Random(f"step 1 {self.seed} {step}")
            drawn = [self.draw(rng) for _ in range(self.reader.settings.batch)]
            self.prompts = [self.reader.prompt(q, found, q.answers[0]) for q, found in drawn]
            self.step = step
        return self.prompts[i]


class Loss(nn.Module):
    """A reader as a module whose forward pass is the mean of its prompts' losses."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.model, self.reader = reader.model, reader
        self.passes: list[tuple[float, int]] = []  # of a step: loss, prompts that were trimmed

    def forward(self, prompts: list[Prompt]) -> tuple[Tensor]:
        loss = self.reader.losses(prompts).mean()
        self.passes.append((float(loss.detach()), sum(p.trimmed > 0 for p in prompts)))
        return (loss,)


def scale(step: int, steps: int) -> float:
    """The learning rate's share of its peak: it rises over WARM_UP steps, falls over the last."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


class Step1(Trainer):
    """transformers' Trainer with Step 1's optimizer and rate; its checkpoints know tied weights."""

    model: Any
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.args.learning_rate
        self.optimizer = torch.optim.AdamW(learnt, rate, betas=(0.9, 0.98), weight_decay=0.01)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        def share(step: int) -> float:
            return scale(step, num_training_steps)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(exist_ok=True)
            torch.save(self.model.state_dict(), Path(output_dir) / "weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint) / "weights.pt"
        self.model.load_state_dict(torch.load(place, map_location="cpu", weights_only=True))


class Progress(TrainerCallback):
    """Follows a training: the loss of each step, METRICS, and the readers that are kept.

    Rows of METRICS hold step, loss (mean since the row before), rate, seconds, and left: seconds to
    go by the pace so far. They are made from the trainer's own log, which its checkpoints hold.
    """

    def __init__(self, loss: Loss, folder: Path, keep: Callable[[str], None]) -> None:
        self.loss, self.keep, self.file = loss, keep, folder / METRICS
        self.settings = settings = loss.reader.settings
        self.kept = {*settings.kept_steps, settings.steps}
        self.marks = {*range(0, settings.steps, max(1, settings.steps // ROWS)), *self.kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.clock = state.global_step, time.monotonic()
        self.before = state.log_history[-1]["seconds"] if state.log_history else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, steps = state.global_step, self.settings.steps
        losses, trimmed = zip(*self.loss.passes, strict=True)
        self.loss.passes.clear()
        loss = device.mean_over_processes(float(np.mean(losses)))
        if not math.isfinite(loss):
            raise ReaderError(
                f"Step 1: the loss is not a number at step {step - 1}. Lower reader.rate."
            )
        seconds = time.monotonic() - self.clock
        row = {"step": step, "loss": loss, "rate": self.settings.rate * scale(step - 1, steps)}
        row["seconds"] = round(self.before + seconds, 2)
        row["left"] = round(seconds / (step - self.began) * (steps - step), 1)
        row["trimmed"] = device.size() * device.mean_over_processes(sum(trimmed))
        state.log_history.append(row)
        if step in self.kept:
            self.keep("fine-tuned" if step == steps else f"step {step}")
        if step in self.marks and device.is_main():
            write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.rows(state)))
        if step == steps:
            control.should_save = False  # it is done

    def rows(self, state: Any) -> list[dict[str, float]]:
        """The rows of METRICS up to now."""
        rows: list[dict[str, float]] = []
        losses: list[float] = []
        for step in state.log_history:
            losses.append(step["loss"])
            if step["step"] in self.marks:
                rows.append({**step, "loss": float(np.mean(losses))})
                del rows[-1]["trimmed"], losses[:]
        return rows


def arguments(settings: ReaderSettings, folder: Path, seed: int) -> TrainingArguments:
    """Of a training in which every step sees `batch` prompts, at most `at_once` in a pass."""
    mine, odd = divmod(settings.batch, device.size())
    if odd:
        raise ReaderError(
            f"reader.batch: {settings.batch} prompts cannot be shared evenly by "
            f"{device.size()} processes. Make it a multiple."
        )
    in_a_pass = max(n for n in range(1, min(mine, settings.at_once) + 1) if mine % n == 0)
    AcceleratorState._reset_state()  # models may differ in precision; the processes stay connected
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.rate,
        per_device_train_batch_size=in_a_pass,
        gradient_accumulation_steps=mine // in_a_pass,
        train_sampling_strategy="sequential",
        save_steps=CHECKPOINT_EVERY,
        save_total_limit=1,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        use_cpu=device.device().type == "cpu",
        ddp_find_unused_parameters=True,
        remove_unused_columns=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    made._n_gpu = 1  # one a process; else it would share the prompts over all that it sees
    return made


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a folder: its state is written last."""
    found = folder.glob("checkpoint-*")
    for path in sorted(found, key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text("utf8"))
        except (OSError, ValueError):
            continue
        log.info("going on from the checkpoint %s", path)
        return str(path)
    return None


def adapted(model: Any, rank: int) -> Callable[[], Any]:
    """Freezes a model but for adapters in its linear layers (LoRA); returns what merges a copy."""
    from peft import LoraConfig, get_peft_model  # it takes seconds, and few need it

    chosen = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    whole: Any = get_peft_model(model, chosen)
    return lambda: copy.deepcopy(whole).merge_and_unload()


def fine_tune(reader: Reader, draw: Draw, folder: Path, seed: int) -> list[float]:
    """Teaches the reader to answer questions; returns the loss (nats a token) of each step.

    `draw` gives a question with its passages. The reader as it stands after each of `kept_steps`
    and at the end is kept in its `reader_folder`, the log in METRICS. A checkpoint lets a killed
    run go on with the same steps. Raises ReaderError if the loss is not a number, or the processes
    of the run cannot share a batch.
    """
    settings = reader.settings
    torch.manual_seed(seed)
    rank = settings.lora_rank
    merged = adapted(reader.model, rank) if rank else lambda: reader.model
    if settings.gradient_checkpointing:
        reader.model.activation_checkpointing_enable()
        reader.model.enable_input_require_grads()

    def keep(which: str) -> None:
        if device.is_main():
            kept = type(reader)(merged(), reader.tokenizer, settings, reader.style)
            kept.save(reader_folder(folder, which))
            reader.model.train()
        device.wait()

    loss = Loss(reader)
    trainer = Step1(
        model=loss,
        args=arguments(settings, folder, seed),
        train_dataset=Prompts(reader, draw, seed),
        data_collator=lambda prompts: {"prompts": prompts},
        callbacks=[Progress(loss, folder, keep)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=device.agreed(last_checkpoint(folder)))
    rows: Sequence[Any] = trainer.state.log_history[: settings.steps]
    trimmed = round(sum(row["trimmed"] for row in rows))
    note_trimmed(trimmed, settings.steps * settings.batch, folder)
    reader.model.eval()
    return [row["loss"] for row in rows]


def make_step1(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The reader after Step 1 and on the way.

    In an embedded world it learns from fresh worlds, on real text from the distill part.
    """
    chosen, k, seed = ReaderSettings(**settings["reader"]), settings["k"], settings["seed"]
    if settings["set"]["source"] == "world":
        encoding = RetrieverSettings(**settings["retriever"])
        retriever = Retriever.load(inputs["retriever"] / "model", encoding)
        lessons = world_lessons(WorldSet(**settings["set"]), retriever, k, seed)
    else:
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        candidates = load_file(inputs["candidates"] / "candidates.safetensors")
        lessons = corpus_lessons(corpus, candidates["distill"].tolist(), k)
    reader = fitted(load_reader(chosen.model, chosen, to_train=True), inputs)
    losses = fine_tune(reader, Lessons(lessons, k, chosen.gold_share).draw, folder, seed)
    if device.is_main():
        write_json(folder / "losses.json", losses)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
