"""The ledger: each claim, the rule fixed beforehand, the measured value with its interval, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ragkit import RagkitError
from ragkit.metrics import Interval

VERDICTS = ("reproduced", "partly", "not reproduced", "undecided", "not comparable", "not yet measured")


class ClaimError(RagkitError):
    """The ledger or the paper's fill-in file cannot be read."""


@dataclass(frozen=True)
class Gain:
    """A gain over the initial system on one set, and over how many seeds it was measured."""

    set_name: str
    value: Interval
    seeds: int


def statements() -> dict[str, dict[str, Any]]:
    """The claims of the paper with their rules, from `assets/claims.yaml`."""
    return yaml.safe_load(resources.files("ragkit").joinpath("assets/claims.yaml").read_text("utf8"))


def paper_values(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """What a reader who owns the paper has filled in: claim -> {value, page}. Empty as shipped."""
    text = path.read_text("utf8") if path else resources.files("ragkit").joinpath("assets/paper_values.yaml").read_text("utf8")
    filled = yaml.safe_load(text) or {}
    for claim, row in filled.items():
        if claim not in statements() or not isinstance(row, dict) or set(row) != {"value", "page"}:
            raise ClaimError(f"paper_values.yaml: {claim!r} must be one of {', '.join(statements())} with keys 'value' and 'page'.")
    return filled


def at_most_partly(verdict: str, seeds: int) -> str:
    """A result of one seed is never more than 'partly'."""
    return "partly" if verdict == "reproduced" and seeds < 2 else verdict


def improves(gain: Gain) -> str:
    """Rule of C1 for one measure: the whole interval above zero reproduces it, the whole interval below refutes it."""
    if gain.value.low > 0:
        return at_most_partly("reproduced", gain.seeds)
    return "not reproduced" if gain.value.high <= 0 else "undecided"


def fails(poor: Gain, good: Gain) -> str:
    """Rule of C2: the upper bound of the poor reader's gain lies below half of the good reader's gain.

    If the good reader itself gains nothing there is no half to be below: undecided.
    """
    if improves(good) in ("not reproduced", "undecided"):
        return "undecided"
    if poor.value.high < good.value.mean / 2:
        return at_most_partly("reproduced", min(poor.seeds, good.seeds))
    return "not reproduced" if poor.value.low >= good.value.mean / 2 else "undecided"


def together(verdicts: list[str]) -> str:
    """One verdict for several parts: all the same, or 'partly' where some part is reproduced, else the weaker."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if "reproduced" in verdicts or "partly" in verdicts:
        return "partly"
    return "undecided" if "undecided" in verdicts else "not reproduced"


def decide(gains: dict[str, dict[str, dict[str, Gain]]], judge: bool) -> dict[str, dict[str, Any]]:
    """Verdicts of C1, C2 and C8 from `gains[set][regime][measure]`; every other claim is 'not yet measured'.

    With `judge` off (a profile too small to tell) the measured claims are 'not comparable'.
    """
    ledger: dict[str, dict[str, Any]] = {claim: {"verdict": "not yet measured", "measured": "", "why": ""} for claim in statements()}
    per_set: dict[str, list[str]] = {"C1": [], "C2": []}
    notes: dict[str, list[str]] = {"C1": [], "C2": []}
    for set_name, regimes in gains.items():
        good, poor = regimes["fine-tuned"], regimes["off-the-shelf"]
        per_set["C1"].append(together([improves(good[measure]) for measure in ("HR@5", "EM", "F1")]))
        notes["C1"].append(f"{set_name}: " + ", ".join(f"{measure} {good[measure].value}" for measure in ("HR@5", "EM", "F1")))
        per_set["C2"].append(fails(poor["HR@5"], good["HR@5"]))
        notes["C2"].append(f"{set_name}: HR@5 {poor['HR@5'].value} against {good['HR@5'].value}")
    for claim in ("C1", "C2"):
        verdict = together(per_set[claim]) if judge else "not comparable"
        why = "; ".join(f"{name}: {v}" for name, v in zip(gains, per_set[claim], strict=True)) if judge else "the profile is too small to judge"
        ledger[claim] = {"verdict": verdict, "measured": "; ".join(notes[claim]), "why": why}
    same = len(gains) > 1 and all(len(set(v)) == 1 for v in per_set.values())
    verdict = "not comparable" if not judge or len(gains) < 2 else "not reproduced" if not same else together([v[0] for v in per_set.values()])
    ledger["C8"] = {"verdict": verdict, "measured": "", "why": "C1 and C2, set by set" if judge else "the profile is too small to judge"}
    return ledger


def table(ledger: dict[str, dict[str, Any]], paper: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The ledger as a table, with the column `paper` for values a reader has filled in."""
    rows = []
    for claim, text in statements().items():
        shown = f"{paper[claim]['value']} (p. {paper[claim]['page']})" if claim in paper else ""
        rows.append({"claim": claim, "statement": text["claim"], "rule": text["rule"], **ledger[claim], "paper": shown})
    return pd.DataFrame(rows)[["claim", "statement", "rule", "measured", "verdict", "why", "paper"]]
