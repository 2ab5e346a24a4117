"""A judgement as one HTML page: the verdict, its reasons, the numbers, and three questions as the reader saw them.

The page runs no script and loads nothing; every text from outside is escaped.
"""

from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ragkit.errors import JudgeError
from ragkit.experiment.evidence import LINE
from ragkit.experiment.store import write_whole
from ragkit.indicators.metrics import Interval
from ragkit.pages import html as views
from ragkit.pages import plots, report
from ragkit.pages.judge import ABOVE, BELOW, GOALS, SHARE, UNSURE, Check, Example, Judgement

DARKEST = (
    5.0  # lift from which tokens are shown equally dark: one sink would leave all others white
)
COLOURS = {ABOVE: "#1a7f37", BELOW: "#b42318", UNSURE: "#57606a"}  # legible under white text
SAID = {
    ABOVE: "By the paper's heuristic the attention of this reader looks fit to teach a retriever.",
    BELOW: "By the paper's heuristic the attention of this reader does not look fit to teach a retriever.",
    UNSURE: "These questions do not decide whether the attention of this reader is fit to teach a retriever.",
}
CAVEAT = (
    f"The line of {LINE} for Indicator 2 is a heuristic of the paper (Unveiling the Magic, NAACL 2024), not a proof. How often it told good teachers from "
    "poor ones in this companion's own worlds is reported by its notebook 06, how far the numbers depend on choices that the paper leaves open by notebook "
    "08: read both before you rely on it. What counts in the end is whether the retriever finds more after it was taught."
)
DIRECT = (
    "Beside the heuristic, and no part of the verdict: the passage scores that would be taught, summed over each passage's tokens, held against the passages "
    "that hold the answer (gold where the questions name it, else by the answer's words)."
)
NUMBERS = {
    "attention": f"lift of the closest {SHARE:.0%}",
    "Spearman": "Spearman, all tokens",
    "Spearman closest": f"Spearman, closest {SHARE:.0%}",
}
EXPLAINED = (
    f"Lift: attention divided by the mean over the question's passage tokens (1 is the average token); closest: the {SHARE:.0%} of the passage tokens "
    "nearest by cosine. Means over questions with 95 % bootstrap intervals, then how many questions have a value. No exact tokens: the wanted tokens "
    "themselves are left out. Vectors dealt out anew: the control, with the space's vectors permuted for each question, so that only a token's identity "
    "counts. Exact tokens only: lexical overlap, where a token is close if it is one of the wanted. Spearman over the closest is undefined where all "
    "of these are exact tokens: equally close."
)


def badge(verdict: str) -> str:
    style = f"background:{COLOURS[verdict]};color:#fff;border-radius:1em;padding:.15em .8em;white-space:nowrap"
    return f'<span style="{style}">{html.escape(verdict)}</span>'


def check_html(check: Check) -> str:
    return f"<li><b>{html.escape(check.name)}</b> {badge(check.verdict)}<p>{html.escape(check.told)}</p></li>"


def cell(rows: pd.DataFrame) -> str:
    """The number of one place of the table, of no row or one."""
    if rows.empty or not rows["n"].iloc[0]:
        return "–"
    value = Interval(**rows[["mean", "low", "high", "n"]].iloc[0].to_dict())
    return (
        f"{value} ({value.n:.0f})"
        if np.isfinite(value.low)
        else f"{value.mean:.3f} ({value.n:.0f})"
    )


def numbers_html(table: pd.DataFrame) -> str:
    """A table an indicator: its numbers, with and without exact tokens, beside the controls; cells may wrap, for phones."""
    parts = []
    for goal in table["goal"].unique():
        lines = []
        for ending, name in ((e, n) for e in ("", " (no exact)") for n in NUMBERS):
            mine = table[(table["goal"] == goal) & (table["number"] == name + ending)]
            shown = {
                column: cell(mine[mine["space"] == space])
                for space, column in (
                    ("measured", "measured"),
                    ("permuted", "vectors dealt out anew"),
                )
            }
            lines.append(
                {
                    "": NUMBERS[name] + (", no exact tokens" if ending else ""),
                    **shown,
                    "exact tokens only": cell(mine[mine["space"] == "overlap"]),
                }
            )
        parts.append(
            f"<h3>{GOALS[goal]}</h3>{report.wide(pd.DataFrame(lines).to_html(index=False, border=0))}"
        )
    return "".join(parts)


def tenths_html(table: pd.DataFrame) -> str:
    """The figure of lift by tenth of closeness; nothing where no question has a value."""
    drawn = table[table["n"] > 0]
    if drawn.empty:
        return ""
    plots.use_theme()
    named = drawn["goal"].map({"answer": "answer", "nouns": "question's nouns"})
    figure, alt = plots.deciles(drawn.assign(set="all questions", reader="this reader", goal=named))
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    plt.close(figure)
    return plots.figure_html(file.getvalue(), alt)


def example_html(example: Example, unfolded: bool) -> str:
    """A question with its nouns in bold, its answers, and its passages' tokens shaded by lift."""
    text, at, parts = example.question.text, 0, []
    for start, end in example.nouns:
        parts += [html.escape(text[at:start]), f"<b>{html.escape(text[start:end])}</b>"]
        at = end
    asked = "".join([*parts, html.escape(text[at:])])
    weights = np.clip(np.nan_to_num(example.lifts), 0, DARKEST).tolist()
    marked = views.marked_tokens(example.tokens, weights, example.owners, example.titles).data
    answers = html.escape(", ".join(example.question.answers))
    return f"<details{' open' if unfolded else ''}><summary>{asked}</summary><p>Answer: {answers}</p>{marked}</details>"


def body(judgement: Judgement) -> str:
    """The page without its frame."""
    counts = (
        report.rows_html(
            (what[0].upper() + what[1:], count) for what, count in judgement.counts.items()
        )
        if judgement.counts
        else "<p>Nothing.</p>"
    )
    how = report.rows_html(
        [
            ("Reader", judgement.reader),
            ("Closeness is measured in the input embeddings of", judgement.space),
            ("Nouns found by", judgement.nouns),
            ("Questions judged", judgement.questions),
            ("Passages a question, on average", f"{judgement.passages:.1f}"),
            (
                "Attention",
                "last row of the prompt, which has not seen the answer; times the value vector's length; mean over heads and layers",
            ),
            ("Seconds", f"{judgement.seconds:.0f}"),
        ]
    )
    mass = report.rows_html(
        (place.capitalize(), f"{share:.1%}")
        for place, share in judgement.mass.items()
        if place != "answer"
    )
    examples = "".join(
        example_html(one, number == 0) for number, one in enumerate(judgement.examples)
    )
    return (
        f"<h1>Is this reader fit to teach a retriever?</h1><p><code>{html.escape(judgement.reader)}</code></p>"
        f'<p style="font-size:1.3em">{badge(judgement.verdict)}</p><p>{SAID[judgement.verdict]}</p>'
        f"<h2>Why</h2><ul class='cards'>{''.join(map(check_html, judgement.checks))}</ul>"
        f"<p>The verdict is <i>above the line</i> if every reason is, <i>below the line</i> if any is, else <i>cannot tell</i>.</p><p>{html.escape(CAVEAT)}</p>"
        f"<h2>Checked directly</h2><p>{DIRECT}</p><ul class='cards'>{check_html(judgement.direct)}</ul>"
        f"<h2>The numbers</h2><p class='soft'>{EXPLAINED}</p>{numbers_html(judgement.numbers)}{tenths_html(judgement.tenths)}"
        f"<h2>Where its attention falls</h2><p>Share of the plain attention of the prompt's last row, mean over layers, heads and questions. The first token "
        f"is the usual sink; the template is everything else that is no passage's text.</p>{mass}"
        f"<h2>Left out, cut, or to be read with care</h2>{counts}"
        f"<h2>The first questions as the reader saw them</h2><p>Passage tokens, the darker the more attention (equally dark from {DARKEST:.0f} times the "
        f"average on). Nouns of the question are bold.</p>{examples}"
        f"<h2>How it was measured</h2>{how}<p>Numbers of readers compare only within one space and on the same questions: to set this reader beside another, "
        "give both the same <code>--space</code>, such as their common pretrained base.</p>"
    )


def write_html(judgement: Judgement, path: Path) -> None:
    """Writes the page. Raises JudgeError where it cannot be written."""
    whole = report.page(
        f"Judgement of {judgement.reader}", body(judgement), [("Judgement", "#main")], "#main"
    )
    try:
        write_whole(path, whole)
    except OSError as error:
        raise JudgeError(
            f"The page cannot be written to {path} ({error.strerror}). Choose another place with --out."
        ) from error
