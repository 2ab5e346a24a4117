"""What attention rows should cost: a small model of work and memory, to hold measured values against.

The parts: matrices, tokens x weights; the fused kernel, tokens x tokens; our rows, rows x tokens. Eager attention also
keeps heads x tokens x tokens numbers a layer. `make bench` measures; notebook 03 shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FLOAT = 4  # bytes of a float32: rows, norms and softmax are kept in it whatever the reader's dtype


@dataclass(frozen=True)
class Shape:
    """A decoder: `size` is a head's, `kv_heads` the heads of keys and values, `widened` the weights of one feed-forward block."""

    layers: int
    heads: int
    size: int
    kv_heads: int
    widened: int

    @property
    def hidden(self) -> int:
        return self.heads * self.size

    @property
    def projections(self) -> int:
        """Weights that make query, key and value of one layer."""
        return self.hidden * (self.hidden + 2 * self.kv_heads * self.size)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a forward pass (without head), by what they are: `matrices` and the `kernel`'s T x T."""

    matrices: float
    kernel: float

    def seconds(self, rates: tuple[float, float]) -> float:
        """Seconds at `rates` (operations a second for matrices and kernel)."""
        return self.matrices / rates[0] + self.kernel / rates[1]


def fused_work(shape: Shape, tokens: int) -> Work:
    """The plain forward pass of one prompt. A kernel that skips what causality hides does half; its rate absorbs that."""
    weights = shape.projections + shape.hidden**2 + shape.widened
    return Work(2.0 * shape.layers * weights * tokens, 4.0 * shape.layers * shape.hidden * tokens**2)


def recorded_work(shape: Shape, tokens: int, rows: int) -> Work:
    """The recorded pass: the last layer stops before its kernel, and each layer's rows come on top."""
    plain = fused_work(shape, tokens)
    saved = 2.0 * (shape.hidden**2 + shape.widened) * tokens
    on_top = 2.0 * shape.layers * shape.hidden * rows * tokens
    return Work(plain.matrices - saved + on_top, plain.kernel * (shape.layers - 1) / shape.layers)


def recorded_bytes(shape: Shape, tokens: int, rows: int, kept: bool = False) -> int:
    """Memory beyond the plain forward pass: a layer's logits, softmax and their copies, and what is kept of it.

    `kept`: all of a Record; otherwise token contributions with and without norm, for one group of rows.
    """
    passing = 4 * shape.heads * rows * tokens * FLOAT
    record = shape.layers * shape.heads * (rows + 1) * tokens * FLOAT
    return passing + (record if kept else 2 * shape.layers * tokens * FLOAT)


def eager_bytes(shape: Shape, tokens: int, width: int = FLOAT) -> int:
    """Memory of `output_attentions`: every layer's T x T matrices, and three more in passing (logits, masked, softmax)."""
    return (shape.layers + 3) * shape.heads * tokens**2 * width


def fitted_rates(shape: Shape, tokens: list[int], seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Operations a second of matrices and kernel that explain measured plain forward passes best (relative least squares)."""
    work = np.array([[part.matrices, part.kernel] for part in (fused_work(shape, t) for t in tokens)])
    costs = np.linalg.lstsq(work / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    return float(1 / costs[0]), float(1 / costs[1])


def measured() -> pd.DataFrame:
    """The bench's table that ships with the package: kind, tokens, way, seconds, MB and what the model says of them."""
    return pd.read_csv(str(resources.files("ragkit").joinpath("assets/attention_bench.csv")))
