"""Specifications agree with the indicators they vary, and the choice that decides is found."""

import numpy as np
import pandas as pd
import pytest

from ragkit.experiment import choices
from ragkit.indicators.measures import SPACES, Tokens, indicator
from ragkit.profile import VARIATIONS, Profile, varied
from ragkit.settings import AttentionSettings, WorldSet


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
            key = (measure, ("consuming", "no norm", "middle"), space, kept)
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
