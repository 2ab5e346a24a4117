"""The ledger: each claim, the rule it is judged by, what was measured, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ragkit.errors import DataError
from ragkit.indicators.metrics import Interval
from ragkit.settings import asset

WEAKER = ("not comparable", "not yet measured", "undecided")  # than a verdict, weakest first
VERDICTS = ("reproduced", "partly", "not reproduced", *WEAKER)
COLUMNS = ["claim", "statement", "rule", "measured", "verdict", "why", "paper"]  # of the ledger
TOO_SMALL = "the profile is too small to judge"


@dataclass(frozen=True)
class Gain:
    """A gain over the initial system on one set, and over how many seeds it was measured."""

    value: Interval
    seeds: int


@dataclass(frozen=True)
class Part:
    """A claim on one set: the verdict by its rule, and what was measured, in words."""

    verdict: str
    measured: str


def statements() -> dict[str, dict[str, Any]]:
    """The paper's claims with their rules, from `assets/claims.yaml`: claim -> {claim, rule}."""
    return yaml.safe_load(asset("claims.yaml").read_text("utf8"))


def paper_values(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """What a reader who owns the paper has filled in: claim -> {value, page}. Empty as shipped."""
    filled = yaml.safe_load((path or asset("paper_values.yaml")).read_text("utf8")) or {}
    for claim, row in filled.items():
        if claim not in statements() or not isinstance(row, dict) or set(row) != {"value", "page"}:
            known = ", ".join(statements())
            raise DataError(
                f"paper_values.yaml: {claim!r} must be one of {known}, with keys value and page."
            )
    return filled


def at_most_partly(verdict: str, seeds: int) -> str:
    """A result of one seed is never more than 'partly'."""
    return "partly" if verdict == "reproduced" and seeds < 2 else verdict


def above(value: Interval, line: float = 0.0) -> str:
    """Reproduced if the interval lies above the line, not reproduced if at or below it."""
    if value.low > line:
        return "reproduced"
    return "not reproduced" if value.high <= line else "undecided"


def clear(gain: Interval) -> bool:
    """Whether zero lies outside the interval."""
    return gain.low > 0 or gain.high < 0


def improves(gain: Gain) -> str:
    """Rule of C1 for one measure: above zero is reproduced, at or below is not reproduced."""
    return at_most_partly(above(gain.value), gain.seeds)


def fails(poor: Gain, good: Gain) -> str:
    """Rule of C2: the poor reader's gain lies below half of the good one's, if that gains."""
    if improves(good) in ("not reproduced", "undecided"):
        return "undecided"  # there is no half to be below
    half = good.value.mean / 2
    if poor.value.high < half:
        return at_most_partly("reproduced", min(poor.seeds, good.seeds))
    return "not reproduced" if poor.value.low >= half else "undecided"


def most(top: Interval, lead: Interval) -> str:
    """Rule of C3 and C4: the closest tenth gets more than the average and every other tenth."""
    return together([above(top, 1.0), above(lead)])


def higher_when_it_works(difference: Interval, gain: Interval) -> str:
    """Rule of C5 and C6 for one number: it is higher in the reader whose distillation gains more.

    Number and gain are fine-tuned minus off-the-shelf.
    """
    if not clear(gain):
        return "undecided"
    if gain.mean < 0:
        difference = Interval(-difference.mean, -difference.high, -difference.low, difference.n)
    return above(difference)


def divided_by(line: float, means: dict[str, Interval], gain: Interval) -> str:
    """Rule of C6's line: the reader whose distillation gains more lies above it, the other below.

    Not reproduced if one of them lies clearly on the wrong side.
    """
    if not clear(gain) or not all(np.isfinite(value.mean) for value in means.values()):
        return "undecided"
    good, poor = means["fine-tuned"], means["off-the-shelf"]
    if gain.mean < 0:
        good, poor = poor, good
    if good.high < line or poor.low > line:
        return "not reproduced"
    return "reproduced" if good.low > line and poor.high < line else "undecided"


def together(verdicts: list[str]) -> str:
    """One verdict for several parts: all the same, 'partly' if some hold, else the weakest."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if "reproduced" in verdicts or "partly" in verdicts:
        return "partly"
    return next((weaker for weaker in WEAKER if weaker in verdicts), "not reproduced")


def over_runs(runs: dict[int, Part]) -> Part:
    """A claim on one set over several runs of Step 1, by their seeds (see `together`)."""
    if len(runs) == 1:
        return next(iter(runs.values()))
    told = [f"Step 1 with seed {seed}: {part.measured}" for seed, part in runs.items()]
    return Part(together([part.verdict for part in runs.values()]), " | ".join(told))


def decide(parts: dict[str, dict[str, Part]], judge: bool) -> dict[str, dict[str, Any]]:
    """The ledger from `parts[set][claim]`; C8 compares the sets.

    With `judge` off (a profile too small to tell) every claim is 'not comparable'.
    """
    ledger: dict[str, dict[str, Any]] = {}
    same = []
    for claim in list(statements())[:-1]:
        on_sets = {name: measured[claim] for name, measured in parts.items()}
        verdicts = [part.verdict for part in on_sets.values()]
        why = "; ".join(f"{name}: {part.verdict}" for name, part in on_sets.items())
        ledger[claim] = {
            "verdict": together(verdicts) if judge else "not comparable",
            "measured": "; ".join(f"{name}: {part.measured}" for name, part in on_sets.items()),
            "why": why if judge else TOO_SMALL,
        }
        if len(set(verdicts)) == 1:
            same.append(claim)
    held = [claim for claim in same if ledger[claim]["verdict"] in ("reproduced", "partly")]
    verdict = "partly" if held else "not reproduced"
    if len(held) == len(ledger) and {row["verdict"] for row in ledger.values()} == {"reproduced"}:
        verdict = "reproduced"
    told = f"the same verdict on both sets: {', '.join(same) or 'none'}; "
    told += f"of these reproduced or partly so: {', '.join(held) or 'none'}"
    ledger["C8"] = {
        "verdict": verdict if judge and len(parts) > 1 else "not comparable",
        "measured": told if judge else "",
        "why": "claim by claim, set by set" if judge else TOO_SMALL,
    }
    return ledger


def table(ledger: dict[str, dict[str, Any]], paper: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The ledger as a table, with the column `paper` for values a reader has filled in."""
    rows = []
    for claim, text in statements().items():
        own = paper.get(claim)
        row = {"claim": claim, "statement": text["claim"], "rule": text["rule"], **ledger[claim]}
        rows.append({**row, "paper": f"{own['value']} (p. {own['page']})" if own else ""})
    return pd.DataFrame(rows, columns=COLUMNS)
