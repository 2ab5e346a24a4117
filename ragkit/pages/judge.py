"""Is a reader of one's own fit to teach a retriever? Both indicators on a few hundred questions, with a verdict and its reasons.

import ragkit
from ragkit.pages.judge_page import write_html
write_html(ragkit.judge("path/to/reader", "questions.jsonl"), Path("judgement.html"))
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from ragkit.data.questions import Question
from ragkit.distillation.teacher import ROWS
from ragkit.errors import JudgeError, NounsError, ReaderError
from ragkit.experiment.evidence import LINE
from ragkit.indicators import measures as indicators
from ragkit.indicators.measures import PLACES, Floats, Tokens
from ragkit.indicators.metrics import Interval, interval, words
from ragkit.indicators.nouns import HOW_TO_GET_ONE, find_nouns, load_nouns
from ragkit.models.reader import Reader, embedded_reader
from ragkit.models.retriever import loading
from ragkit.pages.asked import Asked, holding, read_asked
from ragkit.profile import AttentionSettings, IndicatorSettings, ReaderSettings

log = logging.getLogger(__name__)
ENOUGH = 30  # questions below which no line is drawn
EXAMPLES = 3
ABOVE, BELOW, UNSURE = "above the line", "below the line", "cannot tell"
GOALS = {"answer": "Indicator 1 (the answer)", "nouns": "Indicator 2 (the question's nouns)"}
SHARE = IndicatorSettings().share


@dataclass(frozen=True)
class Check:
    """One reason of a verdict: ABOVE, BELOW or UNSURE, and the numbers behind it in words."""

    name: str
    verdict: str
    told: str


@dataclass(frozen=True)
class Example:
    """A question as the reader saw it: its passages' tokens (see `views.marked_tokens`) with their lift."""

    question: Question
    nouns: list[tuple[int, int]]
    titles: list[str]
    tokens: list[str]
    lifts: list[float]
    owners: list[int]


@dataclass(frozen=True)
class Judgement:
    """What `judge` found.

    `numbers` has a row for each number of each indicator: goal, number, space (`measured`, `permuted`, `overlap`), mean,
    low, high, n (questions behind it). `per_question` has a row a question, with the measured numbers by goal. `tenths` has the
    mean lift of each tenth of the tokens by closeness. `mass` is the share of plain attention on each of PLACES. `counts` says what was
    left out, cut or needs care. `checks` make the verdict; `direct` stands beside it.
    """

    reader: str
    space: str
    nouns: str
    questions: int
    passages: float
    verdict: str
    checks: list[Check]
    direct: Check
    numbers: pd.DataFrame
    per_question: pd.DataFrame
    tenths: pd.DataFrame
    mass: dict[str, float]
    counts: dict[str, int]
    examples: list[Example]
    seconds: float


def load(name: str) -> Reader:
    """A reader with as long a context as its positions allow."""
    path = str(embedded_reader()) if name == "embedded" else name
    with loading(path):
        config = AutoConfig.from_pretrained(path)
    context = getattr(config, "max_position_embeddings", None) or ReaderSettings().context
    reader = Reader.load(name, ReaderSettings(model=name, context=context))
    if reader.end is None:
        raise JudgeError(
            f"The tokenizer of {name!r} names no end token (eos_token), which closes every answer. Set it in tokenizer_config.json."
        )
    return reader


def usable(reader: Reader, asked: list[Asked], counts: Counter[str]) -> list[Asked]:
    """The questions that the reader can be asked; `counts` takes up the others, and what is cut or needs care."""
    kept = []
    for (question, passages), answer in zip(
        asked, indicators.answer_ids(reader, [q for q, _ in asked]), strict=True
    ):
        if not answer:
            counts["questions left out: the reader's tokenizer has no token for the answer"] += 1
            continue
        try:
            prompt = reader.prompt(question, passages, question.answers[0])
        except ReaderError:
            counts[
                "questions left out: longer than the reader's context, even without passages"
            ] += 1
            continue
        kept.append((question, passages))
        counts[
            f"prompts cut to the reader's context of {reader.settings.context} tokens, the same share of each passage"
        ] += prompt.trimmed > 0
        counts["answers that stand in no passage (kept)"] += not holding(question, passages)
        counts["answers of one character (kept: such a token is common)"] += (
            has_word(question.answers[0]) and len(question.answers[0]) == 1
        )
        counts["answers of only punctuation (left out of Indicator 1)"] += not has_word(
            question.answers[0]
        )
    if not kept:
        raise JudgeError(
            "The reader can be asked none of the questions: "
            + ", ".join(f"{count} {what}" for what, count in counts.items())
            + "."
        )
    return kept


def has_word(answer: str) -> bool:
    return any(word[0].isalnum() for word in words(answer))


def noun_spans(
    model: str, questions: Sequence[Question]
) -> tuple[list[list[tuple[int, int]]] | None, str]:
    """Each question's nouns as character spans, or None with the reason."""
    try:
        return find_nouns(load_nouns(model), [q.text for q in questions]), ""
    except NounsError as error:
        why = str(error).removesuffix(HOW_TO_GET_ONE).strip()
        return (
            None,
            f"{why} Install en_core_web_sm (python -m spacy download en_core_web_sm), or give a pipeline's name or folder with --nouns.",
        )


@dataclass(frozen=True)
class Look:
    """What one pass of the reader showed, and the space in which closeness is measured.

    `attention` `[tokens]` belongs to `tokens`; `table` `[vocabulary, d]` are the space's embeddings, `owner` its tokenizer.
    """

    reader: Reader
    asked: list[Asked]
    tokens: Tokens
    attention: Floats
    table: Tensor
    owner: PreTrainedTokenizerBase

    def of(self, number: int) -> NDArray[np.bool_]:
        """Which tokens belong to a question `[tokens]`."""
        return self.tokens.question == number

    def per_token(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether any token of the same question is flagged `[tokens]`."""
        return (np.bincount(self.tokens.question, weights=flags) > 0)[self.tokens.question]

    def closeness(
        self, wanted: list[list[int]], dealt: np.random.Generator | None = None
    ) -> Floats:
        """Closeness of each passage token to its question's wanted tokens `[tokens]`.

        With `dealt` the vectors are dealt out anew among all tokens, for each question again: were it once for all, common
        words would have the same luck everywhere, which no interval over questions shows.
        """
        ids = np.unique(
            np.concatenate([self.tokens.ids, *(np.array(goal, dtype=np.int64) for goal in wanted)])
        )
        vectors = indicators.embeddings(self.reader.tokenizer, ids, self.table, self.owner)
        there, order = np.flatnonzero(np.isfinite(vectors).all(1)), np.arange(len(ids))
        close = np.full(len(self.tokens.ids), np.nan)
        for number, goal in enumerate(wanted):
            mine = self.of(number)
            at, goals = (
                np.searchsorted(ids, self.tokens.ids[mine]),
                np.searchsorted(ids, np.array(goal, dtype=np.int64)),
            )
            if dealt is not None:
                order[there] = dealt.permutation(there)
            close[mine] = indicators.closeness(vectors[order[at]], vectors[order[goals]])
        return close

    def by_question(
        self, close: Floats, exact: NDArray[np.bool_], share: float = SHARE
    ) -> pd.DataFrame:
        """An indicator's numbers, a row a question, NaN where undefined."""
        made = indicators.indicator(self.attention, close, self.tokens.question, exact, share)
        return made.set_index("question").reindex(range(len(self.asked))).reset_index(drop=True)


def undefined(attention: Floats, close: Floats) -> str:
    """Why Spearman is undefined over one question's tokens; empty where it is defined."""
    there = np.isfinite(close)
    if not there.any():
        return "what is asked for has no embedding in the space"
    if there.sum() < 3:
        return "fewer than three passage tokens"
    if np.ptp(attention[there]) == 0:
        return "all tokens have the same attention"
    return "all tokens are equally close" if np.ptp(close[there]) == 0 else ""


def mean_of(values: pd.Series) -> Interval:
    return interval(values.dropna().to_numpy(dtype=np.float64))


@dataclass(frozen=True)
class Measured:
    """One indicator: `numbers` and `tenths` are rows of a Judgement's tables; `each` has a row a question; `lead` is over the control."""

    numbers: list[dict[str, Any]]
    tenths: list[dict[str, Any]]
    each: pd.DataFrame
    lead: Interval


def measure(look: Look, goal: str, wanted: list[list[int]], counts: Counter[str]) -> Measured:
    """An indicator in the space, in the space with its vectors dealt out anew, and by lexical overlap alone; `counts` takes up what is left out."""
    close = look.closeness(wanted)
    exact = np.concatenate(
        [np.isin(look.tokens.ids[look.of(number)], ids) for number, ids in enumerate(wanted)]
    )
    overlap = np.where(look.per_token(exact), exact, np.nan)
    tables = {
        "measured": look.by_question(close, exact),
        "permuted": look.by_question(look.closeness(wanted, np.random.default_rng(0)), exact),
        "overlap": look.by_question(overlap, exact, share=0)[
            ["attention", "Spearman"]
        ],  # the closest token and its equals: the exact ones
    }
    for number, ids in enumerate(wanted):
        if ids and (why := undefined(look.attention[look.of(number)], close[look.of(number)])):
            counts[f"questions left out of the Spearman of {GOALS[goal]}: {why}"] += 1
    lost = look.per_token(np.isfinite(close)) & np.isnan(close)
    counts[f"passage tokens without an embedding in the space (left out of {GOALS[goal]})"] += int(
        lost.sum()
    )
    lifts = indicators.deciles(look.attention, close, look.tokens.question)
    return Measured(
        [
            {"goal": goal, "number": name, "space": space, **asdict(mean_of(one[name]))}
            for space, one in tables.items()
            for name in one
        ],
        [
            {"goal": goal, "tenth": place + 1, **asdict(interval(column[np.isfinite(column)]))}
            for place, column in enumerate(lifts.T)
        ],
        tables["measured"],
        mean_of(tables["measured"]["attention"] - tables["permuted"]["attention"]),
    )


def check(name: str, value: Interval, line: float, told: str) -> Check:
    """On which side of a line an interval lies, given enough questions."""
    if value.n < ENOUGH:
        shown = f"{value} " if value.n > 1 else ""
        return Check(
            name,
            UNSURE,
            f"{told}: {shown}over {value.n} questions, too few to tell: at least {ENOUGH} with a value are needed.",
        )
    found = ABOVE if value.low > line else BELOW if value.high < line else UNSURE
    return Check(name, found, f"{told}: {value} over {value.n} questions.")


def direct_check(look: Look) -> Check:
    """Does the passage with most attention hold the answer more often than one drawn at random?

    Only questions with the answer in some passages and not in all can tell. No part of the paper's heuristic.
    """
    first, chance = [], []
    for number, (question, passages) in enumerate(look.asked):
        found, mine = holding(question, passages), look.of(number)
        if 0 < len(found) < len(passages):
            scores = np.bincount(
                look.tokens.owner[mine], weights=look.attention[mine], minlength=len(passages)
            )
            first.append(int(scores.argmax()) in found)
            chance.append(len(found) / len(passages))
    name = "The passage with most attention holds the answer. The line: chance"
    if not first:
        return Check(
            name, UNSURE, "No question has its answer in some of its passages and not in others."
        )
    told = f"In {np.mean(first):.3f} of the questions, against {np.mean(chance):.3f} by chance; difference"
    return check(name, interval(np.array(first) - np.array(chance)), 0.0, told)


def checks_of(measured: dict[str, Measured], why_not: str) -> list[Check]:
    """The reasons of a verdict: Indicator 2's Spearman against the paper's line, and each indicator's lift against its control."""
    name = f"Indicator 2, Spearman. The line: the paper's {LINE}"
    if "nouns" in measured:
        rho = mean_of(measured["nouns"].each["Spearman"])
        line = check(
            name, rho, LINE, "Mean Spearman between attention and closeness to the question's nouns"
        )
    else:
        line = Check(name, UNSURE, f"Not computed. {why_not}")
    told = (
        "Lift, minus that of the tokens which are closest with the space's vectors dealt out anew"
    )
    return [
        line,
        *(
            check(
                f"{GOALS[goal]}, lift of the closest {SHARE:.0%}. The line: its control",
                one.lead,
                0.0,
                told,
            )
            for goal, one in measured.items()
        ),
    ]


def verdict_of(checks: list[Check]) -> str:
    """ABOVE if every check is, BELOW if any is, else UNSURE."""
    found = {one.verdict for one in checks}
    return BELOW if BELOW in found else ABOVE if found == {ABOVE} else UNSURE


def spelt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as texts; one that goes on with a word begins with `##`, as `views.marked_tokens` wants it."""
    raw = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    begins = (
        "Ġ",
        "▁",
        "Ċ",
    )  # how byte-level and SentencePiece vocabularies write what stands before a word
    if not any(token.startswith(begins) for token in raw):
        return raw
    return [
        ("" if token.startswith(begins) else "##") + str(tokenizer.decode([i])).strip()
        for token, i in zip(raw, ids, strict=True)
    ]


def examples_of(look: Look, spans: list[list[tuple[int, int]]] | None) -> list[Example]:
    """The first questions, so that none is picked."""
    lifts, found = indicators.lift(look.attention, look.tokens.question), []
    for number, (question, passages) in enumerate(look.asked[:EXAMPLES]):
        mine = look.of(number)
        tokens = spelt(look.reader.tokenizer, look.tokens.ids[mine].tolist())
        titles = [passage.title for passage in passages]
        found.append(
            Example(
                question,
                spans[number] if spans else [],
                titles,
                tokens,
                lifts[mine].tolist(),
                look.tokens.owner[mine].tolist(),
            )
        )
    return found


def judge(
    reader_name: str,
    questions: str | Path | Sequence[dict[str, Any]],
    nouns: str = "en_core_web_sm",
    space_reader: str | None = None,
) -> Judgement:
    """Judges a reader (a folder, a hub name, or `embedded`) on questions with passages (see `read_asked`).

    `nouns` is a spaCy pipeline, by name or folder; without one Indicator 2 is not computed, the rest is. Closeness is
    measured in the input embeddings of `space_reader`, by default the reader's own: readers compare only within one
    space. Attention is read as the companion's profiles do by default: last row of the prompt, value norm, mean of all layers.
    """
    started, settings = time.monotonic(), AttentionSettings()
    asked = read_asked(questions)
    reader = load(reader_name)
    space = load(space_reader) if space_reader else reader
    counts: Counter[str] = Counter()
    asked = usable(reader, asked, counts)
    texts, found = zip(*asked, strict=True)
    spans, why_not = noun_spans(nouns, texts)
    if spans is None:
        log.warning("Indicator 2 is not computed. %s", why_not)
    tokens = indicators.look_at_tokens(reader, texts, found)
    look = Look(
        reader,
        asked,
        tokens,
        tokens.attention(settings),
        space.model.get_input_embeddings().weight.detach(),
        space.tokenizer,
    )
    wanted = {
        "answer": [
            ids if has_word(q.answers[0]) else []
            for q, ids in zip(texts, indicators.answer_ids(reader, texts), strict=True)
        ]
    }
    if spans is not None:
        pairs = zip(texts, spans, strict=True)
        wanted["nouns"] = [
            [token for token, inside in indicators.within_spans(reader, q.text, places) if inside]
            for q, places in pairs
        ]
        counts["questions without a noun (left out of Indicator 2)"] += sum(
            not ids for ids in wanted["nouns"]
        )
    measured = {goal: measure(look, goal, tokens_of, counts) for goal, tokens_of in wanted.items()}
    checks, ids = checks_of(measured, why_not), pd.Series([q.id for q in texts], name="question")
    return Judgement(
        reader=reader_name,
        space=space_reader or "its own",
        nouns=nouns if spans is not None else "none",
        questions=len(asked),
        passages=float(np.mean([len(passages) for passages in found])),
        verdict=verdict_of(checks),
        checks=checks,
        direct=direct_check(look),
        numbers=pd.DataFrame([row for one in measured.values() for row in one.numbers]),
        per_question=pd.concat(
            [ids, *(one.each.add_prefix(f"{goal} ") for goal, one in measured.items())], axis=1
        ),
        tenths=pd.DataFrame([row for one in measured.values() for row in one.tenths]),
        mass=dict(
            zip(PLACES, tokens.mass[:, ROWS.index(settings.rows)].mean(0).tolist(), strict=True)
        ),
        counts={what: count for what, count in counts.items() if count},
        examples=examples_of(look, spans),
        seconds=time.monotonic() - started,
    )
