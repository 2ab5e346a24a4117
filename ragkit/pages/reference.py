"""The reference run in `figures/`: how a run differs from it beyond chance, and how a run becomes it."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

GAINS, LEDGER, MAIN = "04_gains.csv", "09_ledger.csv", "04_main_table.csv"


@dataclass
class Comparison:
    """What was compared, where the run differs beyond its intervals, and what else a reader should know."""

    summary: str
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log."""
        return [
            self.summary,
            *(f"  differs: {line}" for line in self.differences),
            *(f"  note: {line}" for line in self.notes),
        ]

    def html(self) -> str:
        """For the report."""
        shown = f"<p>{html.escape(self.summary)}</p>"
        for title, lines in (("Differs", self.differences), ("To know", self.notes)):
            shown += (
                f"<h3>{title}</h3><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
                if lines
                else ""
            )
        return shown


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Nested settings as `part.key`; sets go by their names."""
    if isinstance(settings, dict):
        return {
            name: value
            for key, inner in settings.items()
            for name, value in flat(inner, f"{path}.{key}" if path else key).items()
        }
    if isinstance(settings, list) and all(
        isinstance(one, dict) and "name" in one for one in settings
    ):
        return {
            name: value
            for one in settings
            for name, value in flat(one, f"{path}.{one['name']}").items()
        }
    return {path: settings}


def compare(run: Path, figures: Path) -> Comparison:
    """How a finished run differs from the reference.

    A gain differs where the two 95 % intervals do not overlap, a verdict where it is another one. Nothing is compared
    where either profile is too small to be judged.
    """
    try:
        theirs = json.loads((figures / "manifest.json").read_text("utf8"))
        reference, commit = theirs["profile"], theirs["git"][:7]
        named, small, known = (
            reference["name"],
            not reference["judge"],
            {one["name"] for one in reference["sets"]},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Comparison(
            f"There is no reference to compare with: {figures} holds no manifest of a run (make reference puts one there)."
        )
    own = json.loads((run / "manifest.json").read_text("utf8"))["profile"]
    if small or not own["judge"]:
        which = f"the reference's profile {named}" if small else f"profile {own['name']}"
        return Comparison(
            f"Not compared with the reference (profile {named}): {which} is too small to judge."
        )
    if not known & {one["name"] for one in own["sets"]}:
        theirs_are = ", ".join(sorted(known))
        return Comparison(
            f"Not compared with the reference (profile {named}): it has other question sets ({theirs_are}) than this run."
        )
    compared, differences, notes = [], [], settings_that_differ(own, reference)
    for file, what, look in (
        (GAINS, "gains (by their 95 % intervals)", gains_that_differ),
        (LEDGER, "verdicts", verdicts_that_differ),
    ):
        try:
            both = pd.read_csv(run / "figures" / file), pd.read_csv(figures / file)
            found, lacking, count = look(*both)
        except (OSError, ValueError, KeyError) as error:
            notes.append(
                f"{what} could not be compared: {file} is missing or damaged in the run or in the reference ({error})"
            )
            continue
        differences += found
        notes += lacking
        compared.append(f"{count} {what}")
    try:
        notes.append(main_table(pd.read_csv(run / "figures" / MAIN), pd.read_csv(figures / MAIN)))
    except (OSError, ValueError, KeyError) as error:
        notes.append(
            f"the main tables could not be compared: {MAIN} is missing or damaged in the run or in the reference ({error})"
        )
    found_out = (
        f"of {' and '.join(compared)}, {len(differences) or 'none'} differ{'' if len(differences) > 1 else 's'}"
        if compared
        else "nothing could be"
    )
    return Comparison(
        f"Compared with the reference (profile {named}, commit {commit}): {found_out}.",
        differences,
        notes,
    )


def settings_that_differ(own: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Settings of the two profiles that differ, and what another draw of a world means for the comparison."""
    here, there = flat(own), flat(reference)
    names = [
        name for name in sorted({*here, *there} - {"name"}) if here.get(name) != there.get(name)
    ]
    notes = []
    if names:
        notes.append(
            "settings differ: "
            + ", ".join(
                f"{name} {here.get(name, 'absent')} here, {there.get(name, 'absent')} there"
                for name in names
            )
        )
    if any(name.startswith("sets.") for name in names):
        notes.append(
            "the sets are not the same draw; an interval speaks of the questions of one draw, so a gain may differ for that reason alone"
        )
    return notes


def gains_that_differ(
    own: pd.DataFrame, reference: pd.DataFrame
) -> tuple[list[str], list[str], int]:
    """Gains whose intervals do not overlap, rows that only one side has, and how many were compared."""
    here, there = (
        table.set_index(["set", "system"])[["mean", "low", "high"]] for table in (own, reference)
    )
    differences, count = [], 0
    for name in here.index.intersection(there.index):
        a, b = here.loc[name], there.loc[name]
        if a.isna().any() or b.isna().any():
            continue
        count += 1
        if a["low"] > b["high"] or a["high"] < b["low"]:
            differences.append(
                f"{name[0]}, {name[1]}: gain in HR@5 {interval(a)} here, {interval(b)} in the reference"
            )
    return differences, one_sided(here.index, there.index, "gains"), count


def verdicts_that_differ(
    own: pd.DataFrame, reference: pd.DataFrame
) -> tuple[list[str], list[str], int]:
    """Claims with another verdict, claims that only one side has, and how many were compared."""
    here, there = (table.set_index("claim")["verdict"] for table in (own, reference))
    shared = here.index.intersection(there.index)
    differences = [
        f"{claim}: verdict '{here[claim]}' here, '{there[claim]}' in the reference"
        for claim in shared
        if here[claim] != there[claim]
    ]
    return differences, one_sided(here.index, there.index, "claims"), len(shared)


def main_table(own: pd.DataFrame, reference: pd.DataFrame) -> str:
    """How far the main tables lie apart; they hold no intervals, so this is said for scale only."""
    here, there = (table.set_index(["set", "system", "reader"]) for table in (own, reference))
    apart = (here - there).abs().stack().dropna()
    if apart.empty:
        return "the main tables have no value in common"
    if apart.max() == 0:
        return f"all {len(apart)} values that the main tables share are the same"
    *row, measure = apart.idxmax()
    return f"the main tables (no intervals) lie at most {apart.max():.3f} apart: {measure} of {', '.join(row)}"


def one_sided(here: pd.Index, there: pd.Index, what: str) -> list[str]:
    """A note on rows that cannot be compared, because one side does not have them."""

    def names(rows: pd.Index) -> str:
        return "; ".join(", ".join(row) if isinstance(row, tuple) else row for row in rows)

    sides = ((here.difference(there), "the reference"), (there.difference(here), "this run"))
    return [f"{what} that {side} does not have: {names(rows)}" for rows, side in sides if len(rows)]


def interval(row: pd.Series) -> str:
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def publish(run: Path, figures: Path, readme: Path) -> None:
    """Copies a run's figures, tables and manifest to `figures`, and its verdicts to the README's ledger section."""
    figures.mkdir(exist_ok=True)
    for old in figures.iterdir():
        old.unlink()
    for kind in ("*.svg", "*.png", "*.csv", "*.txt"):
        for path in (run / "figures").glob(kind):
            shutil.copy(path, figures / path.name)
    shutil.copy(run / "manifest.json", figures / "manifest.json")
    ledger = pd.read_csv(run / "figures" / "09_ledger.csv").fillna("")
    rows = [
        f"| {row.claim} | {row.statement} | **{row.verdict}** | {row.why} |"
        for row in ledger.itertuples()
    ]
    table = "\n".join(["| | claim | verdict | set by set |", "|---|---|---|---|", *rows])
    before, rest = readme.read_text("utf8").split("<!-- ledger -->")
    readme.write_text(
        f"{before}<!-- ledger -->\n{table}\n<!-- /ledger -->{rest.split('<!-- /ledger -->')[1]}",
        "utf8",
    )
