"""Exact attention rows of any reader. This folder works alone, under any name."""

from .kernels import AttentionError
from .record import Record, contributions, observe, observe_cross, passage_scores, pooled, record

__all__ = ["AttentionError", "Record", "contributions", "observe", "observe_cross"]
__all__ += ["passage_scores", "pooled", "record"]
