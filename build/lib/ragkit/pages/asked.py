"""Questions that come with their passages, from a file of one's own."""

from __future__ import annotations

from ragkit.errors import DataError

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragkit.data.questions import Question, text_and_answers
from ragkit.data.files import read_jsonl
from ragkit.indicators.metrics import holds_answer
from ragkit.data.passages import Passage

FEWEST, MOST = 2, 20  # passages of a question
Asked = tuple[Question, list[Passage]]


def read_asked(questions: str | Path | Sequence[dict[str, Any]]) -> list[Asked]:
    """Questions with their passages, from a JSONL file or a list of such objects. Raises DataError that names line and key.

    Keys: `question`; `answer` or `answers` (a text, a list, or TriviaQA's object: the first counts); `passages` or DPR's
    `ctxs`, FEWEST to MOST objects with `text` and `title`; where known, `gold`: places of passages that state the answer.
    """
    if isinstance(questions, str | Path):
        path = Path(questions)
        if not path.is_file():
            raise DataError(f"There is no file {path} with questions. Give a JSONL file, one object a line.")
        asked = [one_asked(row, f"{path}, line {number}", f"{path.name}:{number}") for number, row in read_jsonl(path)]
    else:
        asked = [one_asked(row, f"Question {number} of the list", str(number)) for number, row in enumerate(questions)]
    if not asked:
        raise DataError("There are no questions to judge a reader on. Give a few hundred.")
    return asked


def one_asked(row: dict[str, Any], where: str, name: str) -> Asked:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with 'question', 'answer' and 'passages'.")
    text, answers = text_and_answers(row, where)
    passages = row.get("passages", row.get("ctxs"))
    if not isinstance(passages, list) or not FEWEST <= len(passages) <= MOST:
        raise DataError(f"{where}: 'passages' must be a list of {FEWEST} to {MOST} objects with 'title' and 'text'.")
    for place, passage in enumerate(passages):
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str) or not passage["text"].strip():
            raise DataError(f"{where}: passage {place} (counted from 0) has no 'text'. Give it one, or leave it out.")
    gold = row.get("gold", [])
    if not isinstance(gold, list) or not all(type(place) is int and 0 <= place < len(passages) for place in gold):
        raise DataError(f"{where}: 'gold' must be a list of places of passages, 0 to {len(passages) - 1}.")
    made = [Passage(f"{name}.{place}", str(one.get("title") or ""), one["text"].strip()) for place, one in enumerate(passages)]
    return Question(name, text, answers, tuple(gold)), made


def holding(question: Question, passages: list[Passage]) -> set[int]:
    """Places of the passages with the answer: gold if it is known, else those in whose text an answer stands."""
    return set(question.gold) or {place for place, passage in enumerate(passages) if holds_answer(passage.text, question.answers)}
