"""Verdicts follow the rules, the unhappy ones too."""

import pytest

from ragkit import claims
from ragkit.claims import ClaimError, Gain
from ragkit.metrics import Interval


def gain(mean, low, high, seeds=3):
    return Gain("a", Interval(mean, low, high, 100), seeds)


def regimes(good, poor):
    return {"fine-tuned": dict.fromkeys(("HR@5", "EM", "F1"), good), "off-the-shelf": dict.fromkeys(("HR@5", "EM", "F1"), poor)}


UP, FLAT, DOWN = gain(0.2, 0.1, 0.3), gain(0.0, -0.05, 0.05), gain(-0.2, -0.3, -0.1)


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
def test_verdicts(good, poor, c1, c2):
    ledger = claims.decide({"a": regimes(good, poor), "b": regimes(good, poor)}, judge=True)
    assert (ledger["C1"]["verdict"], ledger["C2"]["verdict"]) == (c1, c2)
    assert ledger["C5"]["verdict"] == "not yet measured"


def test_sets_that_disagree():
    ledger = claims.decide({"a": regimes(UP, FLAT), "b": regimes(DOWN, FLAT)}, judge=True)
    assert ledger["C1"]["verdict"] == "partly"
    assert ledger["C8"]["verdict"] == "not reproduced"


def test_a_small_profile_is_never_judged():
    ledger = claims.decide({"a": regimes(UP, FLAT)}, judge=False)
    assert {ledger[c]["verdict"] for c in ("C1", "C2", "C8")} == {"not comparable"}


def test_every_verdict_is_a_known_one():
    for good in (UP, FLAT, DOWN):
        for poor in (UP, FLAT, DOWN):
            ledger = claims.decide({"a": regimes(good, poor), "b": regimes(poor, good)}, judge=True)
            assert {row["verdict"] for row in ledger.values()} <= set(claims.VERDICTS)


def test_the_papers_values_are_empty_as_shipped_and_checked_when_filled(tmp_path):
    assert claims.paper_values() == {}
    filled = tmp_path / "paper.yaml"
    filled.write_text("C9: {value: 1, page: 2}")
    with pytest.raises(ClaimError, match="C9"):
        claims.paper_values(filled)
    filled.write_text("C1: {value: '1', page: 2}")
    ledger = claims.table(claims.decide({"a": regimes(UP, FLAT)}, judge=True), claims.paper_values(filled))
    assert ledger.set_index("claim")["paper"]["C1"] == "1 (p. 2)"
