"""Notebooks executed: what they are made of, when they hold, whose Python runs them, how they
fail."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from ragkit.errors import NotebookError
from ragkit.experiment import run
from ragkit.experiment.lab import Lab
from ragkit.experiment.provenance import closure
from ragkit.experiment.store import Store, read_record
from ragkit.profile import load_profile, save_profile

ROOT = Path(__file__).parent.parent.parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook(folder, *cells, parameters="PROFILE = 'tiny'\nRUNS = '..'"):
    """A notebook of these cells in a folder of its own; returns the folder."""
    made = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    made.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    made.cells += map(nbformat.v4.new_code_cell, cells)
    folder.mkdir()
    nbformat.write(made, folder / "05_toy.ipynb")
    return folder


class Run:
    """A run, of whose stages there are those of one set's data, and of whose notebooks the toy."""

    def __init__(self, folder, *cells, **more):
        self.sources = notebook(folder / "sources", *cells, **more)
        self.lab = Lab("smoke", folder / "runs")
        save_profile(self.lab.profile, self.lab.folder / "profile.yaml")

    @property
    def toy(self):
        """The notebook as a stage, as the next call sees it."""
        (toy,) = run.notebooks_of(self.lab, self.sources)
        return toy

    def open(self):
        return self.lab.store.open(self.toy)


@pytest.fixture(autouse=True, scope="module")
def data_alone():
    """Runs of a few cheap stages."""
    kinds = ("passages", "questions")
    with pytest.MonkeyPatch.context() as patch:
        every = run.stages_of
        patch.setattr(run, "stages_of", lambda g: [s for s in every(g) if s.kind in kinds][:2])
        yield


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook that opened two stages and drew a figure, beside a foreign kernel and package."""
    folder = tmp_path_factory.mktemp("executed")
    foreign = folder / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    (folder / "other" / "ragkit").mkdir(parents=True)
    (folder / "other" / "ragkit" / "__init__.py").write_text("raise SystemExit('foreign')")
    made = Run(
        folder,
        "from ragkit.experiment.lab import Lab\nlab = Lab(PROFILE, RUNS)\nlab.corpus('almanac')",
        "import ragkit, sys\nprint(sys.executable, ragkit.__file__, lab.folder)",
        "(lab.figures / '05_drawn.csv').write_text('a,b')",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("PYTHONPATH", str(folder / "other"))
        assert made.lab.store.why_not(made.toy) == "not made yet"
        made.open()
    return made


def test_the_kernel_is_this_interpreter_with_this_package(executed):
    told = nbformat.read(executed.open() / "05_toy.ipynb", as_version=4)
    said = told.cells[-2].outputs[0].text.split()
    assert said[:2] == [sys.executable, str(ROOT / "ragkit" / "__init__.py")]
    assert Path(said[2]) == executed.lab.folder.resolve()


def test_an_execution_keeps_what_it_is_made_of_and_drew(executed):
    saved = read_record(executed.open())
    stages = {one.name: [one.name, one.key] for one in run.stages_of(executed.lab.graph)}
    assert saved["record"]["inputs"] == stages
    assert set(saved["files"]) == {"05_toy.ipynb", "figures/05_drawn.csv"}
    assert "ragkit.experiment.lab" in saved["record"]["settings"]["code"]
    assert executed.lab.status["05_toy"] == "ran: not made yet"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("closure", lambda c: closure(c) | {"ragkit.data.text": "x"}, "ragkit.data.text changed"),
        ("DRAWN_WITH", ("pandas",), "settings.drawn with."),
    ],
)
def test_an_execution_holds_only_with_all_that_it_depends_on(
    executed, monkeypatch, name, value, reason
):
    monkeypatch.setattr(run, name, value)
    assert executed.lab.store.why_not(executed.toy).startswith(reason)
    monkeypatch.undo()
    assert executed.lab.store.why_not(executed.toy) is None


def test_an_edited_notebook_is_run_again(executed):
    file = executed.sources / "05_toy.ipynb"
    kept = file.read_text("utf8")
    file.write_text(kept.replace("'a,b'", "'a,c'"), "utf8")
    assert executed.lab.store.why_not(executed.toy) == "its source changed"
    file.write_text(kept, "utf8")
    assert executed.lab.store.why_not(executed.toy) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [("k=9", "settings.profile.k 5 -> 9"), ("sets.0.seed=99", "settings.profile.sets")],
)
def test_an_execution_holds_only_with_its_profile(executed, change, reason):
    lab = Lab(load_profile("smoke", [change]), executed.lab.runs)
    (toy,) = run.notebooks_of(lab, executed.sources)
    assert lab.store.why_not(toy).startswith(reason)


def test_an_execution_holds_only_with_the_stages_and_files_that_were_there(executed):
    toy, store = executed.toy, Store(executed.lab.folder)
    stage = next(iter(toy.inputs.values()))
    anew = replace(stage, settings={**stage.settings, "more": 1})
    other = replace(toy, inputs={**toy.inputs, stage.name: anew})
    assert store.why_not(other) == f"{stage.name} was made anew"
    drawn = store.home(toy) / "figures" / "05_drawn.csv"
    drawn.write_text("other")
    assert store.why_not(toy) == "figures/05_drawn.csv is damaged or missing"
    drawn.write_text("a,b")
    assert store.why_not(toy) is None


def test_a_kernel_that_is_shut_down_says_nothing(tmp_path, capfd):
    said = "KeyboardInterrupt caught in kernel."  # by a kernel that is shut down in a reply
    Run(tmp_path, f"get_ipython().kernel.log.error({said!r})").open()
    assert said not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (
            "from ragkit.errors import ProfileError\nraise ProfileError('mine.yaml: k: too large')",
            ["cell 4: mine.yaml: k: too large"],
        ),
        (
            "# a look at it\nvalues = []\nvalues[3]",
            ["cell 4 ('# a look at it')", "IndexError: list index out of range", "traceback: "],
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            ["its Python process was killed", "memory"],
        ),
    ],
)
def test_a_failing_notebook_is_named_with_its_cell(tmp_path, cell, words):
    made = Run(tmp_path, "x = 1", cell)
    with pytest.raises(NotebookError) as caught:
        made.open()
    assert str(caught.value).startswith("Notebook 05_toy.ipynb")
    for word in words:
        assert word in str(caught.value)
    assert made.lab.store.why_not(made.toy) == "not made yet"


def test_every_error_of_the_package_is_known_as_its_own():
    known = {"RagkitError", "DataError", "StoreError", "AttentionError"}
    assert known <= run.OWN_ERRORS
    assert "ValueError" not in run.OWN_ERRORS


def test_an_unknown_parameter_is_an_error(tmp_path):
    """Else the notebook's own value would count, and it would read another run."""
    made = Run(tmp_path, parameters="PROFILE = 'tiny'")
    with pytest.raises(NotebookError, match=r"05_toy\.ipynb does not know the parameter RUNS"):
        made.open()


def test_a_folder_without_notebooks_is_named(tmp_path):
    with pytest.raises(NotebookError, match="from a checkout"):
        run.notebooks_of(Lab(load_profile("smoke"), tmp_path / "runs"), tmp_path)
