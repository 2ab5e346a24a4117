"""Passage vectors on disk: shards of `.npy`, memory-mapped when opened, so that millions of them need no memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit import RagkitError

BLOCK = 50_000  # vectors read at a time where all are looked at


class VectorsError(RagkitError):
    """Stored vectors that are damaged or do not belong together; the message names the file."""


def path_of(folder: Path, number: int) -> Path:
    return folder / f"vectors-{number:05}.npy"


def shards(folder: Path) -> list[int]:
    """The numbers of the shards that are whole: one is renamed into its place only when all of it is written."""
    return sorted(int(path.stem.removeprefix("vectors-")) for path in folder.glob("vectors-*.npy"))


def write_shard(folder: Path, number: int, vectors: NDArray[Any]) -> None:
    """Writes one shard `[rows, dimensions]` aside and renames it."""
    aside = folder / f"shard-{number:05}.new"
    with open(aside, "wb") as file:
        np.save(file, vectors)
    aside.replace(path_of(folder, number))


class Vectors:
    """The vectors of a folder of shards `[passages, dimensions]`; every shard but the last has the same number of rows.

    Raises VectorsError if a shard is missing, damaged, or of another shape than the rest.
    """

    def __init__(self, folder: Path) -> None:
        numbers = shards(folder)
        if not numbers or numbers != list(range(len(numbers))):
            missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
            raise VectorsError(f"{path_of(folder, missing)} is missing. Remove the stage's folder, then give the same command.")
        self.parts = [self.opened(path_of(folder, number)) for number in numbers]
        self.rows, self.dimensions = self.parts[0].shape
        for number, part in enumerate(self.parts):
            fits = len(part) == self.rows if number + 1 < len(self.parts) else 0 < len(part) <= self.rows
            if part.shape[1] != self.dimensions or part.dtype != self.parts[0].dtype or not fits:
                raise VectorsError(f"{path_of(folder, number)} holds {part.shape} {part.dtype}, the first shard {self.parts[0].shape} {self.parts[0].dtype}.")

    @staticmethod
    def opened(path: Path) -> NDArray[Any]:
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise VectorsError(f"{path} is damaged ({error}). Remove the stage's folder, then give the same command.") from None
        if part.ndim != 2 or part.dtype.kind != "f":
            raise VectorsError(f"{path} holds no vectors: {part.dtype} {part.shape}.")
        return part

    def __len__(self) -> int:
        return self.rows * (len(self.parts) - 1) + len(self.parts[-1])

    def take(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at `places` (of any shape) `[..., dimensions]`; only these rows are read."""
        flat = np.asarray(places).reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"places {flat.min()} to {flat.max()} of {len(self)} vectors")
        made = np.empty((len(flat), self.dimensions), dtype=np.float32)
        owners = flat // self.rows
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            mine = mine[np.argsort(flat[mine])]  # in the order of the disk
            made[mine] = self.parts[number][flat[mine] - number * self.rows]
        return made.reshape(*np.shape(places), self.dimensions)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All vectors, a block at a time, with the place of its first."""
        for number, part in enumerate(self.parts):
            for start in range(0, len(part), BLOCK):
                yield number * self.rows + start, np.ascontiguousarray(part[start : start + BLOCK], dtype=np.float32)
