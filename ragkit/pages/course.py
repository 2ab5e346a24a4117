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
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from ragkit.errors import NotebookError
from ragkit.experiment.run import KILLED, kernel_of_here, stoppable
from ragkit.experiment.store import only_run
from ragkit.settings import asset

log = logging.getLogger(__name__)
HEADING = re.compile(r"### Exercise (\d+) · (.+?) \*\((easy|medium|hard), (\d+) minutes\)\*\n")
SHAPE = "'### Exercise 1 · Name *(easy, 10 minutes)*'; two code cells must follow: solution, check"
REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.M | re.S)
STUBBED = "NotImplementedError"
STUB = f"# YOUR CODE HERE\nraise {STUBBED}()"
ADVICE = "Let an assert of its own fail there; give names an empty value before the solution."
SOURCE = re.compile(r"Solved here[^.]*\.")  # what the sources say of themselves
KINDS = {  # of copies, and what they say in its place
    "student": "Yours to solve, where a cell says `# YOUR CODE HERE`.",
    "solution": "The solutions stand between `### BEGIN SOLUTION` and `### END SOLUTION`.",
}


class Exercise(NamedTuple):
    """An exercise of a notebook: its cells for the answer and the check, what its heading says."""

    answer: NotebookNode
    check: NotebookNode
    notebook: str
    id: str
    where: str
    title: str
    difficulty: str
    minutes: str


def with_answer(source: str, code: str) -> str:
    """A cell with `code` in the place of its solution, as far to the right."""
    return REGION.sub(lambda region: textwrap.indent(code, region[1]), source)


def exercises_of(stem: str, notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a solved notebook. Raises NotebookError that says what one of them lacks."""
    found = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown" or not cell.source.startswith("### Exercise"):
            continue
        heading, cells = HEADING.match(cell.source), notebook.cells[place + 1 : place + 3]
        if heading is None or [one.cell_type for one in cells] != ["code", "code"]:
            line = cell.source.splitlines()[0]
            raise NotebookError(f"Notebook {stem}: {line!r} should read {SHAPE}.")
        number, title, difficulty, minutes = heading.groups()
        name, where = f"{stem[:2]}-{number}", f"Notebook {stem}, exercise {number} ({title})"
        answer, check = cells
        if len(REGION.findall(answer.source)) != 1 or not answer.metadata.get("wrong"):
            marks = "### BEGIN SOLUTION and ### END SOLUTION"
            wrong = "likely answers under 'wrong' in its metadata"
            raise NotebookError(f"{where} lacks one solution between {marks}, or {wrong}.")
        found.append(Exercise(answer, check, stem, name, where, title, difficulty, minutes))
    return found


def copy_of(notebook: NotebookNode, profile: str, runs: str, kind: str = "") -> NotebookNode:
    """A copy that works on the given run. Of a kind, a key of KINDS, it can be handed out: it has
    no wrong answers and says what it is, and `student` has stubs for the solutions."""
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


def faults(stem: str, notebook: NotebookNode, run: Callable[[str], str]) -> Iterator[str]:
    """What does not hold in a solved notebook; `run` runs code and says in what error it ended.
    Each exercise is tried with the stub, each wrong answer and the solution. Its check must refuse
    all but the last by an assert of its own with a sentence, or the stub by the stub's error."""
    exercises = {one.answer.id: one for one in exercises_of(stem, notebook)}
    checks = {one.check.id for one in exercises.values()}
    for place, cell in enumerate(notebook.cells, 1):
        if one := exercises.get(cell.id):
            for code in (STUB, *cell.metadata["wrong"]):
                told = "the stub" if code == STUB else f"the wrong answer {code!r}"
                good = f"AssertionError: .|{STUBBED}" if code == STUB else "AssertionError: ."
                ended = run(with_answer(cell.source, code))
                if ended and not (code == STUB and ended.startswith(STUBBED)):
                    yield f"{one.where}: {told} does not even run: {ended}"
                if not re.match(good, ended := run(one.check.source)):
                    ends = f"ends in {ended}" if ended else "passes"
                    yield f"{one.where}: its check {ends} on {told}. {ADVICE}"
            if ended := run(cell.source):
                yield f"{one.where}, its solution: {ended}"
            if ended := run(one.check.source):
                yield f"{one.where}, its check on the solution: {ended}"
        elif cell.cell_type == "code" and cell.id not in checks and (ended := run(cell.source)):
            yield f"Notebook {stem}, cell {place}: {ended}"


def verify(stem: str, notebook: NotebookNode, folder: Path) -> list[str]:
    """The `faults` of a solved notebook, tried in one kernel, in `folder`."""
    found: list[str] = []
    kernel = kernel_of_here(folder / "partial" / "jupyter", "ragkit-course", {})
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(new_notebook(), kernel_name=kernel, timeout=None, resources=place)
    client.allow_errors = True
    client.log.setLevel(logging.WARNING)  # it tells of every kernel it starts

    def run(code: str) -> str:
        client.nb.cells.append(new_code_cell(code))
        client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)
        for error in client.nb.cells[-1].outputs:
            if error.output_type == "error":
                trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
                raised_in = re.findall(r"Cell In\[(\d+)\]", trace)[-1:]
                own = raised_in == [str(client.code_cells_executed)]
                return f"{error.ename}{'' if own else ' in another cell'}: {error.evalue}"
        return ""

    def work() -> None:
        with client.setup_kernel():
            found.extend(faults(stem, notebook, run))

    try:
        stoppable([work])
    except DeadKernelError:
        found.append(f"Notebook {stem}: {KILLED}")
    return found


def write(sources: Path, run: Path, profile: str) -> Path:
    """Tries all exercises on a finished run, then writes `course/` beside it, which it returns.
    `profile` is the run's, a name or a file, by which the copies open it. Raises NotebookError if
    there are no notebooks, an exercise is out of shape, or a check does not do its work."""
    notebooks = {path.stem: nbformat.read(path, 4) for path in sorted(sources.glob("[0-9]*.ipynb"))}
    if not notebooks:
        raise NotebookError(f"There are no notebooks in {sources}: run this from a checkout.")
    profile = str(Path(profile).resolve()) if Path(profile).is_file() else profile
    exercises = [e for stem, notebook in notebooks.items() for e in exercises_of(stem, notebook)]
    with only_run(run):
        for stem, notebook in notebooks.items():
            copy = copy_of(notebook, profile, str(run.parent.resolve()))
            if found := verify(stem, copy, run):
                raise NotebookError("\n".join(found))
            log.info("checked  notebook %s", stem)
    if (folder := run.parent / "course").is_dir():  # somebody may have worked in it
        old = folder.rename(f"{folder}-{time.strftime('%Y%m%d-%H%M%S')}")
        log.info("kept     the last course as %s", old)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for stem, notebook in notebooks.items():
            copy = copy_of(notebook, profile, "../..", kind)
            nbformat.write(copy, folder / kind / f"{stem}.ipynb")
    form = "| {id} | {notebook} | {title} | {difficulty} | {minutes} |"
    rows = "\n".join(form.format(**one._asdict()) for one in exercises)
    plan = string.Template(asset("lesson_plan.md").read_text("utf8"))
    (folder / "lesson_plan.md").write_text(plan.substitute(profile=profile, exercises=rows), "utf8")
    return folder
