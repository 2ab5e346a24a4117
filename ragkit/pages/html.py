"""Attention and the ledger as self-contained HTML: no script, nothing from the network, every text escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import pandas as pd
from IPython.display import HTML

VERDICT_COLOURS = {
    "reproduced": "#1a7f37",
    "partly": "#8a5a00",
    "not reproduced": "#b42318",
}  # legible under white text; others are grey


def marked_tokens(
    tokens: Sequence[str], weights: Sequence[float], owners: Sequence[int], titles: Sequence[str]
) -> HTML:
    """Each passage with its tokens shaded by their weight (1.0 is the darkest token shown).

    A token beginning with `##` is joined to the one before it.
    """
    largest = max((w for w, o in zip(weights, owners, strict=True) if o >= 0), default=0.0) or 1.0
    blocks = []
    for number, title in enumerate(titles):
        parts = []
        for token, weight, owner in zip(tokens, weights, owners, strict=True):
            if owner != number:
                continue
            glue = "" if token.startswith("##") else " "
            strength = max(0.0, min(1.0, weight / largest))
            colour = "#fff" if strength > 0.55 else "#111"
            style = f"background:rgba(0,90,160,{strength:.2f});color:{colour};border-radius:2px"
            parts.append(
                f'{glue}<span style="{style}" title="{weight:.4f}">{html.escape(token.removeprefix("##"))}</span>'
            )
        blocks.append(
            f"<p style='line-height:1.7;margin:.4em 0'><b>{number + 1}. {html.escape(title)}</b> {''.join(parts)}</p>"
        )
    return HTML(
        f"<div style='max-width:46em;background:#fff;color:#111;padding:.2em .6em'>{''.join(blocks)}</div>"
    )


def by_run(measured: str) -> str:
    """What was measured on one set as an item of a list; several runs of Step 1 as a list of their own below it."""
    name, _, told = html.escape(measured).partition(": ")
    runs = told.split(" | ")
    if len(runs) == 1:
        return f"<li>{html.escape(measured)}</li>"
    return f"<li>{name}<ul style='padding-left:1.2em'>{''.join(f'<li>{run}</li>' for run in runs)}</ul></li>"


def ledger(table: pd.DataFrame, links: Mapping[str, str] | None = None) -> HTML:
    """The claims as cards, two or three beside each other where there is room, one below the other on a phone.

    `table` is that of `ragkit.claims.table`; `links` holds, for some claims, HTML that leads to where they are measured.
    """
    cards = []
    for row in table.fillna("").itertuples(index=False):
        colour = VERDICT_COLOURS.get(row.verdict, "#57606a")
        badge = f"<span style='background:{colour};color:#fff;border-radius:1em;padding:.1em .7em;white-space:nowrap'>{html.escape(row.verdict)}</span>"
        measured = "".join(map(by_run, filter(None, row.measured.split("; "))))
        paper = (
            f"<p style='margin:.4em 0'>In the paper: {html.escape(row.paper)}</p>"
            if row.paper
            else ""
        )
        why = f"<p style='margin:.4em 0'>Why: {html.escape(row.why)}</p>" if row.why else ""
        cards.append(
            f"<section style='border:1px solid rgba(127,127,127,.4);border-left:.4em solid {colour};border-radius:8px;padding:.7em .9em'>"
            f"<div style='display:flex;justify-content:space-between;gap:1em;align-items:baseline'><b>{html.escape(row.claim)}</b>{badge}</div>"
            f"<p style='margin:.4em 0'>{html.escape(row.statement)}</p><ul style='margin:.4em 0;padding-left:1.2em'>{measured}</ul>{paper}"
            f"<details><summary style='cursor:pointer'>The rule</summary><p style='margin:.4em 0'>{html.escape(row.rule)}</p>{why}</details>"
            f"{(links or {}).get(row.claim, '')}</section>"
        )
    grid = (
        "display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20em,100%),1fr));gap:.8em"
    )
    return HTML(f"<div style='{grid}'>{''.join(cards)}</div>")
