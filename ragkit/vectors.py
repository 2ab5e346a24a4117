"""stub"""

from __future__ import annotations
from pathlib import Path
from collections.abc import Iterator
from typing import Any
import numpy as np
from numpy.typing import NDArray


def shards(folder: Path) -> list[int]:
    return sorted(int(p.stem.split("-")[1]) for p in folder.glob("vectors-*.npy"))


def write_shard(folder: Path, number: int, vectors: NDArray[Any]) -> None:
    np.save(folder / f"vectors-{number:05}.npy", vectors)


class Vectors:
    def __init__(self, folder: Path) -> None:
        self.all = np.concatenate([np.load(folder / f"vectors-{n:05}.npy") for n in shards(folder)]).astype(np.float32)
        self.dimensions = self.all.shape[1]

    def __len__(self) -> int:
        return len(self.all)

    def take(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.all[places]
