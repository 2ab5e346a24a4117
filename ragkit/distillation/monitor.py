"""An early word on each training of a run, by a rule that was fixed before any curve was seen.

**Step 2** is *working* if HR on dev stood more than GAIN above its start at each of the last AGREE
looks; *not working* if it stood at or below its start at each of them, or no more than GAIN above
while the loss had not fallen by the share CLEAR. As long as HR leaves it open, it is *not working*
if its teacher gives the tokens closest to the answer, and those closest to the question's nouns, no
more attention than the average token.

**Step 1** is *not working* if at the last AGREE kept steps all the reader's lifts are at or below
the average token's, *working* if those near the answer are above it and the loss has fallen by
CLEAR. A loss that is flat over ENOUGH_ROWS rows is *not working*. All else is *too early to tell*.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ragkit.errors import StoreError

AGREE, GAIN, CLEAR, ENOUGH_ROWS = 2, 0.01, 0.05, 10
AVERAGE, LIFTS = 1.0, ("answer lift", "nouns lift")  # the average token's lift; those of a reader
WORKING, NOT_WORKING, TOO_EARLY = "working", "not working", "too early to tell"
COLUMNS = ["training", "state", "step", "epoch", "loss", "rate", "hr", "seconds", "left"]
Row = dict[str, Any]


def known(rows: Sequence[Row], *names: str) -> list[float]:
    """The values of these numbers in the rows that hold them."""
    values = [row.get(name) for name in names for row in rows]
    return [value for value in values if value is not None and math.isfinite(value)]


def verdict(rows: Sequence[Row], probes: Sequence[Row] = ()) -> tuple[str, str]:
    """WORKING, NOT_WORKING or TOO_EARLY by the rule above, and the reason.

    `rows` are a log's, the first is the start. `probes` hold LIFTS: of the readers that Step 1
    kept, in order, first that of its start; of the teacher of Step 2.
    """
    losses = known(rows[1:], "loss") or [0.0]
    third = max(1, len(losses) // 3)
    first, last = float(np.mean(losses[:third])), float(np.mean(losses[-third:]))
    fall = (first - last) / (abs(first) or 1.0)
    moved = f"the loss has {f'fallen by {fall:.0%}' if fall >= CLEAR else 'not clearly fallen'}"
    if known(rows, "epoch"):
        return judge_step2(known(rows, "hr"), fall, moved, known(probes, *LIFTS))
    if len(losses) >= ENOUGH_ROWS and fall < CLEAR:
        return NOT_WORKING, f"{moved} ({-fall:+.0%} from the first third of the rows on)"
    near, nouns = (known(probes[1:], lift)[-AGREE:] for lift in LIFTS)
    if len(near) < AGREE:
        return TOO_EARLY, f"{len(near)} of {AGREE} kept steps"
    each = " and ".join(f"{lift:.2f}" for lift in near)
    told = f"lift near the answer at the last kept steps: {each}; {moved}"
    if max(near + nouns) <= AVERAGE:
        return NOT_WORKING, f"{told}: no more attention than the average token, near nouns neither"
    return WORKING if min(near) > AVERAGE and fall >= CLEAR else TOO_EARLY, told


def judge_step2(hr: list[float], fall: float, moved: str, lifts: list[float]) -> tuple[str, str]:
    """The verdict on HR on dev at each look, the fall of the loss, and the teacher's lifts."""
    gains = [round(value - hr[0], 9) for value in hr[1:]][-AGREE:]
    told = f"{len(gains)} of {AGREE} looks"
    if len(gains) == AGREE:
        each = " and ".join(f"{gain:+.3f}" for gain in gains)
        told = f"HR on dev against its start at the last looks: {each}; {moved}"
        if min(gains) > GAIN:
            return WORKING, told
        if max(gains) <= 0 or (max(gains) <= GAIN and fall < CLEAR):
            return NOT_WORKING, told
    if (lift := max(lifts, default=math.inf)) <= AVERAGE:
        given = f"{lift:.2f} times the average token's attention, no more than any"
        return NOT_WORKING, f"the teacher gives the tokens closest to answer and nouns {given}"
    return TOO_EARLY, told


def first_verdict(rows: Sequence[Row], probes: Sequence[Row] = ()) -> tuple[str, int]:
    """The first word that was not TOO_EARLY, or that, and how many rows behind the start it took.

    A probe that holds a `step` is known from the row of that step on.
    """
    for count in range(1, len(rows) + 1):
        at = max(known(rows[:count], "step"), default=math.inf)
        word, _ = verdict(rows[:count], [p for p in probes if p.get("step", 0) <= at])
        if word != TOO_EARLY:
            return word, count - 1
    return TOO_EARLY, len(rows) - 1


def read_log(folder: Path) -> list[Row]:
    """The rows of a training's log; none before it is written, or if it was just moved."""
    with suppress(FileNotFoundError), open(folder / "metrics.jsonl", encoding="utf8") as lines:
        return [json.loads(line) for line in lines]
    return []


def follow(run_folder: Path, keys: Iterable[str]) -> pd.DataFrame:
    """The logs of the trainings with these keys, row by row, in COLUMNS.

    `training` is the key; `state` is 'unfinished' while it goes on, or was killed and will be gone
    on with. Raises StoreError if there is no log.
    """
    rows: list[Row] = []
    for key in keys:  # a training that ends meanwhile moves from the first place to the second
        going = [row for at in run_folder.glob(f"partial/*-{key}") for row in read_log(at)]
        ended = [row for at in run_folder.glob(f"stages/*/{key}") for row in read_log(at)]
        about = {"training": key, "state": "finished" if ended else "unfinished"}
        rows += [about | row for row in ended or going]
    if not rows:
        told = "Start a run (make reproduce), and look again when Step 1 has begun."
        raise StoreError(f"No training has written a log in {run_folder} yet. {told}")
    return pd.DataFrame(rows).reindex(columns=COLUMNS)
