"""The two indicators: does a reader's attention go to what is close to the answer, and to the nouns of the question?

A token's attention is its lift: its contribution divided by the mean over the question's passage tokens, so that 1 is the
average token. Its closeness is the cosine to the nearest of the wanted tokens in one frozen space. Everything is
measured per question and then averaged, for tokens of one prompt are no independent sample.
"""

from __future__ import annotations

from ragkit.errors import IndicatorError, RagkitError

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from ragkit.models import device as fleet
from ragkit.data.questions import Question
from ragkit.data.passages import Passage
from ragkit.profile import AttentionSettings
from ragkit.models.reader import PART, Prompt, Reader
from ragkit.distillation.teacher import ROWS, over_layers, token_contributions

Floats = NDArray[np.float64]
PLACES = ("passages", "titles", "question", "template", "answer", "first token")
MEASURES = ("attention", "Spearman", "Spearman closest")



@dataclass(frozen=True)
class Tokens:
    """The passage tokens of some questions' prompts as one reader saw them, question after question.

    `ids`, `owner` (place of its passage), `question` and `from_end` (tokens between it and the prompt's end) `[tokens]`;
    `contribution` `[tokens, row types, norm (off, on), layers]`, row types in the order of `teacher.ROWS`;
    `mass` `[questions, row types, places]`: share of plain attention, averaged over layers, that falls on each of PLACES.
    """

    ids: NDArray[np.int64]
    owner: NDArray[np.int64]
    question: NDArray[np.int64]
    from_end: NDArray[np.int64]
    contribution: NDArray[np.float32]
    mass: NDArray[np.float32]

    def attention(self, settings: AttentionSettings) -> Floats:
        """Contributions `[tokens]` under one choice of rows, norm and layers."""
        return over_layers(self.contribution[:, ROWS.index(settings.rows), int(settings.norm)], settings.layers)


def look_at_tokens(reader: Reader, questions: Sequence[Question], found: Sequence[Sequence[Passage]]) -> Tokens:
    """One pass over every question's prompt with its answer; keeps what falls on each passage token."""
    prompts = [reader.prompt(q, list(passages), q.answers[0]) for q, passages in zip(questions, found, strict=True)]

    def look(batch: list[Prompt]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Of each prompt: contributions of its passage tokens `[tokens, rows, norm, layers]`, and its `mass`."""
        contributions, result = token_contributions(reader, batch).cpu().float(), []  # [norm, layers, rows, prompts, tokens]
        for place, prompt in enumerate(batch):
            owner = np.array(prompt.owner)
            each = contributions[:, :, :, place, : len(owner)].permute(3, 2, 0, 1).numpy()
            plain = each[:, :, 0].mean(2)  # [tokens, rows]
            first = np.arange(len(owner)) == 0
            parts = [owner >= 0, owner == PART["title"], owner == PART["question"], owner == PART["other"], owner == PART["answer"]]
            result.append((each[owner >= 0], np.stack([plain[part & ~first].sum(0) for part in parts] + [plain[0]], axis=1) / plain.sum(0)[:, None]))
        return result

    batches = fleet.by_length([len(p.ids) for p in prompts], reader.settings.at_once)
    parts = fleet.spread(batches, lambda chosen: [prompts[i] for i in chosen], look, "tokens")
    seen = dict(zip((i for chosen in batches for i in chosen), (one for part in parts for one in part), strict=True))
    fleet.done["questions"] += len(prompts) if fleet.is_main() else 0
    owners = [np.array(p.owner) for p in prompts]
    inside = [owner >= 0 for owner in owners]
    return Tokens(
        ids=np.concatenate([np.array(p.ids)[mine] for p, mine in zip(prompts, inside, strict=True)]),
        owner=np.concatenate([owner[mine] for owner, mine in zip(owners, inside, strict=True)]),
        question=np.repeat(np.arange(len(prompts)), [int(mine.sum()) for mine in inside]),
        from_end=np.concatenate([(p.answer_start - np.arange(len(p.ids)))[mine] for p, mine in zip(prompts, inside, strict=True)]),
        contribution=np.concatenate([seen[i][0] for i in range(len(prompts))]),
        mass=np.stack([seen[i][1] for i in range(len(prompts))]).astype(np.float32),
    )


@torch.no_grad()
def contextual_closeness(
    reader: Reader, questions: Sequence[Question], found: Sequence[Sequence[Passage]], nouns: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Floats, Floats]:
    """Closeness of each passage token to the answer and to the question's nouns `[tokens]`, in the order of `Tokens`.

    The space is a decoder's last hidden states over the whole prompt with its answer; `nouns` are character spans.
    """
    to_answer, to_nouns = [], []
    for question, passages, spans in zip(questions, found, nouns, strict=True):
        prompt = reader.prompt(question, list(passages), question.answers[0])
        ids, mask = reader.batch([prompt])
        states = reader.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0].double().cpu().numpy()
        owner = np.array(prompt.owner)
        asked = states[owner == PART["question"]]
        answer = states[prompt.answer_start : -1]  # without the end token
        to_answer.append(closeness(states[owner >= 0], answer))
        to_nouns.append(closeness(states[owner >= 0], asked[asked_within_spans(reader, question, list(passages), spans)]))
    return np.concatenate(to_answer), np.concatenate(to_nouns)


def asked_within_spans(reader: Reader, question: Question, passages: list[Passage], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """For each token of the question as it stands in the prompt `[question tokens]`: does it overlap one of the character spans?

    A tokenizer may cut a text otherwise within a prompt than alone, so the places in the prompt count.
    """
    pieces = reader.pieces(question, passages)
    before = sum(len(text) for text, _ in takewhile(lambda piece: piece[1] != PART["question"], pieces))
    offsets = reader.tokenizer("".join(text for text, _ in pieces), return_offsets_mapping=True)["offset_mapping"]
    asked = [place for place, who in zip(offsets, reader.tokens(pieces)[1], strict=True) if who == PART["question"]]
    return np.array([any(start < last + before and end > first + before for first, last in spans) for start, end in asked], dtype=bool)


def last_characters(reader: Reader, text: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place in a passage's text of the last character of each of its tokens `[tokens]`, given as they stand in a prompt."""
    encoded = reader.tokenizer(" " + text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"][: len(ids)] != ids.tolist():
        raise IndicatorError("A passage has other tokens alone than in its prompt: its words cannot be told apart there.")
    return np.array([end for _, end in encoded["offset_mapping"][: len(ids)]], dtype=np.int64) - 2  # one for the space put before the text


def by_question(question: NDArray[np.int64]) -> list[slice]:
    """Where each question's tokens stand: they come question after question."""
    edges = np.searchsorted(question, np.arange(int(question.max()) + 2 if len(question) else 1))
    return [slice(start, end) for start, end in pairwise(edges)]


def lift(attention: Floats, question: NDArray[np.int64]) -> Floats:
    """Attention `[tokens]` divided by its mean over the question's tokens; NaN for a question whose attention is all zero."""
    sizes = np.bincount(question)
    means = np.bincount(question, weights=attention) / np.maximum(sizes, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(means[question] > 0, attention / means[question], np.nan)


def answer_ids(reader: Reader, questions: Sequence[Question]) -> list[list[int]]:
    """The tokens of each question's first answer, as they follow a prompt."""
    return [list(reader.tokenizer(" " + q.answers[0], add_special_tokens=False)["input_ids"]) for q in questions]


def within_spans(reader: Reader, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, bool]]:
    """The tokens of a text as they follow a prompt, and whether each overlaps one of the character spans, such as its nouns."""
    encoded = reader.tokenizer(" " + text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, any(start < last + 1 and end > first + 1 for first, last in spans)) for token, (start, end) in pairs]


def embeddings(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64], table: Tensor, owner: PreTrainedTokenizerBase) -> Floats:
    """Vectors of tokens `[tokens, d]` in the space of an embedding `table` `[vocabulary, d]` that belongs to the tokenizer `owner`.

    A token of another tokenizer is the mean of the pieces that its text has in the space; one that has none becomes NaN.
    """
    kept = table.detach().float().cpu().numpy().astype(np.float64)
    if tokenizer.get_vocab() == owner.get_vocab():
        return kept[ids]
    unique, place = np.unique(ids, return_inverse=True)
    vectors = np.full((len(unique), kept.shape[1]), np.nan)
    special = set(owner.all_special_ids)
    for row, token in enumerate(unique):
        pieces = [i for i in owner(tokenizer.decode([int(token)]), add_special_tokens=False)["input_ids"] if i not in special]
        if pieces:
            vectors[row] = kept[pieces].mean(0)
    return vectors[place]


def closeness(tokens: Floats, wanted: Floats) -> Floats:
    """Cosine of each token `[tokens, d]` to the nearest of the wanted vectors `[wanted, d]`; NaN where a vector is missing or zero, or none is wanted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        units, goals = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (tokens, wanted))
    goals = goals[np.isfinite(goals).all(1)]
    if not len(goals):
        return np.full(len(tokens), np.nan)
    return (units @ goals.T).max(1).round(12)  # a token that comes twice is as close twice: rounding errors must not break the tie


def ranks(values: Floats, question: NDArray[np.int64], ties: Literal["average", "min"] = "average") -> Floats:
    """Rank of each value `[tokens]` among those of its question, the smallest 1; NaN has none."""
    return pd.Series(values).groupby(question).rank(method=ties).to_numpy()


def spearman(x: Floats, y: Floats, question: NDArray[np.int64] | None = None, n: int = 1) -> Floats:
    """Spearman's rank correlation over the tokens of each of n questions `[n]`; without `question` all tokens are of one.

    NaN where it is undefined: fewer than three tokens, or one side constant.
    """
    question = np.zeros(len(x), dtype=np.int64) if question is None else question
    sizes = np.bincount(question, minlength=n)
    a, b = (ranks(side, question) - (sizes[question] + 1) / 2 for side in (x, y))
    both, first, second = (np.bincount(question, weights=product, minlength=n) for product in (a * b, a * a, b * b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sizes < 3, np.nan, both / np.sqrt(first * second))


def closest(close: Floats, question: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """The closest share of each question's tokens `[tokens]`, at least one; all as close as the last one that belongs to it come along."""
    counts = np.maximum(1, np.round(share * np.bincount(question)))
    return ranks(-close, question, "min") <= counts[question]


def measure(lifts: Floats, close: Floats, question: NDArray[np.int64], share: float, n: int) -> dict[str, Floats]:
    """MEASURES of each of n questions: mean lift of the closest share, and Spearman over all tokens and over the closest share."""
    near = closest(close, question, share)
    sums, sizes = (np.bincount(question[near], weights=weights, minlength=n) for weights in (lifts[near], None))
    with np.errstate(invalid="ignore"):
        top = sums / sizes
    correlations = spearman(lifts, close, question, n), spearman(lifts[near], close[near], question[near], n)
    return dict(zip(MEASURES, (top, *correlations), strict=True))


def indicator(attention: Floats, close: Floats, question: NDArray[np.int64], exact: NDArray[np.bool_], share: float) -> pd.DataFrame:
    """An indicator, a row a question: MEASURES, and each again with ' (no exact)': without the wanted tokens themselves.

    `attention` and `close` `[tokens]`; `exact` marks tokens that are one of the wanted. What is undefined is NaN. Tokens
    without a closeness are left out.
    """
    lifts, n = lift(attention, question), int(question.max()) + 1 if len(question) else 0
    columns: dict[str, Floats] = {}
    known = np.isfinite(lifts) & np.isfinite(close)
    for ending, kept in (("", known), (" (no exact)", known & ~exact)):
        found = measure(lifts[kept], close[kept], question[kept], share, n)
        columns |= {f"{name}{ending}": values for name, values in found.items()}
    return pd.DataFrame({"question": np.arange(n), **columns})


def deciles(attention: Floats, close: Floats, question: NDArray[np.int64]) -> Floats:
    """Mean lift of each tenth of a question's tokens by closeness `[questions, 10]`, farthest first; ties share their ranks' tenth."""
    lifts, n = lift(attention, question), int(question.max()) + 1 if len(question) else 0
    known = np.isfinite(close) & np.isfinite(lifts)
    lifts, close, question = lifts[known], close[known], question[known]
    tenth = np.minimum((ranks(close, question) - 0.5) / np.bincount(question)[question] * 10, 9.999).astype(int)
    cells = 10 * question + tenth
    with np.errstate(invalid="ignore"):
        return (np.bincount(cells, weights=lifts, minlength=10 * n) / np.bincount(cells, minlength=10 * n)).reshape(n, 10)
