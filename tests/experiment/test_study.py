"""The study of who can teach: its trainings and readers in the graph, and their table."""

from itertools import product

import pytest

from ragkit.errors import StoreError
from ragkit.experiment import analysis, wanted
from ragkit.experiment.graph import Of
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.wanted import STUDY, studied, trained
from ragkit.experiment.wanted import stages as stages_of

SMALL = """
name: small-study
judge: false
sets:
  - {source: world, name: almanac, world: almanac, seed: 11, entities: 40, distill: 40, dev: 20, test: 20}
study: true
retriever: {crop_steps: 20}
reader: {steps: 12}
distill: {seeds: [0]}
evaluate: {answered: 10}
"""  # noqa: E501


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("study", tmp_path_factory.mktemp("runs"))


def test_there_are_enough_readers_and_trainings(lab):
    of = {training: studied(training) for training in STUDY["trainings"]}
    worlds = len(lab.sets)
    assert worlds * len(of) >= 25
    assert worlds * sum(map(len, of.values())) >= 125
    begun = {one: STUDY["trainings"][one].get("reader", {}).get("model") for one in of}
    first = [begun[one] for one in of if "off-the-shelf" in of[one]]
    assert sorted(map(str, first)) == sorted(map(str, {*begun.values()}))  # each beginning once
    steps = {"step 12", "step 50", "step 200", "fine-tuned"}
    for training, readers in of.items():
        assert steps <= set(readers)
        assert set(STUDY["steps"]) <= set(trained(lab.graph, training).profile.reader.kept_steps)


def test_each_training_has_its_own_step_1_and_all_one_space_of_closeness(lab):
    keys, bases = set(), []
    for training in STUDY["trainings"]:
        stage = trained(lab.graph, training).stage("foretellers", Of("almanac", "fine-tuned"))
        keys.add(stage.inputs["step1"].key)
        bases.append(stage.settings["base"])
        assert stage.settings["part"] == "dev"
        assert stage.settings["base_weights"]
    assert len(keys) == len(STUDY["trainings"])
    assert all(base == bases[0] for base in bases)
    assert bases[0]["model"] == "embedded"


def test_the_run_holds_what_the_notebook_opens(lab):
    keys = {one.key for one in stages_of(lab.graph)}
    for training in STUDY["trainings"]:
        own = trained(lab.graph, training)
        for which in studied(training):
            assert own.stage("foretellers", Of("trivia", which)).key in keys
            for signal in STUDY["signals"]:
                assert own.step2("trivia", f"{which} {signal}", 2).key in keys
    plain = {one.key for one in stages_of(Lab("tiny", lab.runs).graph)}
    assert not any(one.kind == "foretellers" for one in stages_of(Lab("tiny", lab.runs).graph))
    assert plain


def test_the_readers_of_a_small_study(tmp_path, monkeypatch):
    """Three readers of two trainings: every foreteller named in the rules, and what they taught."""
    wrong = {"reader": {"label_noise": 0.5}}
    trainings = {"as it is": {"before": True}, "half of the answers wrong": wrong}
    monkeypatch.setitem(wanted.STUDY, "trainings", trainings)
    monkeypatch.setitem(wanted.STUDY, "steps", [])
    (tmp_path / "small.yaml").write_text(SMALL, "utf8")
    lab = Lab(changed_profile(str(tmp_path / "small.yaml"), ()), tmp_path / "runs")
    table = analysis.readers(lab)
    told = table[["training", "reader"]].to_numpy().tolist()
    assert told == [
        ["as it is", "off-the-shelf"],
        ["as it is", "fine-tuned"],
        ["half of the answers wrong", "fine-tuned"],
    ]
    readings = product(("answer", "nouns"), STUDY["readings"], ("", " (no exact)"))
    names = [*STUDY["simple"], *(f"{goal}: {one}{ending}" for goal, one, ending in readings)]
    assert not table[names].isna().to_numpy().all(0).any()
    for place, row in enumerate(table.to_dict("records")):
        own = lab.with_graph(trained(lab.graph, row["training"]))
        one = analysis.Analysis(own, "almanac")
        taught = one.hit_gains(f"{row['reader']} balanced")
        assert row["gain by balanced"] == pytest.approx(taught.mean())
        halves = [row[f"gain by balanced, half {half}"] for half in (0, 1)]
        assert min(halves) <= row["gain by balanced"] <= max(halves), place
    assert table["loss"].nunique() == 3


def test_without_a_study_the_published_one_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkit.settings.REFERENCES", tmp_path)
    with pytest.raises(StoreError, match="make reproduce PROFILE=study"):
        analysis.readers(Lab("smoke", tmp_path))
