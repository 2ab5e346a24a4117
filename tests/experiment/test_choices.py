"""Notebook 08: specifications agree with the indicators they vary, the choice that decides is
found, and every deviation from the paper names variations that there are."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from ragkit.distillation.targets import READERS
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Tokens, indicator
from ragkit.profile import VARIATIONS, Profile, varied
from ragkit.settings import LAYERS, ROWS, AttentionSettings, WorldSet, asset

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks" / "08_choices.ipynb"


def said_in_the_notebook(part, **names):
    """What its cells of a part define."""
    names |= {"np": np, "pd": pd, "product": product, "measures": measures, "SPACES": SPACES}
    names |= {"READERS": READERS, "LAYERS": LAYERS, "ROWS": ROWS, "Analysis": object}
    names |= {"AttentionSettings": AttentionSettings}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.id.startswith(part) and cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)
    return SimpleNamespace(**names)


choices = said_in_the_notebook("multiverse")


class Stub:
    """An analysis of two questions with drawn numbers."""

    def __init__(self):
        rng, n = np.random.default_rng(0), 60
        self.questions, places = ["a", "b"], np.arange(n)
        self.table = {}
        for which in ("fine-tuned", "off-the-shelf"):
            contribution = rng.random((n, 3, 2, 4)).astype(np.float32)
            given = {
                "ids": places,
                "owner": 0 * places,
                "title": places < 0,
                "question": np.repeat([0, 1], n // 2),
            }
            given |= {"from_end": places, "ends": places, "contribution": contribution}
            self.table[which] = Tokens(**given, mass=np.zeros((2, 3, 6), np.float32))
        self.close = {space: rng.random(n) for space in SPACES}
        self.close["retriever"][[3, 40]] = np.nan  # tokens without a vector in one space
        self.exact = rng.random(n) < 0.1

    def tokens(self, which):
        return self.table[which]

    def closeness(self, which, goal, space):
        return self.close[space], self.exact


def expected(stub, space):
    """The indicator of notebook 06 under one combination of choices."""
    settings, tokens = AttentionSettings(rows="consuming", norm=False, layers="middle"), stub.tokens
    weights = tokens("fine-tuned").attention(settings)
    question = tokens("fine-tuned").question
    return indicator(weights, stub.close[space], question, stub.exact, 0.2)


@pytest.mark.parametrize("space", SPACES)
def test_a_specification_is_the_indicator_under_its_choices(space):
    stub = Stub()
    every = choices.per_question(stub, "fine-tuned", "answer")
    assert every.shape == (len(choices.MEASURES) * 3 * 2 * 4 * 4 * 2, 2)
    table = expected(stub, space)
    for kept, suffix in (("with exact", ""), ("no exact", " (no exact)")):
        for measure, column in (
            ("Spearman, all", "Spearman"),
            ("attention, closest 20%", "attention"),
            ("Spearman, closest 20%", "Spearman closest"),
        ):
            key = ("consuming", "no norm", "middle", space, kept, measure)
            made = every[choices.KEYS.index(key)]
            assert made == pytest.approx(table[column + suffix].to_numpy(), abs=1e-6)


def test_the_choice_that_decides_comes_first():
    table = pd.DataFrame(
        {"rows": list("aabb"), "norm": list("xyxy"), "low": [0.1, 0.2, -0.2, -0.1]}
    )
    found = choices.hinges(table, ("norm", "rows"))
    assert found["choice"].tolist() == ["rows", "norm"]
    assert found["range"].tolist() == [1, 0]
    assert found["shares"].tolist() == ["a 100%, b 0%", "x 50%, y 50%"]


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_takes_one_choice_otherwise(name):
    profile = Profile(name="p", sets=(WorldSet(source="world", name="a", world="almanac", seed=1),))
    other = varied(profile, name)
    sections = type(profile).model_fields
    changed = [one for one in sections if getattr(profile, one) != getattr(other, one)]
    assert changed == list(VARIATIONS[name])
    Profile.model_validate(other.model_dump())


def test_deviations_say_how_far_each_variation_moves_the_gain(tmp_path):
    rows = []
    for variation, poor, good in [("as it is", 0.0, 0.1), ("reverse KL", 0.02, 0.05)]:
        for name, more in (("a", 0.0), ("b", 0.01)):
            for reader, mean in zip(READERS, (poor, good), strict=True):
                shift = more if variation != "as it is" else 0.0
                rows.append((name, variation, reader, mean + shift))
    trained = pd.DataFrame(rows, columns=["set", "variation", "reader", "mean"])
    html = SimpleNamespace(table=lambda frame: frame)
    given = {"trained": trained, "yaml": yaml, "asset": asset, "figures": tmp_path, "html": html}
    said_in_the_notebook("deviations", **given)
    table = pd.read_csv(tmp_path / "08_deviations.csv").set_index("choice")
    moved = "reverse KL: off-the-shelf +0.020 to +0.030, fine-tuned -0.050 to -0.040"
    assert table.loc["divergence", "moves"] == moved
    assert table.loc["prompt", "moves"] == "not run here"
    assert table.loc["reader", "moves"] == "not varied"
    known = yaml.safe_load(asset("deviations.yaml").read_text("utf8"))
    assert {name for row in known for name in row.get("varied", [])} <= set(VARIATIONS)
