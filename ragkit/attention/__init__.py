"""Exact attention rows of any reader, and what they cost. Needs nothing of the other rooms."""

from ragkit.attention.kernels import AttentionError
from ragkit.attention.record import (
    Record,
    branch,
    contributions,
    observe,
    observe_cross,
    passage_scores,
    pooled,
    read_prefix,
    record,
    record_cross,
    record_generation,
)

__all__ = [
    "AttentionError",
    "Record",
    "branch",
    "contributions",
    "observe",
    "observe_cross",
    "passage_scores",
    "pooled",
    "read_prefix",
    "record",
    "record_cross",
    "record_generation",
]
