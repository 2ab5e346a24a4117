"""The plan: the same graph, walked without making it."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from transformers import LlamaConfig

from ragkit.experiment import plan
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.wanted import stages as stages_of


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The profile `paper`, of which nothing is here: its lab, and what it needs."""
    lab = Lab("paper", tmp_path_factory.mktemp("runs"))
    return lab, plan.make(lab)[0]


def ratio(table, folder):
    """Seconds as planned over seconds as recorded, of a run that holds the planned kinds."""
    took = Counter()
    for stage in json.loads((folder / "manifest.json").read_text())["stages"].values():
        took[stage["kind"]] += stage["seconds"]
    assert took.keys() == set(table["kind"])
    return table["seconds"].sum() / sum(took.values())


def test_paper_is_planned_by_arithmetic_without_a_network(paper):
    lab, table = paper
    assert table["name"].tolist() == [one.name for one in stages_of(lab.graph)]
    numbers = table[["seconds", "memory", "stays", "passing"]]
    assert (np.isfinite(numbers) & (numbers >= 0)).all(axis=None)
    said = plan.told(lab)
    assert "to fetch: facebook/wiki_dpr: 7.60 GB" in said
    assert "by arithmetic on one GPU" in said
    assert re.search(r"Memory: step1 needs .* GB: does NOT fit on .*T4.*reader\.lora_rank", said)
    assert "nan" not in said
    assert not list(lab.folder.glob("stages/*"))


def test_step_1_of_falcon_rw_1b_needs_31_gb_in_passing(paper):
    """Beside the readers it keeps: weights and two moments, in the checkpoint and its successor."""
    lab, table = paper
    step1 = table.set_index("name").loc["step1/nq"]
    assert 29e9 < step1["passing"] < 33e9
    weights, _ = plan.shape_of(lab.profile.reader.model)
    assert 1.2e9 < weights < 1.4e9
    kept = 1 + len(lab.profile.reader.kept_steps)
    assert step1["stays"] == pytest.approx(4 * weights * kept)


def test_adapters_and_checkpointing_need_less(paper):
    stage = next(one for one in stages_of(paper[0].graph) if one.kind == "step1")
    whole, less, more = (
        plan.needs(stage, changed_profile("paper", changes))
        for changes in ([], ["reader.lora_rank=8"], ["reader.gradient_checkpointing=false"])
    )
    assert less["memory"] < 0.6 * whole["memory"]
    assert less["passing"] < 0.1 * whole["passing"]
    assert more["memory"] > whole["memory"]


def test_a_large_reader_is_timed_by_one_layer_and_no_stage_is_made(tmp_path):
    """Its configuration is enough: the prompts of a small run alone would take many minutes."""
    LlamaConfig(hidden_size=256, intermediate_size=512, vocab_size=49152).save_pretrained(tmp_path)
    lab = Lab(changed_profile("smoke", [f"reader.model={tmp_path}"]), tmp_path / "runs")
    table, how = plan.make(lab)
    assert how == "by arithmetic on this processor"
    looks = table[table["kind"] == "teacher"]
    assert (looks["seconds"] > 0).all()
    each = looks["seconds"] / looks["units"]
    assert each.max() == pytest.approx(each.min())
    assert not list(lab.runs.glob("*/stages/*/*"))


def test_a_plan_from_what_earlier_runs_recorded(smoke):
    """Another seed of everything: every stage is missing, and the finished run tells the rates."""
    lab = Lab(changed_profile("smoke", ["seed=5", "sets.0.seed=21", "sets.1.seed=22"]), smoke)
    table, how = plan.make(lab)
    assert table["name"].tolist() == [one.name for one in stages_of(lab.graph)]
    assert how == "by stages that earlier runs recorded here"
    assert 1 / 1.5 < ratio(table, smoke / "smoke") < 1.5
    said = plan.told(lab)
    for kind in {one.kind for one in stages_of(lab.graph)}:
        assert f"\n  {kind} " in said


def test_nothing_is_missing_of_a_finished_run(smoke):
    lab = Lab("smoke", smoke)
    assert plan.make(lab)[0].empty
    assert "Time: 0:00:00 from" in plan.told(lab)


@pytest.mark.slow
def test_tiny_is_foreseen_within_a_factor_of_1_5(tmp_path, ragkit):
    """On a quiet machine: plan, run, compare."""
    table, how = plan.make(Lab("tiny", tmp_path))
    assert how == "by two small runs of the same stages, measured now"
    ended = ragkit("reproduce", "--profile", "tiny", "--runs", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert 1 / 1.5 < ratio(table, tmp_path / "tiny") < 1.5
