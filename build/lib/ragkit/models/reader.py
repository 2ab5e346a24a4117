"""The reader: a causal language model that answers a question from the passages in its prompt."""

from __future__ import annotations

from ragkit.errors import RagkitError, ReaderError

import copy
import logging
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from ragkit.models import checkpoint
from ragkit.models import device as fleet
from ragkit.data import worlds as world
from ragkit.attention.record import observe, pooled
from ragkit.data.questions import Question
from ragkit.data.passages import Passage
from ragkit.profile import ReaderSettings
from ragkit.models.retriever import loading
from ragkit.experiment.store import input_hash, write_json

log = logging.getLogger(__name__)
CHECKPOINT_EVERY = 50  # steps of Step 1
PART = {"other": -1, "question": -2, "answer": -3, "title": -4}  # `owner` values that are not a passage's own text



@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens: `ids` `[tokens]`, and for each token its owner: a passage's number or a value of PART.

    `answer_start` is the position of the first answer token (the length of the prompt if there is no answer).
    """

    ids: list[int]
    owner: list[int]
    answer_start: int
    trimmed: int = 0


class Reader:
    """A causal language model with its tokenizer and the way its prompts are written.

    `style` is `question` (passages, question, answer) or `cloze` (passages, the beginning of a statement).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ReaderSettings, style: str = "question") -> None:
        if not tokenizer.is_fast:
            raise ReaderError(f"{settings.model}: a fast tokenizer (tokenizer.json) is needed to find each passage's tokens.")
        limit = getattr(model.config, "max_position_embeddings", settings.context)
        if settings.context > limit and not getattr(model.config, "alibi", False):
            raise ReaderError(f"{settings.model} has {limit} positions. Lower reader.context from {settings.context} to that or less.")
        self.model, self.tokenizer, self.settings, self.style = model.eval(), tokenizer, settings, style
        self.end = tokenizer.eos_token_id
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(cls, name: str, settings: ReaderSettings, style: str = "question", to_train: bool = False) -> Reader:
        """From a folder or hub name, on the run's device and the fused attention path if it has one; `embedded` is the one that ships.

        In `settings.dtype`; with float32 weights if it is `to_train`. An encoder-decoder becomes a `ragkit.fid.FidReader`.
        """
        path = str(embedded_reader()) if name == "embedded" else name
        revision = {} if Path(path).is_dir() else {"revision": settings.revision}
        dtype = torch.float32 if to_train else getattr(torch, settings.dtype)
        if name == "embedded":
            check_whole(embedded_reader())
        with loading(path):
            is_encoder_decoder = AutoConfig.from_pretrained(path, **revision).is_encoder_decoder
            kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
            model: Any = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **revision)
            model.to(fleet.device())
            tokenizer = AutoTokenizer.from_pretrained(path, **revision)
        if is_encoder_decoder:
            from ragkit.models.fid import FidReader  # it builds on this module

            return FidReader(model, tokenizer, settings, style)
        return cls(model, tokenizer, settings, style)

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face's format; all processes must call it where the model is split over them."""
        state = fleet.whole_state(self.model) if fleet.is_sharded(self.model) else None
        if fleet.is_main():
            self.model.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)

    def pieces(self, question: Question, passages: list[Passage]) -> list[tuple[str, int]]:
        """The prompt as texts with their owners."""
        parts: list[tuple[str, int]] = []
        for number, passage in enumerate(passages):
            parts += [(world.block(passage.title, ""), PART["title"]), (passage.text, number), ("\n", PART["other"])]
        if self.style == "cloze":
            return [*parts, ("In short. ", PART["other"]), (question.cloze, PART["question"])]
        asked = [("question: ", PART["other"]), (question.text, PART["question"]), ("\n", PART["other"])]
        if self.settings.order == "question first":
            return [*asked, *parts, ("answer:", PART["other"])]
        return [*parts, *asked, ("answer:", PART["other"])]

    def tokens(self, pieces: list[tuple[str, int]]) -> tuple[list[int], list[int]]:
        """The texts as one text's tokens, and the owner of each token: that of its first character that is no space."""
        text, spans = "", []
        for piece, who in pieces:
            spans.append((len(text), len(text) + len(piece), who))
            text += piece
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        span = 0
        owner: list[int] = []
        for start, end in encoded["offset_mapping"]:
            first = next((i for i in range(start, end) if not text[i].isspace()), max(start, end - 1))
            while span < len(spans) - 1 and first >= spans[span][1]:
                span += 1
            owner.append(spans[span][2] if end > start else PART["other"])
        return list(encoded["input_ids"]), owner

    def prompt(self, question: Question, passages: list[Passage], answer: str | None = None) -> Prompt:
        """The prompt, with the answer and an end token behind it if given.

        A prompt longer than the reader's context loses tokens at the end of its passages, the same share from each;
        never of the question. Raises ReaderError if the question alone does not fit.
        """
        ids, owner = self.tokens(self.pieces(question, passages))
        tail = [] if answer is None else [*self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"], self.end]
        spare = self.settings.context - len(ids) - max(len(tail), self.settings.answer_tokens)
        if spare < 0:
            ids, owner = self.trim(ids, owner, -spare, len(passages))
        return Prompt(ids + tail, owner + [PART["answer"]] * len(tail), len(ids), max(0, -spare))

    def trim(self, ids: list[int], owner: list[int], excess: int, k: int) -> tuple[list[int], list[int]]:
        """Cuts the same share from the end of each passage, `excess` tokens in all."""
        sizes = [owner.count(i) for i in range(k)]
        if excess > sum(sizes):
            raise ReaderError(f"The question alone is longer than the reader's context of {self.settings.context} tokens. Raise reader.context.")
        total = max(1, sum(sizes))
        cut = [size * excess // total for size in sizes]
        for i in sorted(range(k), key=lambda i: -(sizes[i] * excess % total))[: excess - sum(cut)]:
            cut[i] += 1
        keep = [size - less for size, less in zip(sizes, cut, strict=True)]
        seen, chosen = [0] * k, []
        for i, who in enumerate(owner):
            if who >= 0:
                seen[who] += 1
            if who < 0 or seen[who] <= keep[who]:
                chosen.append(i)
        return [ids[i] for i in chosen], [owner[i] for i in chosen]

    def batch(self, prompts: list[Prompt], left: bool = False) -> tuple[Tensor, Tensor]:
        """Padded ids and mask `[prompts, tokens]`, on the model's device."""
        fleet.done["tokens"] += sum(len(p.ids) for p in prompts)
        longest = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            place = slice(longest - len(prompt.ids), longest) if left else slice(0, len(prompt.ids))
            ids[i, place], mask[i, place] = torch.tensor(prompt.ids), 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def answer(self, prompts: list[Prompt]) -> list[str]:
        """Greedy answers, in order; what follows the first line break or full stop is cut. The processes of a run share the prompts."""
        answers = [""] * len(prompts)
        batches = fleet.by_length([len(p.ids) for p in prompts], 2 * self.settings.at_once)
        made = fleet.spread(batches, lambda chosen: [prompts[i] for i in chosen], self.generated, "answer")
        for chosen, texts in zip(batches, made, strict=True):
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
        fleet.done["questions"] += len(prompts) if fleet.is_main() else 0
        return answers

    @torch.no_grad()
    def generated(self, prompts: list[Prompt]) -> list[str]:
        """The answers to one batch of prompts."""
        ids, mask = self.batch(prompts, left=True)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.settings.answer_tokens, do_sample=False,
            pad_token_id=self.pad, eos_token_id=self.end,
        )  # fmt: skip
        return [self.text_of(row) for row in out[:, ids.shape[1] :]]

    def text_of(self, row: Tensor) -> str:
        """The answer that new tokens `[tokens]` spell."""
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
        return text.split("\n")[0].split(".")[0].strip()

    def token_losses(self, prompts: list[Prompt]) -> Tensor:
        """Negative log-likelihood (nats) of the tokens of each prompt's answer `[prompts, answer tokens]`, with gradients; NaN behind its end."""
        ids, mask = self.batch(prompts)
        rows = torch.arange(ids.shape[1] - 1, device=ids.device)[None]
        starts = torch.tensor([p.answer_start for p in prompts], device=ids.device)[:, None]
        is_answer = (rows + 1 >= starts) & mask[:, 1:].bool()
        states = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        logits = self.model.get_output_embeddings()(states[is_answer])  # the head only where an answer token is predicted
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][is_answer], reduction="none")
        return pad_sequence(list(loss.split(is_answer.sum(1).tolist())), batch_first=True, padding_value=math.nan)

    def losses(self, prompts: list[Prompt]) -> Tensor:
        """Mean negative log-likelihood (nats a token) of each prompt's answer `[prompts]`, with gradients."""
        return self.token_losses(prompts).nanmean(1)

    def attention(self, prompts: list[Prompt], rows: Tensor, uses: Tensor) -> Tensor:
        """Token contributions `[norm (off, on), layers, groups, prompts, tokens]`, right-padded like `batch`.

        `rows` `[prompts, rows]` are places in the prompts, `uses` `[groups, prompts, rows]` says which rows make a group.
        """
        ids, mask = self.batch(prompts)
        return pooled(lambda visit: observe(self.model, ids, mask, rows, visit), uses)


def embedded_reader() -> Path:
    """The folder of the reader that ships with the package."""
    return Path(str(resources.files("ragkit").joinpath("assets/reader")))


def check_whole(folder: Path) -> None:
    """Compares the embedded reader's files with the hashes that were shipped beside them."""
    for line in (folder / "sha256.txt").read_text("utf8").splitlines():
        expected, name = line.split()
        if not (folder / name).is_file() or input_hash(folder / name) != expected:
            raise ReaderError(
                f"The embedded reader's {folder / name} is damaged or missing. Get it back: git checkout -- ragkit/assets/reader, or install again."
            )


def note_trimmed(trimmed: int, prompts: int, folder: Path) -> None:
    """Keeps in a stage's folder how many of its prompts were too long for the reader, and says so; the report repeats it."""
    write_json(folder / "trimmed.json", {"trimmed": trimmed, "prompts": prompts})
    if trimmed and fleet.is_main():
        log.warning("%d of %d prompts were longer than the reader's context; each lost the same share of all its passages.", trimmed, prompts)


class Lesson(nn.Module):
    """A reader as a module whose forward pass is its loss: what Accelerate wraps, so that gradients are shared and precision is mixed."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.model, self.reader = reader.model, reader

    def forward(self, prompts: list[Prompt]) -> Tensor:
        """Sum of the prompts' losses."""
        return self.reader.losses(prompts).sum()


def adapted(model: PreTrainedModel, rank: int) -> Callable[[], PreTrainedModel]:
    """Freezes a model but for adapters of the given rank in its linear layers (LoRA, Hu et al. 2021); returns what makes a merged copy."""
    from peft import LoraConfig, get_peft_model

    whole: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"))
    return lambda: copy.deepcopy(whole).merge_and_unload()


def fine_tune(
    reader: Reader,
    draw: Callable[[random.Random], tuple[Question, list[Passage]]],
    folder: Path,
    seed: int,
    report: Callable[[list[float], float], None] = lambda losses, rate: None,
) -> list[float]:
    """Step 1: teaches the reader to answer questions; returns the loss of each step.

    `draw` gives a question with its passages. The reader as it stands after each of `kept_steps` is kept in
    `folder/<steps>`. A checkpoint lets a killed run go on with the same steps. The processes of a run share each batch, `at_once`
    prompts in a pass. `report` is called where it begins and after each step, with the losses so far and the learning rate (see
    `ragkit.training_log`).
    """
    settings = reader.settings
    torch.manual_seed(seed)
    merged = adapted(reader.model, settings.lora_rank) if settings.lora_rank else lambda: reader.model
    lesson: nn.Module = Lesson(reader)
    if settings.gradient_checkpointing:
        reader.model.activation_checkpointing_enable()
        reader.model.enable_input_require_grads()
    accelerator = fleet.accelerator(settings.dtype)
    if settings.shard:
        kinds = reader.model._no_split_modules or ()
        fleet.shard(lesson, [part for part in reader.model.modules() if type(part).__name__ in kinds], settings.dtype)
    else:
        lesson = accelerator.prepare(lesson)
    trained = [p for p in reader.model.parameters() if p.requires_grad]
    optimizer = accelerator.prepare(torch.optim.AdamW(trained, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01))
    history: tuple[list[float], int] = checkpoint.load(folder, reader.model, [optimizer]) or ([], 0)
    losses, trimmed = history

    def prompts_of(step: int) -> list[Prompt]:
        rng = random.Random(f"step 1 {seed} {step}")
        return [reader.prompt(q, found, q.answers[0]) for q, found in (draw(rng) for _ in range(settings.batch))]

    def keep(place: Path) -> None:
        if settings.shard or fleet.is_main():
            type(reader)(merged(), reader.tokenizer, settings, reader.style).save(place)
            reader.model.train()
        fleet.wait()

    report(losses, 0.0)
    reader.model.train()
    steps = range(len(losses), settings.steps)
    for step, prompts in zip(steps, fleet.ahead(steps, prompts_of), strict=True):
        trimmed += sum(p.trimmed > 0 for p in prompts)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / 30, (settings.steps - step) / (0.3 * settings.steps))
        loss = learn(lesson, accelerator, prompts, settings.at_once)
        if not math.isfinite(loss):
            raise ReaderError(f"Step 1: the loss is not a number at step {step}. Lower reader.rate.")
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fleet.done["questions"] += len(prompts) if fleet.is_main() else 0
        losses.append(loss)
        if step + 1 in settings.kept_steps:
            keep(folder / str(step + 1))
        if step + 1 == settings.steps:
            keep(folder)
        report(losses, optimizer.param_groups[0]["lr"])
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < settings.steps:
            checkpoint.save(folder, reader.model, [optimizer], [losses, trimmed])
    checkpoint.remove(folder)
    note_trimmed(trimmed, settings.steps * settings.batch, folder)
    reader.model.eval()
    return losses


def learn(lesson: nn.Module, accelerator: Accelerator, prompts: list[Prompt], at_once: int) -> float:
    """The mean loss of a batch of prompts, its gradients added up pass by pass; every process makes as many passes, for shards are brought together in each."""
    mine, weight = fleet.share(prompts)
    total, passes = 0.0, -(-len(prompts) // (fleet.size() * at_once))
    for number, places in enumerate(np.array_split(np.arange(len(mine)), passes)):
        part = [mine[i] for i in places]
        with accelerator.no_sync(lesson) if number + 1 < passes else nullcontext():
            loss = lesson(part or mine[:1]) * (weight / len(mine) if part else 0.0)
            accelerator.backward(loss)
        total += float(loss.detach())
    return fleet.mean_over_processes(total)
