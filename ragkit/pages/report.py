"""The report: a run as static pages that need no network.

Overview, executed notebooks, gallery, sliders, manifest. A page may load nothing, and none but the
sliders may run a script.
"""

import json
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from ragkit.experiment.lab import Lab
from ragkit.pages import html, reference, sliders
from ragkit.pages.reference import flat
from ragkit.settings import asset

SHOWN_ROWS = 12  # of a figure's table
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
    parts = re.split(r"(<table>.*?</table>)", made, flags=re.DOTALL)  # every other one is a table
    parts[1::2] = [html.fill("wide", table=Markup(table)) for table in parts[1::2]]
    return Markup("".join(parts))


def output_html(output: nbformat.NotebookNode, drawn: Iterable[str] = ()) -> Markup:
    """One output of a cell: text escaped, HTML by the allow-list but for the figures `drawn`."""
    data = output.get("data", {})
    if "text/html" in data:
        if data["text/html"] in drawn:
            return Markup(data["text/html"])
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


def notebook_html(path: Path, drawn: Iterable[str] = ()) -> Markup:
    """An executed notebook: prose, code, outputs; not what went to the error stream."""
    cells, shown = nbformat.read(path, as_version=4).cells, partial(output_html, drawn=drawn)
    look = {"lexer": PythonLexer(), "formatter": HtmlFormatter(cssclass="code")}
    return html.fill(
        "notebook", cells=cells, prose=prose, code=partial(highlight, **look), shown=shown
    )


def lesson(path: Path) -> str:
    """What a notebook says one will learn in it, as plain text."""
    first = nbformat.read(path, as_version=4).cells[0].source
    said = re.search(r"\*\*You will learn\*\*(.*?)(?:\n\*\*|\n\n|\Z)", first, re.DOTALL)
    return " ".join(re.sub(r"[*`]", "", said[1]).split()).capitalize() if said else ""


def write(lab: Lab, figures: Path) -> tuple[Path, list[str]]:
    """Writes `report/` in a finished run's folder.

    Returns its index page, and how the run compares with the reference in `figures`.
    """
    folder = lab.folder / "report"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    manifest = json.loads((lab.folder / "manifest.json").read_text("utf8"))
    compared, settings = reference.compare(lab.folder, figures), flat(manifest["profile"])
    drawn, gallery = set(), {}
    for path in sorted(lab.figures.glob("*.svg")):
        drawn.add(html.figure(path))
        table, told = pd.read_csv(path.with_suffix(".csv")), {"name": path.stem, "most": SHOWN_ROWS}
        shown = html.table(table.head(SHOWN_ROWS))
        numbers = html.fill("numbers", table=shown, rows=len(table), **told)
        gallery[path.stem] = html.figure(path, numbers)
        for end in (".csv", ".svg", ".png"):
            shutil.copy(path.with_suffix(end), folder / "figures")
    notebooks = sorted((lab.folder / "notebooks").glob("*.ipynb"))
    claims = pd.read_csv(lab.figures / reference.LEDGER)
    overview = {
        "manifest": manifest,
        "compared": compared,
        "gains": gallery.get(Path(reference.GAINS).stem, ""),
        "claims": claims.to_dict("records"),
        "ledger": html.ledger(claims, {path.stem[:2]: f"{path.stem}.html" for path in notebooks}),
        "lessons": {path.stem: lesson(path) for path in notebooks},
    }
    bodies = {("Overview", "index.html"): html.fill("overview", **overview)}
    for path in notebooks:
        bodies[path.stem.replace("_", " "), f"{path.stem}.html"] = notebook_html(path, drawn)
    bodies |= {
        ("Gallery", "gallery.html"): html.fill("gallery", figures=gallery),
        ("Sliders", "sliders.html"): Markup(sliders.body(lab)),
        ("Manifest", "manifest.html"): html.fill("manifest", manifest=manifest, settings=settings),
        ("Paper scale", "paper_scale.html"): prose(asset("paper_scale.md").read_text("utf8")),
    }
    for (title, file), body in bodies.items():
        (folder / file).write_text(page(title, body, list(bodies), file), "utf8")
    return folder / "index.html", compared
