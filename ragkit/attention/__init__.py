"""Exact attention rows of any reader, and their cost. This folder works alone, under any name."""

from .kernels import AttentionError
from .record import Record, observe, observe_cross, record, record_cross
from .scores import contributions, passage_scores, pooled

__all__ = ["AttentionError", "Record", "contributions", "observe", "observe_cross"]
__all__ += ["passage_scores", "pooled", "record", "record_cross"]
