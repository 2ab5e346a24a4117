"""Questions in three parts, which passages answer them, and where a set comes from."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.data.files import input_hash, read_jsonl
from ragkit.data.passages import Passage, Passages
from ragkit.data.text import holds_answer, normalise
from ragkit.errors import DataError
from ragkit.settings import FileSet, HubSet, HubTable, QuestionSet, WorldSet

PARTS = ("distill", "dev", "test")
PASSAGES = "passages.arrow"
GOLD_KEYS = ("gold_id", "gold_passage_id", "psg_id")  # of a question's gold passage in files
CUTS = (1, 5, 20)


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the corpus indices of the passages that state one.

    `cloze` is the beginning of a statement with the same answer, for readers that only complete
    text; `relation` and `wording` name the kind of question in the embedded worlds.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    cloze: str = ""
    relation: str = ""
    wording: int = -1
    entity: str = ""


@dataclass(frozen=True)
class Corpus:
    """A question set: passages, in memory or on disk, and questions by part."""

    name: str
    passages: Sequence[Passage]
    questions: dict[str, list[Question]]

    @classmethod
    def load(cls, name: str, passages: Path, questions: Path) -> Corpus:
        """Opens the folders that `make_passages` and `make_questions` wrote."""
        parts = {}
        for part in PARTS:
            rows = [row for _, row in read_jsonl(questions / f"{part}.jsonl")]
            tuples = [{key: tuple(row[key]) for key in ("answers", "gold")} for row in rows]
            parts[part] = [Question(**row | own) for row, own in zip(rows, tuples, strict=True)]
        return cls(name, Passages(passages / PASSAGES), parts)

    def golds(
        self, questions: Sequence[Question], ranking: NDArray[np.int64]
    ) -> list[tuple[int, ...]]:
        """The passages that count as found for each question: the gold ones.

        Where no gold passage is known (NQ-open, TriviaQA): those of its row of the ranking
        `[questions, k]` whose text holds an answer: so count DPR, FiD and Contriever.
        """
        rows = zip(questions, ranking.tolist(), strict=True)
        return [self.gold(question, row) for question, row in rows]

    def gold(self, question: Question, found: Sequence[int]) -> tuple[int, ...]:
        """See `golds`."""
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
    ranks = []
    for row, gold in zip(found, golds, strict=True):
        first = next((rank for rank, place in enumerate(row, 1) if place in gold), None)
        ranks.append(1 / first if first else 0.0)
    return np.array(ranks)


def text_and_answers(row: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """The question and its answers, without repeats.

    Answers are a text, a list, TriviaQA's object with `value` and `aliases`, or a list written as
    text (DPR's CSV). Raises DataError for what is missing or no text.
    """
    text, answers = row.get("question"), row.get("answer", row.get("answers"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'question' is missing or empty.")
    if isinstance(answers, dict):
        more = answers.get("aliases") or []
        answers = [answers.get("value"), *(more if isinstance(more, list | tuple) else [more])]
        answers = [one for one in answers if one is not None]
    if isinstance(answers, str):
        answers = _as_list(answers)
    if not isinstance(answers, list | tuple):
        answers = [] if answers is None else [answers]
    if wrong := [one for one in answers if not isinstance(one, str)]:
        raise DataError(
            f"{where}: the answer {wrong[0]!r:.60} is no text. Put numbers and dates in quotes."
        )
    if not (kept := tuple(dict.fromkeys(one.strip() for one in answers if one.strip()))):
        raise DataError(f"{where}: no answers. 'answer' is a text, or a list with at least one.")
    return text.strip(), kept


def _as_list(text: str) -> list[Any]:
    """The list that a text writes out in Python's manner, or the text alone."""
    if text.strip().startswith("[") and text.strip().endswith("]"):
        try:
            return list(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return [text]


def read_questions(path: Path, passages: Sequence[Passage]) -> list[Question]:
    """Questions of a file (see `text_and_answers`); a gold passage's id stands under GOLD_KEYS.

    Raises DataError that names file and line, also for a gold passage that is not there.
    """
    rows = list(read_jsonl(path))
    golds = [
        next((str(row[key]) for key in GOLD_KEYS if row.get(key) is not None), None)
        for _, row in rows
    ]
    wanted = set(golds) - {None}
    place = {p.id: i for i, p in enumerate(passages) if p.id in wanted} if wanted else {}
    questions = []
    for (number, row), gold in zip(rows, golds, strict=True):
        where = f"{path}, line {number}"
        text, answers = text_and_answers(row, where)
        if gold is not None and gold not in place:
            raise DataError(f"{where}: gold passage {gold!r} is not among the passages.")
        known = () if gold is None else (place[gold],)
        questions.append(Question(f"{path.name}:{number}", text, answers, known))
    return questions


def same_question(text: str) -> str:
    """What two texts of one question have in common: their words after normalisation."""
    return normalise(text) or text


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """Each question once, in order, with the answers and gold passages of all its repeats."""
    found: dict[str, Question] = {}
    for one in questions:
        key = same_question(one.text)
        if first := found.get(key):
            answers = tuple(dict.fromkeys(first.answers + one.answers))
            gold = tuple(sorted({*first.gold, *one.gold}))
            found[key] = replace(first, answers=answers, gold=gold)
        else:
            found[key] = one
    return list(found.values())


def input_hashes(settings: QuestionSet) -> dict[str, str]:
    """The files that a set is read from, by hash; a hub's table is told by its revision."""
    if isinstance(settings, WorldSet):
        return {}
    return _hashes(settings.passages) | _hashes(settings.questions)


def _hashes(source: HubTable | str | None) -> dict[str, str]:
    """The files of a local source, by hash."""
    place = Path(source.dataset if isinstance(source, HubTable) else source or "")
    if source is None or not place.exists():
        return {}
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    return {str(file): input_hash(file) for file in files}


def passage_settings(settings: QuestionSet) -> dict[str, Any]:
    """What determines a set's passages, as JSON values: sets that agree in it share their stage."""
    whole = settings.model_dump(mode="json")
    if isinstance(settings, WorldSet):
        world = ("source", "world", "seed", "entities", "wordings_per_fact")
        return {key: whole[key] for key in world}
    source: HubTable | str | None = settings.passages
    if isinstance(settings, FileSet):
        keys = ["source", "passages"]
    elif settings.pools:  # the passages of the questions that are drawn
        keys, source = [key for key in whole if key != "name"], settings.questions
    else:
        drawn = ["seed"] if settings.most_passages else []
        keys = ["source", "passages", "passage_split", "most_passages", *drawn]
    return {key: whole[key] for key in keys} | {"contents": _hashes(source)}


def question_settings(settings: QuestionSet) -> dict[str, Any]:
    """What determines a set's questions beside its passages, as JSON values."""
    contents = {} if isinstance(settings, WorldSet) else _hashes(settings.questions)
    return settings.model_dump(mode="json") | {"contents": contents}


def card(settings: QuestionSet) -> list[dict[str, str]]:
    """Where a set's texts come from: rows of set, what, source, revision, licence."""

    def row(what: str, source: HubTable | str) -> dict[str, str]:
        if isinstance(source, HubTable):
            name = source.dataset + (f" ({source.config})" if source.config else "")
            told = (name, source.revision, source.licence)
        else:
            digest = _hashes(source).get(source, "unknown")[:12]
            told = (Path(source).name, f"sha256 {digest}", "as its source says")
        names = ("set", "what", "source", "revision", "licence")
        return dict(zip(names, (settings.name, what, *told), strict=True))

    if isinstance(settings, WorldSet):
        made = row("questions and passages", f"embedded world {settings.world!r}")
        return [made | {"revision": f"seed {settings.seed}", "licence": "Apache-2.0"}]
    if isinstance(settings, HubSet) and settings.passages is None:
        pooled = row(f"passages ({', '.join(settings.pools)})", settings.questions)
        return [row("questions", settings.questions), pooled]
    assert settings.passages is not None
    return [row("questions", settings.questions), row("passages", settings.passages)]
