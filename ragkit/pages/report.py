"""The report: a run as static pages that load nothing; none but the sliders may run a script. And
the reference run in `figures/`: how a run differs from it, and how a run becomes it."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from ragkit.data.files import write_whole
from ragkit.errors import StoreError
from ragkit.experiment.lab import Lab, read_json
from ragkit.experiment.store import replaced
from ragkit.pages import html, sliders
from ragkit.settings import asset

GAINS, LEDGER, MAIN = "04_gains.csv", "09_ledger.csv", "04_main_table.csv"
DEVIATIONS = "08_deviations.csv"
ENDS = (".svg", ".png", ".csv", ".txt")  # of a figure's files
GAIN = (
    "{set}, {system}: gain in HR@5 {mean:+.3f} [{low:+.3f}, {high:+.3f}] here, "
    "{mean there:+.3f} [{low there:+.3f}, {high there:+.3f}] there"
)
VERDICT = "{claim}: verdict '{verdict}' here, '{verdict there}' there"
SHOWN_ROWS = 12  # of a figure's table


def prose(markdown: str, escape: bool = False) -> Markup:
    """Markdown as HTML, its tables in boxes that scroll; `escape` shows HTML in it as text."""
    made = html.clean(MarkdownWithMath(renderer=IPythonRenderer(escape=escape)).render(markdown))
    wide = html.fill("wide", table=Markup(r"\1"))
    return Markup(re.sub(r"(<table>.*?</table>)", wide, made, flags=re.DOTALL))


def output_html(output: nbformat.NotebookNode) -> Markup:
    """One output of a cell: text escaped, HTML by the allow-list."""
    data = output.get("data", {})
    if "text/html" in data:
        made = html.clean(data["text/html"])
        is_bare = "<table" in made and 'class="wide"' not in made
        return html.fill("wide", table=made) if is_bare else made
    if "text/markdown" in data:
        return prose(data["text/markdown"], escape=True)
    if "image/png" in data:
        source = data["image/png"].strip()
        return Markup('<img alt="figure" src="data:image/png;base64,{}">').format(source)
    text = data.get("text/plain") or output.get("text") or "\n".join(output.get("traceback", []))
    return Markup("<pre>{}</pre>").format(re.sub(r"\x1b[^m]*m", "", text))


def notebook_html(path: Path) -> Markup:
    """An executed notebook: prose, code, outputs; not what went to the error stream."""
    cells = nbformat.read(path, as_version=4).cells
    code = partial(highlight, lexer=PythonLexer(), formatter=HtmlFormatter(cssclass="code"))
    return html.fill("notebook", cells=cells, prose=prose, code=code, shown=output_html)


def lesson(path: Path) -> str:
    """What a notebook says one will learn in it, as plain text."""
    first = nbformat.read(path, as_version=4).cells[0].source
    said = re.search(r"\*\*You will learn\*\*(.*?)(?:\n\*\*|\n\n|\Z)", first, re.DOTALL)
    return " ".join(re.sub(r"[*`]", "", said[1]).split()).capitalize() if said else ""


def flat(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile's settings as `part.key`; sets go by their names."""
    sets = {one["name"]: one for one in profile["sets"]}
    return pd.json_normalize({**profile, "sets": sets}).iloc[0].to_dict()


def measured_by(manifest: dict[str, Any]) -> str:
    """The profile of a run and the commits that made its stages and notebooks."""
    made = [one["made"] for part in ("stages", "notebooks") for one in manifest[part].values()]
    commits = dict.fromkeys(str(one["commit"])[:7] for one in made)
    held = ", with changes that no commit holds" if any(one.get("dirty") for one in made) else ""
    named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f"profile {manifest['profile']['name']}, {named}{held}"


def compare(run: Path, figures: Path) -> list[str]:
    """How the finished run in a folder differs from the reference in `figures`, line by line: a
    gain where the two 95 % intervals do not overlap, a verdict where it is another one. Nothing is
    compared where either profile is too small to be judged."""
    own = read_json(run / "manifest.json")["profile"]
    try:
        manifest = read_json(figures / "manifest.json")
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
    names = sorted(here.keys() & there.keys() - {"name"})
    settings = [f"{n} {here[n]} here, {there[n]} there" for n in names if here[n] != there[n]]
    return [summary, *told, f"Settings that differ: {'; '.join(settings) or 'none'}."]


def write(lab: Lab, figures: Path) -> tuple[Path, list[str]]:
    """Writes `report/` in a finished run's folder. Returns its index page, and how the run compares
    with the reference in `figures`."""
    folder = lab.folder / "report"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    manifest, compared = read_json(lab.folder / "manifest.json"), compare(lab.folder, figures)
    settings, gallery = flat(manifest["profile"]), {}
    for path in sorted(lab.figures.glob("*.svg")):
        table = pd.read_csv(path.with_suffix(".csv"))
        shown = {"name": path.stem, "rows": len(table), "most": SHOWN_ROWS}
        numbers = html.fill("numbers", table=html.table(table.head(SHOWN_ROWS)), **shown)
        gallery[path.stem] = html.figure(path, numbers)
        for end in (".csv", ".svg", ".png"):
            shutil.copy(path.with_suffix(end), folder / "figures")
    notebooks = sorted((lab.folder / "notebooks").glob("*.ipynb"))
    claims = pd.read_csv(lab.figures / LEDGER)
    overview = {
        **{"manifest": manifest, "compared": compared, "claims": claims.to_dict("records")},
        "gains": gallery.get(Path(GAINS).stem, ""),
        "ledger": html.ledger(claims, {path.stem[:2]: f"{path.stem}.html" for path in notebooks}),
        "lessons": {path.stem: lesson(path) for path in notebooks},
        "deviations": html.table(pd.read_csv(lab.figures / DEVIATIONS)),
    }
    bodies = {("Overview", "index.html"): html.fill("overview", **overview)}
    for path in notebooks:
        bodies[path.stem.replace("_", " "), f"{path.stem}.html"] = notebook_html(path)
    bodies |= {
        ("Gallery", "gallery.html"): html.fill("gallery", figures=gallery),
        ("Sliders", "sliders.html"): Markup(sliders.body(lab)),
        ("Manifest", "manifest.html"): html.fill("manifest", manifest=manifest, settings=settings),
        ("Paper scale", "paper_scale.html"): prose(asset("paper_scale.md").read_text("utf8")),
    }
    for (title, file), body in bodies.items():
        (folder / file).write_text(html.page(title, body, list(bodies), file), "utf8")
    return folder / "index.html", compared


def block(mark: str) -> re.Pattern[str]:
    """Where a table stands in the README: between `<!-- mark -->` and `<!-- /mark -->`."""
    return re.compile(f"(?<=<!-- {mark} -->).*?(?=<!-- /{mark} -->)", re.DOTALL)


def make_reference(lab: Lab, figures: Path, readme: Path) -> None:
    """Makes a finished run the reference: figures, tables, manifest, and two tables of the README.
    All is checked before anything is touched (StoreError, which says all that is lacking), and
    written aside first. Folders in `figures` (the references of other profiles) stay."""
    record, lacking = lab.folder / "manifest.json", []
    if (manifest := read_json(record))["profile"] != lab.profile.model_dump(mode="json"):
        lacking.append(f"{record} has other settings than profile {lab.profile.name} has now")
    files = {one for one in lab.figures.glob("*") if one.suffix in ENDS}
    files |= {lab.figures / name for name in (GAINS, LEDGER, MAIN, DEVIATIONS)}
    files |= {one.with_suffix(end) for one in lab.figures.glob("*.svg") for end in ENDS}
    empty = [one for one in sorted(files) if not (one.is_file() and one.stat().st_size)]
    lacking += [f"{one} is missing or empty" for one in empty]
    text = readme.read_text("utf8") if readme.is_file() else ""
    marks = [mark for mark in ("ledger", "deviations") if not block(mark).search(text)]
    lacking += [f"{readme} must hold <!-- {one} --> and after it <!-- /{one} -->" for one in marks]
    if lacking:
        advice = f"Run `make reproduce PROFILE={lab.profile.name}` first."
        raise StoreError(f"Nothing was published: {'; '.join(lacking)}. {advice}")
    ledger = pd.read_csv(lab.figures / LEDGER)[["claim", "statement", "verdict", "why", "paper"]]
    tables = {"ledger": ledger, "deviations": pd.read_csv(lab.figures / DEVIATIONS)}
    for mark, table in tables.items():
        told = ["", f"| {' | '.join(table)} |", "|---" * table.shape[1] + "|"]
        cells = table.fillna("").astype(str).replace(r"\|", r"\\|", regex=True).to_numpy()
        told += [f"| {' | '.join(row)} |" for row in cells]
        told += ["", f"Measured with {measured_by(manifest)}.", ""]
        text = block(mark).sub("\n".join(told).replace("\\", r"\\"), text, count=1)
    with replaced(figures) as aside:
        for path in (*files, record):
            shutil.copy(path, aside)
        for inner in filter(Path.is_dir, figures.glob("*")):
            shutil.copytree(inner, aside / inner.name)
    write_whole(readme, text)
