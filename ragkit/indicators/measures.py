"""Does a reader attend to what is close to the answer (Indicator 1), to the question's nouns (2)? A
token's attention is its lift: its contribution over the mean of the question's passage tokens. Its
closeness is the cosine to the nearest wanted token in one frozen space. All is measured per
question, for tokens of one prompt are no independent sample; they come question after question, and
`question` `[tokens]` numbers them. What is undefined is NaN. At the end: means with intervals."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import special

from ragkit.data.corpus import Passage, block
from ragkit.distillation import targets
from ragkit.distillation.targets import Bools, Floats, over_layers
from ragkit.errors import DataError
from ragkit.settings import ROWS, AttentionSettings

Ints = NDArray[np.int64]
Wanted = Sequence[Sequence[int]]  # words, for each question
Cut = Callable[[str], Sequence[tuple[int, int, str]]]  # start, end, label of a text's words
PLACES = ("passages", "titles", "question", "template", "answer", "first token")
MEASURES = ("attention", "Spearman", "Spearman closest")
SPACES = ("input", "own", "retriever", "contextual")  # where closeness is measured
# the input space, its vectors dealt anew for each question; 1 for wanted tokens, 0 for others
CONTROLS = ("permuted", "overlap")
UNDEFINED = np.errstate(invalid="ignore", divide="ignore")  # what it is becomes NaN


@dataclass(frozen=True)
class Tokens:
    """The tokens of passages and their titles in some questions' prompts, as one reader saw them.
    `[tokens]`: `ids`, `owner` (place of its passage), `title` (whether it is one of the title's),
    `question`, `from_end` (tokens to the prompt's end), `ends` (place of its last character in its
    passage's text or title, -1 if unknown).
    `contribution` `[tokens, rows, norm (off, on), layers]`, rows as in `settings.ROWS`; `mass`
    `[questions, rows, places]`: share of plain attention, mean of all layers, on each of PLACES."""

    ids: Ints
    owner: Ints
    title: Bools
    question: Ints
    from_end: Ints
    ends: Ints
    contribution: NDArray[np.float32]
    mass: NDArray[np.float32]

    def attention(self, settings: AttentionSettings) -> Floats:
        """Contributions `[tokens]` under one choice of rows, norm and layers."""
        chosen = self.contribution[:, ROWS.index(settings.rows), int(settings.norm)]
        return over_layers(chosen, settings.layers)

    @property
    def texts(self) -> "Tokens":
        """Those of the passages' own texts alone."""
        of_tokens = {name: of[~self.title] for name, of in vars(self).items() if name != "mass"}
        return Tokens(**of_tokens, mass=self.mass)

    @classmethod
    def load(cls, folder: Path) -> "Tokens":
        return cls(**load_file(folder / "tokens.safetensors"))


def load_closeness(folder: Path, goal: str, space: str) -> tuple[Floats, Bools]:
    """Closeness to a goal (`answer`, `nouns`) in a space or control `[tokens]`, as `make_closeness`
    wrote it, and which tokens are the goal's own. Raises DataError where there is none."""
    arrays = load_file(folder / "closeness.safetensors")
    if f"{goal}/{space}" not in arrays:
        what = f"No closeness to the {goal} in the space {space!r}"
        why = "nouns need a noun finder, contextual a decoder with the off-the-shelf one's tokens"
        raise DataError(f"{what}: {why}. Choose another indicators.space.")
    return arrays[f"{goal}/{space}"], arrays[f"{goal}/exact"].astype(bool)


def by_question(question: Ints, n: int | None = None) -> list[slice]:
    """Where the tokens of each of n questions stand."""
    numbers = np.arange((len(np.bincount(question)) if n is None else n) + 1)
    return [slice(start, end) for start, end in pairwise(np.searchsorted(question, numbers))]


@UNDEFINED
def means(values: Floats, group: Ints, n: int = 0) -> Floats:
    """Mean of each of n groups' values `[n]`, NaN left out; NaN for one without any."""
    known = np.isfinite(values)
    sums = np.bincount(group, np.where(known, values, 0), n)
    return sums / np.bincount(group, known, n)


@UNDEFINED
def lift(attention: Floats, question: Ints) -> Floats:
    """Attention `[tokens]` over its mean within the question; NaN where all of it is zero."""
    mean = means(attention, question)[question]
    return np.where(mean > 0, attention / mean, np.nan)


@UNDEFINED
def closeness(tokens: Floats, wanted: Floats) -> Floats:
    """Cosine of each token `[tokens, d]` to the nearest of the wanted vectors `[wanted, d]`.
    NaN where a vector is missing or zero, or none is wanted. Of 12 digits, so that equals tie."""
    units, goals = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (tokens, wanted))
    goals = goals[np.isfinite(goals).all(1)]
    if not len(goals):
        return np.full(len(tokens), np.nan)
    return (units @ goals.T).max(1).round(12)


def exact(tokens: Tokens, wanted: Wanted) -> Bools:
    """Whether each token `[tokens]` is one of the wanted tokens of its question."""
    pairs = zip(by_question(tokens.question, len(wanted)), wanted, strict=True)
    return np.concatenate([np.isin(tokens.ids[mine], ids) for mine, ids in pairs])


def closeness_to(
    tokens: Tokens, wanted: Wanted, vectors: Floats, dealt: np.random.Generator | None = None
) -> Floats:
    """Closeness of each token's word `[tokens]` to the wanted words of its question, by the vectors
    of all words `[words, d]`. With `dealt` these are dealt anew among the words for each question:
    dealt once, common words would have the same luck everywhere, which no interval shows."""
    order, parts = np.arange(len(vectors)), []
    there = np.flatnonzero(np.isfinite(vectors).all(1))
    for mine, goal in zip(by_question(tokens.question, len(wanted)), wanted, strict=True):
        if dealt is not None:
            order[there] = dealt.permutation(there)
        own, other = (order[np.array(ids, dtype=np.int64)] for ids in (tokens.ids[mine], goal))
        parts.append(closeness(vectors[own], vectors[other]))
    return np.concatenate(parts)


def by_word(tokens: Tokens, found: Sequence[Sequence[Passage]], cut: Cut) -> list[str]:
    """The label of the word that each token ends in `[tokens]`, as `cut` cuts the titles and texts
    of the passages found for its question; empty where its place is unknown, or behind a space."""
    words_of, labels = cache(cut), []
    places = (tokens.question, tokens.owner, tokens.title, tokens.ends)
    for question, owner, is_title, end in zip(*places, strict=True):
        passage = found[question][owner]
        words = words_of(block(passage.title, "") if is_title else passage.text)
        number = bisect_right(words, end, key=itemgetter(1))
        inside = number < len(words) and words[number][0] <= end
        labels.append(words[number][2] if inside else "")
    return labels


def ranks(values: Floats, question: Ints, ties: Literal["average", "min"] = "average") -> Floats:
    """Rank of each value `[tokens]` among those of its question, the smallest 1; NaN has none."""
    return pd.Series(values).groupby(question).rank(method=ties).to_numpy()


@UNDEFINED
def spearman(x: Floats, y: Floats, question: Ints | None = None, n: int = 1) -> Floats:
    """Spearman's correlation by question `[n]`, or of all; NaN for under 3 tokens or a constant."""
    question = np.zeros(len(x), dtype=np.int64) if question is None else question
    sizes = np.bincount(question, minlength=n)
    a, b = (ranks(side, question) - (sizes[question] + 1) / 2 for side in (x, y))
    both, first, second = (np.bincount(question, p, minlength=n) for p in (a * b, a * a, b * b))
    return np.where(sizes < 3, np.nan, both / np.sqrt(first * second))


def closest(close: Floats, question: Ints, share: float) -> Bools:
    """The closest share of each question's tokens `[tokens]`, at least one, with all that tie."""
    counts = np.maximum(1, np.round(share * np.bincount(question, np.isfinite(close))))
    return ranks(-close, question, "min") <= counts[question]


@UNDEFINED
def indicator(
    attention: Floats, close: Floats, question: Ints, exact: Bools, share: float
) -> pd.DataFrame:
    """An indicator, a row a question: MEASURES (mean lift of the closest tokens, their `share` of
    the attention, Spearman over all tokens, and within the closest), and each with ' (no exact)':
    without the wanted tokens, marked by `exact` `[tokens]`; those without closeness left out."""
    lifts, n = lift(attention, question), len(np.bincount(question))
    table = pd.DataFrame({"question": np.arange(n)})
    known = np.isfinite(lifts) & np.isfinite(close)
    for ending, kept in (("", known), (" (no exact)", known & ~exact)):
        near = closest(np.where(kept, close, np.nan), question, share)
        table[f"attention{ending}"] = means(lifts[near], question[near], n)
        shares = [np.bincount(question[some], attention[some], n) for some in (near, known)]
        table[f"share{ending}"] = shares[0] / shares[1]
        for name, some in (("Spearman", kept), ("Spearman closest", near)):
            table[name + ending] = spearman(lifts[some], close[some], question[some], n)
    return table


@UNDEFINED
def of_passages(
    looks: targets.Looks, others: Mapping[str, Floats], settings: AttentionSettings
) -> pd.DataFrame:
    """The checks of a reader's attention over passages, a row a question: by its looks in rank and
    in reversed order, and against `others`, further scores of the passages `[questions, k]`."""
    rank, back = (targets.attention_scores(looks[o], settings) for o in ("rank", "reversed"))
    holds, (n, k) = looks["rank"]["holds"].astype(float), rank.shape
    both = targets.standardise(rank) + targets.standardise(back)
    telling = holds.max(1, keepdims=True) > holds.min(1, keepdims=True)
    shares = rank / rank.sum(1, keepdims=True)
    found = {"top holds the answer": rank, "top holds the answer, balanced": both}
    table = {
        name: np.where(telling, targets.top(s) * holds, np.nan).sum(1) for name, s in found.items()
    }
    table["entropy"] = special.entr(shares).sum(1) / np.log(k)
    table["last in place"] = targets.top(rank)[:, -1]
    table["orders agree"] = (targets.top(rank) * targets.top(back)).sum(1)
    question = np.repeat(np.arange(n), k)
    places = {"follows the place": np.tile(np.arange(k, dtype=float), (n, 1))}
    for name, other in (places | dict(others)).items():
        table[name] = spearman(rank.ravel(), other.ravel(), question, n)
    return pd.DataFrame(table)


def deciles(attention: Floats, close: Floats, question: Ints, parts: int = 10) -> Floats:
    """Mean lift of each tenth (or so many `parts`) of a question's tokens by closeness `[questions,
    parts]`, farthest first; ties share the part of their mean rank. NaN closeness is left out."""
    lifts, n = lift(attention, question), len(np.bincount(question))
    known = np.isfinite(close) & np.isfinite(lifts)
    lifts, close, question = lifts[known], close[known], question[known]
    places = (ranks(close, question) - 0.5) / np.bincount(question)[question]
    cells = parts * question + np.minimum(places * parts, parts - 1e-3).astype(int)
    return means(lifts, cells, parts * n).reshape(n, parts)


def matched_lead(lifts: Floats, near: Bools, cells: NDArray[Any], question: Ints) -> Floats:
    """Mean lead in lift of each question's `near` tokens over the others of the same cell (of
    `[kinds, tokens]`, such as place and part of speech) `[questions]`; NaN lifts take no part."""
    _, cell = np.unique(np.vstack([question, cells]), axis=1, return_inverse=True)
    others = means(np.where(near, np.nan, lifts), cell)
    return means(np.where(near, lifts - others[cell], np.nan), question)


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % bootstrap interval, its number of groups, the resamples' means, if any."""

    mean: float
    low: float
    high: float
    n: int
    draws: Floats = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@lru_cache(maxsize=8)
def drawn(n: int, resamples: int, seed: int = 0) -> Floats:
    """How often each of n is drawn, in each resample of n `[resamples, n]`."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)


@UNDEFINED
def draws(values: Floats, groups: NDArray[Any], resamples: int) -> Floats:
    """Bootstrap means `[resamples, ...]` of `values` `[..., n]`, NaN left out. Whole groups (labels
    `[n]`) are drawn, the same for all rows. Rounded to 12 digits: equal on every machine."""
    rows, label = values.reshape(-1, len(groups)), np.unique(groups, return_inverse=True)[1]
    known = np.isfinite(rows)
    sums = np.stack([np.bincount(label, row) for row in np.where(known, rows, 0)], axis=1)
    sizes = np.stack([np.bincount(label, row) for row in known], axis=1)
    times = drawn(len(sums), resamples)
    means = (times @ sums) / (times @ sizes)
    return means.reshape(resamples, *values.shape[:-1]).round(12)


def percentiles(cloud: Floats, mean: float, n: int) -> Interval:
    """The percentile interval of resampled means `[resamples]`, NaN left out."""
    known = cloud[np.isfinite(cloud)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Interval(mean, float(low), float(high), n, known)


def interval(values: Floats, groups: NDArray[Any] | None = None, resamples: int = 2000) -> Interval:
    """Mean of `values` `[n]` or `[seeds, n]`, NaN left out, resampled by groups (labels `[n]`;
    default: each value its own) and over seeds. Below two groups there are no bounds."""
    rows = np.atleast_2d(values)
    seeds, size = rows.shape
    known, labels = np.isfinite(rows).any(0), np.arange(size) if groups is None else groups
    rows, labels = rows[:, known], labels[known]
    n, mean = len(np.unique(labels)), float(np.nanmean(rows)) if known.any() else math.nan
    if n < 2:
        return percentiles(np.empty(0), mean, n)
    by_seed = draws(rows, labels, resamples) * drawn(seeds, resamples, seed=1)
    return percentiles(by_seed.sum(1) / seeds, mean, n)
