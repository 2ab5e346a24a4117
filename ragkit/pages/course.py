"""The course: a student and a solution copy of every notebook, slides, a lesson plan. The end of
`assets/lesson_plan.md` says how an exercise is written. Nothing is written before it has been
tried: each check must refuse the stub and every likely wrong answer by an assertion of its own, and
pass on the solution. Marks are nbgrader's, whose commands work on the solution copies."""

import json
import logging
import re
import textwrap
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml
from jinja2 import Template
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ragkit.errors import NotebookError
from ragkit.experiment.run import KILLED, kernel_of_here, stoppable
from ragkit.experiment.store import only_run
from ragkit.pages import html
from ragkit.pages.report import output_html, prose
from ragkit.settings import asset

log = logging.getLogger(__name__)
LESSONS = yaml.safe_load(asset("lessons.yaml").read_text("utf8"))
LESSON = (asset("templates") / "lesson.md").read_text("utf8")
HEADING = re.compile(r"### Exercise (\d+) · (.+?) \*\((easy|medium|hard), (\d+) minutes\)\*\n")
SHAPE = "'### Exercise 1 · Name *(easy, 10 minutes)*'; two code cells must follow: solution, check"
REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.M | re.S)
STUBBED = "NotImplementedError"
STUB = f"# YOUR CODE HERE\nraise {STUBBED}()"
OWN = "AssertionError: .+"  # in which a check ends by itself
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
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("ran", None)
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f"PROFILE = {json.dumps(profile)}\nRUNS = {json.dumps(runs)}"
        if kind:
            cell.metadata.pop("wrong", None)
            cell.source = SOURCE.sub(KINDS[kind], cell.source)
        if kind == "student":
            cell.source = with_answer(cell.source, STUB)
    return copy


def with_lesson(copy: NotebookNode, lesson: dict[str, Any], kind: str) -> NotebookNode:
    """A copy with outcomes and quiz (`assets/lessons.yaml`), for `solution` with model answers."""
    form: Any = Template(LESSON, trim_blocks=True, lstrip_blocks=True).module
    copy.cells.insert(1, new_markdown_cell(form.begin(lesson)))
    copy.cells.append(new_markdown_cell(form.end(lesson, kind)))
    return copy


def trial(code: str, what: str, ends: str = "") -> NotebookNode:
    """A cell that says what it is, and by a pattern in what error it must end: by default none."""
    return new_code_cell(code, metadata={"what": what, "ends": ends})


def trials_of(stem: str, notebook: NotebookNode) -> Iterator[NotebookNode]:
    """All that a solved notebook is tried by, in order. A check must refuse the stub and
    each wrong answer by an assert of its own with a sentence (or the stub by its error)."""
    exercises = {one.answer.id: one for one in exercises_of(stem, notebook)}
    checks = {one.check.id for one in exercises.values()}
    for place, cell in enumerate(notebook.cells, 1):
        if one := exercises.get(cell.id):
            check, refuses = one.check.source, "(which an assert of its own must refuse)"
            stub, unmade = with_answer(cell.source, STUB), f"|{STUBBED}.*"
            yield trial(stub, f"{one.where}, the stub", unmade)
            yield trial(check, f"{one.where}, its check on the stub {refuses}", OWN + unmade)
            for code in cell.metadata["wrong"]:
                what = f"the wrong answer {code!r}"
                yield trial(with_answer(cell.source, code), f"{one.where}, {what}")
                yield trial(check, f"{one.where}, its check on {what} {refuses}", OWN)
            yield trial(cell.source, f"{one.where}, its solution")
            yield trial(check, f"{one.where}, its check on the solution")
        elif cell.cell_type == "code" and cell.id not in checks:
            yield trial(cell.source, f"Notebook {stem}, cell {place}")


def ended(cell: NotebookNode) -> str:
    """In what error an executed cell ended; '' if in none."""
    for error in cell.outputs:
        if error.output_type == "error":
            trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
            raised_in = re.findall(r"Cell In\[(\d+)\]", trace)[-1:]
            own = raised_in == [str(cell.execution_count)]
            return f"{error.ename}{'' if own else ' in another cell'}: {error.evalue}"
    return ""


def verify(stem: str, notebook: NotebookNode, folder: Path) -> list[str]:
    """What does not hold in a solved notebook, all tried in one kernel, in `folder`."""
    tried = new_notebook(cells=list(trials_of(stem, notebook)))
    how: Any = {"allow_errors": True, "timeout": None, "kernel_manager_class": kernel_of_here()}
    client = NotebookClient(tried, resources={"metadata": {"path": str(folder)}}, **how)
    client.log.setLevel(logging.WARNING)  # it tells of every kernel it starts
    try:
        stoppable(client.execute)
    except DeadKernelError:
        return [f"Notebook {stem}: {KILLED}"]
    found = []
    for cell in tried.cells:
        if not re.fullmatch(cell.metadata["ends"], ended(cell), re.DOTALL):
            found.append(f"{cell.metadata['what']}: {ended(cell) or 'it passes'}")
    return found


def write_slides(ran: list[Path], folder: Path) -> None:
    """Slides of executed notebooks: a page each that runs no script and loads nothing."""
    folder.mkdir()
    pages = [(path.stem.replace("_", " "), f"{path.stem}.html") for path in ran]
    for path, (name, file) in zip(ran, pages, strict=True):
        cells = nbformat.read(path, as_version=4).cells
        body = html.fill("slides", cells=cells, prose=prose, shown=output_html)
        (folder / file).write_text(html.page(name, body, pages, file), "utf8")


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
            copy = with_lesson(copy, LESSONS[stem], kind) if stem in LESSONS else copy
            nbformat.write(copy, folder / kind / f"{stem}.ipynb")
    write_slides(sorted((run / "notebooks").glob("[0-9]*.ipynb")), folder / "slides")
    plan = Template(asset("lesson_plan.md").read_text("utf8"), trim_blocks=True)
    text = plan.render(profile=profile, exercises=exercises, lessons=LESSONS)
    (folder / "lesson_plan.md").write_text(text, "utf8")
    return folder
