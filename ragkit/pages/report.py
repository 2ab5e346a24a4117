"""The report: a run as static pages that need no network.

Overview, executed notebooks, gallery, sliders, manifest. A page may load nothing, and none but the
sliders may run a script.
"""

import json
import re
import shutil
from collections.abc import Iterable
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
    return html.fill("page", title=title, file=file, body=Markup(body), style=style, pages=pages)


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
            cells.append({"code": code, "source": cell.source, "outputs": shown})
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


def manifest_html(manifest: dict[str, Any]) -> Markup:
    """What was run, from what, on what, how long it took, and how long it was planned to take.

    What not all stages and notebooks were made by alike (commit, versions, machine), and changes
    that no commit holds, are warned of.
    """
    records = [*manifest["stages"].values(), *manifest["notebooks"].values()]
    made = [one["made"] for one in records]
    rows = [{"commit": one["commit"], **one["versions"], **one["machine"]} for one in made]
    told, warnings = {}, []
    for what, column in pd.DataFrame(rows, dtype=object).items():
        counts = column.dropna().astype(str).value_counts(sort=False)
        told[what] = ", ".join(counts.index)
        if len(counts) > 1:
            told[what] = ", ".join(f"{value} ({count})" for value, count in counts.items())
            warnings.append(f"Not all was made by the same {what}: {told[what]}.")
    if dirty := sum(one.get("dirty", False) for one in made):  # unknown where there is no git
        warnings.append(f"{dirty} were made by code with changes that the commit does not hold.")
    plan = [row for row in manifest.get("plan") or [] if row["kind"] != "all"]
    settings = reference.flat(manifest["profile"])
    given = {"manifest": manifest, "settings": settings, "plan": plan}
    return html.fill("manifest", made=told, warnings=warnings, **given)


def overview_html(
    lab: Lab, manifest: dict[str, Any], compared: reference.Comparison, notebooks: dict[Path, str]
) -> Markup:
    """What this run is, its verdicts, its key figure, how it compares, the way to all else."""
    named = {path.stem: (name, lesson(path)) for path, name in notebooks.items()}
    gains, ledger = lab.figures / "04_gains.svg", lab.figures / reference.LEDGER
    shown = {"gains": figure_of(gains) if gains.is_file() else "", "ledger": ""}
    if ledger.is_file():
        claims = pd.read_csv(ledger)
        pages = {stem[:2]: f"{stem}.html" for stem in named}
        links = {claim: pages[n] for claim, n in MEASURED_IN.items() if n in pages}
        shown["counts"] = claims["verdict"].value_counts()
        shown["ledger"] = Markup(html.ledger(claims, links).data)
    return html.fill("overview", manifest=manifest, notebooks=named, compared=compared, **shown)


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
    paths = sorted((lab.folder / "notebooks").glob("*.ipynb"))
    notebooks = {path: path.stem.replace("_", " ") for path in paths}
    first = ("Overview", "index.html")
    bodies = {first: overview_html(lab, manifest, compared, notebooks)}
    for path, name in notebooks.items():
        bodies[name, f"{path.stem}.html"] = notebook_html(path, drawn)
    bodies |= {
        ("Gallery", "gallery.html"): html.fill("gallery", figures=gallery),
        ("Sliders", "sliders.html"): Markup(sliders.body(lab)),
        ("Manifest", "manifest.html"): manifest_html(manifest),
        ("Paper scale", "paper_scale.html"): prose(asset("paper_scale.md").read_text("utf8")),
    }
    for (title, file), body in bodies.items():
        (folder / file).write_text(page(title, body, list(bodies), file), "utf8")
    return folder / "index.html", compared
