"""The report: a run as static pages that need no network.

Overview, executed notebooks, gallery, sliders, manifest. A page may load nothing, and none but the
sliders may run a script.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from ragkit.experiment.lab import Lab
from ragkit.pages import html, reference, sliders
from ragkit.settings import asset

SHOWN_ROWS = 12  # of a figure's table
# Where each claim is measured, by the notebook's number.
MEASURED_IN = dict(C1="04", C2="04", C3="05", C4="05", C5="06", C6="06", C7="07", C8="09")
WIDGET = "application/vnd.jupyter.widget-view+json"
Pages = list[tuple[str, str]]  # name and file


def page(title: str, body: str, pages: Pages, file: str) -> str:
    """A whole page with its navigation; `body` is HTML."""
    themes = (HtmlFormatter(style=name) for name in ("default", "github-dark"))
    light, dark = (theme.get_style_defs(".code") for theme in themes)
    own = asset("report.css").read_text("utf8")
    style = Markup(f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n{own}")
    notebooks = [one for one in pages if one[1][0].isdigit()]
    parts = {"notebooks": notebooks, "others": [one for one in pages if one not in notebooks]}
    return html.fill("page", title=title, file=file, body=Markup(body), style=style, **parts)


def prose(markdown: str, escape: bool = False) -> Markup:
    """Markdown as HTML, its tables in boxes that scroll; `escape` shows HTML in it as text."""
    made = html.clean(MarkdownWithMath(renderer=IPythonRenderer(escape=escape)).render(markdown))
    boxed = re.sub(r"<table>.*?</table>", lambda it: html.wide(it[0]), made, flags=re.DOTALL)
    return Markup(boxed)


def output_html(output: nbformat.NotebookNode, drawn: Iterable[str] = ()) -> Markup:
    """One output of a cell: text escaped, HTML by the allow-list but for the figures `drawn`."""
    data = output.get("data", {})
    if "text/html" in data:
        if data["text/html"] in drawn:
            return Markup(data["text/html"])
        made = html.clean(data["text/html"])
        return html.wide(made) if "<table" in made and 'class="wide"' not in made else made
    if "text/markdown" in data:
        return prose(data["text/markdown"], escape=True)
    if "image/png" in data:
        source = data["image/png"].strip()
        return Markup('<img alt="figure" src="data:image/png;base64,{}">').format(source)
    text = data.get("text/plain") or output.get("text") or "\n".join(output.get("traceback", []))
    return Markup("<pre>{}</pre>").format(re.sub(r"\x1b[^m]*m", "", text))


def notebook_html(path: Path, drawn: Iterable[str] = ()) -> Markup:
    """An executed notebook: prose, code, outputs; not what went to the error stream."""
    cells: list[dict[str, Any]] = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            cells.append({"prose": prose(cell.source)})
        elif cell.cell_type == "code" and cell.metadata.get("tags") != ["injected-parameters"]:
            # papermill's own cell names this machine's folders; the manifest has the profile
            outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            shown = [output_html(o, drawn) for o in outputs if WIDGET not in o.get("data", {})]
            code = Markup(highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code")))
            solution = "### BEGIN SOLUTION" in cell.source
            cells.append({"prose": None, "code": code, "solution": solution, "outputs": shown})
    return html.fill("notebook", cells=cells)


def lesson(path: Path) -> str:
    """What a notebook says one will learn in it, as plain text."""
    first = nbformat.read(path, as_version=4).cells[0].source
    said = re.search(r"\*\*You will learn\*\*(.*?)(?:\n\*\*|\n\n|\Z)", first, re.DOTALL)
    return " ".join(re.sub(r"[*`]", "", said[1]).split()).capitalize() if said else ""


def figure_of(path: Path) -> Markup:
    """A figure (the path of its SVG) with its words, its table's beginning, links to its files."""
    table = pd.read_csv(path.with_suffix(".csv"))
    shown = html.table(table.head(SHOWN_ROWS)).data
    rest = f"; the first {SHOWN_ROWS} of {len(table)} rows" if len(table) > SHOWN_ROWS else ""
    extra = html.fill("numbers", name=path.stem, rest=rest, table=Markup(shown))
    return html.figure(path.read_text("utf8"), path.with_suffix(".txt").read_text("utf8"), extra)


def by_kind(stages: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each kind of stage: its stages, their seconds, units a second, how many ran now."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind in sorted({stage["kind"] for stage in stages.values()}):
        alike = {name: stage for name, stage in stages.items() if stage["kind"] == kind}
        units: Counter[str] = Counter()
        for stage in alike.values():
            units.update(stage["units"])
        seconds = sum(stage["seconds"] for stage in alike.values())
        rates = {unit: n / seconds for unit, n in sorted(units.items()) if seconds}
        ran = sum(stage["status"].startswith("ran") for stage in alike.values())
        kinds[kind] = {"stages": alike, "seconds": seconds, "rates": rates, "ran": ran}
    return kinds


def provenance(records: Iterable[dict[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """The commit, versions and machine that made stages and notebooks, and warnings.

    Where not all have the same, each value is told with how many have it, and warned of; and so is
    a working tree with changes that no commit holds.
    """
    found: dict[str, Counter[str]] = {}
    dirty = 0
    for made in (record["made"] for record in records):
        dirty += made.get("dirty", False)  # nothing is known of it where there is no git
        for what, value in {
            "commit": made["commit"],
            **made["versions"],
            **made["machine"],
        }.items():
            found.setdefault(what, Counter())[str(value)] += 1
    told, warnings = {}, []
    for what, values in found.items():
        told[what] = ", ".join(values)
        if len(values) > 1:
            told[what] = ", ".join(f"{value} ({count})" for value, count in values.items())
            warnings.append(f"Not all was made by the same {what}: {told[what]}.")
    if dirty:
        warnings.append(f"{dirty} were made by code with changes that the commit does not hold.")
    return told, warnings


def manifest_html(manifest: dict[str, Any]) -> Markup:
    """What was run, from what, on what, how long it took, and how long it was planned to take."""
    made, warnings = provenance([*manifest["stages"].values(), *manifest["notebooks"].values()])
    told = {"made": made, "warnings": warnings, "kinds": by_kind(manifest["stages"])}
    plan = [row for row in manifest.get("plan") or [] if row["kind"] != "all"]
    settings = reference.flat(manifest["profile"])
    return html.fill("manifest", manifest=manifest, settings=settings, plan=plan, **told)


def overview_html(lab: Lab, manifest: dict[str, Any], compared: reference.Comparison) -> Markup:
    """What this run is, its verdicts, its key figure, how it compares, the way to all else."""
    notebooks = {path.stem: (named(path), lesson(path)) for path in executed(lab)}
    gains, ledger = lab.figures / "04_gains.svg", lab.figures / reference.LEDGER
    shown = {"tally": "", "ledger": "", "gains": figure_of(gains) if gains.is_file() else ""}
    if ledger.is_file():
        claims = pd.read_csv(ledger)
        pages = {stem[:2]: f"{stem}.html" for stem in notebooks}
        links = {claim: pages[n] for claim, n in MEASURED_IN.items() if n in pages}
        counts = claims["verdict"].value_counts()
        shown["tally"] = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        shown["ledger"] = Markup(html.ledger(claims, links).data)
    told = {"manifest": manifest, "notebooks": notebooks, "compared": compared.html()}
    return html.fill("overview", **told, **shown)


def executed(lab: Lab) -> list[Path]:
    """The run's notebooks, in their order."""
    return sorted((lab.folder / "notebooks").glob("*.ipynb"))


def named(notebook: Path) -> str:
    """A notebook's number and name for people."""
    return f"{notebook.stem[:2]} {notebook.stem[3:].replace('_', ' ')}"


def write(lab: Lab, figures: Path) -> tuple[Path, reference.Comparison]:
    """Writes `report/` in a finished run's folder.

    Returns its index page, and how the run compares with the reference in `figures`.
    """
    folder = lab.folder / "report"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    manifest = json.loads((lab.folder / "manifest.json").read_text("utf8"))
    compared = reference.compare(lab.folder, figures)
    drawn, gallery = set(), {}
    for path in sorted(lab.figures.glob("*.svg")):
        alt = path.with_suffix(".txt").read_text("utf8")
        drawn.add(html.figure(path.read_text("utf8"), alt))
        gallery[path.stem] = figure_of(path)
        for end in (".csv", ".svg", ".png"):
            shutil.copy(path.with_suffix(end), folder / "figures")
    bodies = {"index.html": ("Overview", overview_html(lab, manifest, compared))}
    bodies |= {f"{one.stem}.html": (named(one), notebook_html(one, drawn)) for one in executed(lab)}
    bodies |= {
        "gallery.html": ("Gallery", html.fill("gallery", figures=gallery)),
        "sliders.html": ("Sliders", Markup(sliders.body(lab))),
        "manifest.html": ("Manifest", manifest_html(manifest)),
        "paper_scale.html": ("Paper scale", prose(asset("paper_scale.md").read_text("utf8"))),
    }
    pages = [(title, file) for file, (title, _) in bodies.items()]
    for file, (title, body) in bodies.items():
        (folder / file).write_text(page(title, body, pages, file), "utf8")
    return folder / "index.html", compared
