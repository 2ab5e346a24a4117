"""The reader: a causal language model that answers a question from the passages in its prompt."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ragkit import RagkitError, checkpoint, world
from ragkit.attention import observe, pooled
from ragkit.corpus import Passage, Question
from ragkit.profile import ReaderSettings
from ragkit.retriever import loading
from ragkit.store import input_hash

log = logging.getLogger(__name__)
CHECKPOINT_EVERY = 50  # steps of Step 1
PART = {"other": -1, "question": -2, "answer": -3, "title": -4}  # `owner` values that are not a passage's own text


class ReaderError(RagkitError):
    """A reader cannot be loaded, fed or trained."""


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
    def load(cls, name: str, settings: ReaderSettings, style: str = "question") -> Reader:
        """From a folder or hub name, in float32, on the fused attention path if it has one; `embedded` is the one that ships.

        An encoder-decoder becomes a `ragkit.fid.FidReader`.
        """
        path = str(embedded_reader()) if name == "embedded" else name
        if name == "embedded":
            check_whole(embedded_reader())
        with loading(path):
            is_encoder_decoder = AutoConfig.from_pretrained(path).is_encoder_decoder
            kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
            model, tokenizer = kind.from_pretrained(path, dtype=torch.float32, use_safetensors=True), AutoTokenizer.from_pretrained(path)
        if is_encoder_decoder:
            from ragkit.fid import FidReader  # it builds on this module

            return FidReader(model, tokenizer, settings, style)
        return cls(model, tokenizer, settings, style)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
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
        """Padded ids and mask `[prompts, tokens]`."""
        longest = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            place = slice(longest - len(prompt.ids), longest) if left else slice(0, len(prompt.ids))
            ids[i, place], mask[i, place] = torch.tensor(prompt.ids), 1
        return ids, mask

    @torch.no_grad()
    def answer(self, prompts: list[Prompt], batch: int = 32) -> list[str]:
        """Greedy answers, in order; what follows the first line break or full stop is cut."""
        answers: list[str] = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        for start in tqdm(range(0, len(order), batch), desc="answer", leave=False):
            chosen = order[start : start + batch]
            ids, mask = self.batch([prompts[i] for i in chosen], left=True)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.settings.answer_tokens, do_sample=False,
                pad_token_id=self.pad, eos_token_id=self.end,
            )  # fmt: skip
            for i, row in zip(chosen, out[:, ids.shape[1] :], strict=True):
                answers[i] = self.text_of(row)
        return answers

    def text_of(self, row: Tensor) -> str:
        """The answer that new tokens `[tokens]` spell."""
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
        return text.split("\n")[0].split(".")[0].strip()

    def token_losses(self, prompts: list[Prompt]) -> Tensor:
        """Negative log-likelihood (nats) of the tokens of each prompt's answer `[prompts, answer tokens]`, with gradients; NaN behind its end."""
        ids, mask = self.batch(prompts)
        rows = torch.arange(ids.shape[1] - 1)[None]
        starts = torch.tensor([p.answer_start for p in prompts])[:, None]
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
    (folder / "trimmed.json").write_text(json.dumps({"trimmed": trimmed, "prompts": prompts}), "utf8")
    if trimmed:
        log.warning("%d of %d prompts were longer than the reader's context; each lost the same share of all its passages.", trimmed, prompts)


def fine_tune(
    reader: Reader,
    draw: Callable[[random.Random], tuple[Question, list[Passage]]],
    folder: Path,
    seed: int,
    report: Callable[[list[float], float], None] = lambda losses, rate: None,
) -> list[float]:
    """Step 1: teaches the reader to answer questions; returns the loss of each step.

    `draw` gives a question with its passages. The reader as it stands after each of `kept_steps` is kept in
    `folder/<steps>`. A checkpoint lets a killed run go on with the same steps. `report` is called where it begins and after each
    step, with the losses so far and the learning rate (see `ragkit.training_log`).
    """
    settings = reader.settings
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(reader.model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    history: tuple[list[float], int] = checkpoint.load(folder, reader.model, [optimizer]) or ([], 0)
    losses, trimmed = history
    report(losses, 0.0)
    reader.model.train()
    for step in tqdm(range(len(losses), settings.steps), desc="Step 1", leave=False):
        rng = random.Random(f"step 1 {seed} {step}")
        prompts = [reader.prompt(q, found, q.answers[0]) for q, found in (draw(rng) for _ in range(settings.batch))]
        trimmed += sum(p.trimmed > 0 for p in prompts)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / 30, (settings.steps - step) / (0.3 * settings.steps))
        loss = reader.losses(prompts).mean()
        if not torch.isfinite(loss):
            raise ReaderError(f"Step 1: the loss is not a number at step {step}. Lower reader.rate.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step + 1 in settings.kept_steps:
            reader.save(folder / str(step + 1))
        report(losses, optimizer.param_groups[0]["lr"])
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < settings.steps:
            checkpoint.save(folder, reader.model, [optimizer], [losses, trimmed])
    checkpoint.remove(folder)
    note_trimmed(trimmed, settings.steps * settings.batch, folder)
    reader.model.eval()
    return losses
