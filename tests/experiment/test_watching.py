"""Notebook A1's early word on a training: the rule, and the log that it reads."""

import json
import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from IPython.display import Markdown

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks" / "A1_watching.ipynb"


def said_in_the_notebook():
    """What its cells that need no run define."""
    names = {"json": json, "math": math, "np": np, "suppress": suppress, "Markdown": Markdown}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.id == "log-read" or (cell.id.startswith("rule") and cell.cell_type == "code"):
            exec(compile(cell.source, cell.id, "exec"), names)
    return SimpleNamespace(**names)


A1 = said_in_the_notebook()
WORKING, NOT_WORKING, TOO_EARLY = A1.WORKING, A1.NOT_WORKING, A1.TOO_EARLY


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
        (looks([0.5, 0.6], [0.6]), [], TOO_EARLY, 1, "1 of 2 checks"),
        (looks([0.5], []), lifts(0.9, 1.0), NOT_WORKING, 0, "1.00 times"),
        (looks([0.5], []), lifts(0.9, 1.2), TOO_EARLY, 0, "0 of 2 checks"),
        (steps(3, 2, 1.5, 1), kept(0.9, 1.2, 1.5), WORKING, 4, "1.20 and 1.50"),
        (steps(3, 2, 1.5, 1), kept(1.1, 0.9, 1.0), NOT_WORKING, 4, "than the average token"),
        (steps(3, 2, 1.5, 1), kept(0.9, 0.9, 1.5), TOO_EARLY, 4, "0.90 and 1.50"),
        (steps(3, 2), kept(0.9, 1.5), TOO_EARLY, 2, "1 of 2 kept steps"),
        (steps(*[3.0] * 10), kept(0.9, 1.2, 1.5), NOT_WORKING, 10, "not clearly fallen"),
        (steps(3, 2), [], TOO_EARLY, 2, "0 of 2 kept steps"),
    ],
)
def test_verdicts(rows, probes, word, taken, reason):
    assert A1.verdict(rows, probes)[0] == word
    assert reason in A1.verdict(rows, probes)[1]
    assert A1.first_verdict(rows, probes) == (word, taken)


def test_what_hr_says_outweighs_the_teachers_attention():
    rows = looks([0.5, 0.6, 0.7], [0.6, 0.5])
    assert A1.first_verdict(rows, lifts(0.5, 0.5)) == (NOT_WORKING, 0)
    assert A1.verdict(rows, lifts(0.5, 0.5))[0] == WORKING


def training(run, key, rows, finished=True):
    folder = run / (f"stages/step2/{key}" if finished else f"partial/step2-{key}")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_following_a_run_while_it_goes_on(tmp_path):
    assert A1.follow(tmp_path, "a1") == []
    training(tmp_path, "a1", [{"step": 0}], finished=False)
    assert A1.follow(tmp_path, "a1") == [{"training": "a1", "state": "unfinished", "step": 0}]
    rows = looks([0.5, 0.6, 0.7], [0.6, 0.5])
    training(tmp_path, "b1", rows)
    followed = A1.follow(tmp_path, "b1")
    assert {row["state"] for row in followed} == {"finished"}
    for count in range(1, 4):
        assert A1.verdict(followed[:count], []) == A1.verdict(rows[:count], [])
        assert A1.first_verdict(followed[:count], lifts(0.5, 0.5)) == (NOT_WORKING, 0)
    (tmp_path / "stages/step2/c1").mkdir()  # without a log
    assert A1.follow(tmp_path, "c1") == []
