"""The reference run in `figures/`: how a run differs from it, and how a run becomes it."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ragkit.data.files import write_whole
from ragkit.errors import StoreError
from ragkit.experiment.lab import Lab

GAINS, LEDGER, MAIN = "04_gains.csv", "09_ledger.csv", "04_main_table.csv"
MARKED = re.compile("(?<=<!-- ledger -->).*?(?=<!-- /ledger -->)", re.DOTALL)  # of the README
ENDS = (".svg", ".png", ".csv", ".txt")  # of a figure's files
MEASURES = ["EM", "F1", "HR@1", "HR@5", "HR@20", "MRR"]
GAIN = (
    "{set}, {system}: gain in HR@5 {mean:+.3f} [{low:+.3f}, {high:+.3f}] here, "
    "{mean there:+.3f} [{low there:+.3f}, {high there:+.3f}] in the reference"
)
VERDICT = "{claim}: verdict '{verdict}' here, '{verdict there}' in the reference"
# What is compared: file, key, values, and how a row that differs is told.
COMPARED = {
    "gains": (GAINS, ["set", "system"], ["mean", "low", "high"], GAIN),
    "verdicts": (LEDGER, ["claim"], ["verdict"], VERDICT),
    "main tables": (MAIN, ["set", "system", "reader"], MEASURES, ""),
}


@dataclass
class Comparison:
    """What was compared, where the run differs beyond its intervals, what else is to be known."""

    summary: str
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log."""
        differences = [f"  differs: {line}" for line in self.differences]
        return [self.summary, *differences, *(f"  note: {line}" for line in self.notes)]


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Nested settings as `part.key`; sets go by their names."""
    if isinstance(settings, list) and settings and isinstance(settings[0], dict):
        settings = {one["name"]: one for one in settings}
    if not isinstance(settings, dict):
        return {path: settings}
    found: dict[str, Any] = {}
    for key, inner in settings.items():
        found |= flat(inner, f"{path}.{key}" if path else key)
    return found


def measured_by(manifest: dict[str, Any]) -> str:
    """The profile of a run and the commits that made its stages and notebooks."""
    if "git" in manifest:  # until 0.2.0 a manifest named one commit for all, that of its last call
        return f"profile {manifest['profile']['name']}, commit {manifest['git'][:7]}"
    records = [*manifest["stages"].values(), *manifest["notebooks"].values()]
    commits = dict.fromkeys(str(one["made"]["commit"])[:7] for one in records)
    dirty = any(one["made"].get("dirty") for one in records)
    named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    held = ", with changes that no commit holds" if dirty else ""
    return f"profile {manifest['profile']['name']}, {named}{held}"


def compare(run: Path, figures: Path) -> Comparison:
    """How the finished run in a folder differs from the reference in `figures`.

    A gain differs where the two 95 % intervals do not overlap, a verdict where it is another one.
    Nothing is compared where either profile is too small to be judged.
    """
    try:
        manifest = json.loads((figures / "manifest.json").read_text("utf8"))
        theirs, named = manifest["profile"], measured_by(manifest)
        judged, sets = theirs["judge"], {one["name"] for one in theirs["sets"]}
    except (OSError, ValueError, KeyError, TypeError):
        said = (
            f"{figures} holds no manifest of a run by this version (`make reference` puts it there)"
        )
        return Comparison(f"There is no reference to compare with: {said}.")
    own = json.loads((run / "manifest.json").read_text("utf8"))["profile"]
    not_compared = f"Not compared with the reference ({named})"
    if not (judged and own["judge"]):
        which = own["name"] if judged else theirs["name"]
        return Comparison(f"{not_compared}: profile {which} is too small to judge.")
    if sets.isdisjoint(one["name"] for one in own["sets"]):
        other = ", ".join(sorted(sets))
        return Comparison(f"{not_compared}: it has other question sets ({other}) than this run.")
    compared, differences, notes = [], [], settings_that_differ(flat(own), flat(theirs))
    for what, (file, key, values, form) in COMPARED.items():
        try:
            tables = [pd.read_csv(at / file)[key + values] for at in (run / "figures", figures)]
            both = tables[0].merge(tables[1], "outer", key, suffixes=("", " there"), indicator=True)
        except (OSError, ValueError, KeyError) as error:
            lacking = f"{file} is missing or damaged in the run or in the reference"
            notes.append(f"{what} not compared: {lacking} ({error})")
            continue
        if file == MAIN:
            notes.append(largest_difference(*(table.set_index(key) for table in tables)))
            continue
        shared = both[both["_merge"] == "both"].dropna()
        if file == GAINS:
            apart = (shared["low"] > shared["high there"]) | (shared["high"] < shared["low there"])
        else:
            apart = shared["verdict"] != shared["verdict there"]
        differences += [form.format(**row) for row in shared[apart].to_dict("records")]
        compared.append(f"{len(shared)} {what}")
        for side, other in (("left_only", "the reference"), ("right_only", "this run")):
            rows = both.loc[both["_merge"] == side, key].agg(", ".join, axis=1)
            if len(rows):
                notes.append(f"{what} that {other} does not have: {'; '.join(rows)}")
    differ = f"{len(differences) or 'none'} differ{'' if len(differences) > 1 else 's'}"
    summary = f"of {' and '.join(compared) or 'nothing'}, {differ} (gains by their intervals)"
    return Comparison(f"Compared with the reference ({named}): {summary}.", differences, notes)


def settings_that_differ(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Settings of the two profiles that differ, and what another draw of a world means."""
    names = {*here, *there} - {"name"}
    differ = sorted(name for name in names if here.get(name) != there.get(name))
    told = [f"{n} {here.get(n, 'absent')} here, {there.get(n, 'absent')} there" for n in differ]
    notes = [f"settings differ: {', '.join(told)}"] if told else []
    if any(name.startswith("sets.") for name in differ):
        notes.append("the sets are not the same draw, for which reason alone a gain may differ")
    return notes


def largest_difference(here: pd.DataFrame, there: pd.DataFrame) -> str:
    """How far the main tables lie apart; they hold no intervals, so this is for scale only."""
    apart = (here - there).abs().stack().dropna()
    if apart.empty:
        return "the main tables have no value in common"
    if apart.max() == 0:
        return f"all {len(apart)} values that the main tables share are the same"
    *row, measure = apart.idxmax()
    where = f"{measure} of {', '.join(row)}"
    return f"the main tables (no intervals) lie at most {apart.max():.3f} apart: {where}"


def checked(lab: Lab, readme: Path) -> tuple[dict[str, Any], list[Path]]:
    """The manifest of a run that may be published, and its files.

    Raises StoreError, which says all that is lacking.
    """
    profile, path, lacking = lab.profile.name, lab.folder / "manifest.json", []
    manifest = json.loads(path.read_text("utf8")) if path.is_file() else {}
    if not manifest:
        lacking.append(f"{path}: the run of profile {profile} is not finished")
    elif manifest["profile"] != lab.profile.model_dump(mode="json"):
        lacking.append(f"{path} is of a run with other settings than profile {profile} has now")
    wanted = {lab.figures / name for name in (GAINS, LEDGER, MAIN)}
    wanted |= {lab.folder / "notebooks" / f"{name}.ipynb" for name in manifest.get("notebooks", ())}
    wanted |= {one.with_suffix(end) for one in lab.figures.glob("*.svg") for end in ENDS}
    files = [one for one in lab.figures.glob("*") if one.suffix in ENDS]
    lacking += [f"{one} is missing" for one in sorted(wanted) if not one.is_file()]
    lacking += [f"{one} is empty" for one in sorted(files) if not one.stat().st_size]
    if not (readme.is_file() and MARKED.search(readme.read_text("utf8"))):
        lacking.append(f"{readme} must hold <!-- ledger --> and after it <!-- /ledger -->")
    if lacking:
        advice = f"Run `make reproduce PROFILE={profile}` first."
        raise StoreError(f"Nothing was published: {'; '.join(lacking)}. {advice}")
    return manifest, [*files, path]


def publish(lab: Lab, figures: Path, readme: Path) -> None:
    """Makes a finished run the reference: figures, tables, manifest, and the README's ledger.

    All is checked before anything is touched (StoreError), written aside and swapped. Folders in
    `figures` (the references of other profiles) stay.
    """
    manifest, files = checked(lab, readme)
    aside, old = figures.with_name(f"{figures.name}.new"), figures.with_name(f"{figures.name}.old")
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in files:
        shutil.copy(path, aside)
    for inner in filter(Path.is_dir, figures.glob("*")):
        shutil.copytree(inner, aside / inner.name)
    told = ["", "| | claim | verdict | set by set |", "|---|---|---|---|"]
    for row in pd.read_csv(lab.figures / LEDGER).fillna("").itertuples():
        told.append(f"| {row.claim} | {row.statement} | **{row.verdict}** | {row.why} |")
    told += ["", f"Measured with {measured_by(manifest)}.", ""]
    if figures.is_dir():
        figures.rename(old)
    aside.rename(figures)
    shutil.rmtree(old, ignore_errors=True)
    write_whole(readme, MARKED.sub(lambda _: "\n".join(told), readme.read_text("utf8"), count=1))
