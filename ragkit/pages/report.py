"""The report: a run as static pages that load nothing; none but the sliders may run a script. And
the reference run in `figures/`: how a run differs from it, and how a run becomes it."""

import base64
import json
import os
import re
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Template
from latex2mathml import converter, exceptions
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from ragkit.data.files import write_whole
from ragkit.errors import StoreError
from ragkit.experiment.lab import Lab, read_json
from ragkit.experiment.store import fingerprint, replaced
from ragkit.pages import html
from ragkit.settings import asset

GAINS, LEDGER, MAIN = "04_gains.csv", "09_ledger.csv", "04_main_table.csv"
DEVIATIONS, SLIDERS = "08_deviations.csv", "03_sliders.html"
FIGURE = re.compile(r'<figure id="(\w+)"')
ENDS = (".svg", ".png", ".csv", ".txt")  # of a figure's files
GAIN = (
    "{set}, {system}: gain in HR@5 {mean:+.3f} [{low:+.3f}, {high:+.3f}] here, "
    "{mean there:+.3f} [{low there:+.3f}, {high there:+.3f}] there"
)
NO_FORMULA: list[Any] = [one for one in vars(exceptions).values() if isinstance(one, type)]
VERDICT = "{claim}: verdict '{verdict}' here, '{verdict there}' there"


class Renderer(IPythonRenderer):
    """Formulas become MathML, which browsers show without a script; what is none stays text."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        with suppress(*NO_FORMULA):
            return converter.convert(body, display=display)
        return super().inline_math(body)

    def block_math(self, body: str) -> str:
        return f'<div class="wide">{self.inline_math(body, "block")}</div>'  # a long one scrolls


def prose(markdown: str, escape: bool = False) -> Markup:
    """Markdown as HTML; `escape` shows HTML in it as text."""
    return html.clean(MarkdownWithMath(renderer=Renderer(escape=escape)).render(markdown))


def output_html(output: nbformat.NotebookNode) -> Markup:
    """One output of a cell: text escaped, HTML by the allow-list."""
    data = output.get("data", {})
    if "text/html" in data:
        return html.clean(data["text/html"])
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
    profiles = [read_json(run / "manifest.json")["profile"]]
    try:
        manifest = read_json(figures / "manifest.json")
        profiles.append(manifest["profile"])
        named = measured_by(manifest)
        gains, verdicts = (
            pd.read_csv(run / "figures" / file).merge(
                pd.read_csv(figures / file), on=key, suffixes=("", " there")
            )
            for file, key in ((GAINS, ["set", "system"]), (LEDGER, "claim"))
        )
        apart = (gains["low"] > gains["high there"]) | (gains["high"] < gains["low there"])
        other = verdicts["verdict"] != verdicts["verdict there"]
        small = [one["name"] for one in profiles if not one["judge"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{figures} holds none of this version (`make reference` puts it there): {error!r}"
        return [f"There is no reference to compare with: {why}."]
    if small or gains.empty:
        why = f"profile {small[0]} is too small to judge" if small else "it has other question sets"
        return [f"Not compared with the reference ({named}): {why}."]
    told = [GAIN.format(**row) for row in gains[apart].to_dict("records")]
    told += [VERDICT.format(**row) for row in verdicts[other].to_dict("records")]
    counts = f"of {len(gains)} gains and {len(verdicts)} verdicts, {len(told) or 'none'} differ"
    return [f"Compared with the reference ({named}): {counts} (gains by their intervals).", *told]


def write(lab: Lab, figures: Path) -> tuple[Path, list[str]]:
    """Writes a finished run's `report/`; returns its index, and how it compares with `figures`."""
    folder = lab.folder / "report"
    folder.mkdir(exist_ok=True)
    manifest, own = read_json(lab.folder / "manifest.json"), figures / lab.base
    compared = compare(lab.folder, own if own.is_dir() else figures)
    notebooks = sorted((lab.folder / "notebooks").glob("*.ipynb"))
    claims, drawn = pd.read_csv(lab.figures / LEDGER), (lab.figures / GAINS).with_suffix(".svg")
    overview = {
        "gained": pd.read_csv(lab.figures / GAINS).to_dict("records"),
        "manifest": manifest,
        "compared": compared,
        "claims": claims.to_dict("records"),
        "gains": html.figure(drawn) if drawn.is_file() else "",
        "ledger": html.ledger(claims, {path.stem[:2]: f"{path.stem}.html" for path in notebooks}),
        "deviations": html.table(pd.read_csv(lab.figures / DEVIATIONS)),
    }
    bodies = {("Overview", "index.html"): html.fill("overview", **overview)}
    for path in notebooks:
        bodies[path.stem.replace("_", " "), f"{path.stem}.html"] = notebook_html(path)
    if (page := lab.figures / SLIDERS).is_file():
        bodies["Sliders", "sliders.html"] = Markup(page.read_text("utf8"))  # our own
    bodies |= {
        ("Manifest", "manifest.html"): html.fill("manifest", manifest=manifest),
        ("Words", "words.html"): prose(asset("glossary.md").read_text("utf8")),
        ("Paper scale", "paper_scale.html"): prose(asset("paper_scale.md").read_text("utf8")),
    }
    for (title, file), body in bodies.items():
        (folder / file).write_text(html.page(title, body, list(bodies), file), "utf8")
    return folder / "index.html", compared


def block(mark: str) -> re.Pattern[str]:
    """Where a table stands in the README: between `<!-- mark -->` and `<!-- /mark -->`."""
    return re.compile(f"(?<=<!-- {mark} -->).*?(?=<!-- /{mark} -->)", re.DOTALL)


def keep_outputs(lab: Lab, sources: Path) -> None:
    """Writes the outputs of a finished run into the notebooks in `sources`, to be read on the web:
    figures as pictures with alt text, no error stream. Each cell keeps a fingerprint of the source
    that `ran`, which tells whose its outputs are. StoreError if a cell was edited since the run."""
    kept = {}
    for file in sorted(sources.glob("[0-9A]*.ipynb")):
        notebook = kept[file] = nbformat.read(file, as_version=4)
        ran = nbformat.read(lab.folder / "notebooks" / file.name, as_version=4)
        made = {cell.id: cell for cell in ran.cells}
        for cell in (one for one in notebook.cells if one.cell_type == "code"):
            if cell.source != made[cell.id].source and cell.metadata.get("tags") != ["parameters"]:
                raise StoreError(f"{file.name} was edited since it ran. `make reproduce` runs it.")
            cell.outputs = [one for one in made[cell.id].outputs if one.get("name") != "stderr"]
            cell.execution_count = made[cell.id].execution_count
            cell.metadata["ran"] = fingerprint(cell.source)
            for one in cell.outputs:
                if named := FIGURE.search(one.get("data", {}).get("text/html", "")):
                    drawn, alt = (lab.figures / f"{named[1]}.{end}" for end in ("png", "txt"))
                    picture = base64.b64encode(drawn.read_bytes()).decode()
                    one.data = {"image/png": picture, "text/plain": alt.read_text("utf8")}
    for file, notebook in kept.items():  # now that none is in the way
        nbformat.write(notebook, file)


def portable(value: Any) -> Any:
    """JSON values with the files of this machine by their names alone."""
    if isinstance(value, dict):
        return {portable(key): portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [portable(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def make_reference(lab: Lab, figures: Path, readme: Path) -> None:
    """Makes a finished run the reference of its profile: figures, tables and manifest in `figures`,
    of another profile than `full` in a folder there; the README's tables are written anew. Before
    anything is touched all is checked (StoreError, which says all that is lacking)."""
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
    home = figures if lab.base == "full" else figures / lab.base
    with replaced(home) as aside:
        for path in files:
            shutil.copy(path, aside)
        (aside / "manifest.json").write_text(json.dumps(portable(manifest), indent=1), "utf8")
        for inner in filter(Path.is_dir, home.glob("*")):
            shutil.copytree(inner, aside / inner.name)
    write_whole(readme, with_tables(text, figures))


def with_tables(text: str, figures: Path) -> str:
    """The README's text with the verdicts of every reference, and the worlds' deviations."""
    homes = {"in the worlds": figures, "on real text": figures / "real"}
    homes = {where: home for where, home in homes.items() if (home / LEDGER).is_file()}
    ledgers = {where: pd.read_csv(home / LEDGER) for where, home in homes.items()}
    claims = next(iter(ledgers.values()))[["claim", "statement", "why", "paper"]]
    claims = claims.rename(columns={"why": "set by set"})
    for place, (where, one) in enumerate(ledgers.items()):
        claims.insert(2 + place, where, one["verdict"])
    tables = {"ledger": claims}
    if (figures / DEVIATIONS).is_file():
        tables["deviations"] = pd.read_csv(figures / DEVIATIONS)
    by = {where: measured_by(read_json(home / "manifest.json")) for where, home in homes.items()}
    told = "; ".join(f"{where}: {one}" for where, one in by.items())
    form = Template(asset("readme_table.md").read_text("utf8"), trim_blocks=True)
    for mark, table in tables.items():
        made = form.render(table=table.fillna(""), measured_by=told)
        text = block(mark).sub(made.replace("\\", r"\\"), text, count=1)
    return text
