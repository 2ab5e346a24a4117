"""The notebooks: clean sources, the smoke run with its report, and the course made of it."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from logs import read_log
from nbclient import NotebookClient

from ragkit.experiment.lab import Lab
from ragkit.experiment.store import fingerprint
from ragkit.experiment.wanted import stages as stages_of
from ragkit.pages import course
from ragkit.pages.course import exercises_of

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = {path.name for path in NOTEBOOKS if path.stem[0].isdigit()}  # others are an appendix
READING = {"05", "06", "08", "09", "A1", "A2"}  # notebooks that only read stored results


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_sources_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(papermill.inspect_notebook(str(path))) == {"PROFILE", "RUNS"}
    text = "\n".join(cell.source for cell in notebook.cells)
    assert len(exercises_of(path.stem, notebook)) >= (0 if path.stem.startswith("A") else 2)
    assert not re.search(r"""if\s+PROFILE|profile\.name\s*==""", text)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(line) for source in code for line in source.splitlines()) <= 100


def test_outputs_that_are_kept_are_those_of_their_cells():
    """An edited cell must lose its output, or be run again (`make reference PROFILE=full`)."""
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if kept := cell.get("outputs"):
                assert cell.metadata["ran"] == fingerprint(cell.source), f"{path.name}: {cell.id}"
                assert not [one for one in kept if one.output_type == "error"]
                assert not [one for one in kept if one.get("name") == "stderr"]
                pictures = [one.data for one in kept if "image/png" in one.get("data", {})]
                assert all(len(one["text/plain"]) > 40 for one in pictures)
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 6e6


@pytest.fixture(scope="module")
def lab(smoke):
    return Lab("smoke", smoke)


@pytest.fixture(scope="module")
def homes(lab):
    """The folders of the run's stages by name."""
    return {one.name: lab.store.home(one) for one in stages_of(lab.graph)}


def test_the_smoke_run_ends_with_a_report(lab):
    manifest = json.loads((lab.folder / "manifest.json").read_text())
    assert set(manifest["notebooks"]) == {path.stem for path in NOTEBOOKS}
    assert set(manifest["stages"]) == {one.name for one in stages_of(lab.graph)}
    for page in ["index", "sliders", "manifest", *(p.stem for p in NOTEBOOKS)]:
        assert (lab.folder / "report" / f"{page}.html").is_file()
    told = [*manifest["stages"].values(), *manifest["notebooks"].values()]
    assert {one["status"] for one in told} == {"ran: not made yet"}
    assert all(one["made"]["versions"] and one["seconds"] >= 0 for one in told)
    assert "not comparable" in (lab.folder / "report" / "index.html").read_text("utf8")


def test_what_only_reads_stored_results_loads_no_models(smoke):
    notebooks = json.loads((smoke / "smoke" / "manifest.json").read_text())["notebooks"]
    numbers = {one["key"]: name[:2] for name, one in notebooks.items()}
    noted = (smoke / "noted").read_text()
    loaded = {numbers[key] for key in re.findall(r"notebook-(\w+)", noted)}
    assert "03" in loaded  # it records attention itself
    assert not loaded & READING


def test_a_second_seed_of_step_1_gives_another_reader(lab, homes):
    weights = [homes[f"step1/almanac{note}"] / "fine-tuned" / "model.safetensors"
               for note in ("", " (Step 1 seed 1)")]  # fmt: skip
    assert weights[0].read_bytes() != weights[1].read_bytes()
    ledger = (lab.folder / "figures" / "09_ledger.csv").read_text()
    assert all(f"Step 1 with seed {seed}: HR@5" in ledger for seed in (0, 1))


def test_the_ceiling_is_the_oracle_on_the_query_side_and_on_both(lab):
    ends = pd.read_csv(lab.figures / "04_ceiling.csv", index_col="set").loc["almanac"]
    seeds = lab.profile.distill.seeds
    both = lab.graph.varied("both sides")
    for side, graph, some in (("query", lab.graph, seeds), ("both", both, seeds[:1])):
        stages = [graph.step2("almanac", "oracle", seed) for seed in some]
        assert {stage.settings["distill"]["side"] for stage in stages} == {side}
        files = [lab.store.home(stage) / "curve.json" for stage in stages]
        last = [json.loads(file.read_text())[-1]["hr"] for file in files]
        told = ends["oracle, query side" if side == "query" else "oracle, both sides"]
        assert told == pytest.approx(np.mean(last))


def test_the_example_finds_a_gold_passage_and_others(lab):
    place, questions = lab.example("trivia", "distill"), lab.corpus("trivia").questions["distill"]
    mixed = []
    for row, question in zip(lab.candidates("trivia")["distill"], questions, strict=True):
        found = set(row[: lab.profile.k].tolist())
        mixed.append(bool(found & set(question.gold)) and not found <= set(question.gold))
    assert mixed[place]
    assert not any(mixed[:place])


def test_the_logs_of_both_steps_stay_with_their_stages(homes):
    steps = read_log(homes["step1/trivia"])
    assert [row["step"] for row in steps] == list(range(1, 21))
    home = homes["step2/trivia/fine-tuned attention, seed 0"]
    curve = json.loads((home / "curve.json").read_text())
    looks = [(row["epoch"], row["hr"]) for row in read_log(home) if "hr" in row]
    assert looks == [(row["epoch"], row["hr"]) for row in curve]


def test_the_report_loads_nothing_and_runs_nothing(lab):
    address = r"""(?:src|href|srcset|action)\s*=\s*["']?\s*(?:https?:)?//[^"'\s>]*"""
    for page in (lab.folder / "report").glob("*.html"):
        text = page.read_text("utf8")
        assert not re.findall(address, text), page.name
        assert not re.findall(r"""url\(\s*["']?\s*(?:https?:)?//""", text), page.name
        assert "<script" not in text or page.name == "sliders.html", page.name


def test_every_figure_has_alt_text_and_a_table(lab):
    figures = sorted((lab.folder / "figures").glob("*.svg"))
    assert len(figures) >= 4
    for figure in figures:
        assert len(figure.with_suffix(".txt").read_text()) > 40
        width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', figure.read_text())[1])
        assert width < 440  # else its text is too small on a phone
        assert figure.with_suffix(".csv").is_file()
        assert figure.with_suffix(".png").is_file()


def test_a_second_run_reuses_everything(lab, ragkit):
    again = ragkit("reproduce", "--profile", "smoke", "--runs", lab.runs)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "running" not in again.stderr
    assert f"{len(NOTEBOOKS)} stages are there, 0 are to be made" in again.stderr
    manifest = json.loads((lab.folder / "manifest.json").read_text())
    for part in ("stages", "notebooks"):
        assert {one["status"] for one in manifest[part].values()} == {"reused"}


def errors_of(path):
    """A copy run where it stands: the error that each exercise's check ends in."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, allow_errors=True, resources=place).execute()
    checks = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    errors = [[o.ename for o in cell.outputs if o.output_type == "error"] for cell in checks]
    return [found[0] if found else None for found in errors]


def test_the_course_of_the_smoke_run(lab, ragkit, monkeypatch):
    """Every exercise is tried here; then a copy is run just as a student opens it."""
    ended = ragkit("course", "--profile", "smoke", "--runs", lab.runs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    folder = lab.runs / "course"
    for kind in course.KINDS:
        assert {path.name for path in (folder / kind).iterdir()} == LESSONS
    assert (folder / "lesson_plan.md").is_file()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert None not in errors_of(folder / "student" / "00_start_here.ipynb")
    assert set(errors_of(folder / "solution" / "00_start_here.ipynb")) == {None}
