"""A judgement as one HTML page that runs no script and loads nothing."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from ragkit.data.files import write_whole
from ragkit.errors import JudgeError
from ragkit.indicators import measures
from ragkit.pages import html, judge, plots, report
from ragkit.pages.judge import Judgement
from ragkit.settings import ROWS, AttentionSettings

log = logging.getLogger(__name__)
EXAMPLES = 3  # the first questions, so that none is picked
DARKEST = 5.0  # lift from which tokens are equally dark: one sink would leave all others white
BEGINS = ("Ġ", "▁", "Ċ")  # a space or a break in byte-level and SentencePiece vocabularies


def tenths(judged: Judgement) -> str:
    """The figure of lift by tenth of closeness; nothing where no question has a value."""
    rows = []
    for goal, tables in judged.tables.items():
        row = {"set": "all questions", "reader": "this reader"}
        row["goal"] = {"nouns": "question's nouns"}.get(goal, goal)
        for tenth, values in tables["tenths"].items():
            rows.append({**row, "tenth": tenth, **asdict(judge.mean_of(values))})
    drawn = pd.DataFrame(rows).query("n > 0")
    if drawn.empty:
        return ""
    plots.use_theme()
    with TemporaryDirectory() as folder:
        return Markup(plots.show(*plots.deciles(drawn), Path(folder), "tenths", drawn).data)


def spelt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as texts; one that goes on with a word begins with `##`, as `marked_tokens` wants."""
    raw = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    if not any(token.startswith(BEGINS) for token in raw):
        return raw
    return [
        ("" if token.startswith(BEGINS) else "##") + str(tokenizer.decode([i])).strip()
        for token, i in zip(raw, ids, strict=True)
    ]


def examples(judged: Judgement) -> list[dict[str, Any]]:
    """The first questions with their nouns, and their tokens the darker the more attention."""
    made, tokens = [], judged.tokens
    shades = np.clip(np.nan_to_num(measures.lift(judged.attention, tokens.question)), 0, DARKEST)
    for number, (question, passages) in enumerate(judged.asked[:EXAMPLES]):
        mine, titles = tokens.question == number, [passage.title for passage in passages]
        texts = spelt(judged.reader.tokenizer, tokens.ids[mine].tolist())
        shown = html.marked_tokens(
            texts, shades[mine].tolist(), tokens.owner[mine].tolist(), titles
        )
        nouns = judged.nouns[number] if judged.nouns else []
        words = [question.text[start:end] for start, end in nouns]
        made.append({"asked": question, "nouns": words, "shown": shown})
    return made


def write_html(judged: Judgement, path: Path) -> None:
    """Writes the page."""
    mass = judged.tokens.mass[:, ROWS.index(AttentionSettings().rows)].mean(0)
    told = {"judged": judged, "judge": judge, "mass": dict(zip(measures.PLACES, mass, strict=True))}
    told |= {"tenths": tenths(judged), "examples": examples(judged), "darkest": DARKEST}
    title = f"Judgement of {judged.how['Reader']}"
    body = html.fill("judge", **told)
    write_whole(path, report.page(title, body, [("Judgement", "#main")], "#main"))


def write(reader: str, questions: str, nouns: str, space: str | None, out: Path) -> None:
    """Judges a reader (see `judge.judge`), tells the verdict with its reasons, writes the page."""
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):  # before minutes of work
        raise JudgeError(
            f"The page cannot be written to {out}: it is a folder, or its folder is not there or "
            "closed to you. Choose another place with --out."
        )
    judged = judge.judge(reader, questions, nouns, space)
    write_html(judged, out)
    for one in (*judged.checks, judged.direct):
        log.info("%-14s %s. %s", one.verdict, one.name, one.told)
    told = f"{judged.verdict} ({len(judged.asked)} questions, {judged.seconds:.0f} s)"
    log.info("verdict: %s. The page: %s", told, out)
