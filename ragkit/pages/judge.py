"""Is a reader of one's own fit to teach a retriever? Its attention on a few hundred questions:
`judge.write_html(judge.judge("path/to/reader", "questions.jsonl"), Path("judgement.html"))`."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import AutoConfig

from ragkit.data.corpus import Corpus, Pair, Question, found_first
from ragkit.data.files import read_jsonl, text_and_answers, write_whole
from ragkit.data.sets import with_text
from ragkit.data.text import same_question, words
from ragkit.distillation import targets
from ragkit.distillation.targets import top
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
from ragkit.settings import EMBEDDED, ROWS, AttentionSettings, IndicatorSettings, ReaderSettings

log = logging.getLogger(__name__)
NOUNS = "en_core_web_sm"  # what finds them
FEWEST, MOST = 2, 20  # passages of a question
ENOUGH = 30  # questions: fewer decide nothing, for a bootstrap's interval of them is too narrow
ABOVE, BELOW, UNSURE = "above", "not above", "undecided"
# Ways to read the attention, and what a verdict adds where no way before is above both lines.
WAYS = {"rank order": "", "balanced": " when balanced", "chosen heads": " by chosen heads"}
FIT, UNFIT = "fit to teach", "unfit to teach"
FIRST, CHANCE = "the first passage", "one drawn at random"  # what the top passage is held against
GOALS = {"answer": "Indicator 1 (the answer)", "nouns": "Indicator 2 (the question's nouns)"}
SHARE, READ = IndicatorSettings().share, AttentionSettings()  # as profiles do by default
PLAIN = "The reader has a chat template, but is asked by a plain prompt, without it (see --chat)."
CHAT = "The reader is asked in a turn of its own chat template, as instruct models are taught."


@dataclass(frozen=True)
class Judgement:
    """What `judge` found. `tops` (see `tops_of`) make the verdict, `tables` are the indicators' by
    their goal. `counts` says what was left out or cut, `how` what was judged by what."""

    reader: Reader
    asked: list[Pair]
    tokens: Tokens
    tables: dict[str, pd.DataFrame]
    tops: pd.DataFrame
    verdict: str
    counts: Mapping[str, int]
    how: dict[str, str]


def read_asked(path: Path) -> list[Pair]:
    """Questions with their passages, from a file (see `read_jsonl`). Keys: `question`; `answer` or
    `answers` (see `text_and_answers` and `found_first`); `passages` or DPR's `ctxs`, best first,
    FEWEST to MOST objects with `text` and `title`; where known, `gold`: places of the passages that
    state the answer. Raises DataError that names line and key."""
    asked = []
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        text, answers = text_and_answers(row, where)
        given, gold = row.get("passages", row.get("ctxs")), row.get("gold") or []
        if not isinstance(given, list) or not FEWEST <= len(given) <= MOST:
            raise DataError(f"{where}: 'passages' must be a list of {FEWEST} to {MOST} objects.")
        passages = list(with_text(given, f"{where}: a passage"))
        if len(passages) < len(given):
            raise DataError(f"{where}: a passage has no text. Mend it, or leave it out.")
        places = range(len(given))
        if not isinstance(gold, list) or any(type(i) is not int or i not in places for i in gold):
            raise DataError(f"{where}: 'gold' must be places of passages, 0 to {places[-1]}.")
        question = Question(f"{path.name}:{line}", text, answers, tuple(gold))
        asked.append((found_first(question, passages), passages))
    if not asked:
        raise DataError(f"There are no questions in {path}. Give a few hundred.")
    return asked


def usable(reader: Reader, asked: list[Pair], counts: Counter[str]) -> list[Pair]:
    """The questions that a reader can be asked, each once; `counts` takes up the others, and what
    needs care. Raises DataError if none is left."""
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


def look_at_all(reader: Reader, asked: list[Pair]) -> tuple[list[targets.Looks], Tokens]:
    """The looks in rank and in reversed order, and all tokens in rank order: three passes. One
    question at a time, for a bar that foretells the minutes from the first on. `holds` marks gold
    passages here; where none is known, those that hold an answer."""
    looks, parts = list[targets.Looks](), list[dict[str, Any]]()
    for number, (question, passages) in enumerate(tqdm(asked, "attention")):
        places, one = range(len(passages)), ([question], [passages])
        gold = Corpus("", passages, {}).gold(question, places)
        holds = {"holds": targets.oracle_scores([places], [gold])}
        looks.append({way: {**look(reader, *one, way), **holds} for way in ("rank", "reversed")})
        seen = look_at_tokens(reader, *one).texts
        parts.append(vars(seen) | {"question": seen.question + number})
    return looks, Tokens(**{name: np.concatenate([x[name] for x in parts]) for name in parts[0]})


def tops_of(looks: list[targets.Looks]) -> pd.DataFrame:
    """A row a question. Where some passages hold the answer, not all: whether that with most
    attention does, by each of WAYS, beside FIRST and CHANCE; heads are chosen on the first half of
    these questions, tried on the other. Of every question, without its answer: `agreement`, whether
    both orders have the same top passage."""
    held, rows = [one["rank"]["holds"][0] for one in looks], []
    telling = [number for number, holds in enumerate(held) if 0 < holds.mean() < 1]
    half, heads = telling[: (len(telling) + 1) // 2], None
    if half:
        shares = np.mean([targets.shares_of_heads(looks[i]["rank"], READ) for i in half], axis=0)
        heads = shares >= np.sort(shares, axis=None)[-min(READ.chosen, shares.size)]
    for number, one in enumerate(looks):
        both = np.concatenate([targets.attention_scores(seen, READ) for seen in one.values()])
        rows.append({"agreement": top(both[0]) @ top(both[1])})
        if number in telling:
            tried = {"rank order": both[0], "balanced": targets.standardise(both).mean(0)}
            tried |= {FIRST: np.arange(both.shape[1]) == 0, CHANCE: np.ones(both.shape[1])}
            if number not in half:
                tried["chosen heads"] = targets.attention_scores(one["rank"], READ, heads)[0]
            rows[-1] |= {name: top(scores) @ held[number] for name, scores in tried.items()}
    return pd.DataFrame(rows, columns=["agreement", *WAYS, FIRST, CHANCE])


def found_of(tops: pd.DataFrame, way: str) -> tuple[str, list[Interval]]:
    """How much more often than FIRST and CHANCE a way's top passage holds the answer: ABOVE if both
    intervals lie above 0, BELOW if one does not reach above it; else, of few questions, and where
    the first passage always holds it (which nothing can exceed) UNSURE."""
    leads = [interval(tops[way] - tops[line]) for line in (FIRST, CHANCE)]
    low, high = min(lead.low for lead in leads), min(lead.high for lead in leads)
    found = BELOW if high <= 0 else ABOVE if low > 0 else UNSURE
    return found if leads[0].n >= ENOUGH and tops[FIRST].min() < 1 else UNSURE, leads


def verdict_of(tops: pd.DataFrame) -> str:
    """FIT by the first way that is above both lines; UNFIT if each fails one, else UNSURE."""
    found = {way: found_of(tops, way)[0] for way in WAYS}
    fit = [FIT + told for way, told in WAYS.items() if found[way] == ABOVE]
    return fit[0] if fit else UNFIT if set(found.values()) == {BELOW} else UNSURE


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
    counts["in no passage"] = sum(not one["rank"]["holds"].any() for one in looks)
    found = [passages for _, passages in asked]
    tables, counts["vectors"] = indicators_of((reader, model), tokens, texts, found, spans)
    tops = tops_of(looks)
    return Judgement(reader, asked, tokens, tables, tops, verdict_of(tops), counts, how)


def write_html(judged: Judgement, path: Path) -> None:
    """Writes a judgement as one page that runs no script and loads nothing."""
    mass = zip(measures.PLACES, judged.tokens.mass[:, ROWS.index(READ.rows)].mean(0), strict=True)
    told = {"judge": globals(), "judged": judged, "mass": dict(mass), "line": LINE}
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
    for way in WAYS:
        found, (first, chance) = found_of(judged.tops, way)
        told = f"{interval(judged.tops[way])}, over {FIRST} {first}, over {CHANCE} {chance}"
        log.info("%-9s %s: %s", found, way, told)
    log.info("verdict: %s (%d questions). The page: %s", judged.verdict, len(judged.asked), out)
