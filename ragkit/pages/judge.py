"""Is a reader of one's own fit to teach a retriever? Both indicators on a few hundred questions.

from ragkit.pages import judge
judge.write_html(judge.judge("path/to/reader", "questions.jsonl"), Path("judgement.html"))
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import AutoConfig

from ragkit.data.corpus import Passage, Question
from ragkit.data.files import read_jsonl, text_and_answers, write_whole
from ragkit.data.text import holds_answer, same_question, words
from ragkit.errors import DataError, NounsError, ReaderError, StoreError
from ragkit.experiment.rules import LINE
from ragkit.indicators import measures
from ragkit.indicators.closeness import Spans, look_at_tokens, space, wanted_ids
from ragkit.indicators.measures import Embed, Floats, Interval, Tokens, Wanted, interval
from ragkit.indicators.nouns import find_nouns, load_nouns
from ragkit.models import device
from ragkit.models.fid import load_reader
from ragkit.models.reader import Reader
from ragkit.pages import html
from ragkit.settings import EMBEDDED, ROWS, AttentionSettings, IndicatorSettings, ReaderSettings

log = logging.getLogger(__name__)
FEWEST, MOST = 2, 20  # passages of a question
ENOUGH = 30  # questions below which no line is drawn
ABOVE, BELOW, UNSURE = "above the line", "below the line", "cannot tell"
GOALS = {"answer": "Indicator 1 (the answer)", "nouns": "Indicator 2 (the question's nouns)"}
SPEARMAN = f"Indicator 2, Spearman. The line: the paper's {LINE}"
SHARE, READ = IndicatorSettings().share, AttentionSettings()  # as profiles do by default
EXAMPLES = 3  # shown on the page: the first questions, so that none is picked
DARKEST = 5.0  # lift from which tokens are equally dark: one sink would leave all others white
CHAT = "The reader has a chat template, but is asked by ragkit's plain prompt, without it."
Asked = tuple[Question, list[Passage]]
Tables = dict[str, dict[str, pd.DataFrame]]  # of a goal, what `measure` gives


class Check(NamedTuple):
    """One reason of a verdict: ABOVE, BELOW or UNSURE, and the numbers behind it in words."""

    name: str
    verdict: str
    told: str


@dataclass(frozen=True)
class Judgement:
    """What `judge` found. `nouns` are each question's, by their characters, None without a finder.
    The `checks` make the verdict, `direct` stands beside it. `counts` says what was left out or
    cut, `how` what was judged by what."""

    reader: Reader
    asked: list[Asked]
    tokens: Tokens
    nouns: Spans | None
    tables: Tables
    verdict: str
    checks: list[Check]
    direct: Check
    counts: Mapping[str, int]
    how: dict[str, str]


def read_asked(path: Path) -> list[Asked]:
    """Questions with their passages, from a file (see `read_jsonl`). Keys: `question`; `answer` or
    `answers` (see `text_and_answers`; the first counts); `passages` or DPR's `ctxs`, FEWEST to MOST
    objects with `text` and `title`; where known, `gold`: places of the passages that state the
    answer. Raises DataError that names line and key."""
    asked = []
    for line, row in read_jsonl(path):
        where, passages = f"{path}, line {line}", []
        text, answers = text_and_answers(row, where)
        given, gold = row.get("passages", row.get("ctxs")), row.get("gold") or []
        if not isinstance(given, list) or not FEWEST <= len(given) <= MOST:
            raise DataError(f"{where}: 'passages' must be a list of {FEWEST} to {MOST} objects.")
        for place, one in enumerate(given):
            told = one if isinstance(one, dict) else {}
            said, title = told.get("text"), told.get("title") or ""
            if not (isinstance(said, str) and said.strip() and isinstance(title, str)):
                wrong = "has no 'text', or a title that is no text. Mend it, or leave it out"
                raise DataError(f"{where}: passage {place} (counted from 0) {wrong}.")
            passages.append(Passage(str(place), title, said.strip()))
        places = range(len(given))
        if not isinstance(gold, list) or any(type(i) is not int or i not in places for i in gold):
            raise DataError(f"{where}: 'gold' must be places of passages, 0 to {places[-1]}.")
        asked.append((Question(f"{path.name}:{line}", text, answers, tuple(gold)), passages))
    if not asked:
        raise DataError(f"There are no questions in {path}. Give a few hundred.")
    return asked


def holding(question: Question, passages: Sequence[Passage]) -> set[int]:
    """Places of the passages with the answer: gold if known, else those whose text holds one."""
    return set(question.gold) or {
        place for place, one in enumerate(passages) if holds_answer(one.text, question.answers)
    }


def usable(reader: Reader, asked: list[Asked], counts: Counter[str]) -> list[Asked]:
    """The questions that a reader can be asked, each once; `counts` takes up the others, and what
    needs care. Raises DataError if none is left."""
    kept: dict[str, Asked] = {}
    for question, passages in asked:
        answer, key = question.answers[0], same_question(question.text)
        try:
            prompt = reader.prompt(question, passages, answer)
        except ReaderError:
            prompt = None
        if prompt is None or max(prompt.owner) < 0:
            counts["too long"] += 1
        elif len(prompt.ids) == prompt.answer_start + 1:  # the end token
            counts["no token for the answer"] += 1
        elif not any(word[0].isalnum() for word in words(answer)):
            counts["only signs"] += 1
        elif key in kept:
            counts["asked before"] += 1
        else:
            kept[key] = (question, passages)
            counts["cut"] += prompt.trimmed > 0
            counts["in no passage"] += not holding(question, passages)
    if not kept:
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        context = f"the reader's context has {reader.settings.context} tokens"
        raise DataError(f"The reader can be asked none of the questions: {told} ({context}).")
    return list(kept.values())


def load(name: str) -> Reader:
    """A reader with as long a context as its positions allow."""
    path = str(EMBEDDED.get(name, name))
    log.info("loading  reader %s", name)
    with device.loading(path):
        config = AutoConfig.from_pretrained(path).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or ReaderSettings().context
    return load_reader(name, ReaderSettings(model=name, context=context))


def measure(
    tokens: Tokens, attention: Floats, embed: Embed, wanted: Wanted
) -> dict[str, pd.DataFrame]:
    """An indicator, a row a question, in the `measured` space; under the control `permuted`, the
    vectors dealt out anew for each question; and by `overlap` with the wanted tokens alone. `lead`
    is the measured lift minus the control's, undefined where both have the same closest tokens."""
    question, exact = tokens.question, measures.exact(tokens, wanted)
    close = measures.closeness_to(tokens, wanted, embed)
    dealt = measures.closeness_to(tokens, wanted, embed, np.random.default_rng(0))
    overlap = np.where((np.bincount(question, exact) > 0)[question], exact, np.nan)
    measured, permuted, same = (
        measures.indicator(attention, one, question, exact, share)
        for one, share in ((close, SHARE), (dealt, SHARE), (overlap, 0.0))  # 0: all equally close
    )
    alike = measures.alike(close, dealt, question, exact, SHARE)
    measured["lead"] = (measured["attention"] - permuted["attention"]).mask(alike)
    overlapping = same[["attention", "Spearman"]]
    return {"measured": measured, "permuted": permuted, "overlap": overlapping}


def mean_of(values: Any) -> Interval:
    """The mean of what is defined."""
    known = np.asarray(values, dtype=np.float64)
    return interval(known[np.isfinite(known)])


def check(name: str, values: Any, line: float, told: str) -> Check:
    """On which side of a line the mean of what is defined lies, given enough questions."""
    value = mean_of(values)
    if value.n < ENOUGH:
        shown = f": {value}" if value.n > 1 else ""
        why = f"too few to tell: at least {ENOUGH} with a value are needed"
        return Check(name, UNSURE, f"{told}{shown} over {value.n} questions, {why}.")
    found = ABOVE if value.low > line else BELOW if value.high < line else UNSURE
    return Check(name, found, f"{told}: {value} over {value.n} questions.")


def direct_check(asked: list[Asked], tokens: Tokens, attention: Floats) -> Check:
    """Does the passage with most attention hold the answer more often than one drawn at random?
    Only questions with the answer in some passages and not in all can tell."""
    gains = []
    places = measures.by_question(tokens.question, len(asked))
    for mine, (question, passages) in zip(places, asked, strict=True):
        found = holding(question, passages)
        if 0 < len(found) < len(passages):
            scores = np.bincount(tokens.owner[mine], attention[mine], len(passages))
            gains.append((scores.argmax() in found) - len(found) / len(passages))
    name = "The passage with most attention holds the answer. The line: chance"
    return check(name, gains, 0.0, "How much more often than one drawn at random")


def checks_of(tables: Tables) -> list[Check]:
    """Each indicator's lift against its control, Indicator 2's Spearman against LINE."""
    checks = []
    told = "Lift minus that of the tokens that are closest with the space's vectors dealt out anew"
    for goal, table in tables.items():
        name = f"{GOALS[goal]}, lift of the closest {SHARE:.0%}. The line: its control"
        checks.append(check(name, table["measured"]["lead"], 0.0, told))
    if "nouns" in tables:
        told = "Mean Spearman between attention and closeness to the question's nouns"
        checks.append(check(SPEARMAN, tables["nouns"]["measured"]["Spearman"], LINE, told))
    return checks


def verdict_of(checks: list[Check]) -> str:
    """ABOVE if every check is, BELOW if any is, else UNSURE."""
    found = {one.verdict for one in checks}
    return BELOW if BELOW in found else ABOVE if found == {ABOVE} else UNSURE


def judge(
    name: str, questions: str, nouns: str = "en_core_web_sm", other: str | None = None
) -> Judgement:
    """Judges a reader (a folder, a hub name, or one of EMBEDDED) on the questions of a file.

    `nouns` is a spaCy pipeline, by name or folder; without one Indicator 2 is not computed.
    Closeness is measured in the input embeddings of the reader `other`, by default its own: readers
    compare only within one space. It cannot know whether passages are true.
    """
    given, reader, counts = read_asked(Path(questions)), load(name), Counter[str]()
    model, unsure = load(other) if other else reader, []
    how = {"Reader": name, "Closeness is measured in the input embeddings of": other or "its own"}
    if getattr(reader.tokenizer, "chat_template", None):
        how["Prompt"] = CHAT
        log.warning("%s", CHAT)
    log.info("cutting  %d questions with their passages into tokens", len(given))
    asked = usable(reader, given, counts)
    texts, spans = [question for question, _ in asked], None
    try:
        spans = find_nouns(load_nouns(nouns), [one.text for one in texts])
        how["Nouns found by"] = nouns
    except NounsError as error:
        unsure = [Check(SPEARMAN, UNSURE, f"Not computed. {error}")]
        log.warning("Indicator 2 is not computed. %s", error)
    log.info("reading  %d prompts, one pass over each", len(asked))
    tokens = look_at_tokens(reader, texts, [passages for _, passages in asked]).texts
    embed, attention = space(reader, model), tokens.attention(READ)
    ids, occur = np.unique(tokens.ids, return_counts=True)
    counts["vectors"] = int(occur[np.isnan(embed(ids)).any(1)].sum())
    tables: Tables = {}
    for goal, wanted in wanted_ids(reader, texts, spans).items():
        log.info("measuring %s", GOALS[goal])
        tables[goal] = measure(tokens, attention, embed, wanted)
    checks, direct = unsure + checks_of(tables), direct_check(asked, tokens, attention)
    found = (tables, verdict_of(checks), checks, direct)
    return Judgement(reader, asked, tokens, spans, *found, counts, how)


def write_html(judged: Judgement, path: Path) -> None:
    """Writes a judgement as one page that runs no script and loads nothing, with the first
    questions' tokens the darker the more attention."""
    tokens, examples = judged.tokens, []
    shade = np.nan_to_num(measures.lift(tokens.attention(READ), tokens.question)).clip(0, DARKEST)
    for number, (question, passages) in enumerate(judged.asked[:EXAMPLES]):
        mine, titles = tokens.question == number, [passage.title for passage in passages]
        texts = judged.reader.tokenizer.convert_ids_to_tokens(tokens.ids[mine].tolist())
        shown = html.marked_tokens(texts, shade[mine].tolist(), tokens.owner[mine].tolist(), titles)
        spans = judged.nouns[number] if judged.nouns else []
        nouns = [question.text[start:end] for start, end in spans]
        examples.append({"asked": question, "nouns": nouns, "shown": shown})
    mass = dict(zip(measures.PLACES, tokens.mass[:, ROWS.index(READ.rows)].mean(0), strict=True))
    told = {"judge": globals(), "judged": judged, "mass": mass, "examples": examples}
    title, body = f"Judgement of {judged.how['Reader']}", html.fill("judge", **told)
    write_whole(path, html.page(title, body, [("Judgement", "#main")], "#main"))


def write(reader: str, questions: str, nouns: str, space: str | None, out: Path) -> None:
    """Judges a reader (see `judge`), tells the verdict with its reasons, writes the page."""
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):  # before minutes of work
        why = "it is a folder, or its folder is not there or closed to you"
        raise StoreError(f"The page cannot be written to {out}: {why}. Choose another --out.")
    judged = judge(reader, questions, nouns, space)
    write_html(judged, out)
    for one in (*judged.checks, judged.direct):
        log.info("%-14s %s. %s", one.verdict, one.name, one.told)
    log.info("verdict: %s (%d questions). The page: %s", judged.verdict, len(judged.asked), out)
