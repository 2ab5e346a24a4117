"""The study of who can teach: its trainings and readers, and their table (an appendix notebook)."""

from itertools import product

import numpy as np
import pytest
import yaml
from cells import defined

from ragkit.errors import StoreError
from ragkit.experiment.analysis import Analysis
from ragkit.experiment.graph import Of
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.tables import published
from ragkit.experiment.wanted import stages as stages_of
from ragkit.settings import EMBEDDED, asset, derived_seed

SMALL = """
name: small-study
judge: false
sets:
  - {source: world, name: almanac, world: almanac, seed: 11, entities: 40, distill: 40, dev: 20, test: 20}
retriever: {crop_steps: 20}
reader: {steps: 12}
distill: {seeds: [0, 1]}
evaluate: {answered: 10}
"""  # noqa: E501
STUDY = yaml.safe_load(asset("foretelling.yaml").read_text("utf8"))


def study(rules=STUDY):
    """What the notebook defines, under these rules."""
    return defined("appendix/study", "study-", STUDY=rules)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("study", tmp_path_factory.mktemp("runs"))


def test_there_are_enough_readers_and_trainings(lab):
    made = study()
    of = {training: made.studied(training) for training in STUDY["trainings"]}
    worlds = len(lab.sets)
    assert worlds * len(of) >= 25
    assert worlds * sum(map(len, of.values())) >= 125
    begun = {one: STUDY["trainings"][one].get("reader", {}).get("model", "embedded") for one in of}
    first = [begun[one] for one in of if "off-the-shelf" in of[one]]
    assert sorted(first) == sorted({*begun.values()})  # each beginning once
    assert {*begun.values()} <= EMBEDDED.keys()
    for training, readers in of.items():
        assert {"step 12", "step 50", "step 200", "fine-tuned"} <= set(readers)
        kept = made.trained(lab.graph, training).profile.reader.kept_steps
        assert set(STUDY["steps"]) <= set(kept)


def test_the_worlds_follow_from_the_rules_of_the_study(lab):
    for name, one in lab.sets.items():
        assert one.seed == derived_seed(name, 0, "foretelling") != derived_seed(name, 0)


def test_each_training_has_its_own_step_1_and_all_one_space_of_closeness(lab):
    made, keys, bases = study(), set(), []
    for training in STUDY["trainings"]:
        graph = made.trained(lab.graph, training)
        stage = graph.stage("foretellers", Of("almanac", "fine-tuned"))
        keys.add(stage.inputs["step1"].key)
        bases.append(stage.settings["base"])
        assert stage.settings["part"] == "dev"
        assert stage.settings["base_weights"]
    assert len(keys) == len(STUDY["trainings"])
    assert all(base == bases[0] for base in bases)
    assert bases[0]["model"] == "embedded"


def test_no_other_run_grows_by_the_study(lab):
    for profile in ("tiny", "study"):
        kinds = {one.kind for one in stages_of(Lab(profile, lab.runs).graph)}
        assert "foretellers" not in kinds


def test_the_readers_of_a_small_study(tmp_path):
    """Three readers of two trainings: every foreteller named in the rules, and what they taught."""
    wrong = {"reader": {"label_noise": 0.5}}
    trainings = {"as it is": {"before": True}, "half of the answers wrong": wrong}
    (tmp_path / "small.yaml").write_text(SMALL, "utf8")
    lab = Lab(changed_profile(str(tmp_path / "small.yaml"), ()), tmp_path / "runs")
    made = study(STUDY | {"trainings": trainings, "steps": []})
    table = made.readers(lab, [("almanac", training) for training in trainings])
    assert table[["training", "reader"]].to_numpy().tolist() == [
        ["as it is", "off-the-shelf"],
        ["as it is", "fine-tuned"],
        ["half of the answers wrong", "fine-tuned"],
    ]
    readings = product(("answer", "nouns"), STUDY["readings"], ("", " (no exact)"))
    names = [*STUDY["simple"], *(f"{goal}: {one}{ending}" for goal, one, ending in readings)]
    assert not table[names].isna().to_numpy().all(0).any()
    for row in table.to_dict("records"):
        own = lab.with_graph(made.trained(lab.graph, row["training"]))
        one, target = Analysis(own, "almanac"), f"{row['reader']} balanced"
        taught = [one.hits(own.distilled("almanac", target, s)[0]) for s in (0, 1)]
        assert row["gain by balanced"] == pytest.approx(np.mean(taught) - one.hits().mean())
        halves = [row[f"gain by balanced, half {half}"] for half in (0, 1)]
        assert min(halves) <= row["gain by balanced"] <= max(halves)
    assert table["loss"].nunique() == 3


def test_where_the_table_is_missing_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkit.settings.REFERENCES", tmp_path)
    with pytest.raises(StoreError, match="Work in a checkout"):
        published(Lab("smoke", tmp_path), "study", "11_readers.csv")
