"""The reader: a causal language model that answers a question from the passages in its prompt."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ragkit.attention.kernels import AttentionError
from ragkit.attention.record import observe, pooled
from ragkit.data.corpus import Passage, Question, block
from ragkit.data.text import readable
from ragkit.errors import ReaderError
from ragkit.models import device
from ragkit.settings import ReaderSettings

CLOZE = " cloze"  # ends the names of readers that are asked by clozes
ANSWER_TOKENS = 32  # where neither the settings nor the questions say it
PART = {"other": -1, "question": -2, "answer": -3, "title": -4}  # owners that are no passage
Piece = tuple[str, int]  # a text of a prompt, and its owner
Coded = tuple[list[int], list[int]]  # tokens, and the owner of each


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens `ids`, and the `owner` of each: a passage's number, or a value of PART.
    `answer_start` is the place of the first answer token (the prompt's length without an answer),
    `trimmed` how many tokens its passages lost, `blocks` the lengths of what is read on its own."""

    ids: list[int]
    owner: list[int]
    answer_start: int
    trimmed: int
    blocks: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def chat_turn(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, str, int]:
    """What a chat template writes before a user's text, and from there to the answer; the token
    that ends an answer. ReaderError without a template, or if it fails or writes the date."""
    asked, told, why = "%%asked%%", "%%told%%", "it writes the day's date: results would change"
    user, reply = {"role": "user", "content": asked}, {"role": "assistant", "content": told}
    try:
        if "strftime_now" not in tokenizer.get_chat_template():
            given: dict[str, Any] = {"tokenize": False}
            whole = str(tokenizer.apply_chat_template([user, reply], **given))
            opened = tokenizer.apply_chat_template([user], add_generation_prompt=True, **given)
            before, why, behind = str(opened).partition(asked)
    except (TemplateError, ValueError) as error:
        why = str(error).split(".")[0] if tokenizer.chat_template else "it has none"
    if why != asked:
        problem = f"{name} cannot be asked by its chat template ({why or 'it drops the question'})"
        raise ReaderError(f"{problem}. Leave reader.chat (--chat) out, or mend it.")
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id is not None:
        before = before.removeprefix(str(tokenizer.bos_token))  # it comes with every text
    after = tokenizer(whole.rpartition(told)[2], add_special_tokens=False)["input_ids"]
    ends = after and getattr(tokenizer.added_tokens_decoder.get(after[0]), "special", False)
    return before, behind, after[0] if ends else tokenizer.eos_token_id


class Reader:
    """A causal language model with its tokenizer and the way its prompts are written.
    `style` is `question` (passages, question, answer) or `cloze` (passages, the beginning of a
    statement; only the embedded worlds have those). It answers in `answer_tokens` at most."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: ReaderSettings
    ) -> None:
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.style, self.answer_tokens = "question", settings.answer_tokens or ANSWER_TOKENS
        self.known = int(model.get_input_embeddings().weight.shape[0])
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        text = model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None) or 0
        short = 0 < limit < settings.context and not getattr(text, "alibi", False)
        no_end, two_parts = end is None or end >= self.known, model.config.is_encoder_decoder
        self.start = model.config.decoder_start_token_id if two_parts else None
        for is_wrong, told in (
            (short, f"it has {limit} positions. Lower reader.context from {settings.context}"),
            (no_end, "it knows no end token. Name one in tokenizer_config.json (eos_token)"),
            (two_parts and self.start is None, "name a decoder_start_token_id in its config.json"),
            (two_parts and settings.chat, "an encoder-decoder has no turns. Leave reader.chat out"),
        ):
            if is_wrong:
                raise ReaderError(f"{settings.model}: {told}.")
        self.end, self.pad = int(end), int(end if pad is None or pad >= self.known else pad)
        plain = ("", "", self.end)
        turn = chat_turn(tokenizer, settings.model) if settings.chat else plain
        self.turn, self.end = turn[:2], turn[2]
        special = {"pad_token_id": self.pad, "eos_token_id": [*{int(end), self.end}]}
        greedy = {"do_sample": False, "num_beams": 1, "decoder_start_token_id": self.start}
        model.generation_config = GenerationConfig(**greedy, **special)  # not the folder's own

    def fit(self, questions: Sequence[Question]) -> None:
        """Lets answers be as long as the longest first gold one, if the settings leave it open."""
        if self.settings.answer_tokens is None:
            answers = [" " + readable(q.answers[0]) for q in questions]
            encoded = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
            self.answer_tokens = max(map(len, encoded)) + 1  # with the end token

    def pieces(self, question: Question, passages: Sequence[Passage]) -> list[Piece]:
        """The prompt as texts with their owners; its end is what the answer goes on from."""
        other, first = PART["other"], self.settings.layout == "question first"
        parts: list[Piece] = []
        for number, passage in enumerate(passages):
            parts.append((block(passage.title, ""), PART["title"]))
            parts += [(passage.text, number), ("\n", other)]
        if self.style == "cloze":
            said = (question.cloze, PART["question"])
            return [*([said, ("\n", other)] if first else []), *parts, ("In short. ", other), said]
        asked = [("question: ", other), (question.text, PART["question"]), ("\n", other)]
        parts = [*([*asked, *parts] if first else [*parts, *asked]), ("answer:", other)]
        before, behind = ((text, other) for text in self.turn)
        return [before, *parts, behind] if any(self.turn) else parts

    def tokens(self, pieces: Sequence[Piece]) -> Coded:
        """The texts as one text's tokens, each with its owner by its first character that is no
        space. A causal reader's end with the text: an end token of the tokenizer is dropped."""
        text, owners = "", list[int]()  # an owner a character
        for piece, who in pieces:
            text += readable(piece)
            owners += [who] * (len(text) - len(owners))
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, owner = list(encoded["input_ids"]), list[int]()
        for start, end in encoded["offset_mapping"]:
            first = min(end - len(text[start:end].lstrip()), end - 1)
            owner.append(owners[first] if end > start else PART["other"])
        special = encoded["special_tokens_mask"]
        while not self.model.config.is_encoder_decoder and ids and special[len(ids) - 1]:
            del ids[-1], owner[-1]
        return ids, owner

    def prompt(
        self, question: Question, passages: Sequence[Passage], answer: str | None = None
    ) -> Prompt:
        """The prompt, with the answer and an end token behind it if given, cut as one text. A
        prompt longer than the reader's context loses tokens at the end of its passages, the same
        share from each; never of the question. Raises ReaderError if that alone does not fit."""
        pieces = self.pieces(question, passages)
        space = "" if pieces[-1][0][-1:].isspace() else " "  # a turn's header may end its line
        told = [] if answer is None else [(space + answer, PART["answer"])]
        ids, owner = self.tokens([*pieces, *told])
        start = owner.index(PART["answer"]) if PART["answer"] in owner else len(ids)
        tail = [] if answer is None else [*ids[start:], self.end]
        room = self.settings.context - max(len(tail), self.answer_tokens)
        return self.joined([(ids[:start], owner[:start])], room, tail)

    def joined(self, blocks: Sequence[Coded], room: int, tail: list[int]) -> Prompt:
        """The prompt of blocks, each cut to the room, with the tokens of an answer behind them."""
        ids, owner, lengths = list[int](), list[int](), list[int]()
        for block_ids, owners in blocks:
            kept = self.trim(owners, max(0, len(owners) - room))
            ids += [block_ids[i] for i in kept]
            owner += [owners[i] for i in kept]
            lengths.append(len(kept))
        trimmed, start = sum(len(owners) for _, owners in blocks) - len(ids), len(ids)
        return Prompt(ids + tail, owner + [PART["answer"]] * len(tail), start, trimmed, lengths)

    def trim(self, owner: list[int], excess: int) -> list[int]:
        """The places that stay if each passage loses the same share of its end, `excess` in all."""
        who = np.array(owner)
        sizes = np.bincount(who[who >= 0], minlength=1)
        if excess > sizes.sum():
            context = f"the reader's context of {self.settings.context} tokens"
            raise ReaderError(f"The question is longer than {context}. Raise reader.context.")
        lost, remainder = np.divmod(sizes * excess, max(1, sizes.sum()))
        lost[np.argsort(-remainder, kind="stable")[: excess - lost.sum()]] += 1
        ends = [np.flatnonzero(who == i)[size - lost[i] :] for i, size in enumerate(sizes)]
        return np.delete(np.arange(len(who)), np.concatenate(ends)).tolist()

    def batch(self, prompts: Sequence[Prompt], side: str = "right") -> tuple[Tensor, Tensor]:
        """Ids and mask `[prompts, tokens]`, padded on one side, on the model's device."""
        rows = [torch.tensor(p.ids) for p in prompts]
        ids = pad_sequence(rows, True, self.pad, side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
        if (most := int(ids.max())) >= self.known:
            token = f"{self.settings.model}: token {most} ({self.tokenizer.decode([most])!r})"
            told = f"lies beyond its {self.known} embeddings. Save model and tokenizer together."
            raise ReaderError(f"{token} {told}")
        return ids.to(self.model.device), mask.to(self.model.device)

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers, in order; the processes of a run share the prompts."""
        return device.spread(prompts, 2 * self.settings.at_once, self.generated, "answer")

    @torch.no_grad()
    def generated(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers to one batch of prompts."""
        ids, mask = self.batch(prompts, "left")
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=self.answer_tokens)
        return [self.text_of(row) for row in out[:, ids.shape[1] :]]

    def text_of(self, row: Tensor) -> str:
        """The answer that new tokens `[tokens]` spell: one line; the rest of a cloze's sentence."""
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip().split("\n")[0]
        return (text.split(".")[0] if self.style == "cloze" else text).strip()

    def token_losses(self, prompts: Sequence[Prompt]) -> Tensor:
        """Losses (nats) of answer tokens `[prompts, tokens]`, with gradients; NaN behind an end."""
        answers = [torch.tensor(p.ids[p.answer_start :]) for p in prompts]
        logits = self.predicted(prompts).float()
        labels = torch.cat(answers).to(logits.device)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return pad_sequence(list(losses.split(list(map(len, answers)))), True, math.nan)

    def predicted(self, prompts: Sequence[Prompt]) -> Tensor:
        """Logits of all answers' tokens, one prompt after another `[tokens, vocabulary]`."""
        ids, mask = self.batch(prompts)
        states = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        rows = zip(states.last_hidden_state, prompts, strict=True)
        predicting = [row[p.answer_start - 1 : len(p) - 1] for row, p in rows]
        return self.model.get_output_embeddings()(torch.cat(predicting))

    def losses(self, prompts: Sequence[Prompt]) -> Tensor:
        """The mean of each prompt's `token_losses` `[prompts]`, with gradients."""
        return self.token_losses(prompts).nanmean(1)

    def attention(self, prompts: Sequence[Prompt], rows: Tensor, uses: Tensor) -> Tensor:
        """Token contributions `[norm (off, on), layers, groups, prompts, heads, tokens]`, padded on
        the right. `rows` `[prompts, rows]` are places in the prompts, `uses` `[groups, prompts,
        rows]` says which rows make a group. Raises ReaderError if it cannot be recorded."""
        try:
            tokens = pooled(self.watched(prompts, rows), uses)
        except AttentionError as error:
            raise ReaderError(f"{self.settings.model}: {error}") from None
        longest = max(map(len, prompts))
        return nn.functional.pad(tokens, (0, longest - tokens.shape[-1]))

    def watched(self, prompts: Sequence[Prompt], rows: Tensor) -> Callable[..., None]:
        """The pass over the prompts that hands each layer's rows of attention to a visitor."""
        return partial(observe, self.model, *self.batch(prompts), rows)
