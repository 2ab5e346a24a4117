"""Questions that come with their passages, from a file of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragkit.data.files import read_jsonl
from ragkit.data.passages import Passage
from ragkit.data.questions import Question, text_and_answers
from ragkit.data.text import holds_answer, normalise, words
from ragkit.errors import DataError, JudgeError, ReaderError
from ragkit.models.reader import Reader

FEWEST, MOST = 2, 20  # passages of a question
Asked = tuple[Question, list[Passage]]


def read_asked(questions: str | Path | Sequence[dict[str, Any]]) -> list[Asked]:
    """Questions with their passages, from a file (see `read_jsonl`) or a list of such objects.

    Keys: `question`; `answer` or `answers` (see `text_and_answers`; the first counts); `passages`
    or DPR's `ctxs`, FEWEST to MOST objects with `text` and `title`; where known, `gold`: places of
    the passages that state the answer. Raises DataError that names line and key.
    """
    if isinstance(questions, str | Path):
        path = Path(questions)
        if not path.is_file():
            raise DataError(f"There is no file {path} with questions. Give a JSONL file.")
        asked = [
            one_asked(row, f"{path}, line {i}", f"{path.name}:{i}") for i, row in read_jsonl(path)
        ]
    else:
        asked = [
            one_asked(row, f"Question {i} of the list", str(i)) for i, row in enumerate(questions)
        ]
    if not asked:
        raise DataError("There are no questions to judge a reader on. Give a few hundred.")
    return asked


def one_asked(row: Any, where: str, name: str) -> Asked:
    """One object as a question and its passages."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with 'question', 'answer' and 'passages'.")
    text, answers = text_and_answers(row, where)
    given, gold = row.get("passages", row.get("ctxs")), row.get("gold") or []
    if not isinstance(given, list) or not FEWEST <= len(given) <= MOST:
        raise DataError(f"{where}: 'passages' must be a list of {FEWEST} to {MOST} objects.")
    passages = []
    for place, one in enumerate(given):
        body, title = (
            (one.get("text"), one.get("title") or "") if isinstance(one, dict) else ("", "")
        )
        if not isinstance(body, str) or not body.strip() or not isinstance(title, str):
            raise DataError(
                f"{where}: passage {place} (counted from 0) has no 'text', or a 'title' that is no "
                "text. Mend it, or leave it out."
            )
        passages.append(Passage(f"{name}.{place}", title, body.strip()))
    last = len(given) - 1
    if not isinstance(gold, list) or any(type(i) is not int or not 0 <= i <= last for i in gold):
        raise DataError(f"{where}: 'gold' must be a list of places of passages, 0 to {last}.")
    return Question(name, text, answers, tuple(gold)), passages


def holding(question: Question, passages: Sequence[Passage]) -> set[int]:
    """Places of the passages with the answer: gold if known, else those whose text holds one."""
    return set(question.gold) or {
        place for place, one in enumerate(passages) if holds_answer(one.text, question.answers)
    }


def has_word(answer: str) -> bool:
    return any(word[0].isalnum() for word in words(answer))


def usable(reader: Reader, asked: list[Asked], counts: Counter[str]) -> list[Asked]:
    """The questions that a reader can be asked, each once.

    `counts` takes up the others, and what is cut or needs care. Raises JudgeError if none is left.
    """
    kept: dict[str, Asked] = {}
    context = f"the reader's context of {reader.settings.context} tokens"
    for question, passages in asked:
        answer, key = question.answers[0], normalise(question.text) or question.text
        try:
            prompt = reader.prompt(question, passages, answer)
        except ReaderError:
            prompt = None
        if prompt is None or max(prompt.owner) < 0:
            counts[f"questions left out: longer than {context}, even without passages"] += 1
        elif len(prompt.ids) == prompt.answer_start + 1:  # the end token
            counts["questions left out: the reader's tokenizer has no token for the answer"] += 1
        elif key in kept:
            counts["questions left out: asked before, and the first one counts"] += 1
        else:
            kept[key] = (question, passages)
            lone = len(answer) == 1 and has_word(answer)
            counts[f"prompts cut to {context}, the same share of each passage"] += (
                prompt.trimmed > 0
            )
            counts["answers that stand in no passage (kept)"] += not holding(question, passages)
            counts["answers of one character (kept: such a token is common)"] += lone
            counts["answers of only signs (left out of Indicator 1)"] += not has_word(answer)
    if not kept:
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise JudgeError(f"The reader can be asked none of the questions: {told}.")
    return list(kept.values())
