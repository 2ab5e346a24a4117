"""The plan: the same graph, walked without making it."""

import json
import math

import pytest

from ragkit.experiment import needs, plan
from ragkit.experiment.lab import Lab, changed_profile


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The plan of the profile `paper`, of which nothing is here."""
    return plan.make(Lab("paper", tmp_path_factory.mktemp("runs")))


def test_paper_is_planned_by_arithmetic_without_a_network(paper):
    assert not plan.at_hand(paper.lab.profile)
    assert [need.stage for need in paper.needs] == paper.lab.stages
    for need in paper.needs:
        numbers = (need.seconds, need.memory, need.stays, need.passing)
        assert all(math.isfinite(one) and one >= 0 for one in numbers), need.stage.name
    assert math.isfinite(paper.wall)
    assert not list(paper.lab.folder.glob("stages/*"))
    said = "\n".join(plan.lines(paper))
    assert "to fetch: facebook/wiki_dpr" in said
    assert "nan" not in said


def test_step_1_of_falcon_rw_1b_needs_31_gb_in_passing(paper):
    """Beside the readers it keeps: weights and two moments, in the checkpoint and its successor."""
    (step1,) = (need for need in paper.needs if need.stage.name == "step1/nq")
    assert 29e9 < step1.passing < 33e9
    weights = needs.shape_of(paper.lab.profile.reader.model).weights
    assert 1.2e9 < weights < 1.4e9
    kept = 1 + len(paper.lab.profile.reader.kept_steps)
    assert step1.stays == pytest.approx(4 * weights * kept)


def test_adapters_and_checkpointing_need_less(paper):
    stage = next(need.stage for need in paper.needs if need.stage.kind == "step1")
    whole, less = paper.lab.profile, changed_profile("paper", ["reader.lora_rank=8"])
    assert needs.memory(stage, less) < 0.6 * needs.memory(stage, whole)
    assert needs.disk(stage, less, "nq")[1] < 0.1 * needs.disk(stage, whole, "nq")[1]
    more = changed_profile("paper", ["reader.gradient_checkpointing=false"])
    assert needs.memory(stage, more) > needs.memory(stage, whole)


def test_a_plan_from_what_earlier_runs_recorded(smoke):
    """Another seed of everything: every stage is missing, and the finished run tells the rates."""
    lab = Lab(changed_profile("smoke", ["seed=5", "sets.0.seed=21", "sets.1.seed=22"]), smoke)
    made = plan.make(lab)
    assert [need.stage for need in made.needs] == lab.stages
    assert made.how == "by stages that earlier runs recorded here"
    manifest = json.loads((smoke / "smoke" / "manifest.json").read_text())
    rows = {row["kind"]: row for row in plan.against(lab.folder, manifest)}
    assert rows.keys() - {"all"} <= {one.kind for one in lab.stages}
    assert {"step1", "step2", "answers", "all"} <= rows.keys()
    assert 1 / 1.5 < rows["all"]["ratio"] < 1.5
    said = "\n".join(plan.lines(made))
    for kind in {one.kind for one in lab.stages}:
        assert f"\n  {kind} " in said


def test_nothing_is_missing_of_a_finished_run(smoke):
    made = plan.make(Lab("smoke", smoke))
    assert made.needs == []
    assert made.wall == 0
    assert plan.against(smoke / "nowhere", {"stages": {}}) is None


@pytest.mark.slow
def test_tiny_is_foreseen_within_a_factor_of_1_5(tmp_path, ragkit):
    """On a quiet machine: plan, run, compare."""
    for name in ("plan", "reproduce"):
        ended = ragkit(name, "--profile", "tiny", "--runs", tmp_path)
        assert ended.returncode == 0, ended.stderr[-3000:]
    manifest = json.loads((tmp_path / "tiny" / "manifest.json").read_text())
    rows = {row["kind"]: row for row in plan.against(tmp_path / "tiny", manifest)}
    assert 1 / 1.5 < rows["all"]["ratio"] < 1.5
