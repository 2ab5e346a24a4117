"""HTML from templates that escape all they are given; what others made passes an allow-list.
Nothing here runs a script or loads anything from the network."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner
from IPython.display import HTML
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pygments.formatters import HtmlFormatter

from ragkit.settings import asset

FILES = FileSystemLoader(asset("templates"))
TEMPLATES = Environment(loader=FILES, autoescape=True, undefined=StrictUndefined)
# Addresses that stay: places of the report, and pictures that are part of the page.
ADDRESS = re.compile(r"#\S*|[\w.-]+(/[\w.-]+)*(#\S*)?|data:image/(png|jpeg);base64,[\w+/=\s]+")
ELSEWHERE = re.compile(r"url\s*\((?!\s*['\"]?#)|//|\\", re.IGNORECASE)  # in a style
UNSEEN = re.compile(r"<(script|style|metadata)\b.*?(</\1\s*>|\Z)", re.IGNORECASE | re.DOTALL)
# Mean, low, high and what is said of them, in a text.
INTERVAL = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\](?: (holds|contradicted))?")
KINDS = yaml.safe_load((asset("templates") / "allowed.yaml").read_text("utf8"))
ALLOWED = {kind: frozenset(names.split()) for kind, names in KINDS.items()}
Pages = list[tuple[str, str]]  # name and file


def allowed(tag: str, name: str, value: str) -> bool:
    """Whether an attribute leads nowhere else and runs nothing."""
    if name in ("href", "src"):
        return ADDRESS.fullmatch(value) is not None
    if name in ("style", "clip-path") and ELSEWHERE.search(value):
        return False
    return name in ALLOWED["attributes"]


CLEANER = Cleaner(
    tags=ALLOWED["tags"],
    attributes=allowed,
    protocols={"http", "data"},  # bleach's word for relative ones; `allowed` refuses all others
    strip=True,
    css_sanitizer=CSSSanitizer(ALLOWED["styles"], ()),
)


def clean(text: str) -> Markup:
    """HTML without scripts, style sheets, event handlers and addresses of other places."""
    return Markup(CLEANER.clean(UNSEEN.sub("", text).replace("xlink:href=", "href=")))


def fill(template: str, **given: Any) -> Markup:
    """A template of the package; everything that it is given is escaped, but HTML objects."""
    return Markup(TEMPLATES.get_template(f"{template}.html").render(given))


def page(title: str, body: str, pages: Pages, file: str) -> str:
    """A whole page with its navigation; `body` is HTML."""
    themes = (HtmlFormatter(style=name) for name in ("default", "github-dark"))
    light, dark = (theme.get_style_defs(".code") for theme in themes)
    own = asset("report.css").read_text("utf8")
    style = Markup(f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n{own}")
    return fill("page", title=title, file=file, body=Markup(body), style=style, pages=pages)


def table(frame: pd.DataFrame, digits: int = 3, index: bool = False) -> HTML:
    """A data frame, its texts escaped, its numbers with `digits` places, its gaps as dashes."""
    look = {"float_format": f"%.{digits}f", "na_rep": "–", "border": 0, "classes": "numbers"}
    return HTML(frame.to_html(index=index, **look))


def figure(path: Path) -> Markup:
    """A figure (path of its SVG), captioned by its alt text's first sentence; all in a fold."""
    svg, alt = (path.with_suffix(end).read_text("utf8") for end in (".svg", ".txt"))
    drawing = svg[svg.index("<svg") :].replace("<svg", '<svg style="max-width:100%;height:auto"', 1)
    return fill("figure", name=path.stem, alt=alt, drawing=Markup(drawing))  # our own


def loop(*part: str) -> HTML:
    """The loop of retriever, reader and target as a picture; boxes named by `part` are marked."""
    return HTML(fill("loop", part=part))


def marked_tokens(
    tokens: Sequence[str], weights: Sequence[float], owners: Sequence[int], titles: Sequence[str]
) -> HTML:
    """Each passage with its tokens shaded by their weight; the largest is the darkest. `owners`: of
    each token the passage, negative for none. One that begins with `##` joins the one before it."""
    marked = [one for one in zip(tokens, weights, owners, strict=True) if one[2] >= 0]
    largest = max((weight for _, weight, _ in marked), default=0.0) or 1.0
    return HTML(fill("marked_tokens", marked=marked, titles=titles, largest=largest))


def prompt(tokens: Sequence[str], owners: Sequence[int], parts: Mapping[int, str]) -> HTML:
    """A whole prompt with its answer and an end token, coloured by part (`parts`: the names of the
    owners that are no passage); each token is marked by the rows that stand on it."""
    named = [parts.get(owner, "passage") for owner in owners]
    said = [place for place, part in enumerate(named) if part == "answer"][:-1]
    before = [place - 1 for place in said]
    rows = {"last_prompt": before[:1], "predicting": before, "consuming": said}
    marks = [[i for i, of in enumerate(rows.values(), 1) if n in of] for n in range(len(tokens))]
    return HTML(fill("prompt", marked=zip(tokens, named, marks, strict=True), rows=rows))


def ledger(table: pd.DataFrame, pages: Mapping[str, str] | None = None) -> HTML:
    """The claims (`ragkit.experiment.claims.ledger`) as cards, side by side where there is room;
    each leads to its notebook's page if that is among `pages`, by the notebook's number."""
    given = {"claims": table.fillna("").to_dict("records"), "pages": pages or {}}
    return HTML(fill("ledger", intervals=INTERVAL.findall, **given))
