"""A log of metrics beside every long training: JSON lines in its stage's folder, and both indicators while a reader learns.

It can be followed while the training runs and stays with its result (`ragkit.monitor` reads it). A training only reports: the log is handed in
from outside (by `Lab`), so no stage depends on it and a change here makes nothing anew.
"""

from __future__ import annotations

from ragkit.errors import RagkitError

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from ragkit.models import device as fleet
from ragkit.indicators import measures as indicators
from ragkit.data.questions import Question
from ragkit.data.passages import Passage
from ragkit.profile import AttentionSettings, ReaderSettings
from ragkit.models.reader import Reader
from ragkit.experiment.store import write_whole

log = logging.getLogger(__name__)
FILE = "metrics.jsonl"
QUESTIONS = 32  # of dev, on which the indicators are measured
ROWS = 80  # of a log of Step 1
PAUSE = 60  # seconds between two lines of progress
NAMES = {"attention": "lift", "Spearman": "Spearman"}  # of the indicators' measures in a row, behind the goal

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The rows of a log; a line that a kill has torn, or that is just being written, is skipped."""
    rows = []
    with suppress(FileNotFoundError):  # nothing is written yet, or its folder has just been renamed
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


class Log:
    """The metrics of one training. Rows hold `step` (or `epoch`), `seconds` since the start, `left`: seconds to go by the pace so far, and what was measured.

    A training that goes on from a checkpoint drops the rows beyond it, so no place stands there twice; time goes on from the last one kept.
    The main process writes; the others keep the same rows, so that all measure at the same places.
    """

    def __init__(self, folder: Path, title: str, unit: str, total: float) -> None:
        self.file, self.title, self.unit, self.total = folder / FILE, title, unit, total
        self.rows: list[Row] = []
        self.at: float | None = None

    @property
    def last(self) -> float:
        """The place of the last row; -1 if there is none."""
        return self.rows[-1][self.unit] if self.rows else -1

    def reach(self, at: float, loss: float) -> None:
        """The training stands at this place: a line of progress a minute at most. Called first where it starts or goes on from."""
        now = time.monotonic()
        if self.at is None:
            self.rows = [row for row in read(self.file) if row[self.unit] <= at and "stopped" not in row]
            fleet.wait()
            if fleet.is_main():
                write_whole(self.file, "".join(map(as_line, self.rows)))
            self.began, self.clock, self.said = at, now, now
            self.before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.at = at
        if now - self.said >= PAUSE and fleet.is_main():
            self.said = now
            log.info("%s: %.3g of %g %ss, loss %.3g, %s left", self.title, at, self.total, self.unit, loss, in_words(self.left()))

    def left(self) -> float:
        """Seconds to go, by the pace since this process began; NaN at its beginning."""
        done = (self.at or 0) - self.began
        return (time.monotonic() - self.clock) * (self.total - (self.at or 0)) / done if done > 0 else math.nan

    def add(self, **measured: Any) -> None:
        """Writes a row for the place last reached."""
        seconds, left = self.before + time.monotonic() - self.clock, self.left()
        row = {self.unit: self.at, **measured, "seconds": round(seconds, 2), **({"left": round(left, 1)} if math.isfinite(left) else {})}
        self.rows.append(row)
        if fleet.is_main():
            with self.file.open("a", encoding="utf8") as file:  # closed at once: the line is there for whoever follows
                file.write(as_line(row))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Notes the error that ends a training, such as a loss that is not a number."""
        if isinstance(error, RagkitError) and self.at is not None:
            self.add(stopped=str(error))


def as_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def in_words(seconds: float) -> str:
    """A duration as people say it, rounded up."""
    if not math.isfinite(seconds):
        return "unknown time"
    return f"{math.ceil(seconds)} s" if seconds < 60 else f"{math.ceil(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


class Probe:
    """Both indicators on a few questions: cheap enough to be measured again and again while a reader learns.

    Closeness is measured in the input embeddings that `reader` has now, so make it of the off-the-shelf reader. Without `nouns`, the character
    spans of the questions' nouns, there is no Indicator 2.
    """

    def __init__(
        self, reader: Reader, questions: Sequence[Question], found: Sequence[Sequence[Passage]], nouns: Sequence[Sequence[tuple[int, int]]] | None,
        attention: AttentionSettings, share: float,
    ) -> None:  # fmt: skip
        self.questions, self.found, self.attention, self.share = questions, found, attention, share
        wanted = {"answer": indicators.answer_ids(reader, questions)}
        if nouns is not None:
            pairs = zip(questions, nouns, strict=True)
            wanted["nouns"] = [[token for token, inside in indicators.within_spans(reader, q.text, spans) if inside] for q, spans in pairs]
        table = reader.model.get_input_embeddings().weight.detach()
        prompts = [reader.prompt(q, list(passages), q.answers[0]) for q, passages in zip(questions, found, strict=True)]
        inside = [[token for token, who in zip(p.ids, p.owner, strict=True) if who >= 0] for p in prompts]

        def vectors(ids: list[int]) -> NDArray[np.float64]:
            return table[ids].float().cpu().numpy().astype(np.float64)  # few rows of what may be a large table

        self.closeness = {
            goal: np.concatenate([indicators.closeness(vectors(tokens), vectors(ids)) for tokens, ids in zip(inside, each, strict=True)])
            for goal, each in wanted.items()
        }

    def __call__(self, reader: Reader) -> dict[str, float]:
        """Means over the questions as the reader attends now: `answer lift`, `answer Spearman`, `nouns lift`, `nouns Spearman`, where defined."""
        was_training = reader.model.training
        reader.model.eval()
        with fleet.counting():  # it is no part of the stage's work
            tokens = indicators.look_at_tokens(reader, self.questions, self.found)
        reader.model.train(was_training)
        lifts, measured = indicators.lift(tokens.attention(self.attention), tokens.question), {}
        for goal, close in self.closeness.items():
            known = np.isfinite(lifts) & np.isfinite(close)
            each = indicators.measure(lifts[known], close[known], tokens.question[known], self.share, len(self.questions))
            for measure, name in NAMES.items():
                if np.isfinite(each[measure]).any():
                    measured[f"{goal} {name}"] = float(np.nanmean(each[measure]))
        return measured


class Step1Log(Log):
    """What `reader.fine_tune` reports to: ROWS rows or more, and at the start, at each kept step and at the end both indicators.

    `reader_after` gives the reader as it is after so many steps.
    """

    def __init__(self, folder: Path, title: str, settings: ReaderSettings, reader_after: Callable[[int], Reader], probe: Probe) -> None:
        super().__init__(folder, title, "step", settings.steps)
        self.reader_after, self.probe = reader_after, probe
        self.every = max(1, settings.steps // ROWS)
        self.looks = {0, *settings.kept_steps, settings.steps}

    def __call__(self, losses: list[float], rate: float) -> None:
        """Called where the training begins and after each step, with the losses of all steps so far; a row's loss is the mean since the one before."""
        step = len(losses)
        self.reach(step, losses[-1] if losses else math.nan)
        if step > self.last and (step % self.every == 0 or step in self.looks):
            since = {"loss": float(np.mean(losses[max(0, int(self.last)) :])), "rate": rate} if step else {}
            self.add(**since, **(self.probe(self.reader_after(step)) if step in self.looks else {}))


class Step2Log(Log):
    """What `distill.train` reports to: a row of the curve at each look; `teacher`, its teacher's indicators, stand in the first."""

    def __init__(self, folder: Path, title: str, epochs: int, batches: float, rate: float, teacher: dict[str, float]) -> None:
        super().__init__(folder, title, "epoch", epochs)
        self.batches, self.rate, self.teacher = batches, rate, teacher

    def __call__(self, curve: list[dict[str, float]], losses: list[float]) -> None:
        """Called where the training begins, after each step and at each look, with the curve so far and the losses since its last row."""
        row = dict(curve[-1])
        self.reach(row["epoch"] + len(losses) / self.batches, losses[-1] if losses else row["loss"])
        if not losses and row["epoch"] > self.last:
            del row["epoch"]
            if len(curve) == 1:
                del row["loss"]
                self.add(**row, **self.teacher)
            elif math.isfinite(row["loss"]):  # else no step was made since the last look
                self.add(**row, rate=self.rate)
