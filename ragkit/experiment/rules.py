"""How measured numbers become verdicts: the rules of `assets/claims.yaml`, which come before the
measurement, with every threshold; and what is known of the paper's own numbers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from ragkit.errors import DataError
from ragkit.indicators.measures import Interval
from ragkit.settings import asset

RULES: dict[str, Any] = yaml.safe_load(asset("claims.yaml").read_text("utf8"))
LIMITS: dict[str, Any] = RULES["thresholds"]
LINE: float = LIMITS["line"]  # of Indicator 2
# The paper's claims with their rules, thresholds filled in: claim -> {claim, rule}
STATEMENTS: dict[str, dict[str, str]] = {
    claim: {name: text.format(**LIMITS) for name, text in texts.items()}
    for claim, texts in RULES["claims"].items()
}
WEAKER = ("not comparable", "not yet measured", "undecided")  # than a verdict, weakest first
WORDS = {1: "holds", 0: "undecided", -1: "contradicted"}
FIGURE = "digitised from the first author's homepage, about +-0.02"


class Number(NamedTuple):
    """What a claim asks of a number: to lie above its line (sign 1), below (-1), or nothing (0)."""

    name: str
    value: Interval
    line: float = 0.0
    sign: int = 1
    votes: bool = True


class Part(NamedTuple):
    """A claim on one set: the verdict by its rule, what was measured, and what caps the verdict."""

    verdict: str
    measured: str
    cap: str = ""


def holm(numbers: Sequence[Number]) -> list[int]:
    """1 for each number that holds, -1 if it is contradicted, 0 if undecided: Holm's procedure over
    two-sided bootstrap p-values against the lines. What lies at its line does not hold."""
    wanted, found = [], [0] * len(numbers)  # the share of resamples on the wanted side
    for _, value, line, sign, _ in numbers:
        there = sign and len(value.draws)
        wanted.append(float((sign * value.draws > sign * line).mean()) if there else 0.5)
    for turn, place in enumerate(sorted(range(len(wanted)), key=lambda i: -abs(wanted[i] - 0.5))):
        if 2 * min(wanted[place], 1 - wanted[place]) > LIMITS["level"] / (len(wanted) - turn):
            break
        found[place] = 1 if wanted[place] > 0.5 else -1
    return found


def judged(numbers: Iterable[Number]) -> Part:
    """The verdict on the numbers of one claim on one set and run."""
    every = list(numbers)
    asked = [number for number in every if number.votes]
    sides = dict(zip([number.name for number in asked], holm(asked), strict=True))
    words = {name: f" {WORDS[side]}" for name, side in sides.items()}
    told = [f"{n.name} {n.value}{words.get(n.name, '')}" for n in every]
    held, against = 1 in sides.values(), -1 in sides.values()
    verdict = "mixed" if held and against else "partly" if held else "undecided"
    verdict = "reproduced" if {*sides.values()} == {1} else verdict
    verdict = "not reproduced" if against and not held else verdict
    return Part(verdict, " · ".join(told))


def together(verdicts: Sequence[str]) -> str:
    """One verdict for several sets or runs."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    held, mixed = {"reproduced", "partly"} & {*verdicts}, "mixed" in verdicts
    if mixed or (held and "not reproduced" in verdicts):
        return "mixed"
    weakest = (weaker for weaker in WEAKER if weaker in verdicts)
    return "partly" if held else next(weakest, "not reproduced")


def side(value: Interval, line: float = 0.0) -> int:
    """Whether the plain interval lies above a line (1), below it (-1) or around it (0)."""
    return int(value.low > line) - int(value.high < line)


def figure_means() -> pd.DataFrame:
    """The paper's recovered figure: means by bin centres, a row a system, a column a panel."""
    bins = pd.read_csv(asset("paper_figure_nq_answer_p95.csv"), comment="#")
    bins["sum"] = bins["count"] * (bins["bin low"] + bins["bin high"]) / 2
    sums = bins.groupby(["condition", "panel"], sort=False)[["sum", "count"]].sum()
    return (sums["sum"] / sums["count"]).unstack(sort=False)


def paper_values(path: Path | None = None) -> dict[str, str]:
    """The paper's numbers, by claim: its recovered figure, and what its owner has filled in."""
    filled = yaml.safe_load((path or asset("paper_values.yaml")).read_text("utf8")) or {}
    for claim, row in filled.items():
        if claim not in STATEMENTS or not isinstance(row, dict) or set(row) != {"value", "page"}:
            raise DataError(f"paper_values.yaml: {claim!r} is no claim, or lacks value and page.")
    means = ", ".join(f"{name} {rho:.2f}" for name, rho in figure_means()["Spearman"].items())
    known = {"C5": f"mean Spearman on NaturalQuestions: {means} ({FIGURE})"}
    return known | {claim: f"{row['value']} (p. {row['page']})" for claim, row in filled.items()}
