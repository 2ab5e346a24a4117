"""The reference: how a run becomes it, and how a run is held against it."""

import json
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from ragkit.errors import StoreError
from ragkit.experiment.store import fingerprint
from ragkit.pages import report
from ragkit.profile import load_profile

SETS = [{"name": "almanac", "seed": 1}, {"name": "trivia", "seed": 2}]
PROFILE = {"name": "tiny", "judge": True, "k": 5, "sets": SETS}
GAINS = (
    "set,system,mean,low,high\nalmanac,oracle,0.2,0.15,0.25\n"
    "almanac,uniform,-0.1,-0.2,0.0\ntrivia,oracle,0.3,0.2,0.4\n"
)
LEDGER = "claim,statement,verdict,why,paper\nC1,It helps.,partly,w,up\nC2,It fails.,undecided,,\n"
DEVIATIONS = "choice,paper,here,moves\nrows,not known,predicting,none\n"
MAIN = (
    "set,system,reader,EM,F1,HR@1,HR@5,HR@20,MRR\n"
    "almanac,BM25,fine-tuned,0.3,,,0.6,,\nalmanac,initial,fine-tuned,,,,0.7,,\n"
)


def made(commit="0123456789abcdef", dirty=False, **versions):
    machine = {"cores": 2, "memory_gib": 4}
    seen = {"commit": commit, "dirty": dirty, "versions": versions, "when": "now"}
    return {**seen, "machine": machine}


def stage(status="reused", **own):
    made_by = own.pop("made", None) or made(torch="2")
    base = {"key": "k", "kind": "passages", "set": "a", "peak_mib": 1, "units": {"passages": 10}}
    return {**base, "status": status, "seconds": 2.0, "made": made_by, **own}


def manifest_of(profile, **own):
    base = {"started": "now", "seconds_of_this_call": 1.0, "trimmed_prompts": {}}
    return {"profile": profile, **base, "stages": {"a": stage()}, "notebooks": {}, **own}


def stand(folder, profile=PROFILE, gains=GAINS, ledger=LEDGER, main=MAIN):
    """A run's tables, as they lie both in a run and in the reference."""
    figures = folder / "figures"
    figures.mkdir(parents=True)
    named = {report.GAINS: gains, report.LEDGER: ledger, report.MAIN: main}
    named |= {report.DEVIATIONS: DEVIATIONS}
    for file, text in named.items():
        if text is not None:
            (figures / file).write_text(text)
    for place in (folder, figures):
        (place / "manifest.json").write_text(json.dumps(manifest_of(profile)))
    return folder


@pytest.fixture
def published(tmp_path):
    return stand(tmp_path / "published") / "figures"


def test_the_same_run_differs_nowhere(tmp_path, published):
    assert report.compare(stand(tmp_path / "run"), published) == [
        "Compared with the reference (profile tiny, commit 0123456): "
        "of 3 gains and 2 verdicts, none differ (gains by their intervals)."
    ]


def test_gains_whose_intervals_lie_apart_and_other_verdicts_are_named(tmp_path, published):
    gains = GAINS.replace("0.2,0.15,0.25", "0.1,0.05,0.149")
    gains = gains.replace("0.3,0.2,0.4", "0.45,0.4,0.5")  # this one only touches
    ledger = LEDGER.replace("undecided", "reproduced")
    summary, *compared = report.compare(stand(tmp_path / "run", PROFILE, gains, ledger), published)
    assert compared == [
        "almanac, oracle: gain in HR@5 +0.100 [+0.050, +0.149] here, +0.200 [+0.150, +0.250] there",
        "C2: verdict 'reproduced' here, 'undecided' there",
    ]
    assert "2 differ (gains" in summary


def test_what_cannot_be_compared_is_said(tmp_path, published):
    named = "Not compared with the reference (profile tiny, commit 0123456)"
    small = stand(tmp_path / "small", PROFILE | {"name": "smoke", "judge": False})
    assert report.compare(small, published) == [f"{named}: profile smoke is too small to judge."]
    other = stand(tmp_path / "run", gains="set,system,mean,low,high\nnq,oracle,0.2,0.1,0.3\n")
    assert report.compare(other, published) == [f"{named}: it has other question sets."]


def test_only_sets_that_both_have_are_compared(tmp_path, published):
    run = stand(tmp_path / "run", gains=GAINS.replace("trivia", "mine"))
    assert "of 2 gains" in report.compare(run, published)[0]


def test_no_reference_is_a_sentence(tmp_path):
    run, figures = stand(tmp_path / "run"), tmp_path / "figures"
    assert "There is no reference to compare with" in report.compare(run, figures)[0]
    figures.mkdir()
    stand(tmp_path / "published", gains="a,b\n1,2\n")
    for text in ("", "[]", "{}", '{"profile": {}, "stages": {}, "notebooks": {}}'):
        (figures / "manifest.json").write_text(text)
        for damaged in (figures, tmp_path / "published" / "figures"):
            assert "There is no reference" in report.compare(run, damaged)[0]


@pytest.fixture
def finished(tmp_path):
    """A finished run that may be published, the reference before it, and a README."""
    profile = load_profile("full")
    run = stand(tmp_path / "run", profile.model_dump(mode="json"))
    (run / "figures" / "manifest.json").unlink()
    for end in ("svg", "png", "csv", "txt"):
        (run / "figures" / f"04_gains.{end}").write_text("x")
    figures, readme = tmp_path / "figures", tmp_path / "README.md"
    (figures / "real").mkdir(parents=True)
    for old in ("old.svg", "real/kept.svg"):
        (figures / old).write_text("<svg/>")
    readme.write_text(
        "before\n<!-- ledger -->\nstale\n<!-- /ledger -->\n"
        "<!-- deviations -->\nold\n<!-- /deviations -->\nafter\n"
    )
    lab = SimpleNamespace(profile=profile, base="full", folder=run, figures=run / "figures")
    return lab, figures, readme


def test_a_run_becomes_the_reference(finished):
    lab, figures, readme = finished
    report.make_reference(lab, figures, readme)
    there = {path.name for path in figures.iterdir()}
    drawn = {f"04_gains.{end}" for end in ("svg", "png", "csv", "txt")}
    assert there == drawn | {report.LEDGER, report.MAIN, report.DEVIATIONS, "manifest.json", "real"}
    assert (figures / "real" / "kept.svg").is_file()
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| C1 | It helps. | partly | w | up |" in lines
    assert "| C2 | It fails. | undecided |  |  |" in lines
    assert "| rows | not known | predicting | none |" in lines
    assert lines.count("Measured in the worlds: profile full, commit 0123456.") == 2
    assert not {"stale", "old"} & set(lines)
    report.make_reference(lab, figures, readme)  # again: the same page
    assert readme.read_text().splitlines() == lines
    assert {path.name for path in figures.parent.iterdir()} == {"run", "figures", "README.md"}


def test_another_profiles_reference_lies_beside_it_and_names_no_place(finished, tmp_path):
    lab, figures, readme = finished
    report.make_reference(lab, figures, readme)
    before = {path.name: path.read_bytes() for path in figures.glob("*.*")}
    sets = 'sets.0={"source":"files","name":"nq","passages":"p.tsv","questions":"q.jsonl"}'
    profile = load_profile("real", [sets]).model_copy(update={"name": "real-1a2b3c"})
    dumped = profile.model_dump(mode="json")
    ledger = LEDGER.replace("partly", "reproduced")
    run = stand(tmp_path / "other", dumped, ledger=ledger)
    (run / "figures" / "manifest.json").unlink()
    other = SimpleNamespace(profile=profile, base="real", folder=run, figures=run / "figures")
    report.make_reference(other, figures, readme)
    assert {path.name: path.read_bytes() for path in figures.glob("*.*")} == before
    assert (figures / "real" / report.LEDGER).read_text() == ledger
    assert not (figures / "real" / "kept.svg").exists()
    kept = json.loads((figures / "real" / "manifest.json").read_text())
    assert kept["profile"]["sets"][0]["passages"] == "p.tsv"
    assert str(tmp_path.parent) not in json.dumps(kept)
    text = readme.read_text()
    assert "| claim | statement | in the worlds | on real text | set by set | paper |" in text
    assert "| C1 | It helps. | partly | reproduced | w | up |" in text
    assert "; on real text: profile real-1a2b3c, commit 0123456." in text


@pytest.fixture
def ran(finished, tmp_path):
    """A notebook that a run executed: its source, and the folder of sources."""
    lab, _, _ = finished
    given = new_code_cell("PROFILE = 'tiny'", metadata={"tags": ["parameters"]})
    cells = [given, new_code_cell("draw()"), new_code_cell("1 + 1")]
    sources = tmp_path / "notebooks"
    for folder in (sources, lab.folder / "notebooks"):
        folder.mkdir()
    nbformat.write(new_notebook(cells=cells), sources / "04_toy.ipynb")
    given.source = "PROFILE = 'full'"
    cells[1].outputs = [
        new_output("stream", name="stderr", text="a warning"),
        new_output("display_data", {"text/html": '<figure id="04_gains"><svg></svg></figure>'}),
    ]
    cells[2].outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=3)]
    nbformat.write(new_notebook(cells=cells), lab.folder / "notebooks" / "04_toy.ipynb")
    return lab, sources


def test_outputs_are_kept_with_figures_as_pictures(ran):
    report.keep_outputs(*ran)
    given, drawn, summed = nbformat.read(ran[1] / "04_toy.ipynb", as_version=4).cells
    assert given.source == "PROFILE = 'tiny'"
    assert [one.data for one in drawn.outputs] == [{"image/png": "eA==", "text/plain": "x"}]
    assert summed.outputs[0].data == {"text/plain": "2"}
    assert summed.metadata["ran"] == fingerprint("1 + 1")


def test_outputs_of_a_cell_that_was_edited_since_are_not_kept(ran):
    file = ran[1] / "04_toy.ipynb"
    file.write_text(file.read_text().replace("1 + 1", "1 + 2"))
    before = file.read_text()
    with pytest.raises(StoreError, match=r"04_toy\.ipynb was edited since it ran"):
        report.keep_outputs(*ran)
    assert file.read_text() == before


def test_work_that_no_commit_holds_is_said():
    manifest = manifest_of(PROFILE, stages={"a": stage(), "b": stage(made=made("beef", True))})
    said = "profile tiny, commits 0123456, beef, with changes that no commit holds"
    assert report.measured_by(manifest) == said


def spoil_profile(lab, readme):
    lab.profile = load_profile("full", ["k=3"])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_profile, "other settings than profile full has now"),
        (
            lambda lab, readme: (lab.figures / "09_ledger.csv").unlink(),
            "09_ledger.csv is missing or empty",
        ),
        (
            lambda lab, readme: (lab.figures / "04_gains.png").unlink(),
            "04_gains.png is missing or empty",
        ),
        (
            lambda lab, readme: (lab.figures / "04_gains.txt").write_text(""),
            "txt is missing or empty",
        ),
        (lambda lab, readme: readme.write_text("no marks"), "README.md must hold"),
    ],
)
def test_nothing_is_touched_where_something_is_lacking(finished, spoil, said):
    lab, figures, readme = finished
    spoil(lab, readme)
    before = readme.read_text()
    with pytest.raises(StoreError, match=said):
        report.make_reference(lab, figures, readme)
    assert readme.read_text() == before
    assert {path.name for path in figures.iterdir()} == {"old.svg", "real"}
    assert not list(figures.parent.glob("figures.*"))
