"""The ledger: each claim, the rule fixed beforehand, the measured value with its interval, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ragkit.errors import ClaimError
from ragkit.indicators.metrics import Interval

VERDICTS = (
    "reproduced",
    "partly",
    "not reproduced",
    "undecided",
    "not comparable",
    "not yet measured",
)


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
    """The claims of the paper with their rules, from `assets/claims.yaml`."""
    return yaml.safe_load(
        resources.files("ragkit").joinpath("assets/claims.yaml").read_text("utf8")
    )


def paper_values(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """What a reader who owns the paper has filled in: claim -> {value, page}. Empty as shipped."""
    text = (
        path.read_text("utf8")
        if path
        else resources.files("ragkit").joinpath("assets/paper_values.yaml").read_text("utf8")
    )
    filled = yaml.safe_load(text) or {}
    for claim, row in filled.items():
        if claim not in statements() or not isinstance(row, dict) or set(row) != {"value", "page"}:
            raise ClaimError(
                f"paper_values.yaml: {claim!r} must be one of {', '.join(statements())} with keys 'value' and 'page'."
            )
    return filled


def at_most_partly(verdict: str, seeds: int) -> str:
    """A result of one seed is never more than 'partly'."""
    return "partly" if verdict == "reproduced" and seeds < 2 else verdict


def above_zero(value: Interval) -> str:
    """Of a gain or difference: reproduced if its interval lies above zero, not reproduced if at or below, else undecided."""
    if value.low > 0:
        return "reproduced"
    return "not reproduced" if value.high <= 0 else "undecided"


def improves(gain: Gain) -> str:
    """Rule of C1 for one measure: the whole interval above zero reproduces it, the whole interval below refutes it."""
    return at_most_partly(above_zero(gain.value), gain.seeds)


def fails(poor: Gain, good: Gain) -> str:
    """Rule of C2: the upper bound of the poor reader's gain lies below half of the good reader's gain.

    If the good reader itself gains nothing there is no half to be below: undecided.
    """
    if improves(good) in ("not reproduced", "undecided"):
        return "undecided"
    if poor.value.high < good.value.mean / 2:
        return at_most_partly("reproduced", min(poor.seeds, good.seeds))
    return "not reproduced" if poor.value.low >= good.value.mean / 2 else "undecided"


def most(top: Interval, lead: Interval) -> str:
    """Rule of C3 and C4: the closest tenth of tokens gets more than the average token and more than every other tenth."""
    return together(
        [above_zero(Interval(top.mean - 1, top.low - 1, top.high - 1, top.n)), above_zero(lead)]
    )


def higher_when_it_works(difference: Interval, gain: Interval) -> str:
    """Rule of C5 and C6 for one number: it is higher in the reader whose distillation gains more. Both fine-tuned minus off-the-shelf.

    Undecided where neither reader's distillation gains clearly more than the other's.
    """
    if gain.low <= 0 <= gain.high:
        return "undecided"
    better_first = (
        difference
        if gain.mean > 0
        else Interval(-difference.mean, -difference.high, -difference.low, difference.n)
    )
    return above_zero(better_first)


def divided_by(line: float, means: dict[str, Interval], gain: Interval) -> str:
    """Rule of C6's line: the reader whose distillation gains more lies above it, the other does not.

    Not reproduced if one of them lies clearly on the wrong side; undecided where an interval holds the line, or
    neither gains clearly more.
    """
    if gain.low <= 0 <= gain.high or not all(np.isfinite(value.mean) for value in means.values()):
        return "undecided"
    good, poor = (
        (means["fine-tuned"], means["off-the-shelf"])
        if gain.mean > 0
        else (means["off-the-shelf"], means["fine-tuned"])
    )
    if good.high < line or poor.low > line:
        return "not reproduced"
    return "reproduced" if good.low > line and poor.high < line else "undecided"


def together(verdicts: list[str]) -> str:
    """One verdict for several parts: all the same, or 'partly' where some part is reproduced, else the weaker."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if "reproduced" in verdicts or "partly" in verdicts:
        return "partly"
    for weaker in ("not comparable", "not yet measured", "undecided"):
        if weaker in verdicts:
            return weaker
    return "not reproduced"


def over_runs(runs: dict[int, Part]) -> Part:
    """A claim on one set over several runs of Step 1, by their seeds: what `together` makes of their verdicts."""
    told = (
        part.measured if len(runs) == 1 else f"Step 1 with seed {seed}: {part.measured}"
        for seed, part in runs.items()
    )
    return Part(together([part.verdict for part in runs.values()]), " | ".join(told))


def decide(parts: dict[str, dict[str, Part]], judge: bool) -> dict[str, dict[str, Any]]:
    """The ledger from `parts[set][claim]`; C8 compares the sets.

    With `judge` off (a profile too small to tell) every measured claim is 'not comparable'.
    """
    small = "the profile is too small to judge"
    ledger: dict[str, dict[str, Any]] = {}
    for claim in (claim for claim in statements() if claim != "C8"):
        verdicts = {name: measured[claim].verdict for name, measured in parts.items()}
        told = "; ".join(f"{name}: {measured[claim].measured}" for name, measured in parts.items())
        why = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())
        ledger[claim] = {
            "verdict": together(list(verdicts.values())) if judge else "not comparable",
            "measured": told,
            "why": why if judge else small,
        }
    same = [
        claim
        for claim in ledger
        if len({measured[claim].verdict for measured in parts.values()}) == 1
    ]
    held = [claim for claim in same if ledger[claim]["verdict"] in ("reproduced", "partly")]
    if not judge or len(parts) < 2:
        verdict = "not comparable"
    elif len(held) == len(ledger):
        verdict = (
            "reproduced"
            if all(ledger[claim]["verdict"] == "reproduced" for claim in held)
            else "partly"
        )
    else:
        verdict = "partly" if held else "not reproduced"
    told = f"the same verdict on both sets: {', '.join(same) or 'none'}; of these reproduced or partly so: {', '.join(held) or 'none'}"
    ledger["C8"] = {
        "verdict": verdict,
        "measured": told if judge else "",
        "why": "claim by claim, set by set" if judge else small,
    }
    return ledger


def table(ledger: dict[str, dict[str, Any]], paper: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The ledger as a table, with the column `paper` for values a reader has filled in."""
    rows = []
    for claim, text in statements().items():
        shown = f"{paper[claim]['value']} (p. {paper[claim]['page']})" if claim in paper else ""
        rows.append(
            {
                "claim": claim,
                "statement": text["claim"],
                "rule": text["rule"],
                **ledger[claim],
                "paper": shown,
            }
        )
    return pd.DataFrame(rows)[["claim", "statement", "rule", "measured", "verdict", "why", "paper"]]
