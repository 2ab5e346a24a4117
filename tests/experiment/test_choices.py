"""Specifications agree with the indicators they vary, and the choice that decides is found."""

import numpy as np
import pandas as pd
import pytest

from ragkit.experiment import choices
from ragkit.profile import VARIATIONS, Profile, WorldSet, varied


class Stub:
    """An analysis of two questions with drawn numbers."""

    def __init__(self):
        from ragkit.indicators.measures import Tokens

        rng = np.random.default_rng(0)
        self.questions = ["a", "b"]
        n = 60
        self.table = {
            which: Tokens(
                ids=np.arange(n), owner=np.zeros(n, int), question=np.repeat([0, 1], n // 2), from_end=np.arange(n),
                contribution=rng.random((n, 3, 2, 4)).astype(np.float32), mass=np.zeros((2, 3, 6), np.float32),
            )
            for which in ("fine-tuned", "off-the-shelf")
        }  # fmt: skip
        self.close = {space: rng.random(n) for space in choices.SPACES}
        self.exact = rng.random(n) < 0.1

    def tokens(self, which):
        return self.table[which]

    def closeness(self, which, goal, space):
        return self.close[space], self.exact


def test_a_specification_is_the_indicator_under_its_choices():
    from ragkit.indicators.measures import indicator
    from ragkit.profile import AttentionSettings

    stub = Stub()
    every = choices.per_question(stub, "fine-tuned", "answer")
    assert len(every) == 4 * 3 * 2 * 4 * 4 * 2
    weights = stub.tokens("fine-tuned").attention(
        AttentionSettings(rows="consuming", norm=False, layers="middle")
    )
    table = indicator(
        weights, stub.close["retriever"], stub.tokens("fine-tuned").question, stub.exact, 0.2
    )
    for kept, suffix in (("with exact", ""), ("no exact", " (no exact)")):
        for measure, column in (("Spearman", "Spearman"), ("attention, closest 20%", "attention")):
            assert every[
                measure, "consuming", "no norm", "middle", "retriever", kept
            ] == pytest.approx(table[column + suffix].to_numpy(), abs=1e-6)


def test_the_choice_that_decides_comes_first():
    table = pd.DataFrame(
        {
            "rows": ["a", "a", "b", "b"],
            "norm": ["x", "y", "x", "y"],
            "low": [0.1, 0.2, -0.2, -0.1],
            "high": [0.3, 0.4, 0.1, 0.1],
        }
    )
    assert choices.verdict(table["low"], table["high"]).tolist() == [
        "higher",
        "higher",
        "unclear",
        "unclear",
    ]
    found = choices.hinges(table, ("norm", "rows"))
    assert found["choice"].tolist() == ["rows", "norm"]
    assert found["range"].tolist() == [1, 0]


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_takes_one_choice_otherwise(name):
    profile = Profile(name="p", sets=(WorldSet(source="world", name="a", world="almanac", seed=1),))
    other = varied(profile, name)
    changed = [
        section
        for section in type(profile).model_fields
        if getattr(profile, section) != getattr(other, section)
    ]
    assert changed == list(VARIATIONS[name])
    Profile.model_validate(other.model_dump())
