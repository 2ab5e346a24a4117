"""Setting up: one list of dependencies, the Makefile's commands, working copies, the wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grimp
import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]


def make(*arguments, **environment):
    """What make would run, without running it, in a checkout that is not set up yet."""
    left = ("CONDA_DEFAULT_ENV", "MAKEFLAGS", "MAKELEVEL")
    given = {name: value for name, value in os.environ.items() if name not in left}
    command, environment = ["make", "-B", "-n", *arguments], given | environment
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return ended.stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("reproduce", "python -m ragkit reproduce --profile 'tiny'"),
        ("plan", "python -m ragkit plan --profile 'tiny'"),
        ("test", "python -m pytest tests"),
        ("slow", "python -m pytest tests -m slow"),
        ("lint", "ruff check ragkit tests"),
        ("report", "python -m ragkit report --profile 'tiny'"),
        ("lab", "jupyter lab lab"),
        ("course", "python -m ragkit course --profile 'tiny'"),
        ("nouns", "papermill notebooks/appendix/nouns.ipynb"),
        ("tidy", "python -m ragkit tidy --profile 'tiny'"),
        ("pretrain", "papermill notebooks/appendix/pretraining.ipynb"),
        ("pretrain", "papermill notebooks/appendix/pretraining_fid.ipynb"),
        ("starts", "-p FAMILY gpt_neox -p HIDDEN 64"),
        ("study", "papermill notebooks/appendix/study.ipynb"),
    ],
)
def test_each_command_sets_itself_up_first(target, words):
    said = make(target)
    assert words in said
    assert said.index("pip install --quiet -e '.[dev]'") < said.index(words)


def test_what_make_runs_is_there():
    text = (ROOT / "Makefile").read_text("utf8")
    for module in re.findall(r"-m (ragkit[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for script in re.findall(r"\$\(RUN\) (tests/\S+\.py)", text):
        assert (ROOT / script).is_file(), script
    assert "lint_imports" in make("lint")


def test_several_processes_work_as_one():
    said = make("reproduce", "PROCESSES=2", "SET=k=3 seed=1")
    assert "torch.distributed.run --nproc_per_node 2 -m ragkit reproduce" in said
    assert "--set 'k=3' --set 'seed=1'" in said


def test_a_profile_is_passed_on_and_conda_is_respected():
    assert "--profile 'my own/mine.yaml'" in make("reproduce", "PROFILE=my own/mine.yaml")
    said = make("reproduce", CONDA_DEFAULT_ENV="ragkit")
    assert ".venv" not in said
    assert "python -m ragkit reproduce" in said
    assert ".venv/bin/python" in make("reproduce", CONDA_DEFAULT_ENV="base")


def told(*command):
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return ended.stdout


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text("utf8")
    targets = set(re.search(r"\.PHONY: (.*)", makefile).group(1).split())
    shown = told("make", "--no-print-directory", "help")
    assert {line.split()[0] for line in shown.splitlines()} == targets


def test_clean_touches_only_what_make_and_runs_made():
    (line,) = (line for line in make("clean").splitlines() if line.startswith("rm -rf"))
    tracked = {path.split("/")[0] for path in told("git", "ls-files").splitlines()}
    assert not tracked & set(line.split()[2:])


def test_environment_yml_takes_everything_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
    assert environment["name"] == "ragkit"
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-e .[dev]"]}
    assert {item.split("=")[0] for item in conda} == {"python", "make", "pip"}
    (version,) = (item.split("=")[1] for item in conda if item.startswith("python="))
    assert PROJECT["requires-python"].startswith(f">={version}")


def test_the_one_list_is_pinned():
    heavy = {re.split(r"[=><]", item)[0]: item for item in PROJECT["dependencies"]}
    assert all("==" in item or ("<" in item and ">=" in item) for item in heavy.values()), heavy
    assert not list(ROOT.glob("requirements*.txt"))


def test_ci_runs_the_three_commands_in_order():
    script = (ROOT / ".ci" / "run").read_text("utf8")
    assert re.findall(r"^make (\w+)", script, re.M) == ["lint", "test", "reproduce"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_working_copies_find_the_runs_and_never_touch_the_originals(tmp_path):
    originals, folder = tmp_path / "notebooks", tmp_path / "lab"
    shutil.copytree(ROOT / "notebooks", originals)
    command = ["make", "-f", ROOT / "Makefile", "lab", "RUN=true", "READY="]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert {one.name for one in folder.iterdir()} == {one.name for one in originals.glob("*.ipynb")}
    for copy in folder.glob("*.ipynb"):
        cells = nbformat.read(copy, as_version=4).cells
        (cell,) = (one for one in cells if "parameters" in one.metadata.get("tags", []))
        values: dict[str, str] = {}
        exec(cell.source, values)
        assert (folder / values["RUNS"]).resolve() == (tmp_path / "runs").resolve()
    edited = folder / "00_start_here.ipynb"
    edited.write_text("mine")
    subprocess.run(command, cwd=tmp_path, check=True)
    assert edited.read_text() == "mine"
    for one in originals.glob("*.ipynb"):
        assert one.read_bytes() == (ROOT / "notebooks" / one.name).read_bytes()
    assert told("git", "check-ignore", "lab/00_start_here.ipynb")


def test_a_wheel_holds_the_assets_and_builds_without_warnings(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ragkit", tmp_path / "ragkit", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    command = [sys.executable, "-c", build]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Warning" not in ended.stdout + ended.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert set(told("git", "ls-files", "ragkit").split()) <= packed


def test_the_house_is_small():
    """7,000 lines, 300 a module; nobody stands on more than eight others."""
    lines = {
        path: len(path.read_text("utf8").splitlines()) for path in (ROOT / "ragkit").rglob("*.py")
    }
    assert max(lines.values()) <= 300
    assert sum(lines.values()) <= 7000
    graph, floors = grimp.build_graph("ragkit"), {}

    def floor(module):
        if module not in floors:
            below = graph.find_modules_directly_imported_by(module) - {"ragkit"}
            floors[module] = 1 + max(map(floor, below), default=0)
        return floors[module]

    assert max(map(floor, graph.modules)) <= 9
