"""The report: a run as static pages that need no network: overview, executed notebooks, gallery, sliders, manifest."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from ragkit import plan
from ragkit.pages import html as views
from ragkit.pages import plots, reference, sliders
from ragkit.profile import Profile

SHOWN_ROWS = 12  # of a figure's table
# Where each claim is measured, by the notebook's number.
MEASURED_IN = {
    "C1": "04",
    "C2": "04",
    "C3": "05",
    "C4": "05",
    "C5": "06",
    "C6": "06",
    "C7": "07",
    "C8": "09",
}
Pages = list[tuple[str, str]]  # name and file


def style() -> str:
    """The style sheet with the colours of code, light and dark."""
    light, dark = (
        HtmlFormatter(style=name).get_style_defs(".code") for name in ("default", "github-dark")
    )
    own = resources.files("ragkit").joinpath("assets/report.css").read_text("utf8")
    return f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n{own}"


def page(title: str, body: str, pages: Pages, file: str) -> str:
    """A whole page with its navigation; it may load nothing, and no page but the sliders may run a script."""

    def link(name: str, target: str) -> str:
        here = ' aria-current="page"' if target == file else ""
        return f'<a href="{html.escape(target)}"{here}>{html.escape(name)}</a>'

    notebooks = [p for p in pages if p[1][0].isdigit()]
    folded = (
        f"<details><summary>Notebooks</summary>{''.join(link(*p) for p in notebooks)}</details>"
        if notebooks
        else ""
    )
    first, *others = [p for p in pages if p not in notebooks]
    turn = ""
    if (place := next((i for i, p in enumerate(notebooks) if p[1] == file), None)) is not None:
        before = (
            link(f"← {notebooks[place - 1][0]}", notebooks[place - 1][1])
            if place
            else "<span></span>"
        )
        after = (
            link(f"{notebooks[place + 1][0]} →", notebooks[place + 1][1])
            if place + 1 < len(notebooks)
            else ""
        )
        turn = f'<div class="turn">{before}{after}</div>'
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:" + (
        "; script-src 'unsafe-inline'" if file == "sliders.html" else ""
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(title)}</title><style>{style()}</style></head><body>"
        f'<a class="skip" href="#main">To the text</a><nav aria-label="Pages">{link(*first)}{folded}{"".join(link(*p) for p in others)}</nav>'
        f'<main id="main">{body}{turn}</main></body></html>'
    )


def output_html(output: nbformat.NotebookNode) -> str:
    """One output of a cell; plain text is escaped, HTML that our own code made is kept."""
    data = output.get("data", {})
    if "text/html" in data:
        return wide(data["text/html"]) if "<table" in data["text/html"] else data["text/html"]
    if "text/markdown" in data:
        return markdown2html_mistune(data["text/markdown"])
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = data.get("text/plain") or output.get("text") or "\n".join(output.get("traceback", []))
    return f"<pre>{html.escape(re.sub(chr(27) + r'[^m]*m', '', text))}</pre>"


def prose_html(markdown: str) -> str:
    """A page of prose; its tables scroll sideways where they are wide."""
    return re.sub(
        r"<table>.*?</table>",
        lambda found: wide(found[0]),
        markdown2html_mistune(markdown),
        flags=re.DOTALL,
    )


def wide(table: str) -> str:
    """A table in a box that scrolls sideways, by keyboard too."""
    return f'<div class="wide" role="region" aria-label="table" tabindex="0">{table}</div>'


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
        parts.append(
            f"<details><summary>Solution</summary>{shown_code}</details>"
            if "### BEGIN SOLUTION" in cell.source
            else shown_code
        )
        shown = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        shown = [
            o for o in shown if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
        ]
        parts += [f'<div class="out">{output_html(o)}</div>' for o in shown]
    return "\n".join(parts)


def lesson(path: Path) -> str:
    """What a notebook says one will learn in it, as plain text."""
    first = nbformat.read(path, as_version=4).cells[0].source
    said = re.search(r"\*\*You will learn\*\*(.*?)(?:\n\*\*|\n\n|\Z)", first, re.DOTALL)
    return " ".join(re.sub(r"[*`]", "", said[1]).split()) if said else ""


def trimmed_html(stages: dict[str, dict[str, int]]) -> str:
    """Which stages met prompts longer than the reader's context; nothing if none did."""
    if not stages:
        return ""
    rows = "".join(
        f"<li>{html.escape(name)}: {counts['trimmed']} of {counts['prompts']}</li>"
        for name, counts in stages.items()
    )
    return (
        "<h2>Prompts longer than the reader's context</h2><p>Each lost the same share of all its passages, never of its question. "
        f"A larger <code>reader.context</code> or a smaller <code>k</code> avoids it.</p><ul>{rows}</ul>"
    )


def figure_of(path: Path) -> str:
    """A figure (the path of its SVG) with its words, the beginning of its table, and links to the copies beside the report."""
    table = pd.read_csv(path.with_suffix(".csv"))
    rest = f"; the first {SHOWN_ROWS} of {len(table)} rows" if len(table) > SHOWN_ROWS else ""
    files = ", ".join(
        f'<a href="figures/{html.escape(path.stem)}.{end}">{end.upper()}</a>'
        for end in ("csv", "svg", "png")
    )
    shown = wide(
        table.head(SHOWN_ROWS).to_html(
            index=False, border=0, float_format="%.3f", na_rep="–", classes="numbers"
        )
    )
    extra = f"<p>The numbers behind it{rest}. Files: {files}</p>{shown}"
    return plots.figure_html(
        path.read_text("utf8"), path.with_suffix(".txt").read_text("utf8"), extra
    )


def gallery_html(figures: list[Path]) -> str:
    """Every figure of the run, in the order of the notebooks."""
    parts = [
        f"<h2>{html.escape(p.stem.replace('_', ' ', 1).replace('_', ' '))}</h2>{figure_of(p)}"
        for p in figures
    ]
    return "<h1>Gallery</h1>" + ("".join(parts) or "<p>This run has no figures.</p>")


def rows_html(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    cells = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f'<table class="pairs">{cells}</table>'


def stages_html(stages: dict[str, dict[str, Any]]) -> str:
    """Seconds and peak memory of every stage (of the process that made it), folded by kind, and whether this call made it or found it."""
    parts = []
    for kind in sorted({name.split("/")[0] for name in stages}):
        alike = {name: stage for name, stage in stages.items() if name.split("/")[0] == kind}
        ran = sum(stage.get("this_call") == "ran" for stage in alike.values())
        table = pd.DataFrame(
            {
                "stage": name.partition("/")[2],
                "seconds": stage["seconds"],
                "peak MiB": stage.get("peak_mib") or "not recorded",
                "in this call": stage.get("this_call", "not recorded"),
            }
            for name, stage in alike.items()
        )
        total = sum(stage["seconds"] for stage in alike.values())
        summary = f"<b>{html.escape(kind)}</b>: {len(alike)} stages, {total:.0f} seconds to make, {ran} ran in this call{throughput(alike.values(), total)}"
        parts.append(
            f"<details><summary>{summary}</summary>{wide(table.to_html(index=False, border=0))}</details>"
        )
    return "".join(parts)


def throughput(stages: Iterable[dict[str, Any]], seconds: float) -> str:
    """What stages did a second, and the share of their time that they waited for data; nothing where it was not counted."""
    work: Counter[str] = Counter()
    for stage in stages:
        work.update(stage.get("work", {}))
    if not work or not seconds:
        return ""
    waited = f"{work.pop('waited', 0.0) / seconds:.1%} of the time waiting for data"
    return "; " + ", ".join(
        [
            *(f"{amount / seconds:,.0f} {what} a second" for what, amount in sorted(work.items())),
            waited,
        ]
    )


def seeds_of(profile: dict[str, Any]) -> list[tuple[str, Any]]:
    """Every seed of a profile with what it draws."""
    worlds = [(f"set {s['name']}", s["seed"]) for s in profile["sets"]]
    step1 = ", ".join(map(str, profile.get("step1_seeds", [profile["seed"]])))
    return [
        ("models", profile["seed"]),
        ("Step 1", step1),
        ("Step 2", ", ".join(map(str, profile["distill"]["seeds"]))),
        *worlds,
    ]


def plan_html(run: Path, profile: Profile) -> str:
    """What `make plan` had said of this run beside what it took, by kind of stage; how to get that where there is no plan of this profile."""
    try:
        table = plan.predicted_against_measured(profile, run)
    except plan.PlanError:
        return "<p>No plan of this profile lies beside the run. After <code>make plan</code> and <code>make report</code> the comparison stands here.</p>"
    whole = table["ratio"].iloc[-1]
    told = f"Predicted over measured: {whole:.2f} for all of it, {'within' if 0.5 <= whole <= 2 else 'not within'} a factor of two."
    shown = table.rename(columns={"predicted": "predicted, s", "measured": "measured, s"})
    columns = dict.fromkeys(("predicted, s", "measured, s"), "{:.0f}".format) | {
        "ratio": lambda ratio: f"{ratio:.2f}" if ratio == ratio else "–"
    }
    body = shown.to_html(index=False, border=0, classes="numbers", formatters=columns)
    return f"<p>{told} The plan is for a quiet machine.</p>{wide(body)}"


def manifest_html(run: Path, manifest: dict[str, Any]) -> str:
    """What was run, from what, on what, how long it took, and how long it had been planned to take."""
    call = [
        ("commit", manifest["git"]),
        ("seconds of this call", manifest["seconds_of_this_call"]),
        ("seconds of all stages", f"{sum(s['seconds'] for s in manifest['stages'].values()):.0f}"),
    ]
    machine = [
        *((name.replace("_gib", ", GiB"), value) for name, value in manifest["machine"].items()),
        ("peak memory of a notebook, MiB", manifest["peak_memory_mib_of_a_notebook"]),
    ]
    versions = [("Python", manifest["python"]), *manifest["versions"].items()]
    parts = [
        ("The run", rows_html(call)),
        (
            "Notebooks",
            rows_html(
                (name.replace("_", " "), what) for name, what in manifest["notebooks"].items()
            ),
        ),
        ("Stages", stages_html(manifest["stages"])),
        ("The plan", plan_html(run, Profile.model_validate(manifest["profile"]))),
        ("Seeds", rows_html(seeds_of(manifest["profile"]))),
        ("Machine", rows_html(machine)),
        ("Versions", rows_html(versions)),
        ("Profile", rows_html(reference.flat(manifest["profile"]).items())),
    ]
    raw = f"<details><summary>As JSON</summary><pre>{html.escape(json.dumps(manifest, indent=2))}</pre></details>"
    shown = "".join(f"<h2>{title}</h2>{body}" for title, body in [*parts, ("All of it", raw)])
    return f"<h1>Manifest of {html.escape(manifest['profile']['name'])}</h1>{shown}"


def overview_html(
    run: Path, manifest: dict[str, Any], notebooks: list[Path], compared: reference.Comparison
) -> str:
    """What this run is, its verdicts, its key figure, how it compares with the reference, and the way to everything else."""
    profile = manifest["profile"]
    seconds = sum(stage["seconds"] for stage in manifest["stages"].values())
    seeds = len(profile["distill"]["seeds"])
    sets = ", ".join(s["name"] for s in profile["sets"])
    what = (
        f"Profile <b>{html.escape(profile['name'])}</b>: question sets {html.escape(sets)}; {profile['k']} passages a question; Step 2 with "
        f"{seeds} seed{'s' if seeds > 1 else ''}. "
        f"Its stages are {minutes(seconds)} of work, sets side by side; the last call took {minutes(manifest['seconds_of_this_call'])}."
    )
    small = (
        ""
        if profile["judge"]
        else "<p>This profile is too small to judge any claim: it shows that everything runs.</p>"
    )
    parts = [f"<h1>Run {html.escape(profile['name'])}</h1><p>{what}</p>{small}"]
    if (gains := run / "figures" / "04_gains.svg").is_file():
        parts.append(f"<h2>Which teacher helps the retriever?</h2>{figure_of(gains)}")
    if (ledger := run / "figures" / "09_ledger.csv").is_file():
        table = pd.read_csv(ledger)
        files = {path.stem[:2]: f"{path.stem}.html" for path in notebooks}
        links = {
            claim: f'<a href="{html.escape(files[n])}">Measured in notebook {n}</a>'
            for claim, n in MEASURED_IN.items()
            if n in files
        }
        tally = ", ".join(
            f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items()
        )
        parts.append(
            f"<h2>The claims</h2><p>{html.escape(tally)}.</p>{views.ledger(table, links).data}"
        )
    parts.append(f"<h2>Beside the reference</h2>{compared.html()}")
    parts.append(
        '<h2>Try it</h2><p><a href="sliders.html">Sliders</a>: choose rows, layers, pooling and temperature, and see what the reader would teach.</p>'
    )
    cards = [
        f'<li><a href="{html.escape(p.stem)}.html"><b>{html.escape(named(p))}</b></a><p>{html.escape(lesson(p).capitalize())}</p>'
        f'<p class="soft">{html.escape(manifest["notebooks"].get(p.stem, ""))}</p></li>'
        for p in notebooks
    ]
    parts.append(
        f'<h2>The notebooks</h2><ul class="cards">{"".join(cards)}</ul>{trimmed_html(manifest["trimmed_prompts"])}'
    )
    return "".join(parts)


def minutes(seconds: float) -> str:
    if seconds < 1.5:
        return "a second"
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def named(notebook: Path) -> str:
    """A notebook's number and name for people."""
    return f"{notebook.stem[:2]} {notebook.stem[3:].replace('_', ' ')}"


def write(run: Path, figures: Path) -> tuple[Path, reference.Comparison]:
    """Writes `report/` in a run folder; returns its index page, and how the run compares with the reference in `figures`."""
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    notebooks, drawn = (
        sorted((run / "notebooks").glob("*.ipynb")),
        sorted((run / "figures").glob("*.svg")),
    )
    manifest = json.loads((run / "manifest.json").read_text("utf8"))
    compared, played = (
        reference.compare(run, figures),
        sliders.body(run, Profile.model_validate(manifest["profile"])),
    )
    pages = [
        ("Overview", "index.html"),
        *((named(p), f"{p.stem}.html") for p in notebooks),
        ("Gallery", "gallery.html"),
        ("Sliders", "sliders.html"),
        ("Manifest", "manifest.html"),
        ("Paper scale", "paper_scale.html"),
    ]
    bodies = {f"{p.stem}.html": (named(p), notebook_html(p)) for p in notebooks} | {
        "index.html": (
            f"Run {manifest['profile']['name']}",
            overview_html(run, manifest, notebooks, compared),
        ),
        "gallery.html": ("Gallery", gallery_html(drawn)),
        "sliders.html": ("Sliders", played),
        "manifest.html": ("Manifest", manifest_html(run, manifest)),
        "paper_scale.html": (
            "Paper scale",
            prose_html(
                resources.files("ragkit").joinpath("assets/paper_scale.md").read_text("utf8")
            ),
        ),
    }
    for file, (title, body) in bodies.items():
        (folder / file).write_text(page(title, body, pages, file), "utf8")
    copies = folder / "figures"
    copies.mkdir(exist_ok=True)
    for path in (p.with_suffix(end) for p in drawn for end in (".csv", ".svg", ".png")):
        shutil.copy(path, copies / path.name)
    return folder / "index.html", compared
