"""The draws of a world that were passed over, and where gold passages come out on top."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from ragkit.data.corpus import Corpus
from ragkit.experiment import tables
from ragkit.experiment.graph import Of
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.wanted import stages as stages_of
from ragkit.settings import derived_seed

FEW = ["retriever.crop_steps=2", "sets.0.entities=12", "sets.0.distill=4", "sets.0.dev=12",
       "sets.0.test=4"]  # fmt: skip


def test_every_draw_is_searched_in_its_own_passages(tmp_path):
    changes = [*FEW, "sets.0.seed=rules", "sets.0.draw=1"]
    lab = Lab(changed_profile("smoke", changes), tmp_path)
    graphs = [*lab.graph.passed_over("almanac"), lab.graph]
    seeds = [graph.sets["almanac"].seed for graph in graphs]
    assert seeds == [derived_seed("almanac", draw) for draw in (0, 1)]
    for graph in graphs:
        told = tables.initial(lab.with_graph(graph), "almanac")
        stage = graph.stage("candidates", Of("almanac"))
        opened = [
            lab.open_stage(one) for one in (stage.inputs["passages"], stage.inputs["questions"])
        ]
        dev = Corpus.load("a", *opened).questions["dev"]
        ranking = load_file(lab.open_stage(stage) / "candidates.safetensors")["dev"][:, :5]
        found = [bool({*q.gold} & {*row}) for q, row in zip(dev, ranking.tolist(), strict=True)]
        assert told == pytest.approx(np.mean(found))
    assert {one.name for one in stages_of(lab.graph)} >= {*lab.status}  # so `tidy` keeps them


def test_a_seed_of_a_profiles_own_is_one_draw(tmp_path):
    lab = Lab(changed_profile("smoke", [*FEW, "sets.0.draw=1"]), tmp_path)
    assert [*lab.graph.passed_over("almanac")] == []


def test_gold_on_top_is_told_where_gold_and_others_were_found(monkeypatch):
    gold = np.array([[True, False, False], [False, False, True]])
    monkeypatch.setattr(tables, "mixed_golds", lambda lab, name: (np.array([0, 2]), gold))
    scores = np.array([[0.9, 0.1, 0.2], [1, 1, 1], [0.1, 0.5, 0.2]])
    right = tables.gold_on_top(None, "almanac", scores)
    assert np.array_equal(right, [1, np.nan, 0], equal_nan=True)
    assert tables.top_is_gold(None, "almanac", scores) == 0.5
