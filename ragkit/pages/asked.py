"""Questions that come with their passages, from a file of one's own."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragkit.data.files import read_jsonl
from ragkit.data.passages import Passage
from ragkit.data.questions import Question, same_question, text_and_answers
from ragkit.data.text import holds_answer, words
from ragkit.errors import DataError, JudgeError, ReaderError
from ragkit.models.reader import Reader

FEWEST, MOST = 2, 20  # passages of a question
Asked = tuple[Question, list[Passage]]


def read_asked(path: Path) -> list[Asked]:
    """Questions with their passages, from a file (see `read_jsonl`).

    Keys: `question`; `answer` or `answers` (see `text_and_answers`; the first counts); `passages`
    or DPR's `ctxs`, FEWEST to MOST objects with `text` and `title`; where known, `gold`: places of
    the passages that state the answer. Raises DataError that names line and key.
    """
    asked = []
    for line, row in read_jsonl(path):
        where, name = f"{path}, line {line}", f"{path.name}:{line}"
        text, answers = text_and_answers(row, where)
        passages = passages_of(row.get("passages", row.get("ctxs")), where)
        gold, last = row.get("gold") or [], len(passages) - 1
        if not isinstance(gold, list) or any(
            type(i) is not int or not 0 <= i <= last for i in gold
        ):
            raise DataError(f"{where}: 'gold' must be a list of places of passages, 0 to {last}.")
        asked.append((Question(name, text, answers, tuple(gold)), passages))
    if not asked:
        raise DataError(f"There are no questions in {path}. Give a few hundred.")
    return asked


def passages_of(given: Any, where: str) -> list[Passage]:
    """The passages of a question, as a file gives them."""
    if not isinstance(given, list) or not FEWEST <= len(given) <= MOST:
        raise DataError(f"{where}: 'passages' must be a list of {FEWEST} to {MOST} objects.")
    passages = []
    for place, one in enumerate(given):
        told = one if isinstance(one, dict) else {}
        text, title = told.get("text"), told.get("title") or ""
        if not isinstance(text, str) or not text.strip() or not isinstance(title, str):
            raise DataError(
                f"{where}: passage {place} (counted from 0) has no 'text', or a 'title' that is no "
                "text. Mend it, or leave it out."
            )
        passages.append(Passage(str(place), title, text.strip()))
    return passages


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
        elif key in kept:
            counts["asked before"] += 1
        else:
            kept[key] = (question, passages)
            counts["cut"] += prompt.trimmed > 0
            counts["in no passage"] += not holding(question, passages)
            counts["one character"] += len(answer) == 1 and has_word(answer)
            counts["only signs"] += not has_word(answer)
    if not kept:
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        context = f"the reader's context has {reader.settings.context} tokens"
        raise JudgeError(f"The reader can be asked none of the questions: {told} ({context}).")
    return list(kept.values())
