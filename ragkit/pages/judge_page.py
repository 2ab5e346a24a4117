"""A judgement as one HTML page that runs no script and loads nothing."""

from __future__ import annotations

import logging
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
from ragkit.indicators.metrics import Interval
from ragkit.pages import html, judge, plots, report
from ragkit.pages.judge import Judgement, Look

log = logging.getLogger(__name__)
EXAMPLES = 3  # the first questions, so that none is picked
DARKEST = 5.0  # lift from which tokens are equally dark: one sink would leave all others white
BEGINS = ("Ġ", "▁", "Ċ")  # how byte-level and SentencePiece vocabularies write a space or a break


def cell(table: pd.DataFrame, goal: str, number: str, space: str) -> str:
    """One number with its interval and the questions behind it; a dash where there is none."""
    chosen = table[["goal", "number", "space"]].eq([goal, number, space]).all(axis=1)
    for row in table.loc[chosen & (table["n"] > 0)].itertuples():
        value = Interval(row.mean, row.low, row.high, row.n)
        return f"{value} ({value.n})" if np.isfinite(value.low) else f"{value.mean:.3f} ({value.n})"
    return "–"


def tenths(table: pd.DataFrame) -> str:
    """The figure of lift by tenth of closeness; nothing where no question has a value."""
    drawn = table[table["n"] > 0]
    if drawn.empty:
        return ""
    plots.use_theme()
    goal = drawn["goal"].map({"answer": "answer", "nouns": "question's nouns"})
    figure, alt = plots.deciles(drawn.assign(set="all questions", reader="this reader", goal=goal))
    with TemporaryDirectory() as folder:
        return Markup(plots.show(figure, alt, Path(folder), "tenths", drawn).data)


def spelt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as texts; one that goes on with a word begins with `##`, as `marked_tokens` wants."""
    raw = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    if not any(token.startswith(BEGINS) for token in raw):
        return raw
    return [
        ("" if token.startswith(BEGINS) else "##") + str(tokenizer.decode([i])).strip()
        for token, i in zip(raw, ids, strict=True)
    ]


def examples(look: Look) -> list[dict[str, Any]]:
    """The first questions with their nouns, and their tokens the darker the more attention."""
    made, lifts = [], measures.lift(look.attention, look.tokens.question)
    shades = np.clip(np.nan_to_num(lifts), 0, DARKEST)
    for number, (question, passages) in enumerate(look.asked[:EXAMPLES]):
        mine, titles = look.places[number], [passage.title for passage in passages]
        texts, owners = spelt(look.tokenizer, look.tokens.ids[mine].tolist()), look.tokens.owner
        shown = html.marked_tokens(texts, shades[mine].tolist(), owners[mine].tolist(), titles)
        nouns = (
            [question.text[start:end] for start, end in look.nouns[number]] if look.nouns else []
        )
        made.append({"asked": question, "nouns": nouns, "shown": shown})
    return made


def write_html(judgement: Judgement, path: Path) -> None:
    """Writes the page. Raises JudgeError where it cannot be written."""
    body = html.fill(
        "judge",
        judged=judgement,
        judge=judge,
        cell=cell,
        tenths=tenths(judgement.tenths),
        examples=examples(judgement.look),
        darkest=DARKEST,
    )
    title = f"Judgement of {judgement.reader}"
    try:
        write_whole(path, report.page(title, body, [("Judgement", "#main")], "#main"))
    except OSError as error:
        raise JudgeError(
            f"The page cannot be written to {path} ({error.strerror}). Choose another with --out."
        ) from error


def write(reader: str, questions: str, nouns: str, space: str | None, out: Path) -> None:
    """Judges a reader (see `judge.judge`), tells the verdict with its reasons, writes the page."""
    if out.is_dir() or not out.absolute().parent.is_dir():  # before minutes of work
        raise JudgeError(
            f"The page cannot be written to {out}: it is a folder, or its folder is not there. "
            "Choose another place with --out."
        )
    judged = judge.judge(reader, questions, nouns, space)
    write_html(judged, out)
    for one in (*judged.checks, judged.direct):
        log.info("%-14s %s. %s", one.verdict, one.name, one.told)
    told = f"{judged.verdict} ({judged.questions} questions, {judged.seconds:.0f} s)"
    log.info("verdict: %s. The page: %s", told, out)
