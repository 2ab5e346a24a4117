"""Attention as self-contained HTML: no script, nothing from the network, every text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from IPython.display import HTML


def marked_tokens(tokens: Sequence[str], weights: Sequence[float], owners: Sequence[int], titles: Sequence[str]) -> HTML:
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
            parts.append(f'{glue}<span style="{style}" title="{weight:.4f}">{html.escape(token.removeprefix("##"))}</span>')
        blocks.append(f"<p style='line-height:1.7;margin:.4em 0'><b>{number + 1}. {html.escape(title)}</b> {''.join(parts)}</p>")
    return HTML(f"<div style='max-width:46em;background:#fff;color:#111;padding:.2em .6em'>{''.join(blocks)}</div>")
