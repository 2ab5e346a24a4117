"""The reference run in `figures/`: how a run differs from it, and how a run becomes it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from ragkit.data.files import write_whole
from ragkit.errors import StoreError
from ragkit.experiment.lab import Lab

GAINS, LEDGER, MAIN = "04_gains.csv", "09_ledger.csv", "04_main_table.csv"
MARKED = re.compile("(?<=<!-- ledger -->).*?(?=<!-- /ledger -->)", re.DOTALL)  # of the README
ENDS = (".svg", ".png", ".csv", ".txt")  # of a figure's files
GAIN = (
    "{set}, {system}: gain in HR@5 {mean:+.3f} [{low:+.3f}, {high:+.3f}] here, "
    "{mean there:+.3f} [{low there:+.3f}, {high there:+.3f}] there"
)
VERDICT = "{claim}: verdict '{verdict}' here, '{verdict there}' there"


def flat(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile's settings as `part.key`; sets go by their names."""
    sets = {one["name"]: one for one in profile["sets"]}
    return pd.json_normalize({**profile, "sets": sets}).iloc[0].to_dict()


def measured_by(manifest: dict[str, Any]) -> str:
    """The profile of a run and the commits that made its stages and notebooks."""
    if "git" in manifest:  # until 0.2.0 a manifest named one commit for all, that of its last call
        return f"profile {manifest['profile']['name']}, commit {manifest['git'][:7]}"
    made = [one["made"] for part in ("stages", "notebooks") for one in manifest[part].values()]
    commits = dict.fromkeys(str(one["commit"])[:7] for one in made)
    held = ", with changes that no commit holds" if any(one.get("dirty") for one in made) else ""
    named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f"profile {manifest['profile']['name']}, {named}{held}"


def compare(run: Path, figures: Path) -> list[str]:
    """How the finished run in a folder differs from the reference in `figures`, line by line.

    A gain differs where the two 95 % intervals do not overlap, a verdict where it is another one.
    Nothing is compared where either profile is too small to be judged.
    """
    own = json.loads((run / "manifest.json").read_text("utf8"))["profile"]
    try:
        manifest = json.loads((figures / "manifest.json").read_text("utf8"))
        theirs, named = manifest["profile"], measured_by(manifest)
        here, there = flat(own), flat(theirs)
        gains, verdicts = (
            pd.read_csv(run / "figures" / file).merge(
                pd.read_csv(figures / file), on=key, suffixes=("", " there")
            )
            for file, key in ((GAINS, ["set", "system"]), (LEDGER, "claim"))
        )
        apart = (gains["low"] > gains["high there"]) | (gains["high"] < gains["low there"])
        other = verdicts["verdict"] != verdicts["verdict there"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{figures} holds none of this version (`make reference` puts it there): {error!r}"
        return [f"There is no reference to compare with: {why}."]
    small = [one["name"] for one in (own, theirs) if not one["judge"]]
    if small or gains.empty:
        why = f"profile {small[0]} is too small to judge" if small else "it has other question sets"
        return [f"Not compared with the reference ({named}): {why}."]
    told = [GAIN.format(**row) for row in gains[apart].to_dict("records")]
    told += [VERDICT.format(**row) for row in verdicts[other].to_dict("records")]
    counts = f"of {len(gains)} gains and {len(verdicts)} verdicts, {len(told) or 'none'} differ"
    summary = f"Compared with the reference ({named}): {counts} (gains by their intervals)."
    names = sorted({*here, *there} - {"name"})
    settings = [
        f"{name} {here.get(name, 'absent')} here, {there.get(name, 'absent')} there"
        for name in names
        if here.get(name) != there.get(name)
    ]
    return [summary, *told, f"Settings that differ: {'; '.join(settings) or 'none'}."]


def publish(lab: Lab, figures: Path, readme: Path) -> None:
    """Makes a finished run the reference: figures, tables, manifest, and the README's ledger.

    All is checked before anything is touched (StoreError, which says all that is lacking), and
    written aside first. Folders in `figures` (the references of other profiles) stay.
    """
    record, lacking = lab.folder / "manifest.json", []
    manifest = json.loads(record.read_text("utf8"))
    if manifest["profile"] != lab.profile.model_dump(mode="json"):
        now = f"other settings than profile {lab.profile.name} has now"
        lacking.append(f"{record} is of a run with {now}")
    files = {one for one in lab.figures.glob("*") if one.suffix in ENDS}
    files |= {lab.figures / name for name in (GAINS, LEDGER, MAIN)}
    files |= {one.with_suffix(end) for one in lab.figures.glob("*.svg") for end in ENDS}
    empty = [one for one in sorted(files) if not (one.is_file() and one.stat().st_size)]
    lacking += [f"{one} is missing or empty" for one in empty]
    if not (readme.is_file() and MARKED.search(readme.read_text("utf8"))):
        lacking.append(f"{readme} must hold <!-- ledger --> and after it <!-- /ledger -->")
    if lacking:
        advice = f"Run `make reproduce PROFILE={lab.profile.name}` first."
        raise StoreError(f"Nothing was published: {'; '.join(lacking)}. {advice}")
    told = ["", "| | claim | verdict | set by set |", "|---|---|---|---|"]
    for row in pd.read_csv(lab.figures / LEDGER).fillna("").itertuples():
        told.append(f"| {row.claim} | {row.statement} | **{row.verdict}** | {row.why} |")
    told += ["", f"Measured with {measured_by(manifest)}.", ""]
    aside = figures.with_name(f"{figures.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in (*files, record):
        shutil.copy(path, aside)
    for inner in filter(Path.is_dir, figures.glob("*")):
        shutil.copytree(inner, aside / inner.name)
    shutil.rmtree(figures, ignore_errors=True)
    aside.rename(figures)
    write_whole(readme, MARKED.sub(lambda _: "\n".join(told), readme.read_text("utf8"), count=1))
