"""The course: a student and a solution copy of every notebook, made from the solved sources, and a lesson plan.

How to write an exercise: three cells, at the end of a notebook under `## Exercises`.

1. Markdown: `### Exercise 2 · Its title *(medium, 10 minutes)*` (easy, medium or hard), what to do, a hint in `<details>`.
2. Code: the solution between `### BEGIN SOLUTION` and `### END SOLUTION`. A name that it assigns gets an empty value before
   the first mark, so that the check finds it. The cell's metadata hold nbgrader's record (`grade_id: 03-2`, `solution: true`)
   and, under `wrong`, likely wrong answers: code for the place between the marks. No copy has them.
3. Code: the check, asserts whose sentences say what is wrong. Its metadata hold nbgrader's record (`grade_id: 03-2-check`,
   `grade: true`, `points`: 1 easy, 2 medium, 3 hard).

What shows the student's work on the data goes into an ordinary cell behind the check. A second or two each, from stages that the
notebook opens anyway; nothing depends on the numbers of one data set, or on the exercise before it.

Nothing is written before it has been tried: each check must fail on the stub and on every wrong answer, with a sentence of its
own, and pass on the solution. Marks and records are nbgrader's, so its own commands work on the solution
copies. It is no dependency: it brings a database, a second notebook server and extensions for every JupyterLab, and
one regular expression does what is needed of it here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import string
import textwrap
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode

from ragkit.errors import CourseError
from ragkit.experiment.kernels import stoppable
from ragkit.experiment.store import Store, file_hash, write_whole

log = logging.getLogger(__name__)
HEADING = re.compile(r"### Exercise (\d+) · (.+?) \*\((easy|medium|hard), (\d+) minutes\)\*\n")
REGION = re.compile(
    r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.MULTILINE | re.DOTALL
)
KINDS = ("student", "solution")
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"


@dataclass(frozen=True)
class Exercise:
    """An exercise of a notebook: its heading, and its cells for the answer and the check."""

    notebook: str
    number: int
    title: str
    difficulty: str
    minutes: int
    answer: NotebookNode
    check: NotebookNode

    @property
    def where(self) -> str:
        return f"Notebook {self.notebook}, exercise {self.number} ({self.title})"

    @property
    def id(self) -> str:
        return f"{self.notebook[:2]}-{self.number}"


@dataclass(frozen=True)
class Step:
    """A cell to try. `fails_on` names the answer that it, a check, must refuse; with `may_raise` it is such an answer."""

    code: str
    where: str
    fails_on: str = ""
    may_raise: bool = False


def with_answer(source: str, code: str) -> str:
    """A cell with `code` in the place of its solution, as far to the right."""
    return REGION.sub(lambda region: textwrap.indent(code, region[1]), source)


def record_of(cell: NotebookNode, role: str) -> str:
    """The id that nbgrader knows a cell by, if it has the given role there."""
    record = cell.metadata.get("nbgrader", {})
    return record.get("grade_id", "") if record.get(role) else ""


def exercises_of(stem: str, notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a solved notebook. Raises CourseError if one is not written as this module's docstring says."""
    found = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown" or not cell.source.startswith("### Exercise"):
            continue
        heading = HEADING.match(cell.source)
        if heading is None:
            first = cell.source.splitlines()[0]
            raise CourseError(
                f"Notebook {stem}: the heading {first!r} should read '### Exercise 1 · Its title *(easy, 10 minutes)*', easy, medium or hard."
            )
        number, title, difficulty, minutes = heading.groups()
        cells = notebook.cells[place + 1 : place + 3]
        if [c.cell_type for c in cells] != ["code", "code"]:
            raise CourseError(
                f"Notebook {stem}, exercise {number} ({title}): two code cells must follow, the solution and its check."
            )
        exercise = Exercise(stem, int(number), title, difficulty, int(minutes), *cells)
        for fine, word in (
            ("<details>" in cell.source, "its text has no hint in <details>"),
            (
                len(REGION.findall(cells[0].source)) == 1,
                "its first code cell must hold one solution between ### BEGIN SOLUTION and ### END SOLUTION",
            ),
            (
                cells[0].metadata.get("wrong"),
                "its solution cell's metadata list no likely answers under 'wrong' that the check must refuse",
            ),
            (
                record_of(cells[0], "solution") == exercise.id,
                f"its solution cell's metadata lack nbgrader's record with grade_id {exercise.id}",
            ),
            (
                record_of(cells[1], "grade") == f"{exercise.id}-check",
                f"its check's metadata lack nbgrader's record with grade_id {exercise.id}-check",
            ),
        ):
            if not fine:
                raise CourseError(f"{exercise.where}: {word}.")
        found.append(exercise)
    return found


def with_parameters(notebook: NotebookNode, profile: str, runs: str) -> NotebookNode:
    """A copy of a notebook that works on the given run."""
    copy = deepcopy(notebook)
    for cell in copy.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f"PROFILE = {json.dumps(profile)}\nRUNS = {json.dumps(runs)}"
    return copy


def handed_out(notebook: NotebookNode, kind: str) -> NotebookNode:
    """A copy of a notebook without the wrong answers and, of kind `student`, with a stub in the place of each solution."""
    copy = deepcopy(notebook)
    for cell in copy.cells:
        cell.metadata.pop("wrong", None)
        if kind == "student":
            cell.source = with_answer(cell.source, STUB)
    return copy


def steps_of(stem: str, notebook: NotebookNode) -> Iterator[Step]:
    """All code cells in order; where an exercise stands, its check is tried on the stub, on each wrong answer and on the solution."""
    exercises = exercises_of(stem, notebook)
    answers, checks = {e.answer.id: e for e in exercises}, {e.check.id for e in exercises}
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or cell.id in checks:
            continue
        if cell.id not in answers:
            yield Step(cell.source, f"Notebook {stem}, cell {place + 1}")
            continue
        exercise = answers[cell.id]
        for what, code in [
            ("the stub", STUB),
            *((f"the wrong answer {wrong!r}", wrong) for wrong in cell.metadata["wrong"]),
        ]:
            yield Step(with_answer(cell.source, code), exercise.where, may_raise=True)
            yield Step(exercise.check.source, exercise.where, fails_on=what)
        yield Step(cell.source, f"{exercise.where}, its solution")
        yield Step(exercise.check.source, f"{exercise.where}, its check on the solution")


def judge(step: Step, cell: NotebookNode) -> None:
    """Raises CourseError if a tried cell did not end as it should."""
    error = next((output for output in cell.outputs if output.output_type == "error"), None)
    if step.may_raise:
        return
    if not step.fails_on:
        if error:
            raise CourseError(f"{step.where}: {error.ename}: {error.evalue}")
    elif error is None:
        raise CourseError(
            f"{step.where}: its check passes on {step.fails_on}, so it does not show that the exercise is solved. Let it assert more."
        )
    elif error.ename not in ("AssertionError", "NotImplementedError"):
        raise CourseError(
            f"{step.where}: on {step.fails_on} its check ends in {error.ename}: {error.evalue}. "
            "Let an assert with a sentence come first, and give what the solution assigns an empty value before it."
        )


def verify(stem: str, notebook: NotebookNode, folder: Path, package: Path) -> None:
    """Tries a solved notebook's exercises in one kernel, in `folder`; raises CourseError that names notebook and exercise."""
    steps = list(steps_of(stem, notebook))
    trial = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(step.code) for step in steps])
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        trial,
        timeout=None,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],
    )
    client.log.setLevel(logging.WARNING)  # it tells of every kernel it starts
    try:
        stoppable([partial(client.execute, env=os.environ | {"PYTHONPATH": path})])
    except DeadKernelError:
        raise CourseError(
            f"Notebook {stem}: its Python process was killed, most likely because memory ran out. Close other programs and try again."
        ) from None
    for step, cell in zip(steps, trial.cells, strict=True):
        judge(step, cell)


def put(path: Path, text: str) -> None:
    """Writes a file of the course; one that is there and reads otherwise may be somebody's work and is kept beside it, in `older/`."""
    if path.is_file() and path.read_text("utf8") != text:
        kept = path.parent.parent / "older" / f"{path.stem}-{file_hash(path)[:8]}{path.suffix}"
        kept.parent.mkdir(exist_ok=True)
        log.info("kept     %s as %s", path.name, kept)
        path.replace(kept)
    write_whole(path, text)


def lesson_plan(profile: str, exercises: list[Exercise]) -> str:
    """The plan from `assets/lesson_plan.md`, with this profile's commands and the table of exercises."""
    plan = string.Template(
        resources.files("ragkit").joinpath("assets/lesson_plan.md").read_text("utf8")
    )
    rows = [
        f"| {e.id} | {e.notebook[3:].replace('_', ' ')} | {e.title} | {e.difficulty} | {e.minutes} |"
        for e in exercises
    ]
    return plan.substitute(profile=profile, exercises="\n".join(rows))


def write(sources: Path, run: Path, profile: str) -> Path:
    """Tries all exercises on a finished run, then writes `course/` beside it; returns that folder.

    Raises CourseError if there are no notebooks, an exercise is not written as it should be, or a check does not do its work.
    """
    notebooks = {
        path.stem: nbformat.read(path, as_version=4)
        for path in sorted(sources.glob("[0-9]*.ipynb"))
    }
    if not notebooks:
        raise CourseError(
            f"There are no notebooks in {sources}. Run this from a checkout of the repository, installed with pip install -e."
        )
    exercises = {stem: exercises_of(stem, notebook) for stem, notebook in notebooks.items()}
    with Store(run).only_run():
        for stem, notebook in notebooks.items():
            started = time.monotonic()
            verify(
                stem,
                with_parameters(notebook, profile, str(run.parent.resolve())),
                run,
                sources.parent,
            )
            log.info(
                "checked  notebook %s: %d exercises (%.0f s)",
                stem,
                len(exercises[stem]),
                time.monotonic() - started,
            )
    folder = run.parent / "course"
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for stem, notebook in notebooks.items():
            put(
                folder / kind / f"{stem}.ipynb",
                nbformat.writes(handed_out(with_parameters(notebook, profile, "../.."), kind))
                + "\n",
            )
    write_whole(
        folder / "lesson_plan.md",
        lesson_plan(profile, [e for found in exercises.values() for e in found]),
    )
    return folder
