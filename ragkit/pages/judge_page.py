"""A judgement as one HTML page that runs no script and loads nothing."""

import logging
import os
from pathlib import Path

import numpy as np

from ragkit.data.files import write_whole
from ragkit.errors import StoreError
from ragkit.indicators import measures
from ragkit.pages import html, judge, report
from ragkit.pages.judge import Judgement
from ragkit.settings import ROWS, AttentionSettings

log = logging.getLogger(__name__)
EXAMPLES = 3  # the first questions, so that none is picked
DARKEST = 5.0  # lift from which tokens are equally dark: one sink would leave all others white


def write_html(judged: Judgement, path: Path) -> None:
    """Writes the page, with the first questions' tokens the darker the more attention."""
    tokens, examples = judged.tokens, []
    shade = np.clip(np.nan_to_num(measures.lift(judged.attention, tokens.question)), 0, DARKEST)
    for number, (question, passages) in enumerate(judged.asked[:EXAMPLES]):
        mine, titles = tokens.question == number, [passage.title for passage in passages]
        texts = judged.reader.tokenizer.convert_ids_to_tokens(tokens.ids[mine].tolist())
        shades, owners = shade[mine].tolist(), tokens.owner[mine].tolist()
        shown = html.marked_tokens(texts, shades, owners, titles)
        spans = judged.nouns[number] if judged.nouns else []
        nouns = [question.text[start:end] for start, end in spans]
        examples.append({"asked": question, "nouns": nouns, "shown": shown})
    mass = judged.tokens.mass[:, ROWS.index(AttentionSettings().rows)].mean(0)
    told = {"mass": dict(zip(measures.PLACES, mass, strict=True)), "darkest": DARKEST}
    body = html.fill("judge", judged=judged, judge=judge, examples=examples, **told)
    title = f"Judgement of {judged.how['Reader']}"
    write_whole(path, report.page(title, body, [("Judgement", "#main")], "#main"))


def write(reader: str, questions: str, nouns: str, space: str | None, out: Path) -> None:
    """Judges a reader (see `judge.judge`), tells the verdict with its reasons, writes the page."""
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):  # before minutes of work
        raise StoreError(
            f"The page cannot be written to {out}: it is a folder, or its folder is not there or "
            "closed to you. Choose another place with --out."
        )
    judged = judge.judge(reader, questions, nouns, space)
    write_html(judged, out)
    for one in (*judged.checks, judged.direct):
        log.info("%-14s %s. %s", one.verdict, one.name, one.told)
    log.info("verdict: %s (%d questions). The page: %s", judged.verdict, len(judged.asked), out)
