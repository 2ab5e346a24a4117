"""The log that a training leaves, read back."""

import json


def read_log(folder):
    """Its rows, in order."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf8").splitlines()]
