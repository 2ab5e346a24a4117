"""What stands beside the notebooks for a course: outcomes, a quiz, importance, model answers."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ragkit.settings import asset

ROOT = Path(__file__).parents[2]
CELLS = {  # of the course's notebooks, by name
    path.stem: json.loads(path.read_text("utf8"))["cells"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
}
NOTEBOOKS = {stem: ["".join(cell["source"]) for cell in cells] for stem, cells in CELLS.items()}
LESSONS = yaml.safe_load(asset("lessons.yaml").read_text("utf8"))
QUIZZES = [question for lesson in LESSONS.values() for question in lesson["quiz"]]


def sentences(text):
    return len(re.findall(r"[.?!](?=\s|$)", text))


def said(choice):
    """A choice's text, and whether it is the right one."""
    kind, text = next(iter(choice.items()))
    assert kind in ("right", "wrong")
    return text, kind == "right"


def test_every_notebook_of_the_course_has_its_lesson():
    assert set(NOTEBOOKS) <= set(LESSONS)
    for stem, lesson in LESSONS.items():
        assert set(lesson) == {"minutes", "outcomes", "quiz", "exercises", "further"}, stem
        assert lesson["minutes"] > 0


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_lesson_knows_the_exercises_and_the_open_question_of_its_notebook(stem):
    headings = [re.match(r"### Exercise (\d+)", text) for text in NOTEBOOKS[stem]]
    own = [f"{stem[:2]}-{found[1]}" for found in headings if found]
    assert list(LESSONS[stem]["exercises"]) == own
    assert set(LESSONS[stem]["exercises"].values()) <= {1, 2, 3}
    assert NOTEBOOKS[stem][-1].startswith("**Further.**")
    assert 4 <= sentences(LESSONS[stem]["further"]) <= 8


def minutes_to_read(cells):
    """Of prose at 180 words a minute, with what cells told in words; of open code at 5 seconds a
    line; of pictures at 40 seconds; and 3 minutes for the quiz. Exercises and folded code apart."""
    words = lines = pictures = 0
    for cell in cells:
        text = "".join(cell["source"])
        if text.startswith("### Exercise"):
            break
        data = [one.get("data", {}) for one in cell.get("outputs", [])]
        told = [text] if cell["cell_type"] == "markdown" else []
        told += ["".join(one.get("text/markdown", "")) for one in data]
        words += len(" ".join(told).split())
        pictures += sum("image/png" in one for one in data)
        if cell["cell_type"] == "code" and not cell["metadata"].get("jupyter"):
            lines += len(text.splitlines())
    return words / 180 + lines * 5 / 60 + pictures * 40 / 60 + 3


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_lesson_says_at_least_the_minutes_that_reading_takes(stem):
    assert LESSONS[stem]["minutes"] >= minutes_to_read(CELLS[stem])


@pytest.mark.parametrize("stem", LESSONS)
def test_outcomes_can_be_seen(stem):
    outcomes = LESSONS[stem]["outcomes"]
    assert 3 <= len(outcomes) <= 4
    for outcome in outcomes:
        assert outcome[0].islower()  # it goes on after "You will be able to"
        assert not outcome.endswith(".")
        assert outcome.split()[0] not in ("know", "understand", "learn", "see", "be", "appreciate")


@pytest.mark.parametrize("stem", LESSONS)
def test_a_quiz_has_five_questions_with_one_right_choice_and_a_reason_for_each(stem):
    assert len(LESSONS[stem]["quiz"]) == 5
    for question in LESSONS[stem]["quiz"]:
        assert question["ask"].endswith("?")
        assert 3 <= len(question["choices"]) <= 4
        assert sum(said(choice)[1] for choice in question["choices"]) == 1
        for choice in question["choices"]:
            text, why = said(choice)[0], choice["why"]
            assert len(choice) == 2
            assert not re.search(r"[`*$<|]", text + why)  # it also stands where nothing is typeset
            assert sentences(why) == 1
            assert why.endswith(".")


def test_nobody_passes_a_quiz_by_place_or_length():
    places, longest = [], 0
    for question in QUIZZES:
        texts = [said(choice)[0] for choice in question["choices"]]
        (right,) = (i for i, choice in enumerate(question["choices"]) if said(choice)[1])
        places.append(right)
        longest += len(texts[right]) == max(map(len, texts))
    assert max(map(places.count, set(places))) < 0.45 * len(QUIZZES)
    assert longest < 0.4 * len(QUIZZES)
