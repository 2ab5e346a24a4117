"""The logs of a run's trainings, and an early word on each by a fixed rule.

The rule, written before it was tried on any curve:

**Step 2** is judged by HR on dev. It is *working* if HR stood more than GAIN above its start at
each of the last AGREE looks; *not working* if HR stood at or below its start at each of them, or no
more than GAIN above while the loss had not fallen by the share CLEAR. As long as HR leaves it open,
it is *not working* if its teacher gives the tokens closest to the answer, and those closest to the
question's nouns, no more attention than the average token.

**Step 1** is judged by the reader's indicators at the last AGREE kept steps: *not working* if at
each all lifts are at or below the average token's, *working* if the lift near the answer is above
it and the loss has clearly fallen. A loss that is flat over ENOUGH_ROWS rows is *not working*.

A loss that is not a number is *not working*; everything else is *too early to tell*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from ragkit.distillation.log import FILE, Row, read_log
from ragkit.errors import MonitorError

AGREE, GAIN, CLEAR, ENOUGH_ROWS = 2, 0.01, 0.05, 10
AVERAGE = 1.0  # the average token's lift
WORKING, NOT_WORKING, TOO_EARLY = "working", "not working", "too early to tell"
COLUMNS = ("training", "key", "state", "step", "epoch", "loss", "rate", "hr", "seconds", "left")


def known(rows: Sequence[Row], *names: str) -> list[float]:
    """The values of these numbers in the rows that hold them."""
    values = [row.get(name) for name in names for row in rows]
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def fallen(losses: Sequence[float]) -> float:
    """The share by which a loss has fallen, from the first third of its values to the last."""
    if len(losses) < 2:
        return 0.0
    third = max(1, len(losses) // 3)
    first, last = float(np.mean(losses[:third])), float(np.mean(losses[-third:]))
    return (first - last) / abs(first) if first else 0.0


def verdict(rows: Sequence[Row], probes: Sequence[Row] = ()) -> tuple[str, str]:
    """WORKING, NOT_WORKING or TOO_EARLY by the rule above, and the reason.

    `rows` are a log's, or the curve of Step 2; the first is the start. `probes` hold `answer lift`
    and `nouns lift`: of the readers that Step 1 kept, in order, first that of its start; of the
    teacher of Step 2.
    """
    if not rows:
        return TOO_EARLY, "nothing is logged yet"
    unit = "epoch" if known(rows, "epoch") else "step"
    for number, row in enumerate(rows):
        if isinstance(row.get("stopped"), str):
            return NOT_WORKING, row["stopped"]
        if number and not math.isfinite(row.get("loss") or 0.0):
            return NOT_WORKING, f"the loss is not a number at {unit} {row[unit]:g}"
    losses = known(rows[1:], "loss")
    if unit == "epoch":
        return judge_step2(known(rows, "hr"), fallen(losses), probes)
    return judge_step1(losses, probes)


def moved(fall: float) -> str:
    """What a loss did that has fallen by this share, in words."""
    return f"the loss has{f' fallen by {fall:.0%}' if fall >= CLEAR else ' not clearly fallen'}"


def judge_step2(hr: list[float], fall: float, probes: Sequence[Row]) -> tuple[str, str]:
    """The verdict on HR on dev at each look, the share by which the loss fell, and the teacher."""
    gains = [round(value - hr[0], 9) for value in hr[1:]][-AGREE:]
    told = f"{len(gains)} of {AGREE} looks"
    if len(gains) == AGREE:
        each = " and ".join(f"{gain:+.3f}" for gain in gains)
        told = f"HR on dev against its start at the last looks: {each}; {moved(fall)}"
        if min(gains) > GAIN:
            return WORKING, told
        if max(gains) <= 0:
            why = ": what it learns does not lead to the gold passages" if fall >= CLEAR else ""
            return NOT_WORKING, told + why
        if max(gains) <= GAIN and fall < CLEAR:
            return NOT_WORKING, f"{told}: nothing moves"
    lift = max(known(probes, "answer lift", "nouns lift"), default=math.inf)
    if lift <= AVERAGE:
        given = f"{lift:.2f} times the average token's attention, no more than any"
        return NOT_WORKING, f"the teacher gives the tokens closest to answer and nouns {given}"
    return TOO_EARLY, told


def judge_step1(losses: list[float], probes: Sequence[Row]) -> tuple[str, str]:
    """The verdict on the losses of its rows and the indicators of its kept readers."""
    fall = fallen(losses)
    if len(losses) >= ENOUGH_ROWS and fall < CLEAR:
        return NOT_WORKING, f"{moved(fall)} ({-fall:+.0%} from the first third of the rows on)"
    last = [probe for probe in probes[1:] if known([probe], "answer lift", "nouns lift")][-AGREE:]
    if len(last) < AGREE:
        return TOO_EARLY, f"{len(last)} of {AGREE} kept steps"
    near = known(last, "answer lift")
    each = " and ".join(f"{lift:.2f}" for lift in near)
    told = f"lift near the answer at the last kept steps: {each}; {moved(fall)}"
    if max(known(last, "answer lift", "nouns lift")) <= AVERAGE:
        return NOT_WORKING, f"{told}: no more attention than the average token, near nouns neither"
    if len(near) == AGREE and min(near) > AVERAGE and fall >= CLEAR:
        return WORKING, told
    return TOO_EARLY, told


def first_verdict(rows: Sequence[Row], probes: Sequence[Row] = ()) -> tuple[str, int]:
    """The first word that was not TOO_EARLY, and how many rows behind the start it took.

    TOO_EARLY if none was. A probe that holds a `step` is known from the row of that step on.
    """
    for count in range(1, len(rows) + 1):
        at = max(known(rows[:count], "step"), default=math.inf)
        word, _ = verdict(rows[:count], [p for p in probes if p.get("step", 0) <= at])
        if word != TOO_EARLY:
            return word, count - 1
    return TOO_EARLY, len(rows) - 1


def follow(run_folder: Path, keys: Collection[str] | None = None) -> pd.DataFrame:
    """The logs of all trainings of a run, row by row: COLUMNS, and what else the rows hold.

    `training` is the stage's name; `state` is 'unfinished' while it goes on, or was killed and will
    be gone on with. Of several stages of one name the one written last is taken; `keys` says which
    to choose from. Raises MonitorError if there is no log.
    """
    logs: list[tuple[float, str, list[Row]]] = []
    patterns = (f"partial/*/{FILE}", f"stages/*/*/{FILE}")  # one that ends meanwhile is in both
    for file in [file for pattern in patterns for file in run_folder.glob(pattern)]:
        folder, key = file.parent, file.parent.name.rpartition("-")[2]
        if keys is not None and key not in keys:
            continue
        with suppress(FileNotFoundError):
            if folder.parent.name == "partial":
                state, name = "unfinished", (folder / "name.txt").read_text("utf8").strip()
            else:
                record = json.loads((folder / "stage.json").read_text("utf8"))
                state, name = "finished", record["name"]
            about = {"training": name, "key": key, "state": state}
            rows = [{**about, **row} for row in read_log(folder)]
            logs.append((file.stat().st_mtime, name, rows))
    logs.sort(key=lambda log: log[0])
    last = {name: rows for _, name, rows in logs}
    table = pd.DataFrame([row for rows in last.values() for row in rows])
    if table.empty:
        raise MonitorError(
            f"No training has written a log in {run_folder} yet. Start a run (make reproduce), "
            "and look again when Step 1 has begun."
        )
    return table.reindex(columns=list(dict.fromkeys([*COLUMNS, *table.columns])))
