"""Verdicts follow the rules, the unhappy ones too."""

import itertools
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ragkit.errors import DataError, NounsError
from ragkit.experiment import claims
from ragkit.experiment.analysis import COMPARED, Analysis
from ragkit.experiment.claims import Gain, Part
from ragkit.indicators.measures import Interval


def gain(mean, low, high, seeds=3):
    return Gain(Interval(mean, low, high, 100), seeds)


UP, FLAT, DOWN = gain(0.2, 0.1, 0.3), gain(0.0, -0.05, 0.05), gain(-0.2, -0.3, -0.1)
NOT_MEASURED = "not yet measured"
VERDICTS = ("reproduced", "partly", "not reproduced", *claims.WEAKER)
NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)


@pytest.mark.parametrize(
    ("good", "poor", "c1", "c2"),
    [
        (UP, FLAT, "reproduced", "reproduced"),
        (UP, DOWN, "reproduced", "reproduced"),
        (UP, UP, "reproduced", "not reproduced"),
        (UP, gain(0.08, 0.0, 0.15), "reproduced", "undecided"),
        (FLAT, FLAT, "undecided", "undecided"),
        (DOWN, FLAT, "not reproduced", "undecided"),
        (gain(0.2, 0.1, 0.3, seeds=1), FLAT, "partly", "partly"),
    ],
)
def test_c1_and_c2(good, poor, c1, c2):
    assert (claims.improves(good), claims.fails(poor, good)) == (c1, c2)


def lifts(top, lead):
    """An analysis in which the closest tenth gets `top`, and has a `lead` over another."""
    profile = SimpleNamespace(indicators=SimpleNamespace(space="input"), attention=None)
    return SimpleNamespace(
        lab=SimpleNamespace(profile=profile),
        tokens=lambda which: SimpleNamespace(attention=lambda settings: None, question=None),
        closeness=lambda *given: (None, None),
        gold_found=lambda: np.array([True]),
        mean_of=lambda values: top if values[0] == 9 else lead,
    )


@pytest.mark.parametrize(
    ("top", "lead", "verdict"),
    [
        (Interval(2.0, 1.5, 2.5, 9), UP.value, "reproduced"),
        # above the average, but another tenth gets more
        (Interval(2.0, 1.5, 2.5, 9), DOWN.value, "partly"),
        (Interval(1.1, 0.9, 1.3, 9), FLAT.value, "undecided"),
        (Interval(0.5, 0.4, 0.6, 9), DOWN.value, "not reproduced"),
    ],
)
def test_c3_and_c4(monkeypatch, top, lead, verdict):
    tenths = np.arange(10.0)[None]
    monkeypatch.setattr(claims.measures, "deciles", lambda *given: tenths)
    for claim in ("C3", "C4"):
        found = claims.JUDGES[claim](lifts(top, lead))
        assert found.verdict == verdict
        assert found.measured.endswith(f"{top}, lead over the next {lead}")
    monkeypatch.setattr(claims.measures, "deciles", lambda *given: np.full((1, 10), np.nan))
    assert claims.JUDGES["C3"](lifts(top, lead)).verdict == "undecided"


@pytest.mark.parametrize(
    ("difference", "works", "verdict"),
    [
        (UP, UP, "reproduced"),
        (DOWN, UP, "not reproduced"),
        (FLAT, UP, "undecided"),
        (UP, FLAT, "undecided"),  # no reader teaches more: nothing to tell
        (UP, Gain(NOTHING, 3), "undecided"),
        # the off-the-shelf reader teaches more, and has the higher indicator
        (DOWN, DOWN, "reproduced"),
        (UP, DOWN, "not reproduced"),
    ],
)
def test_c5_and_c6(difference, works, verdict):
    assert claims.higher_when_it_works(difference.value, works.value) == verdict


@pytest.mark.parametrize(
    ("good", "poor", "works", "verdict"),
    [
        (Interval(0.5, 0.4, 0.6, 9), Interval(0.1, 0.0, 0.2, 9), UP, "reproduced"),
        (Interval(0.5, 0.4, 0.6, 9), Interval(0.4, 0.35, 0.5, 9), UP, "not reproduced"),
        (Interval(0.1, 0.0, 0.2, 9), Interval(0.0, -0.1, 0.1, 9), UP, "not reproduced"),
        (Interval(0.3, 0.2, 0.4, 9), Interval(0.0, -0.1, 0.1, 9), UP, "undecided"),
        (Interval(0.5, 0.4, 0.6, 9), Interval(0.1, 0.0, 0.2, 9), FLAT, "undecided"),
        (Interval(0.1, 0.0, 0.2, 9), Interval(0.5, 0.4, 0.6, 9), DOWN, "reproduced"),
        (NOTHING, NOTHING, UP, "undecided"),
    ],
)
def test_the_line_of_c6(good, poor, works, verdict):
    assert claims.divided(poor, good, works.value) == verdict


@pytest.mark.parametrize(
    ("verdicts", "one_reader", "several"),
    [
        (["reproduced"], "partly", "reproduced"),
        (["reproduced", "reproduced"], "reproduced", "reproduced"),
        (["reproduced", "undecided"], "partly", "partly"),
        (["undecided", "not reproduced"], "undecided", "undecided"),
        (["not reproduced"], "not reproduced", "not reproduced"),
    ],
)
def test_a_claim_must_hold_in_every_run_of_step_1(monkeypatch, verdicts, one_reader, several):
    runs = SimpleNamespace(runs=lambda: dict(enumerate(verdicts)))
    for claim, expected in (("C1", several), ("C5", one_reader)):
        monkeypatch.setitem(claims.JUDGES, claim, lambda run: Part(run, f"value of {run}"))
        found = claims.part(runs, claim)
        assert found.verdict == expected
        assert all(f"value of {verdict}" in found.measured for verdict in verdicts)


class Drawn:
    """An analysis of eight readers on twelve questions, many of them tied, off by `error`."""

    def __init__(self, error):
        self.lab = self.profile = self.evaluate = self
        self.bootstrap, self.error, self.rng = 200, error, np.random.default_rng(0)

    def readers(self):
        return list("abcdefgh")

    def values(self, key, *shape):
        values = np.random.default_rng(zlib.crc32(key.encode())).integers(0, 2, shape) / 3
        return values + self.error * self.rng.standard_normal(shape)

    def indicator(self, which, goal):
        return pd.DataFrame({name: self.values(which + name, 12) for name in COMPARED})

    def hit_gains(self, target):
        return self.values(target, 3, 12)


def test_rounding_errors_break_no_tie_between_readers():
    exact, off = (Analysis.followings(Drawn(error), "answer") for error in (0, 1e-15))
    pd.testing.assert_frame_equal(exact, off, check_exact=True)


def parts(*verdicts):
    return {f"C{i}": Part(verdict, "x") for i, verdict in enumerate(verdicts, 1)}


def verdicts_of(judge=True, **sets):
    table = claims.ledger(sets, judge, {})
    return dict(zip(table["claim"], table["verdict"], strict=True))


def test_sets_that_disagree():
    holds, fails = parts(*["reproduced"] * 7), parts(*["not reproduced"] * 7)
    found = verdicts_of(a=holds, b=fails)
    assert found.pop("C8") == "not reproduced"
    assert set(found.values()) == {"partly"}
    assert verdicts_of(a=holds, b=holds)["C8"] == "reproduced"
    assert verdicts_of(a=holds)["C8"] == "not comparable"
    assert verdicts_of(a=fails, b=fails)["C8"] == "not reproduced"
    some = parts("reproduced", *["undecided"] * 6)
    assert verdicts_of(a=some, b=some)["C8"] == "partly"


def test_what_could_not_be_computed_is_not_reproduced_by_silence(monkeypatch):
    def judge(run):
        raise NounsError("no noun finder")

    monkeypatch.setitem(claims.JUDGES, "C4", judge)
    missing = claims.part(SimpleNamespace(runs=lambda: {0: None}), "C4")
    assert missing == (NOT_MEASURED, "not computed: no noun finder")
    found = verdicts_of(a=parts(*[NOT_MEASURED] * 7), b=parts(*["undecided"] * 7))
    assert found["C4"] == NOT_MEASURED


def test_a_small_profile_is_never_judged():
    found = verdicts_of(judge=False, a=parts(*["reproduced"] * 7))
    assert set(found.values()) == {"not comparable"}


def test_every_verdict_is_a_known_one():
    for first, second in itertools.product(VERDICTS, VERDICTS):
        found = verdicts_of(a=parts(*[first] * 7), b=parts(*[second] * 7))
        assert set(found.values()) <= set(VERDICTS)


def test_every_claim_has_a_rule():
    assert list(claims.STATEMENTS) == [f"C{i}" for i in range(1, 9)]
    for text in claims.STATEMENTS.values():
        assert set(text) == {"claim", "rule"}
        assert len(text["rule"]) > 10


def test_the_papers_values_are_empty_as_shipped_and_checked_when_filled(tmp_path):
    assert claims.paper_values() == {}
    filled = tmp_path / "paper.yaml"
    filled.write_text("C9: {value: 1, page: 2}")
    with pytest.raises(DataError, match="C9"):
        claims.paper_values(filled)
    filled.write_text("C1: {value: '1', page: 2}")
    undecided = {"a": parts(*["undecided"] * 7)}
    ledger = claims.ledger(undecided, True, claims.paper_values(filled))
    assert ledger.set_index("claim")["paper"]["C1"] == "1 (p. 2)"
