"""The ledger: each claim, the rule it is judged by, what was measured, and a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ragkit.errors import DataError
from ragkit.indicators.metrics import Interval
from ragkit.settings import asset

WEAKER = ("not comparable", "not yet measured", "undecided")  # than a verdict, weakest first
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


def together(verdicts: list[str]) -> str:
    """One verdict for several parts: all the same, 'partly' if some hold, else the weakest."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if "reproduced" in verdicts or "partly" in verdicts:
        return "partly"
    return next((weaker for weaker in WEAKER if weaker in verdicts), "not reproduced")


def improves(gain: Gain) -> str:
    """C1, one measure: the gain lies above zero."""
    return at_most_partly(above(gain.value), gain.seeds)


def fails(poor: Gain, good: Gain) -> str:
    """C2: the poor reader's gain lies below half of the good one's; undecided if that is none."""
    if improves(good) in ("not reproduced", "undecided"):
        return "undecided"
    half = good.value.mean / 2
    if poor.value.high < half:
        return at_most_partly("reproduced", min(poor.seeds, good.seeds))
    return "not reproduced" if poor.value.low >= half else "undecided"


def most(top: Interval, lead: Interval) -> str:
    """C3 and C4: the closest tenth gets more than the average and than every other tenth."""
    return together([above(top, 1.0), above(lead)])


def higher_when_it_works(difference: Interval, gain: Interval) -> str:
    """C5 and C6, one number: it is higher in the reader whose distillation gains more.

    Number and gain are fine-tuned minus off-the-shelf; undecided if the gain may be zero.
    """
    if gain.high < 0:
        return above(Interval(-difference.mean, -difference.high, -difference.low, difference.n))
    return above(difference) if gain.low > 0 else "undecided"


def divided_by(line: float, poor: Interval, good: Interval, gain: Interval) -> str:
    """C6: the line stands between the off-the-shelf reader and the fine-tuned one, the reader
    whose distillation gains more above it; not reproduced if one is clearly on the wrong side.
    """
    if gain.high < 0:
        poor, good = good, poor
    elif not gain.low > 0:
        return "undecided"
    if good.high < line or poor.low > line:
        return "not reproduced"
    return "reproduced" if good.low > line and poor.high < line else "undecided"


def alike(verdicts: Mapping[str, str], same: list[str]) -> tuple[str, str]:
    """C8: the claims hold on both sets. From each claim's verdict and those `same` on both sets.

    Reproduced if every claim is, 'partly' if some hold on both; and what was measured.
    """
    held = [claim for claim in same if verdicts[claim] in ("reproduced", "partly")]
    told = f"the same verdict on both sets: {', '.join(same) or 'none'}; "
    told += f"of these reproduced or partly so: {', '.join(held) or 'none'}"
    if set(verdicts.values()) == {"reproduced"}:
        return "reproduced", told
    return "partly" if held else "not reproduced", told


def ledger(
    parts: Mapping[str, Mapping[str, Part]], judge: bool, paper: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """The claims as a table, from `parts[set][claim]`; the column `paper` holds `paper_values`.

    Without `judge` (a profile too small to tell) every claim is 'not comparable'.
    """
    verdicts, same, rows, texts = {}, [], [], statements()
    *single, both = texts
    for claim in single:
        on_sets = {name: of_set[claim] for name, of_set in parts.items()}
        found = [part.verdict for part in on_sets.values()]
        verdicts[claim] = together(found)
        same += [claim] if len(set(found)) == 1 else []
        measured = "; ".join(f"{name}: {part.measured}" for name, part in on_sets.items())
        why = "; ".join(f"{name}: {part.verdict}" for name, part in on_sets.items())
        rows.append((measured, verdicts[claim], why))
    verdict, told = alike(verdicts, same)
    verdicts[both] = verdict if len(parts) > 1 else "not comparable"
    rows.append((told if judge else "", verdicts[both], "claim by claim, set by set"))
    table = pd.DataFrame(rows, columns=["measured", "verdict", "why"])
    if not judge:
        table = table.assign(verdict="not comparable", why=TOO_SMALL)
    table.insert(0, "claim", list(texts))
    table.insert(1, "statement", [text["claim"] for text in texts.values()])
    table.insert(2, "rule", [text["rule"] for text in texts.values()])
    filled = {claim: f"{own['value']} (p. {own['page']})" for claim, own in paper.items()}
    return table.assign(paper=[filled.get(claim, "") for claim in texts])
