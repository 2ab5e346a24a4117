"""The notebooks: clean sources, the whole smoke run, its report, its course, and the faults of a run."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file

from ragkit import plan
from ragkit.distillation.log import read
from ragkit.experiment import tables as measured
from ragkit.experiment.lab import Lab
from ragkit.pages import course
from ragkit.pages.course import exercises_of
from ragkit.profile import load_profile

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_sources_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert set(papermill.inspect_notebook(str(path))) == {"PROFILE", "RUNS"}
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "## Exercises" in text
    assert len(exercises_of(path.stem, notebook)) >= 2
    assert not re.search(r"""if\s+PROFILE|profile\.name\s*==""", text)


def test_the_smoke_run_ends_with_a_report(smoke):
    run = smoke / "smoke"
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["notebooks"]) == {p.stem for p in NOTEBOOKS}
    for page in ["index", "gallery", "sliders", "manifest", *(p.stem for p in NOTEBOOKS)]:
        assert (run / "report" / f"{page}.html").is_file()
    assert {stage["this_call"] for stage in manifest["stages"].values()} == {"ran"}
    assert "not comparable" in (run / "report" / "index.html").read_text()


def test_a_second_run_of_step_1_shares_what_does_not_depend_on_it(smoke):
    first = smoke / "smoke" / "stages"
    second = smoke / "smoke" / "varied" / "step1-seed-1" / "stages"

    def key(stages, name):
        return json.loads((stages / name / "stage.json").read_text())["key"]

    for shared in (
        "retriever/almanac",
        "teacher/trivia/off-the-shelf",
        "step2/almanac/off-the-shelf-attention-0",
        "tokens/trivia/off-the-shelf",
    ):
        assert key(first, shared) == key(second, shared)
    for own in (
        "step1/trivia",
        "teacher/almanac/fine-tuned",
        "step2/trivia/step-10-perplexity-0",
        "tokens/almanac/step-10",
    ):
        assert key(first, own) != key(second, own)
    weights = [
        (stages / "step1" / "almanac" / "model.safetensors").read_bytes()
        for stages in (first, second)
    ]
    assert weights[0] != weights[1]
    ledger = (smoke / "smoke" / "figures" / "09_ledger.csv").read_text()
    assert all(f"Step 1 with seed {seed}: HR@5" in ledger for seed in (0, 1))


def test_an_index_refresh_gives_the_reader_new_candidates(smoke):
    home = smoke / "smoke" / "stages"
    other = (
        smoke
        / "smoke"
        / "varied"
        / "index-refresh"
        / "varied"
        / "refreshed-fine-tuned-attention-0"
        / "stages"
    )
    before, after = (
        load_file(stages / "candidates" / "trivia" / "candidates.safetensors")
        for stages in (home, other)
    )
    assert (before["distill"] != after["distill"]).any()
    vectors = [stages / "vectors" / "trivia" / "00000.npy" for stages in (home, other)]
    assert vectors[0].samefile(
        vectors[1]
    )  # the query side learns: no passage is encoded again, and the shard is not even copied
    scores = [
        load_file(stages / "teacher" / "trivia" / "fine-tuned" / "scores.safetensors")["attention"]
        for stages in (home, other)
    ]
    moved = (before["distill"][:, :5] != after["distill"][:, :5]).any(1)
    assert np.array_equal((scores[0] != scores[1]).any(axis=(1, 2, 3, 4, 5)), moved)
    assert (other / "step1" / "trivia" / "model.safetensors").read_bytes() == (
        home / "step1" / "trivia" / "model.safetensors"
    ).read_bytes()
    assert [
        row["epoch"]
        for row in json.loads(
            (other / "step2" / "trivia" / "fine-tuned-attention-0" / "curve.json").read_text()
        )
    ] == [0, 0.5, 1]


def test_a_profile_with_index_refreshes_answers_with_the_last_retriever(smoke, tmp_path):
    profile = load_profile("smoke").model_copy(update={"name": "refreshing", "index_refreshes": 1})
    shutil.copytree(smoke / "smoke" / "stages", tmp_path / "refreshing" / "stages")
    lab = Lab(profile, tmp_path)
    rows = measured.answer_rows(lab, "almanac", ["answer string"])
    assert set(rows["system"]) == {"closed book", "BM25", "initial", "answer string"}
    last = (
        tmp_path
        / "refreshing"
        / "varied"
        / "refreshed-answer-string-0"
        / "stages"
        / "step2"
        / "almanac"
        / "answer-string-0"
    )
    answers = json.loads(
        (
            lab.store.folder
            / "stages"
            / "answers"
            / "almanac"
            / "answer-string-fine-tuned-0"
            / "stage.json"
        ).read_text()
    )
    assert (
        answers["record"]["upstream"]["step2/almanac/answer-string-0"]
        == json.loads((last / "stage.json").read_text())["key"]
    )
    assert lab.store.status["answers/almanac/initial-fine-tuned-0"] == "reused"


def test_the_ceiling_is_the_oracle_on_the_query_side_and_on_both(smoke):
    lab = Lab("smoke", smoke)
    ends = measured.ceiling(lab, "almanac").set_index("trained")["HR"]
    for side, home in (
        ("query", smoke / "smoke"),
        ("both", smoke / "smoke" / "varied" / "both-sides"),
    ):
        stage = home / "stages" / "step2" / "almanac" / "oracle-0"
        assert ends[side] == json.loads((stage / "curve.json").read_text())[-1]["hr"]
        assert (
            json.loads((stage / "stage.json").read_text())["record"]["profile"]["distill"]["side"]
            == side
        )
    assert lab.store.status["step2/almanac/oracle-0"] == "reused"


def test_the_example_finds_a_gold_passage_and_others(smoke):
    lab = Lab("smoke", smoke)
    place, questions = lab.example("trivia", "distill"), lab.corpus("trivia").questions["distill"]
    found = [set(row[: lab.profile.k].tolist()) for row in lab.candidates("trivia")["distill"]]
    mixed = [
        bool(row & set(q.gold)) and not row <= set(q.gold)
        for row, q in zip(found, questions, strict=True)
    ]
    assert mixed[place]
    assert not any(mixed[:place])


@pytest.mark.parametrize("system", ["closed-book", "initial", "BM25", "fine-tuned-attention"])
def test_every_run_of_step_1_is_measured_against_its_own_reader(smoke, system):
    """The fine-tuned reader's answers depend on the Step 1 that made it; those of the reader before Step 1 do not."""
    homes = [smoke / "smoke" / "stages", smoke / "smoke" / "varied" / "step1-seed-1" / "stages"]

    def key(home, stage):
        return json.loads((home / stage / "stage.json").read_text())["key"]

    for home in homes:
        made_from = json.loads(
            (home / "answers" / "almanac" / f"{system}-fine-tuned-0" / "stage.json").read_text()
        )["record"]["upstream"]
        assert made_from["step1/almanac"] == key(home, "step1/almanac")
    assert len({key(home, f"answers/almanac/{system}-fine-tuned-0") for home in homes}) == 2
    assert len({key(home, "answers/almanac/closed-book-off-the-shelf-0") for home in homes}) == 1


def test_the_logs_of_both_steps_stay_with_their_stages(smoke):
    stages = smoke / "smoke" / "stages"
    steps, looks = (
        read(stages / name / "metrics.jsonl")
        for name in ("step1/trivia", "step2/trivia/fine-tuned-attention-0")
    )
    assert [row["step"] for row in steps if "answer lift" in row] == [0, 10, 20]
    curve = json.loads(
        (stages / "step2" / "trivia" / "fine-tuned-attention-0" / "curve.json").read_text()
    )
    assert [(row["epoch"], row["hr"]) for row in looks] == [
        (row["epoch"], row["hr"]) for row in curve
    ]
    assert not any(
        "training_log" in name
        for name in json.loads((stages / "step1" / "trivia" / "stage.json").read_text())["record"][
            "code"
        ]
    )
    for name in (
        "answer lift",
        "answer Spearman",
        "nouns lift",
        "nouns Spearman",
    ):  # the teacher of Step 2 is the reader that Step 1 ended with
        assert looks[0][name] == pytest.approx(steps[-1][name], abs=1e-5)


def test_the_report_has_no_external_address(smoke):
    for page in (smoke / "smoke" / "report").glob("*.html"):
        text = page.read_text()
        assert not re.findall(
            r"""(?:src|href|srcset|action)\s*=\s*["']?\s*(?:https?:)?//[^"'\s>]*""", text
        ), page.name
        assert not re.findall(r"""url\(\s*["']?\s*(?:https?:)?//""", text), page.name
        assert "<script" not in text or page.name == "sliders.html", page.name


def test_the_report_folds_solutions_and_hints(smoke):
    for path in NOTEBOOKS:
        text = (smoke / "smoke" / "report" / f"{path.stem}.html").read_text()
        exercises = len(exercises_of(path.stem, nbformat.read(path, as_version=4)))
        assert (
            text.count("<details><summary>Solution</summary>")
            == text.count("<summary>Hint</summary>")
            == exercises
        )
        assert text.count("### END SOLUTION") == exercises


def test_every_figure_has_alt_text_and_a_table(smoke):
    figures = sorted((smoke / "smoke" / "figures").glob("*.svg"))
    assert len(figures) >= 4
    for figure in figures:
        assert len(figure.with_suffix(".txt").read_text()) > 40
        assert (
            float(re.search(r'<svg[^>]* width="([\d.]+)pt"', figure.read_text())[1]) < 440
        )  # else its text is too small on a phone
        assert figure.with_suffix(".csv").is_file()
        assert figure.with_suffix(".png").is_file()


def test_a_second_run_reuses_everything(smoke, ragkit):
    again = ragkit("reproduce", "--profile", "smoke", "--runs", str(smoke))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "running" not in again.stderr
    assert again.stderr.count("reused   notebook") == len(NOTEBOOKS)
    manifest = json.loads((smoke / "smoke" / "manifest.json").read_text())
    assert {stage["this_call"] for stage in manifest["stages"].values()} == {"reused"}


def test_the_plan_foresees_every_stage_of_the_smoke_run(smoke, ragkit):
    """Every stage of the finished run is planned, by name and folder, and none that it did not make; its memory too. (`test_plan` tests the rest.)"""
    run, profile = smoke / "smoke", load_profile("smoke")
    needs = [need for need in plan.Ground.of(profile).needs({}) if need.stage.set_name]
    planned = {(need.stage.home, need.stage.name): need for need in needs}
    assert len(planned) == len(needs)
    assert set(planned) == set(plan.measured(run))
    for (home, name), need in planned.items():
        peak = json.loads((run / home / "stages" / name / "stage.json").read_text())["peak_mib"]
        assert peak is None or 0.6 < (need.device + need.host) / (peak * 2**20) < 1.7, name
    said = ragkit("plan", "--profile", "smoke", "--runs", str(smoke))
    assert said.returncode == 0, said.stderr[-3000:]
    table = plan.predicted_against_measured(profile, run).set_index("kind")
    assert set(table.index) == {*(need.stage.kind for need in needs), "notebooks", "all"}
    assert table.loc["all", "stages"] == len(planned) + 1
    assert 0.05 < table.loc["all", "ratio"] < 20  # of a machine that may be busy with other things
    manifest = run / "report" / "manifest.html"
    assert "No plan of this profile lies beside the run" in manifest.read_text()
    assert ragkit("report", "--profile", "smoke", "--runs", str(smoke)).returncode == 0
    assert (
        f"Predicted over measured: {table.loc['all', 'ratio']:.2f} for all of it"
        in manifest.read_text()
    )


def test_a_wrong_profile_ends_in_a_sentence(ragkit):
    wrong = ragkit("reproduce", "--profile", "tinny")
    assert wrong.returncode == 2
    assert "Did you mean 'tiny'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_html_in_passages_is_escaped():
    from ragkit.pages.html import marked_tokens

    shown = marked_tokens(["<script>", "alert"], [1.0, 0.5], [0, 0], ["<b>x</b>"]).data
    assert "<script>" not in shown
    assert "<b>x</b>" not in shown


def errors_of(path):
    """The exercises' checks of a notebook, run as it stands where it stands, with the error that each ends in."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, allow_errors=True, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    checks = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    return [
        next((o.ename for o in cell.outputs if o.output_type == "error"), None) for cell in checks
    ], notebook


def test_the_course_of_the_smoke_run(smoke, ragkit, monkeypatch):
    """Every exercise of every notebook is tried here; then one notebook is run just as a student opens it."""
    ended = ragkit("course", "--profile", "smoke", "--runs", str(smoke))
    assert ended.returncode == 0, ended.stderr[-3000:]
    folder = smoke / "course"
    for kind in course.KINDS:
        assert {path.stem for path in (folder / kind).iterdir()} == {
            path.stem for path in NOTEBOOKS
        }
    assert (folder / "lesson_plan.md").is_file()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    failed, _ = errors_of(folder / "student" / "00_start_here.ipynb")
    assert failed == ["AssertionError", "NotImplementedError"]
    passed, notebook = errors_of(folder / "solution" / "00_start_here.ipynb")
    assert passed == [None, None]
    assert "reused   corpus/almanac" in nbformat.writes(notebook)
