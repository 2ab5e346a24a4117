"""Questions in three parts, which passages answer them, and where a set comes from."""

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ragkit.data.files import input_hash, read_jsonl
from ragkit.data.passages import Passage, Passages
from ragkit.data.text import holds_answer, normalise
from ragkit.errors import DataError
from ragkit.settings import HubSet, HubTable, QuestionSet, WorldSet

PARTS = ("distill", "dev", "test")
PASSAGES = "passages.arrow"
GOLD_KEYS = ("gold_id", "gold_passage_id", "psg_id")  # of a question's gold passage in files
CUTS = (1, 5, 20)


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the corpus indices of the passages that state one."""

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    cloze: str = ""  # a statement up to the answer, for readers that only complete text
    relation: str = ""  # the kind of question in the embedded worlds, and its wording
    wording: int = -1
    entity: str = ""


@dataclass(frozen=True)
class Corpus:
    """A question set: passages, in memory or on disk, and questions by part."""

    name: str
    passages: Sequence[Passage]
    questions: dict[str, list[Question]]

    @classmethod
    def load(cls, name: str, passages: Path, questions: Path) -> "Corpus":
        """Opens the folders that `make_passages` and `make_questions` wrote."""
        checked, parts = TypeAdapter(Question), {}
        for part in PARTS:
            rows = read_jsonl(questions / f"{part}.jsonl")
            parts[part] = [checked.validate_python(row) for _, row in rows]
        return cls(name, Passages(passages / PASSAGES), parts)

    def golds(
        self, questions: Sequence[Question], ranking: NDArray[np.int64]
    ) -> list[tuple[int, ...]]:
        """The `gold` passages of each question and its row of the ranking `[questions, k]`."""
        rows = zip(questions, ranking.tolist(), strict=True)
        return [self.gold(question, row) for question, row in rows]

    def gold(self, question: Question, found: Sequence[int]) -> tuple[int, ...]:
        """The passages that count as found: the gold ones.

        Where none is known (NQ-open, TriviaQA): those found whose text holds an answer, as DPR, FiD
        and Contriever count.
        """
        return question.gold or tuple(
            place for place in found if holds_answer(self.passages[place].text, question.answers)
        )


def hits(
    found: Sequence[Sequence[int]], golds: Sequence[Sequence[int]], k: int
) -> NDArray[np.float64]:
    """1.0 for each question with a gold passage among its first k `[questions]` (HR@k)."""
    rows = zip(found, golds, strict=True)
    return np.array([float(bool(set(gold) & set(row[:k]))) for row, gold in rows])


def reciprocal_ranks(
    found: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """1 / rank of the first gold passage, 0 if none was found `[questions]`; MRR is the mean."""
    made = []
    for row, gold in zip(found, golds, strict=True):
        ranks = (1 / rank for rank, place in enumerate(row, 1) if place in gold)
        made.append(next(ranks, 0.0))
    return np.array(made)


def text_and_answers(row: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """The question and its answers, without repeats.

    Answers are a text, a list, TriviaQA's object with `value` and `aliases`, or a list written as
    text (DPR's CSV). Raises DataError for what is missing or no text.
    """
    text, answers = row.get("question"), row.get("answer", row.get("answers"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'question' is missing or empty.")
    if isinstance(answers, dict):
        told = [answers.get("value"), *_as_list(answers.get("aliases"))]
        answers = [one for one in told if one is not None]
    elif isinstance(answers, str) and re.fullmatch(r"\s*\[.*\]\s*", answers, re.DOTALL):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # then it is a text
            answers = ast.literal_eval(answers.strip())
    if wrong := [one for one in _as_list(answers) if not isinstance(one, str)]:
        raise DataError(f"{where}: the answer {wrong[0]!r:.60} is no text. Put it in quotes.")
    if not (kept := dict.fromkeys(one.strip() for one in _as_list(answers) if one.strip())):
        raise DataError(f"{where}: no answers. 'answer' is a text, or a list with at least one.")
    return text.strip(), tuple(kept)


def _as_list(value: Any) -> list[Any]:
    """A list or tuple as a list; nothing as an empty one; anything else as its only entry."""
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def read_questions(path: Path, passages: Sequence[Passage]) -> list[Question]:
    """Questions of a file (see `text_and_answers`); a gold passage's id stands under GOLD_KEYS.

    Raises DataError that names file and line, also for a gold passage that is not there.
    """
    rows, golds = list(read_jsonl(path)), []
    for _, row in rows:
        named = (str(row[key]) for key in GOLD_KEYS if row.get(key) is not None)
        golds.append(next(named, ""))
    wanted = set(golds) - {""}
    places = {p.id: (i,) for i, p in enumerate(passages) if p.id in wanted} if wanted else {}
    questions = []
    for (line, row), gold in zip(rows, golds, strict=True):
        where = f"{path}, line {line}"
        if gold and gold not in places:
            raise DataError(f"{where}: gold passage {gold!r} is not among the passages.")
        told = text_and_answers(row, where)
        questions.append(Question(f"{path.name}:{line}", *told, places.get(gold, ())))
    return questions


def same_question(text: str) -> str:
    """What two texts of one question have in common: their words after normalisation."""
    return normalise(text) or text


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """Each question once, in order, with the answers and gold passages of all its repeats."""
    found: dict[str, Question] = {}
    for one in questions:
        first = found.setdefault(same_question(one.text), one)
        answers = tuple(dict.fromkeys(first.answers + one.answers))
        gold = tuple(sorted({*first.gold, *one.gold}))
        found[same_question(one.text)] = replace(first, answers=answers, gold=gold)
    return list(found.values())


def passage_settings(settings: QuestionSet) -> dict[str, Any]:
    """What determines a set's passages, as JSON values: sets that agree in it share their stage."""
    kept, source = {"world", "seed", "entities", "wordings_per_fact"}, None
    if not isinstance(settings, WorldSet):
        kept, source = {"passages", "passage_split"}, settings.passages
    if isinstance(settings, HubSet) and settings.pools:  # passages of the questions that are drawn
        kept, source = set(HubSet.model_fields) - {"name"}, settings.questions
    told = settings.model_dump(mode="json", include={"source", *kept})
    return told | {"contents": contents(source)}


def question_settings(settings: QuestionSet) -> dict[str, Any]:
    """What determines a set's questions beside its passages, as JSON values."""
    source = None if isinstance(settings, WorldSet) else settings.questions
    return settings.model_dump(mode="json") | {"contents": contents(source)}


def contents(source: HubTable | str | None) -> dict[str, str]:
    """The files of a source on disk, by hash; a hub's table is told by its revision."""
    place = Path(source.dataset if isinstance(source, HubTable) else source or "")
    if source is None or not place.exists():
        return {}
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return {str(file): input_hash(file) for file in files}


def card(settings: QuestionSet) -> list[dict[str, str]]:
    """Where a set's texts come from: rows of set, what, source, revision, licence."""
    names = ("set", "what", "source", "revision", "licence")
    if isinstance(settings, WorldSet):
        told = (f"embedded world {settings.world!r}", f"seed {settings.seed}", "Apache-2.0")
        return [dict(zip(names, (settings.name, "questions and passages", *told), strict=True))]
    rows = []
    for what in ("questions", "passages"):
        source = getattr(settings, what) or settings.questions  # pools stand beside the questions
        if isinstance(source, HubTable):
            name = source.dataset + (f" ({source.config})" if source.config else "")
            told = (name, source.revision, source.licence)
        else:
            digest = contents(source).get(source, "unknown")[:12]
            told = (Path(source).name, f"sha256 {digest}", "as its source says")
        rows.append(dict(zip(names, (settings.name, what, *told), strict=True)))
    return rows
