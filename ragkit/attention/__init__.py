"""Exact attention rows of any reader, and their cost. This folder works alone, under any name."""

from .kernels import AttentionError
from .record import (
    Record,
    branch,
    observe,
    observe_cross,
    read_prefix,
    record,
    record_cross,
    record_generation,
)
from .scores import contributions, passage_scores, pooled

__all__ = ["AttentionError", "Record", "branch", "contributions", "observe", "observe_cross"]
__all__ += [
    "passage_scores",
    "pooled",
    "read_prefix",
    "record",
    "record_cross",
    "record_generation",
]
