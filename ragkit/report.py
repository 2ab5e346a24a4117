"""The report: executed notebooks as static pages that need no network, with navigation, gallery, ledger and manifest."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--back:#fff;--code:#f6f8fa;--link:#0a58a8}
*{box-sizing:border-box}body{margin:0;font:16px/1.6 system-ui,sans-serif;color:var(--ink);background:var(--back)}
nav{padding:.6rem 1rem;border-bottom:1px solid var(--line);display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}
main{max-width:56rem;margin:0 auto;padding:1rem}a{color:var(--link)}h1{line-height:1.2}
pre{background:var(--code);padding:.7rem;overflow-x:auto;font-size:.82rem;line-height:1.45;border-radius:6px}
.out{margin:.3rem 0 1rem;overflow-x:auto}.out pre{background:none;border-left:3px solid var(--line);border-radius:0}
table{border-collapse:collapse;border:0;font-size:.85rem;display:block;overflow-x:auto}
th,td{border:0;border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left!important;vertical-align:top}.anchor-link{display:none}
img,svg{max-width:100%;height:auto}figcaption{color:var(--soft);font-size:.85rem}
"""


def page(title: str, body: str, pages: list[tuple[str, str]]) -> str:
    """A whole page with its navigation."""
    links = " ".join(f'<a href="{html.escape(file)}">{html.escape(name)}</a>' for name, file in pages)
    css = STYLE + HtmlFormatter(cssclass="code").get_style_defs(".code")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{css}</style></head><body><nav>{links}</nav><main>{body}</main></body></html>"
    )


def output_html(output: nbformat.NotebookNode) -> str:
    """One output of a cell; plain text is escaped, HTML that our own code made is kept."""
    data = output.get("data", {})
    if "text/html" in data:
        return data["text/html"]
    if "text/markdown" in data:
        return markdown2html_mistune(data["text/markdown"])
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = data.get("text/plain") or output.get("text") or "\n".join(output.get("traceback", []))
    return f"<pre>{html.escape(re.sub(chr(27) + r'[^m]*m', '', text))}</pre>"


def notebook_html(path: Path) -> str:
    """An executed notebook as HTML: prose, code, outputs; progress bars on the error stream are left out."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(markdown2html_mistune(cell.source))
            continue
        if cell.cell_type != "code" or "injected-parameters" in cell.metadata.get("tags", []):
            continue  # papermill's cell names this machine's folders; the manifest has the profile
        shown_code = highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code"))
        parts.append(f"<details><summary>Solution</summary>{shown_code}</details>" if "### BEGIN SOLUTION" in cell.source else shown_code)
        shown = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        shown = [o for o in shown if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        parts += [f'<div class="out">{output_html(o)}</div>' for o in shown]
    return "\n".join(parts)


def trimmed_html(stages: dict[str, dict[str, int]]) -> str:
    """Which stages met prompts longer than the reader's context; nothing if none did."""
    if not stages:
        return ""
    rows = "".join(f"<li>{html.escape(name)}: {counts['trimmed']} of {counts['prompts']}</li>" for name, counts in stages.items())
    return (
        "<h2>Prompts longer than the reader's context</h2><p>Each lost the same share of all its passages, never of its question. "
        f"A larger <code>reader.context</code> or a smaller <code>k</code> avoids it.</p><ul>{rows}</ul>"
    )


def write(run: Path) -> Path:
    """Writes `report/` in a run folder and returns its index page."""
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    notebooks = sorted((run / "notebooks").glob("*.ipynb"))
    pages = (
        [("Overview", "index.html")]
        + [(p.stem[:2] + " " + p.stem[3:].replace("_", " "), f"{p.stem}.html") for p in notebooks]
        + [("Gallery", "gallery.html"), ("Manifest", "manifest.html")]
    )
    for path in notebooks:
        (folder / f"{path.stem}.html").write_text(page(path.stem, notebook_html(path), pages), "utf8")
    figures = []
    for path in sorted((run / "figures").glob("*.svg")):
        alt = path.with_suffix(".txt").read_text("utf8")
        svg = path.read_text("utf8")
        label, drawing = html.escape(alt, quote=True), svg[svg.index("<svg") :]
        figures.append(f'<figure><div role="img" aria-label="{label}">{drawing}</div><figcaption>{html.escape(alt)}</figcaption></figure>')
    (folder / "gallery.html").write_text(page("Gallery", "<h1>Gallery</h1>" + "".join(figures), pages), "utf8")
    manifest = json.loads((run / "manifest.json").read_text("utf8"))
    shown = html.escape(json.dumps(manifest, indent=2))
    (folder / "manifest.html").write_text(page("Manifest", f"<h1>Manifest</h1><pre>{shown}</pre>", pages), "utf8")
    listing = "".join(f'<li><a href="{file}">{html.escape(name)}</a></li>' for name, file in pages[1:])
    ledger = run / "figures" / "ledger.html"
    body = f"<h1>Run {html.escape(manifest['profile']['name'])}</h1><ul>{listing}</ul>" + trimmed_html(manifest["trimmed_prompts"])
    body += ledger.read_text("utf8") if ledger.is_file() else ""
    (folder / "index.html").write_text(page("Report", body, pages), "utf8")
    return folder / "index.html"


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
    rows = [f"| {row.claim} | {row.statement} | **{row.verdict}** | {row.measured} |" for row in ledger.itertuples()]
    table = "\n".join(["| | claim | verdict | measured |", "|---|---|---|---|", *rows])
    before, rest = readme.read_text("utf8").split("<!-- ledger -->")
    readme.write_text(f"{before}<!-- ledger -->\n{table}\n<!-- /ledger -->{rest.split('<!-- /ledger -->')[1]}", "utf8")
