"""The reference: how a run becomes it, and how a run is held against it."""

import json

import pytest

from ragkit.pages import reference

PROFILE = {
    "name": "tiny",
    "judge": True,
    "k": 5,
    "sets": [{"name": "almanac", "seed": 1}, {"name": "trivia", "seed": 2}],
}
GAINS = "set,system,mean,low,high\nalmanac,oracle,0.2,0.15,0.25\nalmanac,uniform,-0.1,-0.2,0.0\ntrivia,oracle,0.3,0.2,0.4\n"
LEDGER = "claim,statement,verdict\nC1,It helps.,partly\nC2,It fails.,undecided\n"
MAIN = (
    "set,system,reader,EM,HR@5\nalmanac,BM25,fine-tuned,0.3,0.6\nalmanac,initial,fine-tuned,,0.7\n"
)


def stand(folder, profile=PROFILE, gains=GAINS, ledger=LEDGER, main=MAIN):
    """A run's tables, as they lie both in a run and in the reference."""
    figures = folder / "figures"
    figures.mkdir(parents=True)
    for file, text in (
        (reference.GAINS, gains),
        (reference.LEDGER, ledger),
        (reference.MAIN, main),
    ):
        if text is not None:
            (figures / file).write_text(text)
    manifest = json.dumps({"profile": profile, "git": "0123456789abcdef"})
    (folder / "manifest.json").write_text(manifest)
    (figures / "manifest.json").write_text(manifest)
    return folder


@pytest.fixture
def published(tmp_path):
    return stand(tmp_path / "published") / "figures"


def test_the_same_run_differs_nowhere(tmp_path, published):
    compared = reference.compare(stand(tmp_path / "run"), published)
    assert (
        compared.summary
        == "Compared with the reference (profile tiny, commit 0123456): of 3 gains (by their 95 % intervals) and 2 verdicts, none differs."
    )
    assert compared.differences == []
    assert compared.notes == ["all 3 values that the main tables share are the same"]


def test_gains_whose_intervals_lie_apart_and_other_verdicts_are_named(tmp_path, published):
    gains = GAINS.replace("0.2,0.15,0.25", "0.1,0.05,0.149").replace(
        "0.3,0.2,0.4", "0.45,0.4,0.5"
    )  # the second one only touches
    run = stand(
        tmp_path / "run",
        gains=gains,
        ledger=LEDGER.replace("undecided", "reproduced"),
        main=MAIN.replace("0.7", "0.65"),
    )
    compared = reference.compare(run, published)
    assert compared.differences == [
        "almanac, oracle: gain in HR@5 +0.100 [+0.050, +0.149] here, +0.200 [+0.150, +0.250] in the reference",
        "C2: verdict 'reproduced' here, 'undecided' in the reference",
    ]
    assert "2 differ." in compared.summary
    assert compared.notes == [
        "the main tables (no intervals) lie at most 0.050 apart: HR@5 of almanac, initial, fine-tuned"
    ]
    assert len(compared.lines()) == 4


def test_a_profile_too_small_to_judge_is_not_compared(tmp_path, published):
    run = stand(
        tmp_path / "run",
        {**PROFILE, "name": "smoke", "judge": False},
        ledger=LEDGER.replace("partly", "not comparable"),
    )
    compared = reference.compare(run, published)
    assert compared.lines() == [
        "Not compared with the reference (profile tiny): profile smoke is too small to judge."
    ]


def test_other_seeds_sets_and_settings_are_said(tmp_path, published):
    profile = {
        **PROFILE,
        "k": 10,
        "sets": [{"name": "almanac", "seed": 7}, {"name": "mine", "seed": 2}],
    }
    compared = reference.compare(
        stand(tmp_path / "run", profile, gains=GAINS.replace("trivia", "mine")), published
    )
    notes = " ".join(compared.notes)
    assert "k 10 here, 5 there" in notes
    assert "sets.almanac.seed 7 here, 1 there" in notes
    assert "not the same draw" in notes
    assert "gains that the reference does not have: mine, oracle" in notes
    assert "gains that this run does not have: trivia, oracle" in notes
    assert "of 2 gains" in compared.summary


def test_sets_with_nothing_in_common_are_not_compared(tmp_path, published):
    compared = reference.compare(
        stand(tmp_path / "run", {**PROFILE, "sets": [{"name": "nq", "seed": 0}]}), published
    )
    assert compared.lines() == [
        "Not compared with the reference (profile tiny): it has other question sets (almanac, trivia) than this run."
    ]


def test_no_reference_is_a_sentence(tmp_path):
    run, figures = stand(tmp_path / "run"), tmp_path / "figures"
    assert "There is no reference to compare with" in reference.compare(run, figures).summary
    figures.mkdir()
    for text in ("", "[]", "{}", '{"profile": {}, "git": "0"}'):
        (figures / "manifest.json").write_text(text)
        assert "There is no reference to compare with" in reference.compare(run, figures).summary


@pytest.mark.parametrize("damaged", ["", "a,b\n1,2\n", None])
def test_a_partial_reference_is_compared_as_far_as_it_goes(tmp_path, damaged):
    compared = reference.compare(
        stand(tmp_path / "run"),
        stand(tmp_path / "published", gains=damaged, main=damaged) / "figures",
    )
    assert "of 2 verdicts, none differs" in compared.summary
    assert [note.split(" could not be compared")[0] for note in compared.notes] == [
        "gains (by their 95 % intervals)",
        "the main tables",
    ]


def test_what_is_said_is_escaped():
    shown = reference.Comparison("<b>a", ["<i>x"], ["<u>y"]).html()
    assert not any(mark in shown for mark in ("<b>", "<i>", "<u>"))


def test_a_run_becomes_the_reference(tmp_path):
    run, figures, readme = tmp_path / "run", tmp_path / "figures", tmp_path / "README.md"
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "04_gains.svg").write_text("<svg/>")
    (run / "figures" / "09_ledger.csv").write_text(
        "claim,statement,rule,measured,verdict,why,paper\nC1,It helps.,r,almanac: 0.1,partly,w,\nC3,More.,r,,not yet measured,,\n"
    )
    (run / "manifest.json").write_text("{}")
    figures.mkdir()
    (figures / "old.svg").write_text("<svg/>")
    readme.write_text("before\n<!-- ledger -->\nstale\n<!-- /ledger -->\nafter\n")
    reference.publish(run, figures, readme)
    assert {p.name for p in figures.iterdir()} == {"04_gains.svg", "09_ledger.csv", "manifest.json"}
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| C1 | It helps. | **partly** | w |" in lines
    assert "| C3 | More. | **not yet measured** |  |" in lines
    assert "stale" not in lines
    reference.publish(run, figures, readme)  # again: the same page
    assert readme.read_text().splitlines() == lines
