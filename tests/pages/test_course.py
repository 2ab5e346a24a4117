"""The course: what students get, and that every check does its work."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from ragkit.errors import CourseError
from ragkit.pages import course

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {
    path.stem: nbformat.read(path, as_version=4)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
EXERCISES = {
    e.id: e for stem, notebook in NOTEBOOKS.items() for e in course.exercises_of(stem, notebook)
}
TASK = "### Exercise 1 · Add *(easy, 5 minutes)*\nAdd.\n\n<details><summary>Hint</summary>\n\n+\n\n</details>"
ANSWER = "total = None\n### BEGIN SOLUTION\ntotal = numbers[0] + numbers[1]\n### END SOLUTION"
CHECK = "assert total == 5, 'The sum of 2 and 3 is wanted.'"


def toy(
    task=TASK,
    answer=ANSWER,
    check=CHECK,
    wrong=("total = numbers[0] * numbers[1]",),
    before="numbers = [2, 3]",
):
    """A notebook with one exercise."""
    grade, solve = (
        {"grade_id": "77-1-check", "grade": True, "points": 1},
        {"grade_id": "77-1", "solution": True},
    )
    return v4.new_notebook(
        cells=[
            v4.new_code_cell(
                'PROFILE = "tiny"\nRUNS = "../runs"', metadata={"tags": ["parameters"]}
            ),
            v4.new_code_cell(before),
            v4.new_markdown_cell(task),
            v4.new_code_cell(answer, metadata={"nbgrader": solve, "wrong": list(wrong)}),
            v4.new_code_cell(check, metadata={"nbgrader": grade}),
        ]
    )


def verify(notebook, folder):
    course.verify("77_toy", notebook, folder, ROOT)


def test_a_sound_exercise_passes(tmp_path):
    verify(toy(), tmp_path)


@pytest.mark.parametrize(
    ("notebook", "words"),
    [
        (toy(check="print(total)"), r"exercise 1 \(Add\): its check passes on the stub"),
        (
            toy(check="assert total, 'Nothing yet.'"),
            r"its check passes on the wrong answer 'total = numbers\[0\] \* numbers\[1\]'",
        ),
        (
            toy(answer=ANSWER.replace("+", "-")),
            r"exercise 1 \(Add\), its check on the solution: AssertionError: The sum",
        ),
        (
            toy(answer=ANSWER.removeprefix("total = None\n")),
            r"on the stub its check ends in NameError: .* Let an assert",
        ),
        (
            toy(answer=ANSWER.replace("numbers[1]", "numbers[2]")),
            r"exercise 1 \(Add\), its solution: IndexError",
        ),
        (toy(before="numbers = 1 / 0"), r"cell 2: ZeroDivisionError"),
        (toy(before="import os\nos._exit(9)"), r"its Python process was killed"),
    ],
    ids=[
        "passes on the stub",
        "passes on a wrong answer",
        "wrong solution",
        "no sentence",
        "solution raises",
        "other cell raises",
        "killed",
    ],
)
def test_what_does_not_hold_is_named(tmp_path, notebook, words):
    with pytest.raises(
        CourseError, match=f"Notebook 77_toy, .*{words}" if "killed" not in words else words
    ):
        verify(notebook, tmp_path)


@pytest.mark.parametrize(
    ("notebook", "words"),
    [
        (toy(task=TASK.replace("easy", "trivial")), "the heading .* should read"),
        (toy(task=TASK.split("\n\n<details>")[0]), "no hint"),
        (toy(answer="total = 5"), "one solution between"),
        (toy(answer=f"{ANSWER}\n{ANSWER}"), "one solution between"),
        (toy(wrong=()), "no likely answers under 'wrong'"),
    ],
)
def test_an_exercise_out_of_shape_is_named(notebook, words):
    with pytest.raises(CourseError, match=words):
        course.exercises_of("77_toy", notebook)
    with pytest.raises(CourseError, match="grade_id 78-1"):
        course.exercises_of("78_toy", toy())
    cut = toy()
    cut.cells.pop()
    with pytest.raises(CourseError, match="two code cells must follow"):
        course.exercises_of("77_toy", cut)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_students_get_everything_but_the_solutions(stem):
    source = NOTEBOOKS[stem]
    student, solution = (
        course.handed_out(course.with_parameters(source, "smoke", "../.."), kind)
        for kind in course.KINDS
    )
    nbformat.validate(student)
    answers = {e.answer.id for e in EXERCISES.values() if e.notebook == stem}
    for cell, full, own in zip(source.cells, solution.cells, student.cells, strict=True):
        if "parameters" in cell.metadata.get("tags", []):
            assert full.source == own.source == 'PROFILE = "smoke"\nRUNS = "../.."'
        else:
            assert full.source == cell.source
            assert (own.source == cell.source) == (cell.id not in answers)
        compile(own.source, own.id, "exec") if own.cell_type == "code" else None
    text = nbformat.writes(student)
    assert text.count("YOUR CODE HERE") == len(answers)
    assert "SOLUTION" not in text
    assert '"wrong"' not in text + nbformat.writes(solution)
    assert source == nbformat.read(
        ROOT / "notebooks" / f"{stem}.ipynb", as_version=4
    )  # the copies left it as it was


def test_the_stub_stands_as_far_right_as_the_solution():
    source = "def f():\n    one = 1\n    ### BEGIN SOLUTION\n    if one:\n        return 2\n    ### END SOLUTION\n\n\nf()"
    assert (
        course.with_answer(source, course.STUB)
        == "def f():\n    one = 1\n    # YOUR CODE HERE\n    raise NotImplementedError()\n\n\nf()"
    )


def test_nbgrader_makes_the_same_stubs():
    preprocessors = pytest.importorskip(
        "nbgrader.preprocessors",
        reason="nbgrader is no dependency; pip install nbgrader==0.9.6 to compare with it",
    )
    for notebook in NOTEBOOKS.values():
        ours, solved = (course.handed_out(notebook, kind) for kind in course.KINDS)
        theirs, _ = preprocessors.ClearSolutions().preprocess(solved, {})
        assert [cell.source for cell in ours.cells] == [cell.source for cell in theirs.cells]


def test_each_lesson_of_the_plan_lasts_90_minutes_and_names_what_there_is():
    plan = course.lesson_plan("smoke", list(EXERCISES.values()))
    assert "$" not in plan
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in plan.splitlines()
        if re.match(r"\| \d:\d\d", line)
    ]
    assert sum(int(row[1]) for row in rows) == 2 * 90
    clock = 0
    for start, minutes, _, place, exercise in rows:
        assert (
            start == f"{clock % 90 // 60}:{clock % 90 % 60:02}"
        )  # the second lesson begins where the first one ends, at 0:00
        clock += int(minutes)
        headings = [
            line
            for cell in NOTEBOOKS[next(s for s in NOTEBOOKS if s[:2] == place[:2])].cells
            for line in cell.source.splitlines()
        ]
        assert all(f"## {section}" in headings for section in re.findall(r"\*(.+?)\*", place)), (
            place
        )
        assert not exercise or EXERCISES[exercise].minutes <= int(minutes)
    assert set(re.findall(r"\b\d\d-\d\b", plan)) <= set(EXERCISES)


def test_a_rebuilt_copy_never_loses_somebodys_work(tmp_path):
    (tmp_path / "student").mkdir()
    path = tmp_path / "student" / "00.ipynb"
    for text in ("built", "built", "mine", "mine too"):
        course.put(path, "built")
        assert path.read_text() == "built"
        path.write_text(text)
    course.put(path, "built anew")
    assert path.read_text() == "built anew"
    assert sorted(p.read_text() for p in (tmp_path / "older").iterdir()) == ["mine", "mine too"]


def test_without_a_finished_run_a_sentence_says_what_to_do(tmp_path, ragkit):
    ended = ragkit("course", "--profile", "smoke", "--runs", str(tmp_path))
    assert ended.returncode == 2
    assert "There is no finished run" in ended.stderr
    assert "reproduce --profile smoke" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "course").exists()


def test_without_notebooks_a_sentence_says_so(tmp_path):
    with pytest.raises(CourseError, match="no notebooks in"):
        course.write(tmp_path, tmp_path / "smoke", "smoke")
