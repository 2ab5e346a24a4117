"""The reader: a causal language model that answers a question from the passages in its prompt."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ragkit.attention import AttentionError, observe, pooled
from ragkit.data.files import file_hash, write_json
from ragkit.data.passages import Passage, block
from ragkit.data.questions import Question
from ragkit.errors import ReaderError
from ragkit.models import device
from ragkit.models.loading import readable
from ragkit.settings import ASSETS, ReaderSettings

log = logging.getLogger(__name__)
ANSWER_TOKENS = 32  # where neither the settings nor the questions say it
PART = {"other": -1, "question": -2, "answer": -3, "title": -4}  # owners that are no passage


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens: `ids` `[tokens]`, and for each its owner: a passage's number or a value
    of PART.

    `answer_start` is the position of the first answer token (the length of the prompt if there is
    no answer), `trimmed` how many tokens its passages lost.
    """

    ids: list[int]
    owner: list[int]
    answer_start: int
    trimmed: int = 0


class Reader:
    """A causal language model with its tokenizer and the way its prompts are written.

    `style` is `question` (passages, question, answer) or `cloze` (passages, the beginning of a
    statement; only the embedded worlds have those). `answer_tokens` is how many it may answer with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: ReaderSettings,
        style: str = "question",
    ) -> None:
        self.settings, self.style = settings, style
        self.model, self.tokenizer = model.eval(), tokenizer
        if not tokenizer.is_fast:
            raise ReaderError(
                f"{settings.model}: a fast tokenizer (tokenizer.json) is needed "
                "to find each passage's tokens."
            )
        config = model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or 0
        if 0 < limit < settings.context and not getattr(config, "alibi", False):
            raise ReaderError(
                f"{settings.model} has {limit} positions. "
                f"Lower reader.context from {settings.context} to that or less."
            )
        self.known = int(model.get_input_embeddings().weight.shape[0])
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if end is None or end >= self.known:
            raise ReaderError(
                f"{settings.model}: its tokenizer names no end token that the model knows. "
                "Name one in tokenizer_config.json (eos_token)."
            )
        self.end, self.pad = int(end), int(end if pad is None or pad >= self.known else pad)
        self.answer_tokens = settings.answer_tokens or ANSWER_TOKENS
        model.generation_config = self.greedy()  # else `generate` fills in the folder's own

    def greedy(self) -> GenerationConfig:
        """How answers are generated, whatever the folder's generation_config.json says."""
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.answer_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.end,
        )

    def fit(self, questions: Sequence[Question]) -> None:
        """Lets answers be as long as the longest first gold one, if the settings leave it open."""
        if self.settings.answer_tokens is None and questions:
            answers = [" " + readable(q.answers[0]) for q in questions]
            ids = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
            self.answer_tokens = max(map(len, ids)) + 1  # with the end token

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face's format."""
        if device.is_main():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def pieces(self, question: Question, passages: Sequence[Passage]) -> list[tuple[str, int]]:
        """The prompt as texts with their owners; its end is what the answer goes on from."""
        other, first = PART["other"], self.settings.order == "question first"
        parts: list[tuple[str, int]] = []
        for number, passage in enumerate(passages):
            parts.append((block(passage.title, ""), PART["title"]))
            parts += [(passage.text, number), ("\n", other)]
        if self.style == "cloze":
            said = (question.cloze, PART["question"])
            return [*([said, ("\n", other)] if first else []), *parts, ("In short. ", other), said]
        asked = [("question: ", other), (question.text, PART["question"]), ("\n", other)]
        return [*([*asked, *parts] if first else [*parts, *asked]), ("answer:", other)]

    def tokens(self, pieces: Sequence[tuple[str, int]]) -> tuple[list[int], list[int]]:
        """The texts as one text's tokens, and the owner of each, by its first character that is no
        space. A causal reader's tokens end with the text: the tokenizer's own end token is dropped.
        """
        text, spans = "", []
        for piece, who in pieces:
            text += readable(piece)
            spans.append((len(text), who))
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, special = list(encoded["input_ids"]), encoded["special_tokens_mask"]
        span = 0
        owner: list[int] = []
        for start, end in encoded["offset_mapping"]:
            first = next(
                (i for i in range(start, end) if not text[i].isspace()), max(start, end - 1)
            )
            while span < len(spans) - 1 and first >= spans[span][0]:
                span += 1
            owner.append(spans[span][1] if end > start else PART["other"])
        while not self.model.config.is_encoder_decoder and ids and special[len(ids) - 1]:
            del ids[-1], owner[-1]
        return ids, owner

    def prompt(
        self, question: Question, passages: Sequence[Passage], answer: str | None = None
    ) -> Prompt:
        """The prompt, with the answer and an end token behind it if given, cut as one text.

        A prompt longer than the reader's context loses tokens at the end of its passages, the same
        share from each; never of the question. Raises ReaderError if that alone does not fit.
        """
        pieces = self.pieces(question, passages)
        if answer is not None:
            pieces.append((" " + answer, PART["answer"]))
        ids, owner = self.tokens(pieces)
        tail: list[int] = []
        if answer is not None:
            start = owner.index(PART["answer"]) if PART["answer"] in owner else len(ids)
            tail = [*ids[start:], self.end]
            ids, owner = ids[:start], owner[:start]
        spare = self.settings.context - len(ids) - max(len(tail), self.answer_tokens)
        if spare < 0:
            ids, owner = self.trim(ids, owner, -spare, len(passages))
        return Prompt(ids + tail, owner + [PART["answer"]] * len(tail), len(ids), max(0, -spare))

    def trim(
        self, ids: list[int], owner: list[int], excess: int, k: int
    ) -> tuple[list[int], list[int]]:
        """Cuts the same share from the end of each passage, `excess` tokens in all."""
        sizes = [owner.count(i) for i in range(k)]
        if excess > sum(sizes):
            raise ReaderError(
                "The question alone is longer than the reader's context of "
                f"{self.settings.context} tokens. Raise reader.context."
            )
        total = max(1, sum(sizes))
        keep = [size - size * excess // total for size in sizes]
        by_remainder = sorted(range(k), key=lambda i: -(sizes[i] * excess % total))
        for i in by_remainder[: sum(keep) - (sum(sizes) - excess)]:
            keep[i] -= 1
        seen, chosen = [0] * k, []
        for i, who in enumerate(owner):
            if who >= 0:
                seen[who] += 1
            if who < 0 or seen[who] <= keep[who]:
                chosen.append(i)
        return [ids[i] for i in chosen], [owner[i] for i in chosen]

    def batch(self, prompts: Sequence[Prompt], left: bool = False) -> tuple[Tensor, Tensor]:
        """Padded ids and mask `[prompts, tokens]`, on the model's device."""
        longest = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            start = longest - len(prompt.ids) if left else 0
            place = slice(start, start + len(prompt.ids))
            ids[i, place], mask[i, place] = torch.tensor(prompt.ids), 1
        if (most := int(ids.max())) >= self.known:
            raise ReaderError(
                f"{self.settings.model}: token {most} ({self.tokenizer.decode([most])!r}) "
                f"lies beyond its {self.known} embeddings. Save model and tokenizer together again."
            )
        return ids.to(self.model.device), mask.to(self.model.device)

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order; the processes of a run share the prompts."""
        batches = device.by_length([len(p.ids) for p in prompts], 2 * self.settings.at_once)
        made = device.spread(
            batches, lambda chosen: [prompts[i] for i in chosen], self.generated, "answer"
        )
        answers = [""] * len(prompts)
        for chosen, texts in zip(batches, made, strict=True):
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
        return answers

    @torch.no_grad()
    def generated(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers to one batch of prompts."""
        ids, mask = self.batch(prompts, left=True)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=self.greedy()
        )
        return [self.text_of(row) for row in out[:, ids.shape[1] :]]

    def text_of(self, row: Tensor) -> str:
        """The answer that new tokens `[tokens]` spell.

        It ends at the end token or a line break; the rest of a cloze ends with its sentence.
        """
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip().split("\n")[0]
        return (text.split(".")[0] if self.style == "cloze" else text).strip()

    def token_losses(self, prompts: Sequence[Prompt]) -> Tensor:
        """Negative log-likelihood (nats) of the tokens of each prompt's answer `[prompts, answer
        tokens]`.

        With gradients; NaN behind an answer's end.
        """
        ids, mask = self.batch(prompts)
        rows = torch.arange(ids.shape[1] - 1, device=ids.device)[None]
        starts = torch.tensor([p.answer_start for p in prompts], device=ids.device)[:, None]
        is_answer = (rows + 1 >= starts) & mask[:, 1:].bool()
        states = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        predicting = states.last_hidden_state[:, :-1][is_answer]  # the head is not needed elsewhere
        logits = self.model.get_output_embeddings()(predicting).float()
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][is_answer], reduction="none")
        each = loss.split(is_answer.sum(1).tolist())
        return pad_sequence(list(each), batch_first=True, padding_value=math.nan)

    def losses(self, prompts: Sequence[Prompt]) -> Tensor:
        """Mean negative log-likelihood (nats a token) of each prompt's answer `[prompts]`, with
        gradients.
        """
        return self.token_losses(prompts).nanmean(1)

    def attention(self, prompts: Sequence[Prompt], rows: Tensor, uses: Tensor) -> Tensor:
        """Token contributions `[norm (off, on), layers, groups, prompts, tokens]`, right-padded
        like `batch`.

        `rows` `[prompts, rows]` are places in the prompts, `uses` `[groups, prompts, rows]` says
        which rows make a group. Raises ReaderError if the reader's attention cannot be recorded.
        """
        ids, mask = self.batch(prompts)
        try:
            return pooled(lambda visit: observe(self.model, ids, mask, rows, visit), uses)
        except AttentionError as error:
            raise ReaderError(f"{self.settings.model}: {error}") from None


def embedded_reader() -> Path:
    """The folder of the reader that ships with the package.

    Raises ReaderError if a file in it is not the one that was shipped.
    """
    folder = ASSETS / "reader"
    for line in (folder / "sha256.txt").read_text("utf8").splitlines():
        expected, name = line.split()
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise ReaderError(
                f"The embedded reader's {folder / name} is damaged or missing. "
                "Get it back: git checkout -- ragkit/assets/reader, or install again."
            )
    return folder


def note_trimmed(trimmed: int, prompts: int, folder: Path) -> None:
    """Keeps in a stage's folder how many of its prompts were too long for the reader, and says
    so.
    """
    if not device.is_main():
        return
    write_json(folder / "trimmed.json", {"trimmed": trimmed, "prompts": prompts})
    if trimmed:
        log.warning(
            "%d of %d prompts were longer than the reader's context; "
            "each lost the same share of all its passages.",
            trimmed,
            prompts,
        )
