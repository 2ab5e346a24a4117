"""What attention rows should cost: a model of work and memory, to hold measured values to.

The parts: matrices, tokens x weights; the fused kernel, tokens x tokens; our rows, rows x tokens.
"""

from dataclasses import dataclass
from importlib import resources

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FLOAT = 4  # bytes of a float32: rows, norms and softmax are kept in it whatever the reader's dtype
Work = NDArray[np.float64]  # floating-point operations of matrices and of the kernel, without head


@dataclass(frozen=True)
class Shape:
    """A decoder: `size` is a head's, `widened` the weights of one feed-forward block."""

    layers: int
    heads: int
    size: int
    kv_heads: int
    widened: int

    @property
    def hidden(self) -> int:
        """Numbers of a token's state."""
        return self.heads * self.size


def fused_work(shape: Shape, tokens: int) -> Work:
    """The plain pass of one prompt (what the kernel saves by causality, its rate absorbs)."""
    weights = 2 * shape.hidden * (shape.hidden + shape.kv_heads * shape.size) + shape.widened
    matrices = 2.0 * shape.layers * weights * tokens
    return np.array([matrices, 4.0 * shape.layers * shape.hidden * tokens**2])


def recorded_work(shape: Shape, tokens: int, rows: int) -> Work:
    """The recorded pass: the last layer stops before its kernel, each layer's rows come on top."""
    matrices, kernel = fused_work(shape, tokens)
    saved = 2.0 * (shape.hidden**2 + shape.widened) * tokens
    on_top = 2.0 * shape.layers * shape.hidden * rows * tokens
    return np.array([matrices - saved + on_top, kernel * (shape.layers - 1) / shape.layers])


def recorded_bytes(shape: Shape, tokens: int, rows: int) -> int:
    """Memory beyond the plain pass: a layer's logits, softmax and copies, and contributions."""
    return (4 * shape.heads * rows + 2 * shape.layers) * tokens * FLOAT


def eager_bytes(shape: Shape, tokens: int) -> int:
    """Memory of `output_attentions`: every layer's T x T matrices, and three more in passing."""
    return (shape.layers + 3) * shape.heads * tokens**2 * FLOAT


def fitted_rates(shape: Shape, tokens: list[int], seconds: NDArray[np.float64]) -> Work:
    """Operations a second that explain measured plain passes best (relative least squares)."""
    work = np.array([fused_work(shape, t) for t in tokens])
    return 1 / np.linalg.lstsq(work / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]


def measured() -> pd.DataFrame:
    """The bench's table that ships with the package: kind, tokens, way, seconds, MB, modelled."""
    return pd.read_csv(str(resources.files(__package__).joinpath("bench.csv")))
