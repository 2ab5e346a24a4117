"""Is a training worth going on with? An early verdict by a fixed rule, and the logs of all trainings of a run, finished or not.

The rule, written before it was tried on any curve:

**Step 2** is judged by HR on dev. It is *working* if HR stood more than GAIN above its start at each of the last AGREE looks. It is *not working* if HR stood
at or below its start at each of them, however far the loss has fallen, or no more than GAIN above while the loss had not fallen by the share CLEAR.
As long as HR leaves it open, it is *not working* if the teacher gives the tokens closest to the answer, and those closest to the question's nouns,
no more attention than the average token.

**Step 1** is judged by the reader's indicators at the last AGREE kept steps. It is *not working* if at both all lifts are at or below the average
token's, *working* if the lift near the answer is above it and the loss has clearly fallen. It is *not working*, too, if the loss is flat over ENOUGH_ROWS rows.

A loss that is not a number is *not working*; everything else is *too early to tell*.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ragkit.distillation.log import FILE, Row, read
from ragkit.errors import MonitorError

AGREE, GAIN, CLEAR, ENOUGH_ROWS = 2, 0.01, 0.05, 10
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "rate",
    "hr",
    "seconds",
    "left",
)  # of `follow`, also as long as no training has written them
AVERAGE = 1.0  # the average token's lift
WORKING, NOT_WORKING, TOO_EARLY = "working", "not working", "too early to tell"


def fallen(losses: Sequence[float]) -> float:
    """The share by which a loss has fallen, from the first third of its values to the last."""
    third = max(1, len(losses) // 3)
    first, last = float(np.mean(losses[:third])), float(np.mean(losses[-third:]))
    return (first - last) / abs(first) if first else 0.0


def known(rows: Sequence[Row], name: str) -> list[float]:
    """The values that a number has in those rows that hold it."""
    return [
        row[name]
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """WORKING, NOT_WORKING or TOO_EARLY by the rule above, and the reason, from a log's rows or the curve of Step 2; the first row is the start."""
    if not rows:
        return TOO_EARLY, "nothing is logged yet"
    for row in rows:
        if isinstance(row.get("stopped"), str):
            return NOT_WORKING, row["stopped"]
    unit = "epoch" if known(rows, "epoch") else "step"
    for row in rows[1:]:
        if not math.isfinite(row.get("loss") or 0.0):
            return NOT_WORKING, f"the loss is not a number at {unit} {row[unit]:g}"
    losses = known(rows[1:], "loss")
    fall = fallen(losses) if len(losses) > 1 else 0.0
    moved = (
        f"the loss has fallen by {fall:.0%}" if fall >= CLEAR else "the loss has not clearly fallen"
    )
    return (
        judge_step2(rows, fall, moved)
        if unit == "epoch"
        else judge_step1(rows, fall, moved, len(losses))
    )


def lifts_of(rows: Sequence[Row]) -> list[float]:
    return known(rows, "answer lift") + known(rows, "nouns lift")


def judge_step2(rows: Sequence[Row], fall: float, moved: str) -> tuple[str, str]:
    """The verdict on rows that hold `hr`, and the teacher's indicators in the first."""
    hr = known(rows, "hr")
    gains = [round(value - hr[0], 9) for value in hr[1:]]
    last, told = gains[-AGREE:], " and ".join(f"{gain:+.3f}" for gain in gains[-AGREE:])
    if len(last) == AGREE:
        told = f"HR on dev against its start at the last looks: {told}; {moved}"
        if min(last) > GAIN:
            return WORKING, told
        if max(last) <= 0:
            return NOT_WORKING, told + (
                ": the retriever learns its target, but that does not lead to the gold passages"
                if fall >= CLEAR
                else ""
            )
        if max(last) <= GAIN and fall < CLEAR:
            return NOT_WORKING, f"{told}: nothing moves"
    lifts = lifts_of(rows[:1])
    if lifts and max(lifts) <= AVERAGE:
        return (
            NOT_WORKING,
            f"the teacher gives the tokens closest to answer and nouns {max(lifts):.2f} times the average token's attention, no more than any",
        )
    return TOO_EARLY, told if len(last) == AGREE else f"{len(last)} of {AGREE} looks"


def judge_step1(rows: Sequence[Row], fall: float, moved: str, count: int) -> tuple[str, str]:
    """The verdict on rows of which some, the first among them, hold the reader's indicators; `count` of them hold a loss."""
    if count >= ENOUGH_ROWS and fall < CLEAR:
        return NOT_WORKING, f"{moved} ({-fall:+.0%} from the first third of the rows to the last)"
    probes = [row for row in rows[1:] if lifts_of([row])][-AGREE:]
    if len(probes) < AGREE:
        return TOO_EARLY, f"{len(probes)} of {AGREE} kept steps"
    near = known(probes, "answer lift")
    told = f"lift near the answer at the last kept steps: {' and '.join(f'{lift:.2f}' for lift in near)}; {moved}"
    if max(lifts_of(probes)) <= AVERAGE:
        return (
            NOT_WORKING,
            f"{told}: the tokens closest to answer and nouns get no more attention than the average token",
        )
    if len(near) == AGREE and min(near) > AVERAGE and fall >= CLEAR:
        return WORKING, told
    return TOO_EARLY, told


def first_verdict(rows: Sequence[Row]) -> tuple[str, int]:
    """What the monitor told first that was not TOO_EARLY, and how many rows behind the start it took (Step 2: looks); TOO_EARLY if it told nothing."""
    for count in range(1, len(rows) + 1):
        word, _ = verdict(rows[:count])
        if word != TOO_EARLY:
            return word, count - 1
    return TOO_EARLY, len(rows) - 1


def follow(run_folder: Path) -> pd.DataFrame:
    """The logs of all trainings of a run, row by row: columns `training` (its stage's name with `-` for `/`), `state`, COLUMNS, and what else rows hold.

    An 'unfinished' training is in progress, or was killed and will be gone on with; it hides a finished one that it replaces. Raises MonitorError if
    there is no log. Variations and further runs of Step 1 have folders of their own below `<run>/varied`.
    """
    stages = run_folder / "stages"
    unfinished = {
        file.parent.name.rpartition("-")[0]: (file.parent, read(file))
        for file in sorted(run_folder.glob(f"partial/*/{FILE}"))
    }
    folders = sorted(
        Path(folder) for folder, _, files in os.walk(stages) if FILE in files
    )  # unlike glob it minds no folder that goes away meanwhile
    logs = {
        "-".join(folder.relative_to(stages).parts): ("finished", read(folder / FILE))
        for folder in folders
    }
    logs |= {
        name: ("unfinished", rows)
        for name, (folder, rows) in unfinished.items()
        if folder.is_dir() or name not in logs
    }
    table = pd.DataFrame(
        [
            {"training": name, "state": state, **row}
            for name, (state, rows) in logs.items()
            for row in rows
        ]
    )
    if table.empty:
        raise MonitorError(
            f"No training has written a log in {run_folder} yet. Start a run (make reproduce), and look again when Step 1 has begun."
        )
    return table.reindex(
        columns=list(dict.fromkeys(["training", "state", *COLUMNS, *table.columns]))
    )
