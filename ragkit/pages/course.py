"""The course: a student and a solution copy of every notebook, and a lesson plan.

How an exercise is written is said at the end of `assets/lesson_plan.md`. Nothing is written before
it has been tried: each check must refuse the stub and every likely wrong answer by an assertion of
its own, and pass on the solution. Marks and records are nbgrader's, so that its own commands work
on the solution copies; it is no dependency.
"""

import json
import logging
import re
import string
import textwrap
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from ragkit.data.files import file_hash, write_whole
from ragkit.errors import CourseError
from ragkit.experiment.executed import kernel_of_here
from ragkit.experiment.run import stoppable
from ragkit.experiment.store import only_run
from ragkit.settings import asset

log = logging.getLogger(__name__)
HEADING = re.compile(r"### Exercise (\d+) · (.+?) \*\((easy|medium|hard), (\d+) minutes\)\*\n")
REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.M | re.S)
STUBBED = "NotImplementedError"
STUB = f"# YOUR CODE HERE\nraise {STUBBED}()"
SOURCE = re.compile(r"Solved here[^.]*\.")  # what the sources say of themselves
KINDS = {  # of copies, and what they say in its place
    "student": "Yours to solve, where a cell says `# YOUR CODE HERE`.",
    "solution": "The solutions stand between `### BEGIN SOLUTION` and `### END SOLUTION`.",
}


@dataclass(frozen=True)
class Exercise:
    """An exercise of a notebook: its heading, and its cells for the answer and the check."""

    notebook: str
    number: str
    title: str
    difficulty: str
    minutes: str
    answer: NotebookNode
    check: NotebookNode

    @property
    def where(self) -> str:
        return f"Notebook {self.notebook}, exercise {self.number} ({self.title})"

    @property
    def id(self) -> str:
        return f"{self.notebook[:2]}-{self.number}"


def with_answer(source: str, code: str) -> str:
    """A cell with `code` in the place of its solution, as far to the right."""
    return REGION.sub(lambda region: textwrap.indent(code, region[1]), source)


def exercises_of(stem: str, notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a solved notebook. Raises CourseError that says what one of them lacks."""
    found = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown" or not cell.source.startswith("### Exercise"):
            continue
        heading = HEADING.match(cell.source)
        cells = notebook.cells[place + 1 : place + 3]
        if heading is None or [c.cell_type for c in cells] != ["code", "code"]:
            raise CourseError(
                f"Notebook {stem}: {cell.source.splitlines()[0]!r} should read '### Exercise 1 · "
                "Title *(easy, 10 minutes)*', or medium, hard, and two code cells must follow: the "
                "solution and its check."
            )
        number, title, difficulty, minutes = heading.groups()
        exercise = Exercise(stem, number, title, difficulty, minutes, *cells)
        records = [c.metadata.get("nbgrader", {}) for c in cells]
        answer = {"grade_id": exercise.id, "solution": True}
        check = {"grade_id": f"{exercise.id}-check", "grade": True}
        lacks = {
            "a hint in <details>": "<details>" in cell.source,
            "one solution between ### BEGIN SOLUTION and ### END SOLUTION": (
                len(REGION.findall(cells[0].source)) == 1
            ),
            "likely answers under 'wrong' in its metadata": bool(cells[0].metadata.get("wrong")),
            f"{answer} in its solution's nbgrader record": answer.items() <= records[0].items(),
            f"{check} in its check's nbgrader record": check.items() <= records[1].items(),
        }
        for what, is_there in lacks.items():
            if not is_there:
                raise CourseError(f"{exercise.where} lacks {what}.")
        found.append(exercise)
    return found


def copy_of(notebook: NotebookNode, profile: str, runs: str, kind: str = "") -> NotebookNode:
    """A copy that works on the given run; of a kind, a key of KINDS, it can be handed out.

    Then it has no wrong answers and says what it is, and `student` has stubs for the solutions.
    """
    copy = deepcopy(notebook)
    for cell in copy.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f"PROFILE = {json.dumps(profile)}\nRUNS = {json.dumps(runs)}"
        if kind:
            cell.metadata.pop("wrong", None)
            cell.source = SOURCE.sub(KINDS[kind], cell.source)
        if kind == "student":
            cell.source = with_answer(cell.source, STUB)
    return copy


def trial_of(stem: str, notebook: NotebookNode) -> NotebookNode:
    """All code cells in order; a check comes behind the stub, each wrong answer and the solution.

    Their metadata say `where` they stand, and what is expected: `refuses` names the answer that a
    check must refuse, `stub` that NotImplementedError may be raised.
    """
    trial = new_notebook()

    def add(code: str, where: str, refuses: str = "", stub: bool = False) -> None:
        expected = {"where": where, "refuses": refuses, "stub": stub}
        trial.cells.append(new_code_cell(code, metadata=expected))

    exercises = {one.answer.id: one for one in exercises_of(stem, notebook)}
    checks = {one.check.id for one in exercises.values()}
    for place, cell in enumerate(notebook.cells, 1):
        if cell.id in exercises:
            where, check = exercises[cell.id].where, exercises[cell.id].check.source
            add(with_answer(cell.source, STUB), f"{where}, its stub", stub=True)
            add(check, where, "the stub", stub=True)
            for wrong in cell.metadata["wrong"]:
                told = f"the wrong answer {wrong!r}"
                add(with_answer(cell.source, wrong), f"{where}: {told} does not even run")
                add(check, where, told)
            add(cell.source, f"{where}, its solution")
            add(check, f"{where}, its check on the solution")
        elif cell.cell_type == "code" and cell.id not in checks:
            add(cell.source, f"Notebook {stem}, cell {place}")
    return trial


def hold_against(cell: NotebookNode) -> None:
    """Raises CourseError if a cell of a trial did not end as is expected of it.

    A check refuses by an assert of its own with a sentence, or by the stub's error.
    """
    where, refuses, stub = (cell.metadata[name] for name in ("where", "refuses", "stub"))
    error = next((output for output in cell.outputs if output.output_type == "error"), None)
    ended = f"{error.ename}: {error.evalue}" if error else ""
    by_stub = stub and error is not None and error.ename == STUBBED
    if not refuses and error and not by_stub:
        raise CourseError(f"{where}: {ended}")
    if refuses and not by_stub and not (error and is_own(error, cell)):
        raise CourseError(
            f"{where}: its check {f'ends in {ended}' if error else 'passes'} on {refuses}. Let an "
            "assert of its own fail there with a sentence, and give what the solution assigns an "
            "empty value before it."
        )


def is_own(error: NotebookNode, cell: NotebookNode) -> bool:
    """Whether it is a failed assert with a sentence, and of this cell itself."""
    trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
    raised_in = re.findall(r"Cell In\[(\d+)\]", trace)[-1:]
    own = error.ename == "AssertionError" and raised_in == [str(cell.execution_count)]
    return own and bool(error.evalue)


def verify(stem: str, notebook: NotebookNode, folder: Path) -> None:
    """Tries a solved notebook's exercises in one kernel, in `folder`.

    Raises CourseError that names notebook and exercise.
    """
    trial = trial_of(stem, notebook)
    kernel = kernel_of_here(folder / "partial" / "jupyter", "ragkit-course", {})
    where, quiet = {"metadata": {"path": str(folder)}}, ["--log-level=ERROR"]
    client = NotebookClient(
        trial, kernel_name=kernel, timeout=None, allow_errors=True, resources=where,
        extra_arguments=quiet,
    )  # fmt: skip
    client.log.setLevel(logging.WARNING)  # it tells of every kernel it starts
    try:
        stoppable([client.execute])
    except DeadKernelError:
        killed = "its Python process was killed, most likely because memory ran out"
        advice = "Close other programs and try again."
        raise CourseError(f"Notebook {stem}: {killed}. {advice}") from None
    for cell in trial.cells:
        hold_against(cell)


def replace_kept(path: Path, text: str) -> None:
    """Writes a file of the course; what somebody made of it is kept beside it, in `older/`."""
    if path.is_file() and path.read_text("utf8") != text:
        kept = path.parent.parent / "older" / f"{path.stem}-{file_hash(path)[:8]}{path.suffix}"
        kept.parent.mkdir(exist_ok=True)
        log.info("kept     %s as %s", path.name, kept)
        path.replace(kept)
    write_whole(path, text)


def lesson_plan(profile: str, exercises: list[Exercise]) -> str:
    """The plan of the assets, with this profile's commands and the table of exercises."""
    rows = []
    for one in exercises:
        name = one.notebook[3:].replace("_", " ")
        rows.append(f"| {one.id} | {name} | {one.title} | {one.difficulty} | {one.minutes} |")
    plan = string.Template(asset("lesson_plan.md").read_text("utf8"))
    return plan.substitute(profile=profile, exercises="\n".join(rows))


def write(sources: Path, run: Path, profile: str) -> Path:
    """Tries all exercises on a finished run, then writes `course/` beside it, which it returns.

    `profile` is the run's, a name or a file, by which the copies open it. Raises CourseError if
    there are no notebooks, an exercise is out of shape, or a check does not do its work.
    """
    notebooks = {path.stem: nbformat.read(path, 4) for path in sorted(sources.glob("[0-9]*.ipynb"))}
    if not notebooks:
        advice = "Run this from a checkout of the repository."
        raise CourseError(f"There are no notebooks in {sources}. {advice}")
    profile = str(Path(profile).resolve()) if Path(profile).is_file() else profile
    exercises = [e for stem, notebook in notebooks.items() for e in exercises_of(stem, notebook)]
    with only_run(run):
        for stem, notebook in notebooks.items():
            started, copy = time.monotonic(), copy_of(notebook, profile, str(run.parent.resolve()))
            verify(stem, copy, run)
            log.info("checked  notebook %s (%.0f s)", stem, time.monotonic() - started)
    folder = run.parent / "course"
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for stem, notebook in notebooks.items():
            copy = nbformat.writes(copy_of(notebook, profile, "../..", kind))
            replace_kept(folder / kind / f"{stem}.ipynb", f"{copy}\n")
    write_whole(folder / "lesson_plan.md", lesson_plan(profile, exercises))
    return folder
