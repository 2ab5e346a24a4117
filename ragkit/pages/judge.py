"""Is a reader of one's own fit to teach a retriever? Both indicators on a few hundred questions.

from ragkit.pages.judge import judge
from ragkit.pages.judge_page import write_html
write_html(judge("path/to/reader", "questions.jsonl"), Path("judgement.html"))
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoConfig, PreTrainedTokenizerBase

from ragkit.errors import JudgeError, NounsError
from ragkit.experiment.evidence import LINE
from ragkit.indicators import measures
from ragkit.indicators.closeness import Spans, embeddings, wanted_ids
from ragkit.indicators.measures import PLACES, Floats, Ints, Tokens
from ragkit.indicators.metrics import Interval, interval
from ragkit.indicators.nouns import HOW_TO_GET_ONE, find_nouns, load_nouns
from ragkit.indicators.tokens import look_at_tokens
from ragkit.models.fid import load_reader
from ragkit.models.loading import loading
from ragkit.models.reader import Reader, embedded_reader
from ragkit.pages.asked import Asked, has_word, holding, read_asked, usable
from ragkit.settings import ROWS, AttentionSettings, IndicatorSettings, ReaderSettings

log = logging.getLogger(__name__)
ENOUGH = 30  # questions below which no line is drawn
ABOVE, BELOW, UNSURE = "above the line", "below the line", "cannot tell"
GOALS = {"answer": "Indicator 1 (the answer)", "nouns": "Indicator 2 (the question's nouns)"}
SHARE = IndicatorSettings().share
CHAT = (
    "The reader has a chat template, but is asked by ragkit's plain prompt without it: within the "
    "template it may attend otherwise."
)
HOW_TO_FIND_NOUNS = (
    "Give --nouns an installed spaCy pipeline's name (python -m spacy download en_core_web_sm, "
    "which needs the network), or a pipeline's folder: the one with its config.cfg."
)


@dataclass(frozen=True)
class Check:
    """One reason of a verdict: ABOVE, BELOW or UNSURE, and the numbers behind it in words."""

    name: str
    verdict: str
    told: str


@dataclass(frozen=True)
class Look:
    """What one pass of the reader showed: `attention` `[tokens]` belongs to `tokens`.

    `nouns` are each question's, as character spans, None if they could not be found. `embed` gives
    the vectors of tokens `[ids, d]` in the space where closeness is measured.
    """

    asked: list[Asked]
    tokens: Tokens
    attention: Floats
    nouns: Spans | None
    embed: Callable[[Ints], Floats]
    tokenizer: PreTrainedTokenizerBase

    @property
    def places(self) -> list[slice]:
        """Where each question's tokens stand."""
        return measures.by_question(self.tokens.question, len(self.asked))


@dataclass(frozen=True)
class Judgement:
    """What `judge` found.

    `numbers` has a row for each number of each indicator: goal, number, space (`measured`,
    `permuted`, `overlap`), mean, low, high, n (questions behind it). `per_question` has a row a
    question, with the measured numbers by goal; `lead` is the lift minus that in the permuted
    space. `tenths` has the mean lift of each tenth of the tokens by closeness. `mass` is the share
    of plain attention on each of PLACES. `counts` says what was left out, cut or needs care. `how`
    says what was judged by what. `checks` make the verdict; `direct` stands beside it.
    """

    reader: str
    verdict: str
    checks: list[Check]
    direct: Check
    numbers: pd.DataFrame
    per_question: pd.DataFrame
    tenths: pd.DataFrame
    mass: dict[str, float]
    counts: dict[str, int]
    how: dict[str, str]
    look: Look
    seconds: float

    @property
    def questions(self) -> int:
        return len(self.look.asked)


def load(name: str) -> Reader:
    """A reader with as long a context as its positions allow."""
    path = str(embedded_reader()) if name == "embedded" else name
    log.info("loading  reader %s", name)
    with loading(path):
        config = AutoConfig.from_pretrained(path).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or ReaderSettings().context
    reader = load_reader(name, ReaderSettings(model=name, context=context))
    if reader.end is None:
        raise JudgeError(
            f"The tokenizer of {name!r} names no end token (eos_token), which closes every answer. "
            "Set it in tokenizer_config.json."
        )
    return reader


def measure(
    look: Look, goal: str, wanted: list[list[int]], counts: Counter[str]
) -> tuple[dict[str, pd.DataFrame], Floats]:
    """An indicator, a row a question, by space, and its lift by tenths `[questions, 10]`.

    Measured, in the control (`permuted`: the vectors are dealt out anew for each question), and by
    `overlap` with the wanted tokens alone. `counts` takes up what is left out.
    """
    tokens, question, name = look.tokens, look.tokens.question, GOALS[goal]
    close = measures.closeness_to(tokens, wanted, look.embed)
    dealt = measures.closeness_to(tokens, wanted, look.embed, np.random.default_rng(0))
    exact = measures.exact(tokens, wanted)
    overlap = np.where((np.bincount(question, exact) > 0)[question], exact, np.nan)
    spaces = {"measured": (close, SHARE), "permuted": (dealt, SHARE)}
    spaces["overlap"] = (overlap, 0.0)  # the closest token and its equals: the exact ones
    tables = {
        space: measures.indicator(look.attention, one, question, exact, share).iloc[:, 1:]
        for space, (one, share) in spaces.items()
    }
    tables["overlap"] = tables["overlap"][["attention", "Spearman"]]
    alike = measures.alike(close, dealt, question, exact, SHARE)
    lead = tables["measured"]["attention"] - tables["permuted"]["attention"]
    tables["measured"]["lead"] = lead.mask(alike)
    known = np.bincount(question, np.isfinite(close)) > 0
    asked = np.array([len(ids) > 0 for ids in wanted])
    for what, which in (
        (f"questions left out of the Spearman of {name}: fewer than three tokens with an embedding "
         "in the space, or all equally close or attended",
         asked & tables["measured"]["Spearman"].isna()),
        (f"passage tokens left out of {name}: without an embedding in the space",
         known[question] & np.isnan(close)),
        (f"questions left out of the lift of {name} over its control: the closest tokens are the "
         "same ones in both", alike),
    ):  # fmt: skip
        counts[what] += int(which.sum())
    return tables, measures.deciles(look.attention, close, question)


def mean_of(values: Any) -> Interval:
    """The mean of what is defined."""
    known = np.asarray(values, dtype=np.float64)
    return interval(known[np.isfinite(known)])


def check(name: str, value: Interval, line: float, told: str) -> Check:
    """On which side of a line an interval lies, given enough questions."""
    if value.n < ENOUGH:
        shown = f": {value}" if value.n > 1 else ""
        why = f"too few to tell: at least {ENOUGH} with a value are needed"
        return Check(name, UNSURE, f"{told}{shown} over {value.n} questions, {why}.")
    found = ABOVE if value.low > line else BELOW if value.high < line else UNSURE
    return Check(name, found, f"{told}: {value} over {value.n} questions.")


def direct_check(look: Look) -> Check:
    """Does the passage with most attention hold the answer more often than one drawn at random?

    Only questions with the answer in some passages and not in all can tell.
    """
    first, chance = [], []
    for mine, (question, passages) in zip(look.places, look.asked, strict=True):
        found, size = holding(question, passages), len(passages)
        if 0 < len(found) < size:
            scores = np.bincount(look.tokens.owner[mine], look.attention[mine], size)
            first.append(int(scores.argmax()) in found)
            chance.append(len(found) / size)
    name = "The passage with most attention holds the answer. The line: chance"
    if not first:
        told = "No question has its answer in some of its passages and not in others."
        return Check(name, UNSURE, told)
    told = f"In {np.mean(first):.3f} of the questions, against {np.mean(chance):.3f} by chance"
    return check(name, interval(np.array(first) - np.array(chance)), 0.0, f"{told}; difference")


def checks_of(measured: dict[str, pd.DataFrame], why_not: str) -> list[Check]:
    """Indicator 2's Spearman against the paper's line, each indicator's lift against its control.

    `measured` has the measured table of each goal; `why_not` says why `nouns` is not among them.
    """
    name = f"Indicator 2, Spearman. The line: the paper's {LINE}"
    checks = [Check(name, UNSURE, f"Not computed. {why_not}")]
    if "nouns" in measured:
        told = "Mean Spearman between attention and closeness to the question's nouns"
        checks = [check(name, mean_of(measured["nouns"]["Spearman"]), LINE, told)]
    control = "the tokens which are closest with the space's vectors dealt out anew"
    for goal, table in measured.items():
        name = f"{GOALS[goal]}, lift of the closest {SHARE:.0%}. The line: its control"
        checks.append(check(name, mean_of(table["lead"]), 0.0, f"Lift, minus that of {control}"))
    return checks


def verdict_of(checks: list[Check]) -> str:
    """ABOVE if every check is, BELOW if any is, else UNSURE."""
    found = {one.verdict for one in checks}
    return BELOW if BELOW in found else ABOVE if found == {ABOVE} else UNSURE


def judge(
    reader_name: str,
    questions: str | Path | Sequence[dict[str, Any]],
    nouns: str = "en_core_web_sm",
    space_reader: str | None = None,
) -> Judgement:
    """Judges a reader (a folder, a hub name, or `embedded`) on questions with passages.

    `questions`: see `read_asked`. `nouns` is a spaCy pipeline, by name or folder; without one
    Indicator 2 is not computed, the rest is. Closeness is measured in the input embeddings of
    `space_reader`, by default the reader's own: readers compare only within one space. Attention is
    read as the companion's profiles do by default: last row of the prompt, value norm, mean of all
    layers. It cannot know whether passages are true.
    """
    started, settings, why_not = time.monotonic(), AttentionSettings(), ""
    counts: Counter[str] = Counter()
    given = read_asked(questions)
    reader = load(reader_name)
    space = load(space_reader) if space_reader else reader
    if is_chat := bool(getattr(reader.tokenizer, "chat_template", None)):
        log.warning("%s", CHAT)
    log.info("cutting  %d questions with their passages into tokens", len(given))
    asked = usable(reader, given, counts)
    texts, found = [question for question, _ in asked], [passages for _, passages in asked]
    spans: Spans | None = None
    try:
        spans = find_nouns(load_nouns(nouns), [question.text for question in texts])
    except NounsError as error:
        why_not = f"{str(error).removesuffix(HOW_TO_GET_ONE)}{HOW_TO_FIND_NOUNS}"
        log.warning("Indicator 2 is not computed. %s", why_not)
    log.info("reading  %d prompts, one pass over each", len(asked))
    tokens = look_at_tokens(reader, texts, found)
    table = space.model.get_input_embeddings().weight
    embed = partial(embeddings, reader.tokenizer, table=table, owner=space.tokenizer)
    look = Look(asked, tokens, tokens.attention(settings), spans, embed, reader.tokenizer)
    wanted = wanted_ids(reader, texts, spans)
    pairs = zip(texts, wanted["answer"], strict=True)
    wanted["answer"] = [ids if has_word(one.answers[0]) else [] for one, ids in pairs]
    without = sum(not ids for ids in wanted.get("nouns", []))
    counts["questions without a noun (left out of Indicator 2)"] += without
    numbers, tenths, measured = [], [], {}
    for goal, ids in wanted.items():
        log.info("measuring %s (%.0f s so far)", GOALS[goal], time.monotonic() - started)
        tables, lifts = measure(look, goal, ids, counts)
        measured[goal] = tables["measured"]
        for which, one in tables.items():
            for name in one:
                row = {"goal": goal, "number": name, "space": which}
                numbers.append(row | asdict(mean_of(one[name])))
        for tenth, column in enumerate(lifts.T, 1):
            tenths.append({"goal": goal, "tenth": tenth} | asdict(mean_of(column)))
    checks = checks_of(measured, why_not)
    mass = tokens.mass[:, ROWS.index(settings.rows)].mean(0).tolist()
    names = pd.Series([question.id for question in texts], name="question")
    each = [one.add_prefix(f"{goal} ") for goal, one in measured.items()]
    how = {
        "Reader": reader_name,
        "Prompt": CHAT if is_chat else "ragkit's plain prompt",
        "Closeness is measured in the input embeddings of": space_reader or "its own",
        "Nouns found by": nouns if spans is not None else "none",
        "Passages a question, on average": f"{np.mean([len(one) for one in found]):.1f}",
    }
    return Judgement(
        reader=reader_name,
        verdict=verdict_of(checks),
        checks=checks,
        direct=direct_check(look),
        numbers=pd.DataFrame(numbers),
        per_question=pd.concat([names, *each], axis=1),
        tenths=pd.DataFrame(tenths),
        mass=dict(zip(PLACES, mass, strict=True)),
        counts={what: count for what, count in counts.items() if count},
        how=how,
        look=look,
        seconds=time.monotonic() - started,
    )
