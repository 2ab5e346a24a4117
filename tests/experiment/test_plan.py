"""The plan: the same graph, walked without making it."""

import json
from collections import Counter

import numpy as np
import pytest

from ragkit.experiment import needs, plan
from ragkit.experiment.lab import Lab, changed_profile


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The plan of the profile `paper`, of which nothing is here."""
    return plan.make(Lab("paper", tmp_path_factory.mktemp("runs")))


def ratio(made, folder):
    """Seconds as planned over seconds as recorded, of a run that holds the planned kinds."""
    took = Counter()
    for stage in json.loads((folder / "manifest.json").read_text())["stages"].values():
        took[stage["kind"]] += stage["seconds"]
    assert took.keys() == set(made.needs["kind"])
    return made.needs["seconds"].sum() / sum(took.values())


def test_paper_is_planned_by_arithmetic_without_a_network(paper):
    assert paper.how == "by arithmetic on this processor"
    assert paper.needs["name"].tolist() == [one.name for one in paper.lab.stages]
    numbers = paper.needs[["seconds", "memory", "stays", "passing"]]
    assert (np.isfinite(numbers) & (numbers >= 0)).all(axis=None)
    assert np.isfinite(paper.wall)
    assert not list(paper.lab.folder.glob("stages/*"))
    said = "\n".join(plan.lines(paper))
    assert "to fetch: facebook/wiki_dpr: 7.60 GB" in said
    assert "nan" not in said


def test_step_1_of_falcon_rw_1b_needs_31_gb_in_passing(paper):
    """Beside the readers it keeps: weights and two moments, in the checkpoint and its successor."""
    step1 = paper.needs.set_index("name").loc["step1/nq"]
    assert 29e9 < step1["passing"] < 33e9
    weights = needs.shape_of(paper.lab.profile.reader.model).weights
    assert 1.2e9 < weights < 1.4e9
    kept = 1 + len(paper.lab.profile.reader.kept_steps)
    assert step1["stays"] == pytest.approx(4 * weights * kept)


def test_adapters_and_checkpointing_need_less(paper):
    stage = next(one for one in paper.lab.stages if one.kind == "step1")
    whole, less = paper.lab.profile, changed_profile("paper", ["reader.lora_rank=8"])
    assert needs.memory(stage, less) < 0.6 * needs.memory(stage, whole)
    assert needs.disk(stage, less)[1] < 0.1 * needs.disk(stage, whole)[1]
    more = changed_profile("paper", ["reader.gradient_checkpointing=false"])
    assert needs.memory(stage, more) > needs.memory(stage, whole)


def test_a_plan_from_what_earlier_runs_recorded(smoke):
    """Another seed of everything: every stage is missing, and the finished run tells the rates."""
    lab = Lab(changed_profile("smoke", ["seed=5", "sets.0.seed=21", "sets.1.seed=22"]), smoke)
    made = plan.make(lab)
    assert made.needs["name"].tolist() == [one.name for one in lab.stages]
    assert made.how == "by stages that earlier runs recorded here"
    assert 1 / 1.5 < ratio(made, smoke / "smoke") < 1.5
    said = "\n".join(plan.lines(made))
    for kind in {one.kind for one in lab.stages}:
        assert f"\n  {kind} " in said


def test_nothing_is_missing_of_a_finished_run(smoke):
    made = plan.make(Lab("smoke", smoke))
    assert made.needs.empty
    assert made.wall == 0
    assert "Time: 0 s" in "\n".join(plan.lines(made))


@pytest.mark.slow
def test_tiny_is_foreseen_within_a_factor_of_1_5(tmp_path, ragkit):
    """On a quiet machine: plan, run, compare."""
    made = plan.make(Lab("tiny", tmp_path))
    assert made.how == "by two small runs of the same stages, measured now"
    ended = ragkit("reproduce", "--profile", "tiny", "--runs", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert 1 / 1.5 < ratio(made, tmp_path / "tiny") < 1.5
