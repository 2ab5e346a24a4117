"""The log of a training: rows of measurements in `metrics.jsonl`, beside its result."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragkit.data.files import write_whole

FILE = "metrics.jsonl"
LOOKS = 2  # times an epoch that Step 2 is looked at
Row = dict[str, Any]


def read_log(folder: Path) -> list[Row]:
    """The rows of a training's log; a line that a kill has torn is skipped."""
    rows = []
    with suppress(FileNotFoundError):  # nothing is written yet, or the folder was just renamed
        for line in (folder / FILE).read_bytes().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def write_log(folder: Path, rows: Sequence[Row], is_main: bool) -> None:
    """Replaces a training's log by these rows, in the main process; NaN is left out."""
    kept = [{name: value for name, value in row.items() if value == value} for row in rows]
    if is_main:
        write_whole(folder / FILE, "".join(json.dumps(row) + "\n" for row in kept))
