"""Notebooks executed: what they opened, when they hold, whose Python runs them, how they fail."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest

from ragkit.errors import NotebookError
from ragkit.experiment.lab import Lab
from ragkit.experiment.run import OWN_ERRORS, Notebooks
from ragkit.experiment.store import RECORD, read_record
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


def notebooks(folder, *cells, **more):
    """A run's notebooks, the toy alone."""
    lab = Lab("smoke", folder / "runs")
    save_profile(lab.profile, lab.folder / "profile.yaml")
    return Notebooks(lab, notebook(folder / "sources", *cells, **more))


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
    made = notebooks(
        folder,
        "from ragkit.experiment.lab import Lab\nlab = Lab(PROFILE, RUNS)\nlab.corpus('almanac')",
        "import ragkit, sys\nprint(sys.executable, ragkit.__file__, lab.folder)",
        "(lab.figures / '05_drawn.csv').write_text('a,b')",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("PYTHONPATH", str(folder / "other"))
        assert made.state(made.sources[0]) == (None, "not made yet")
        made.run(made.sources[0])
    return made


def test_the_kernel_is_this_interpreter_with_this_package(executed):
    told = nbformat.read(executed.homes["05_toy"] / "05_toy.ipynb", as_version=4)
    said = told.cells[-2].outputs[0].text.split()
    assert said[:2] == [sys.executable, str(ROOT / "ragkit" / "__init__.py")]
    assert Path(said[2]) == executed.lab.folder.resolve()


def test_an_execution_keeps_what_it_opened_and_drew(executed):
    saved = read_record(executed.homes["05_toy"])
    keys = {one.name: [one.name, one.key] for one in executed.lab.stages}
    opened = ("passages/almanac", "questions/almanac")
    assert saved["record"]["inputs"] == {name: keys[name] for name in opened}
    assert set(saved["files"]) == {"05_toy.ipynb", "figures/05_drawn.csv"}
    assert "ragkit.experiment.lab" in saved["record"]["code"]
    assert executed.status == {"05_toy": "ran: not made yet"}
    executed.publish()
    assert (executed.lab.folder / "figures" / "05_drawn.csv").read_text() == "a,b"
    assert (executed.lab.folder / "notebooks" / "05_toy.ipynb").is_file()
    again = Notebooks(executed.lab, executed.sources[0].parent)
    again.run(again.sources[0])
    assert again.status == {"05_toy": "reused"}
    assert again.homes == executed.homes


@pytest.mark.parametrize(
    ("part", "changed", "reason"),
    [
        ("code", {"ragkit.data.text": "other"}, "ragkit.data.text changed"),
        ("code", {"its source": "other"}, "its source changed"),
        ("versions", {"pandas": "9"}, "versions.pandas 9 -> "),
        ("profile", {"k": 9}, "profile.k 9 -> 5"),
        ("inputs", {"bm25/almanac": ["bm25/almanac", "an older key"]}, "bm25/almanac was made"),
        ("files", {"figures/05_more.csv": "gone"}, "its files are damaged or missing"),
    ],
)
def test_an_execution_holds_only_with_all_that_it_depends_on(executed, part, changed, reason):
    source, record = executed.sources[0], executed.homes["05_toy"] / RECORD
    text = record.read_text()
    saved = json.loads(text)
    (saved if part == "files" else saved["record"])[part] |= changed
    record.write_text(json.dumps(saved))
    home, told = executed.state(source)
    record.write_text(text)
    assert home is None
    assert told.startswith(reason)
    assert executed.state(source) == (record.parent, "")


def test_a_kernel_that_is_shut_down_says_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUPYTER_PATH", os.environ.get("JUPYTER_PATH", ""))  # put back afterwards
    said = "KeyboardInterrupt caught in kernel."  # by a kernel that is shut down in a reply
    made = notebooks(tmp_path, f"get_ipython().kernel.log.error({said!r})")
    made.run(made.sources[0])
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
def test_a_failing_notebook_is_named_with_its_cell(tmp_path, monkeypatch, cell, words):
    monkeypatch.setenv("JUPYTER_PATH", os.environ.get("JUPYTER_PATH", ""))  # put back afterwards
    made = notebooks(tmp_path, "x = 1", cell)
    with pytest.raises(NotebookError) as caught:
        made.run(made.sources[0])
    assert str(caught.value).startswith("Notebook 05_toy.ipynb")
    for word in words:
        assert word in str(caught.value)
    assert made.state(made.sources[0]) == (None, "not made yet")


def test_every_error_of_the_package_is_known_as_its_own():
    known = {"RagkitError", "DataError", "StoreError", "AttentionError"}
    assert known <= OWN_ERRORS
    assert "ValueError" not in OWN_ERRORS


def test_an_unknown_parameter_is_an_error(tmp_path):
    """Else the notebook's own value would count, and it would read another run."""
    made = notebooks(tmp_path, parameters="PROFILE = 'tiny'")
    with pytest.raises(NotebookError, match=r"05_toy\.ipynb does not know the parameter RUNS"):
        made.run(made.sources[0])


def test_a_folder_without_notebooks_is_named(tmp_path):
    with pytest.raises(NotebookError, match="from a checkout"):
        Notebooks(Lab(load_profile("smoke"), tmp_path / "runs"), tmp_path)
