"""Is a reader of one's own fit to teach a retriever? Its attention on a few hundred questions, held
against what foretold best in the study of notebook 11:
`judge.write_html(judge.judge("path/to/reader", "questions.jsonl"), Path("judgement.html"))`."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoConfig

from ragkit.data.corpus import Corpus, Pair, Question, found_first
from ragkit.data.files import read_jsonl, text_and_answers, write_whole
from ragkit.data.sets import with_text
from ragkit.data.text import same_question, words
from ragkit.distillation import targets
from ragkit.distillation.teacher import look
from ragkit.errors import DataError, NounsError, ReaderError, StoreError
from ragkit.experiment.rules import LINE
from ragkit.indicators import measures
from ragkit.indicators.closeness import indicators_of, look_at_tokens
from ragkit.indicators.measures import Interval, Tokens, interval
from ragkit.indicators.nouns import find_nouns, load_nouns
from ragkit.models import device
from ragkit.models.fid import load_reader, located
from ragkit.models.reader import Reader
from ragkit.pages import html
from ragkit.settings import EMBEDDED, AttentionSettings, IndicatorSettings, ReaderSettings, asset

log = logging.getLogger(__name__)
NOUNS = "en_core_web_sm"  # what finds them
FEWEST, MOST = 2, 20  # passages of a question
ENOUGH = 30  # questions: fewer decide nothing, for a bootstrap's interval of them is too narrow
FIT, UNFIT, UNSURE = "fit to teach", "unfit to teach", "undecided"
# By signal, the rule that was wrong for the fewest readers of the study; and what it adds to FIT.
RULES = pd.read_csv(asset("judge.csv")).set_index("signal").to_dict("index")
SIGNALS = {"attention": "", "balanced": " when balanced"}
GOALS = {"answer": "Indicator 1 (the answer)", "nouns": "Indicator 2 (the question's nouns)"}
SHARE, READ = IndicatorSettings().share, AttentionSettings()  # as profiles do by default
PLAIN = "The reader has a chat template, but is asked by a plain prompt, without it (see --chat)."
CHAT = "The reader is asked in a turn of its own chat template, as instruct models are taught."


@dataclass(frozen=True)
class Judgement:
    """What `judge` found. `tables` are the indicators' by their goal, `measured` all foretellers, a
    row a question; of these `found` (by signal, see `found_by`) and `verdict` are made. `counts`
    says what was left out or cut, `how` what was judged by what."""

    reader: Reader
    asked: list[Pair]
    tokens: Tokens
    tables: dict[str, pd.DataFrame]
    measured: pd.DataFrame
    found: dict[str, tuple[str, Interval]]
    verdict: str
    counts: Mapping[str, int]
    how: dict[str, str]


def read_asked(path: Path) -> list[Pair]:
    """Questions with their passages, from a file (see `read_jsonl`). Keys: `question`; `answer` or
    `answers` (see `text_and_answers` and `found_first`); `passages` or DPR's `ctxs`, best first,
    FEWEST to MOST objects with `text` and `title`, as many for each; where known, `gold`: places of
    the passages that state the answer. Raises DataError that names line and key."""
    asked = list[Pair]()
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        text, answers = text_and_answers(row, where)
        given, gold = row.get("passages", row.get("ctxs")), row.get("gold") or []
        if not isinstance(given, list) or not FEWEST <= len(given) <= MOST:
            raise DataError(f"{where}: 'passages' must be a list of {FEWEST} to {MOST} objects.")
        passages = list(with_text(given, f"{where}: a passage"))
        if len(passages) < len(given):
            raise DataError(f"{where}: a passage has no text. Mend it, or leave it out.")
        if asked and len(given) != (wanted := len(asked[0][1])):
            told = f"{len(given)} passages, where the first question has {wanted}"
            raise DataError(f"{where}: {told}. Give every question as many: chance depends on it.")
        places = range(len(given))
        if not isinstance(gold, list) or any(type(i) is not int or i not in places for i in gold):
            raise DataError(f"{where}: 'gold' must be places of passages, 0 to {places[-1]}.")
        question = Question(f"{path.name}:{line}", text, answers, tuple(gold))
        asked.append((found_first(question, passages), passages))
    if not asked:
        raise DataError(f"There are no questions in {path}. Give a few hundred.")
    return asked


def usable(reader: Reader, asked: list[Pair], counts: Counter[str]) -> list[Pair]:
    """Questions that a reader can be asked, each once; `counts` the others; DataError if none."""
    kept: dict[str, Pair] = {}
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
    if not kept:
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        context = f"the reader's context has {reader.settings.context} tokens"
        raise DataError(f"The reader can be asked none of the questions: {told} ({context}).")
    return list(kept.values())


def load(name: str, chat: bool = False) -> Reader:
    """A reader with as long a context as its positions allow."""
    path, given = located(name)
    log.info("loading  reader %s", name)
    with device.loading(str(EMBEDDED.get(name, name))):
        config = AutoConfig.from_pretrained(path, **given).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or ReaderSettings().context
    return load_reader(name, ReaderSettings(model=name, context=context, chat=chat))


def look_at_all(reader: Reader, asked: list[Pair]) -> tuple[targets.Looks, Tokens]:
    """The looks in rank and in reversed order, and all tokens in rank order: three passes. `holds`
    marks gold passages here; where none is known, those that hold an answer."""
    questions, found = map(list, zip(*asked, strict=True))
    places = [range(len(passages)) for passages in found]
    golds = [Corpus("", p, {}).gold(q, place) for (q, p), place in zip(asked, places, strict=True)]
    holds = {"holds": targets.oracle_scores(places, golds)}
    looks = {way: {**look(reader, questions, found, way), **holds} for way in ("rank", "reversed")}
    return looks, look_at_tokens(reader, questions, found).texts


def measured_of(looks: targets.Looks, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All foretellers that two looks and the indicators' `tables` tell, a row a question."""
    named = [one.drop(columns="question").add_prefix(f"{goal}: ") for goal, one in tables.items()]
    return pd.concat([measures.of_passages(looks, {}, READ), *named], axis=1)


def found_by(rule: Mapping[str, Any], measured: pd.DataFrame) -> tuple[str, Interval]:
    """On which side of the rule's cut its foreteller lies, with the interval of its mean over these
    questions: FIT, UNFIT, or UNSURE; that also where few questions or none have a value."""
    value = interval(measured.get(rule["foreteller"], pd.Series(dtype=float)).to_numpy())
    sign = 1 if rule["can teach"] == "above" else -1
    low, high = sorted((sign * (value.low - rule["cut"]), sign * (value.high - rule["cut"])))
    found = FIT if low >= 0 else UNFIT if high < 0 else UNSURE
    return (found if value.n >= ENOUGH else UNSURE), value


def verdict_of(found: Mapping[str, tuple[str, Interval]]) -> str:
    """FIT by the first of SIGNALS that is found so; UNFIT if each is, else UNSURE."""
    words = {signal: word for signal, (word, _) in found.items()}
    fit = [FIT + told for signal, told in SIGNALS.items() if words[signal] == FIT]
    return fit[0] if fit else UNFIT if {*words.values()} == {UNFIT} else UNSURE


def judge(
    name: str, questions: str, nouns: str = NOUNS, other: str | None = None, chat: bool = False
) -> Judgement:
    """Judges a reader (a folder, a GGUF file, a hub name, or one of EMBEDDED) on the questions of a
    file, asked by its own chat template or by the plain prompt. `nouns` is a spaCy pipeline, by
    name or folder; without one Indicator 2 is not computed. Closeness is measured in the input
    embeddings of the reader `other`, by default its own: readers compare only within one space."""
    given, reader, counts = read_asked(Path(questions)), load(name, chat), Counter[str]()
    model = load(other) if other else reader
    how = {"Reader": name, "Closeness is measured in the input embeddings of": other or "its own"}
    if getattr(reader.tokenizer, "chat_template", None):
        how["Prompt"] = CHAT if chat else PLAIN
        log.warning("%s", how["Prompt"])
    asked = usable(reader, given, counts)
    texts, spans = [question for question, _ in asked], None
    try:
        spans = find_nouns(load_nouns(nouns), [one.text for one in texts])
        how["Nouns found by"] = nouns
    except NounsError as error:
        how["Indicator 2"] = f"Not computed. {error}"
        log.warning("Indicator 2 is not computed. %s", error)
    log.info("reading  %d prompts, as ranked, reversed, and by their tokens", len(asked))
    looks, tokens = look_at_all(reader, asked)
    counts["in no passage"] = int((looks["rank"]["holds"].max(1) == 0).sum())
    passages = [found for _, found in asked]
    tables, counts["vectors"] = indicators_of((reader, model), tokens, texts, passages, spans)
    measured = measured_of(looks, tables)
    found = {signal: found_by(RULES[signal], measured) for signal in SIGNALS}
    verdict = verdict_of(found)
    return Judgement(reader, asked, tokens, tables, measured, found, verdict, counts, how)


def write_html(judged: Judgement, path: Path) -> None:
    """Writes a judgement as one page that runs no script and loads nothing."""
    mass = judged.tokens.mass[:, measures.ROWS.index(READ.rows)].mean(0)
    told = {"judge": globals(), "judged": judged, "line": LINE}
    told["mass"] = dict(zip(measures.PLACES, mass, strict=True))
    title, body = f"Judgement of {judged.how['Reader']}", html.fill("judge", **told)
    write_whole(path, html.page(title, body, [("Judgement", "#main")], "#main"))


def write(
    reader: str, questions: str, nouns: str, space: str | None, out: Path, chat: bool = False
) -> None:
    """Judges a reader (see `judge`), tells the verdict with its reasons, writes the page."""
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):  # before minutes of work
        why = "it is a folder, or its folder is not there or closed to you"
        raise StoreError(f"The page cannot be written to {out}: {why}. Choose another --out.")
    judged = judge(reader, questions, nouns, space, chat)
    write_html(judged, out)
    for signal, (word, value) in judged.found.items():
        log.info("by %s %s: %s %s", signal, word, RULES[signal]["foreteller"], value)
    log.info("verdict: %s (%d questions). The page: %s", judged.verdict, len(judged.asked), out)
