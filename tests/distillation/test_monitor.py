"""The early word on a training: the rule, the log, following a run."""

import json
import math

import pytest

from ragkit.distillation.monitor import (
    NOT_WORKING,
    TOO_EARLY,
    WORKING,
    first_verdict,
    follow,
    verdict,
)
from ragkit.errors import StoreError


def looks(hr, losses):
    pairs = zip(hr, [math.nan, *losses], strict=True)
    return [{"epoch": n / 2, "hr": value, "loss": loss} for n, (value, loss) in enumerate(pairs)]


def lifts(answer, nouns):
    return [{"answer lift": answer, "nouns lift": nouns}]


FALLING, FLAT = [0.6, 0.5, 0.4, 0.3], [0.4, 0.4, 0.4, 0.4]
SLOW = [0.5, 0.505, 0.505, 0.505, 0.505]


def steps(*losses):
    """A log of Step 1 with a row each 10 steps."""
    return [{"step": 10 * n, "loss": loss} for n, loss in enumerate([math.nan, *losses])]


def kept(*lifts):
    """Indicators of the readers kept at the start and after each 20 steps."""
    return [{"step": 20 * n, "answer lift": lift} for n, lift in enumerate(lifts)]


@pytest.mark.parametrize(
    ("rows", "probes", "word", "taken", "reason"),
    [
        (looks([0.5, 0.6, 0.7, 0.7, 0.7], FALLING), [], WORKING, 2, "+0.200 and +0.200"),
        (looks([0.5, 0.5, 0.4, 0.4, 0.3], FALLING), [], NOT_WORKING, 2, "-0.100 and -0.200"),
        (looks([0.5, 0.49, 0.5, 0.5, 0.5], FLAT), [], NOT_WORKING, 2, "not clearly fallen"),
        (looks(SLOW, FLAT), [], NOT_WORKING, 2, "+0.005 and +0.005"),
        (looks(SLOW, FALLING), [], TOO_EARLY, 4, "+0.005"),
        (looks([0.5, 0.6, 0.4, 0.6, 0.6], FALLING), [], WORKING, 4, "+0.100"),
        (looks([0.5, 0.6], [0.6]), [], TOO_EARLY, 1, "1 of 2 looks"),
        (looks([0.5], []), lifts(0.9, 1.0), NOT_WORKING, 0, "1.00 times"),
        (looks([0.5], []), lifts(0.9, 1.2), TOO_EARLY, 0, "0 of 2 looks"),
        (steps(3, 2, 1.5, 1), kept(0.9, 1.2, 1.5), WORKING, 4, "1.20 and 1.50"),
        (steps(3, 2, 1.5, 1), kept(1.1, 0.9, 1.0), NOT_WORKING, 4, "than the average token"),
        (steps(3, 2, 1.5, 1), kept(0.9, 0.9, 1.5), TOO_EARLY, 4, "0.90 and 1.50"),
        (steps(3, 2), kept(0.9, 1.5), TOO_EARLY, 2, "1 of 2 kept steps"),
        (steps(*[3.0] * 10), kept(0.9, 1.2, 1.5), NOT_WORKING, 10, "not clearly fallen"),
        (steps(3, 2), [], TOO_EARLY, 2, "0 of 2 kept steps"),
    ],
)
def test_verdicts(rows, probes, word, taken, reason):
    assert verdict(rows, probes)[0] == word
    assert reason in verdict(rows, probes)[1]
    assert first_verdict(rows, probes) == (word, taken)


def test_what_hr_says_outweighs_the_teachers_attention():
    rows = looks([0.5, 0.6, 0.7], [0.6, 0.5])
    assert first_verdict(rows, lifts(0.5, 0.5)) == (NOT_WORKING, 0)
    assert verdict(rows, lifts(0.5, 0.5))[0] == WORKING


def training(run, key, rows, finished=True):
    folder = run / (f"stages/step2/{key}" if finished else f"partial/step2-{key}")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_following_a_run_while_it_goes_on(tmp_path):
    keys = {"a1": "Step 1", "b1": "Step 2", "c1": "not begun"}
    with pytest.raises(StoreError, match="make reproduce"):
        follow(tmp_path, keys)
    training(tmp_path, "a1", [{"step": 0}], finished=False)
    table = follow(tmp_path, keys)
    assert table[["training", "state", "step"]].values.tolist() == [["a1", "unfinished", 0]]
    assert table["hr"].isna().all()
    rows = looks([0.5, 0.6, 0.7], [0.6, 0.5])
    training(tmp_path, "b1", rows)
    training(tmp_path, "b0", rows)  # not asked for
    (tmp_path / "stages/step2/c1").mkdir()  # without a log
    table = follow(tmp_path, keys)
    states = table.groupby("training")["state"].first().to_dict()
    assert states == {"a1": "unfinished", "b1": "finished"}
    followed = table[table["training"] == "b1"].to_dict("records")
    for count in range(1, 4):
        assert verdict(followed[:count]) == verdict(rows[:count])
        assert first_verdict(followed[:count], lifts(0.5, 0.5)) == (NOT_WORKING, 0)
