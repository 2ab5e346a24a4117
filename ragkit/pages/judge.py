"""Is a reader of one's own fit to teach a retriever? Both indicators on a few hundred questions.

from ragkit.pages import judge, judge_page
judge_page.write_html(judge.judge("path/to/reader", "questions.jsonl"), Path("judgement.html"))
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoConfig

from ragkit.errors import NounsError
from ragkit.experiment.evidence import LINE
from ragkit.indicators import measures
from ragkit.indicators.closeness import Spans, look_at_tokens, space, wanted_ids
from ragkit.indicators.measures import Floats, Ints, Tokens
from ragkit.indicators.metrics import Interval, interval
from ragkit.indicators.nouns import find_nouns, load_nouns
from ragkit.models.fid import load_reader
from ragkit.models.loading import loading
from ragkit.models.reader import Reader, embedded_reader
from ragkit.pages.asked import Asked, has_word, holding, read_asked, usable
from ragkit.settings import AttentionSettings, IndicatorSettings, ReaderSettings

log = logging.getLogger(__name__)
ENOUGH = 30  # questions below which no line is drawn
ABOVE, BELOW, UNSURE = "above the line", "below the line", "cannot tell"
GOALS = {"answer": "Indicator 1 (the answer)", "nouns": "Indicator 2 (the question's nouns)"}
SHARE = IndicatorSettings().share
CHAT = (
    "The reader has a chat template, but is asked by ragkit's plain prompt without it: within the "
    "template it may attend otherwise."
)
Tables = Mapping[str, Mapping[str, pd.DataFrame]]


@dataclass(frozen=True)
class Check:
    """One reason of a verdict: ABOVE, BELOW or UNSURE, and the numbers behind it in words."""

    name: str
    verdict: str
    told: str


@dataclass(frozen=True)
class Judgement:
    """What `judge` found.

    `attention` `[tokens]` is that of `tokens`, as the reader saw them; `nouns` are each question's,
    by their characters, None if they could not be found. `tables` has what `measure` gives for each
    goal. The `checks` make the verdict; `direct` stands beside it. `counts` says what was left out,
    cut or needs care, `how` what was judged by what.
    """

    reader: Reader
    asked: list[Asked]
    tokens: Tokens
    attention: Floats
    nouns: Spans | None
    tables: Tables
    verdict: str
    checks: list[Check]
    direct: Check
    counts: dict[str, int]
    how: dict[str, str]
    seconds: float


def load(name: str) -> Reader:
    """A reader with as long a context as its positions allow."""
    path = str(embedded_reader()) if name == "embedded" else name
    log.info("loading  reader %s", name)
    with loading(path):
        config = AutoConfig.from_pretrained(path).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or ReaderSettings().context
    return load_reader(name, ReaderSettings(model=name, context=context))


def measure(
    tokens: Tokens, attention: Floats, embed: Callable[[Ints], Floats], wanted: list[list[int]]
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """An indicator, a row a question, by space, and `tenths`: the lift of tenths by closeness.

    Spaces: `measured` (with `lead`, its lift minus the control's), the control `permuted` (the
    vectors are dealt out anew for each question), and `overlap` with the wanted tokens alone.
    `embed` gives the vectors of tokens `[ids, d]`. Then how many questions have no Spearman, tokens
    no vector, questions the same closest tokens in the control.
    """
    question = tokens.question
    close = measures.closeness_to(tokens, wanted, embed)
    dealt = measures.closeness_to(tokens, wanted, embed, np.random.default_rng(0))
    exact = measures.exact(tokens, wanted)
    overlap = np.where((np.bincount(question, exact) > 0)[question], exact, np.nan)
    spaces = {"measured": (close, SHARE), "permuted": (dealt, SHARE)}
    spaces["overlap"] = (overlap, 0.0)  # the closest token and its equals: the exact ones
    tables = {
        space: measures.indicator(attention, one, question, exact, share).iloc[:, 1:]
        for space, (one, share) in spaces.items()
    }
    tables["overlap"] = tables["overlap"][["attention", "Spearman"]]
    alike = measures.alike(close, dealt, question, exact, SHARE)
    lead = tables["measured"]["attention"] - tables["permuted"]["attention"]
    tables["measured"]["lead"] = lead.mask(alike)
    lifts = measures.deciles(attention, close, question)
    tables["tenths"] = pd.DataFrame(lifts, columns=range(1, 11))
    asked = np.array([len(ids) > 0 for ids in wanted])
    known = (np.bincount(question, np.isfinite(close)) > 0)[question]
    undefined = asked & tables["measured"]["Spearman"].isna()
    lacking = {"Spearman": undefined, "vectors": known & np.isnan(close), "control": alike}
    return tables, {what: int(which.sum()) for what, which in lacking.items()}


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


def direct_check(asked: list[Asked], tokens: Tokens, attention: Floats) -> Check:
    """Does the passage with most attention hold the answer more often than one drawn at random?

    Only questions with the answer in some passages and not in all can tell.
    """
    first, chance = [], []
    places = measures.by_question(tokens.question, len(asked))
    for mine, (question, passages) in zip(places, asked, strict=True):
        found, size = holding(question, passages), len(passages)
        if 0 < len(found) < size:
            scores = np.bincount(tokens.owner[mine], attention[mine], size)
            first.append(int(scores.argmax()) in found)
            chance.append(len(found) / size)
    name = "The passage with most attention holds the answer. The line: chance"
    if not first:
        told = "No question has its answer in some of its passages and not in others."
        return Check(name, UNSURE, told)
    told = f"In {np.mean(first):.3f} of the questions, against {np.mean(chance):.3f} by chance"
    return check(name, interval(np.array(first) - np.array(chance)), 0.0, f"{told}; difference")


def checks_of(tables: Tables, why_not: str) -> list[Check]:
    """Indicator 2's Spearman against the paper's line, each indicator's lift against its control.

    `why_not` says why `nouns` is not among the goals of the `tables`.
    """
    name = f"Indicator 2, Spearman. The line: the paper's {LINE}"
    checks = [Check(name, UNSURE, f"Not computed. {why_not}")]
    if "nouns" in tables:
        told = "Mean Spearman between attention and closeness to the question's nouns"
        checks = [check(name, mean_of(tables["nouns"]["measured"]["Spearman"]), LINE, told)]
    told = (
        "Lift, minus that of the tokens which are closest with the space's vectors dealt out anew"
    )
    for goal, table in tables.items():
        name = f"{GOALS[goal]}, lift of the closest {SHARE:.0%}. The line: its control"
        checks.append(check(name, mean_of(table["measured"]["lead"]), 0.0, told))
    return checks


def verdict_of(checks: list[Check]) -> str:
    """ABOVE if every check is, BELOW if any is, else UNSURE."""
    found = {one.verdict for one in checks}
    return BELOW if BELOW in found else ABOVE if found == {ABOVE} else UNSURE


def nouns_of(asked: list[Asked], pipeline: str) -> tuple[Spans | None, str]:
    """The nouns of the questions, or None and why they cannot be found."""
    try:
        return find_nouns(load_nouns(pipeline), [question.text for question, _ in asked]), ""
    except NounsError as error:
        log.warning("Indicator 2 is not computed. %s", error)
        return None, str(error)


def judge(
    name: str, questions: str, nouns: str = "en_core_web_sm", other: str | None = None
) -> Judgement:
    """Judges a reader (a folder, a hub name, or `embedded`) on questions with passages.

    `questions`: a file, see `read_asked`. `nouns` is a spaCy pipeline, by name or folder; without
    one Indicator 2 is not computed, the rest is. Closeness is measured in the input embeddings of
    the reader `other`, by default its own: readers compare only within one space. Attention is read
    as profiles do by default: last row of the prompt, value norm, mean of all layers. It cannot
    know whether passages are true.
    """
    started, counts = time.monotonic(), Counter[str]()
    given, reader = read_asked(Path(questions)), load(name)
    model = load(other) if other else reader
    if is_chat := bool(getattr(reader.tokenizer, "chat_template", None)):
        log.warning("%s", CHAT)
    log.info("cutting  %d questions with their passages into tokens", len(given))
    asked = usable(reader, given, counts)
    texts, found = [question for question, _ in asked], [passages for _, passages in asked]
    spans, why_not = nouns_of(asked, nouns)
    log.info("reading  %d prompts, one pass over each", len(asked))
    tokens, embed = look_at_tokens(reader, texts, found), space(reader, model)
    attention = tokens.attention(AttentionSettings())
    wanted, tables = wanted_ids(reader, texts, spans), {}
    pairs = zip(texts, wanted["answer"], strict=True)
    wanted["answer"] = [ids if has_word(one.answers[0]) else [] for one, ids in pairs]
    counts["no noun"] = sum(not ids for ids in wanted.get("nouns", []))
    for goal, ids in wanted.items():
        log.info("measuring %s (%.0f s so far)", GOALS[goal], time.monotonic() - started)
        tables[goal], lacking = measure(tokens, attention, embed, ids)
        counts.update({f"{goal} {what}": count for what, count in lacking.items()})
    how = {
        "Reader": name,
        "Prompt": CHAT if is_chat else "ragkit's plain prompt",
        "Closeness is measured in the input embeddings of": other or "its own",
        "Nouns found by": nouns if spans is not None else "none",
        "Passages a question, on average": f"{np.mean([len(one) for one in found]):.1f}",
    }
    checks = checks_of(tables, why_not)
    return Judgement(
        reader, asked, tokens, attention, spans, tables, verdict_of(checks), checks,
        direct_check(asked, tokens, attention), counts, how, time.monotonic() - started,
    )  # fmt: skip
