"""The course: what students get, and that every check does its work."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ragkit.errors import NotebookError
from ragkit.pages import course

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {
    path.stem: nbformat.read(path, as_version=4)
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
}
EXERCISES = {
    e.id: e for stem, notebook in NOTEBOOKS.items() for e in course.exercises_of(stem, notebook)
}
TASK = (
    "### Exercise 1 · Add *(easy, 5 minutes)*\nAdd.\n\n"
    "<details><summary>Hint</summary>\n\n+\n\n</details>"
)
ANSWER = "total = None\n### BEGIN SOLUTION\ntotal = numbers[0] + numbers[1]\n### END SOLUTION"
CHECK = "assert total == 5, 'The sum of 2 and 3 is wanted.'"
BEFORE = "numbers = [2, 3]"
WRONG = "total = numbers[0] * numbers[1]"
FUNCTION = "def add(a, b):\n    ### BEGIN SOLUTION\n    return a + b\n    ### END SOLUTION"
CALLED = "assert add(2, 3) == 5, 'The sum of 2 and 3 is wanted.'"


def cells(number=1, task=TASK, answer=ANSWER, check=CHECK, wrong=(WRONG,), before=BEFORE):
    """An exercise behind a cell of code."""
    grade = {"grade_id": f"77-{number}-check", "grade": True, "points": 1}
    solve = {"grade_id": f"77-{number}", "solution": True}
    return [
        new_code_cell(before),
        new_markdown_cell(task.replace("Exercise 1", f"Exercise {number}")),
        new_code_cell(answer, metadata={"nbgrader": solve, "wrong": list(wrong)}),
        new_code_cell(check, metadata={"nbgrader": grade}),
    ]


def toy(**changes):
    """A notebook with one exercise."""
    return new_notebook(cells=cells(**changes))


def function(*wrong):
    return {"answer": FUNCTION, "check": CALLED, "wrong": wrong}


SOUND = [{}, function("return a * b", "return None")]
FAULTS = [
    ({"check": "print(total)"}, r", its check on the stub \(.*\): it passes"),
    (
        {"check": "assert total, 'Nothing yet.'"},
        r", its check on the wrong answer 'total = numbers\[0\] \* numbers\[1\]' \(.*: it passes",
    ),
    ({"answer": ANSWER.replace("+", "-")}, r", its check on the solution: AssertionError: The sum"),
    (
        {"answer": ANSWER.replace("total = None", "del total")},
        r", its check on the stub \(which an assert of its own must refuse\): NameError",
    ),
    ({"answer": ANSWER.replace("numbers[1]", "numbers[2]")}, r", its solution: IndexError"),
    (
        {"wrong": [WRONG, "total = numbers[2]"]},
        r", the wrong answer 'total = numbers\[2\]': IndexError",
    ),
    (
        {"wrong": ["raise AssertionError('not by the check')"]},
        r", the wrong answer .*: AssertionError",
    ),
    (
        {"answer": f"{ANSWER}\nprint(total.bit_length())", "wrong": ["total = 'five'"]},
        r", the wrong answer .*: AttributeError",
    ),
    (
        function("return a * b", "return a / 0"),
        r", its check on the wrong answer 'return .*: ZeroDivisionError in another cell: ",
    ),
    (
        function("assert a > b, 'not by the check'"),
        r", its check on the wrong answer .*: AssertionError in another cell: not by the check",
    ),
    (
        function("raise NotImplementedError"),
        r", its check on the wrong .*: NotImplementedError in another cell: ",
    ),
    ({"check": "assert total == 5"}, r", its check on the stub .*: AssertionError: $"),
]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """All of these exercises tried in one kernel, and what was said of each cell."""
    every = [*SOUND, *(fault for fault, _ in FAULTS)]
    notebook = new_notebook(cells=[c for i, one in enumerate(every) for c in cells(i, **one)])
    return course.verify("77_toy", notebook, tmp_path_factory.mktemp("trial"))


def test_a_sound_exercise_passes(tried):
    assert not any(re.match(r"Notebook 77_toy, exercise [01] ", said) for said in tried)


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_what_does_not_hold_is_named(tried, number):
    where = f"Notebook 77_toy, exercise {number + len(SOUND)} \\(Add\\)"
    assert any(re.match(where + FAULTS[number][1], said) for said in tried), tried


def test_a_cell_that_fails_and_a_killed_kernel_are_named(tmp_path):
    found = course.verify("77_toy", toy(before="1 / 0\nnumbers = [2, 3]"), tmp_path)
    assert found[0] == "Notebook 77_toy, cell 1: ZeroDivisionError: division by zero"
    (found,) = course.verify("77_toy", toy(before="import os\nos._exit(9)"), tmp_path)
    assert "77_toy: its Python process was killed" in found


@pytest.mark.parametrize(
    ("notebook", "words"),
    [
        (toy(task=TASK.replace("easy", "trivial")), "Add .* should read"),
        (toy(answer="total = 5"), "lacks one solution between"),
        (toy(answer=f"{ANSWER}\n{ANSWER}"), "lacks one solution between"),
        (toy(wrong=[]), "likely answers under 'wrong'"),
    ],
)
def test_an_exercise_out_of_shape_is_named(notebook, words):
    with pytest.raises(NotebookError, match=words):
        course.exercises_of("77_toy", notebook)
    cut = toy()
    cut.cells.pop()
    with pytest.raises(NotebookError, match="two code cells must follow"):
        course.exercises_of("77_toy", cut)


def test_exercises_have_hints_and_nbgraders_records():
    cells = [cell for notebook in NOTEBOOKS.values() for cell in notebook.cells]
    tasks = [cell.source for cell in cells if cell.source.startswith("### Exercise")]
    assert len(tasks) == len(EXERCISES)
    assert all("<details>" in task for task in tasks)
    for one in EXERCISES.values():
        answer, check = (cell.metadata["nbgrader"] for cell in (one.answer, one.check))
        assert (answer["grade_id"], answer["solution"]) == (one.id, True)
        assert (check["grade_id"], check["grade"]) == (f"{one.id}-check", True)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_students_get_everything_but_the_solutions(stem):
    source = NOTEBOOKS[stem]
    student, solution = (course.copy_of(source, "smoke", "../..", kind) for kind in course.KINDS)
    nbformat.validate(student)
    answers = {e.answer.id for e in EXERCISES.values() if e.notebook == stem}
    for cell, full, own in zip(source.cells, solution.cells, student.cells, strict=True):
        if "parameters" in cell.metadata.get("tags", []):
            assert full.source == own.source == 'PROFILE = "smoke"\nRUNS = "../.."'
        elif course.SOURCE.search(cell.source):
            assert own.source.endswith(cell.source.partition(".")[2])
        else:
            assert full.source == cell.source
            assert (own.source == cell.source) == (cell.id not in answers)
        compile(own.source, own.id, "exec") if own.cell_type == "code" else None
    texts = {kind: nbformat.writes(course.copy_of(source, "", "", kind)) for kind in course.KINDS}
    assert texts["student"].count("YOUR CODE HERE") == len(answers) + bool(answers)
    assert "BEGIN SOLUTION" not in texts["student"]
    for kind, text in texts.items():
        assert '"wrong"' not in text
        assert "Solved here" not in text  # each copy says what it is itself
        assert not answers or course.KINDS[kind] in "\n".join(
            cell.source for cell in course.copy_of(source, "", "", kind).cells
        )
    kept = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    assert source == kept  # the copies left it as it was


def test_the_stub_stands_as_far_right_as_the_solution():
    body = "    one = 1\n{}\n\n\nf()"
    solved = "    ### BEGIN SOLUTION\n    if one:\n        return 2\n    ### END SOLUTION"
    stub = "    # YOUR CODE HERE\n    raise NotImplementedError()"
    made = course.with_answer("def f():\n" + body.format(solved), course.STUB)
    assert made == "def f():\n" + body.format(stub)


def test_nbgrader_makes_the_same_stubs():
    preprocessors = pytest.importorskip("nbgrader.preprocessors", reason="nbgrader is not here")
    for notebook in NOTEBOOKS.values():
        ours, solved = (course.copy_of(notebook, "", "", kind) for kind in course.KINDS)
        theirs, _ = preprocessors.ClearSolutions().preprocess(solved, {})
        pairs = zip(ours.cells, theirs.cells, strict=True)
        assert all(a.source == b.source for a, b in pairs if a.cell_type == "code")


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The course of this repository's notebooks, as if each check had been tried."""
    monkeypatch.setattr(course, "verify", lambda *given: [])
    return course.write(ROOT / "notebooks", tmp_path / "smoke", "smoke")


def test_each_lesson_of_the_plan_lasts_90_minutes_and_names_what_there_is(built):
    plan = (built / "lesson_plan.md").read_text("utf8")
    assert "{" not in plan
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in plan.splitlines()
        if re.match(r"\| \d:\d\d", line)
    ]
    assert sum(int(row[1]) for row in rows) == 2 * 90
    clock = 0
    for start, minutes, what, place, exercise in rows:
        # the second lesson begins where the first one ends, at 0:00
        assert start == f"{clock % 90 // 60}:{clock % 90 % 60:02}"
        clock += int(minutes)
        assert what.startswith("Ten minutes to spare") == (clock % 90 == 0)
        stem = next(stem for stem in NOTEBOOKS if stem[:2] == place[:2])
        headings = [line for cell in NOTEBOOKS[stem].cells for line in cell.source.splitlines()]
        for section in re.findall(r"\*(.+?)\*", place):
            assert f"## {section}" in headings, place
        assert not exercise or int(EXERCISES[exercise].minutes) <= int(minutes)
    assert set(re.findall(r"\b\d\d-\d\b", plan)) <= set(EXERCISES)


def test_a_rebuilt_course_never_loses_somebodys_work(built, tmp_path):
    (built / "student" / "mine.ipynb").write_text("mine")
    assert course.write(ROOT / "notebooks", tmp_path / "smoke", "smoke") == built
    assert {path.stem for path in (built / "student").iterdir()} == set(NOTEBOOKS)
    (kept,) = tmp_path.glob("course-*")
    assert (kept / "student" / "mine.ipynb").read_text() == "mine"


def test_slides_show_what_cells_show_a_heading_each_without_code(tmp_path):
    cells = [
        new_markdown_cell("# 04 · Title"),
        new_code_cell("hidden = 1", outputs=[new_output("stream", text="shown <b>\n")]),
        new_markdown_cell("## One\nA sentence."),
        new_markdown_cell("and more"),
        new_markdown_cell("## Exercises"),
        new_code_cell("x", outputs=[new_output("stream", text="never\n")]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "04_one.ipynb")
    course.write_slides([tmp_path / "04_one.ipynb"], tmp_path / "slides")
    page = (tmp_path / "slides" / "04_one.html").read_text("utf8")
    assert page.count("<section>") == page.count("</section>") == 2
    first, second = page.split("</section>")[:2]
    assert "shown &lt;b&gt;" in first
    assert "and more" in second
    assert not any(word in page for word in ("hidden = 1", "never", "Exercises", "<script"))


def test_without_a_finished_run_a_sentence_says_what_to_do(tmp_path, ragkit):
    ended = ragkit("course", "--profile", "smoke", "--runs", str(tmp_path))
    assert ended.returncode == 2
    assert "There is no finished run" in ended.stderr
    assert "reproduce --profile smoke" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "course").exists()


def test_without_notebooks_a_sentence_says_so(tmp_path):
    with pytest.raises(NotebookError, match="no notebooks in"):
        course.write(tmp_path, tmp_path / "smoke", "smoke")
