"""Passage vectors on disk: shards of `.npy` files, mapped into memory when read, so that millions of passages need little of it."""

from __future__ import annotations

from ragkit.errors import RagkitError, VectorsError

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 2**26  # of float32 values handed out at once
ALIGNED = 1024  # rows: FAISS multiplies as many at a time, so that blocks of a multiple are added up as one array would be
KINDS = (np.dtype("<f4"), np.dtype("<f2"))



def write_array(path: Path, array: NDArray[Any]) -> None:
    """Writes an array as `.npy` aside and renames it: the old file or the new one, never half of one."""
    aside = path.with_name(f"{path.name}.new")
    with open(aside, "wb") as file:  # np.save would append .npy to a name
        np.save(file, array, allow_pickle=False)
    aside.replace(path)


def write_shard(folder: Path, number: int, vectors: NDArray[Any]) -> None:
    """Writes the vectors `[rows, dimensions]`, float32 or float16, of shard `number` (from 0 on), and makes the folder.

    All shards but the last must have the same number of rows: `Vectors` checks it.
    """
    path = folder / f"{number:05d}.npy"
    if vectors.ndim != 2 or not vectors.size or vectors.dtype not in KINDS:
        raise VectorsError(f"{path}: expected float32 or float16 vectors [rows, dimensions], got {vectors.dtype} {list(vectors.shape)}.")
    if not np.isfinite(vectors).all():
        hint = " float16 ends at 65504: set index.dtype to float32." if vectors.dtype == KINDS[1] else " The retriever is damaged."
        raise VectorsError(f"{path}: some vectors to be written hold values that are not finite.{hint}")
    folder.mkdir(parents=True, exist_ok=True)
    write_array(path, vectors)


def numbered(folder: Path) -> dict[int, Path]:
    """The files of shards by their number, in order, whole or not."""
    return dict(sorted((int(path.stem), path) for path in folder.glob("*.npy") if path.stem.isdecimal()))


def open_shard(path: Path) -> NDArray[Any]:
    """One shard `[rows, dimensions]`, mapped: its rows are read from disk when they are looked at."""
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VectorsError(f"{path} is no whole shard of vectors ({str(error).splitlines()[0]}). Remove it and encode the passages again.") from None
    if not isinstance(shard, np.memmap) or shard.ndim != 2 or shard.dtype not in KINDS:
        raise VectorsError(f"{path} holds something other than float32 or float16 vectors [rows, dimensions]. Remove it and encode the passages again.")
    return shard


def shards(folder: Path) -> list[int]:
    """The numbers of the shards that are whole, in order: what an interrupted encoding need not do again."""
    whole = []
    for number, path in numbered(folder).items():
        try:
            open_shard(path)
        except VectorsError:
            continue
        whole.append(number)
    return whole


class Vectors:
    """The vectors of a folder of shards as one array `[len(self), dimensions]` of which only what is asked for is read.

    Shards are mapped anew each time: an encoding of thousands of shards needs no more open files than one of two, and
    memory that was read through a mapping goes back with it. Raises VectorsError naming the file that is missing, damaged
    or unlike the others.
    """

    def __init__(self, folder: Path) -> None:
        files = numbered(folder)
        if not files:
            raise VectorsError(f"{folder} holds no vectors. Encode the passages first.")
        for number in range(max(files)):
            if number not in files:
                raise VectorsError(f"{folder / f'{number:05d}.npy'} is missing, though later shards are there. Encode the passages again: only it is made.")
        self.folder, self.files = folder, list(files.values())
        first = open_shard(self.files[0])
        (self.rows, self.dimensions), self.dtype = first.shape, first.dtype
        total = 0
        for path in self.files:
            shard = open_shard(path)
            if (shard.shape[1], shard.dtype) != (self.dimensions, self.dtype):
                raise VectorsError(
                    f"{path} holds {shard.dtype} vectors of {shard.shape[1]} dimensions, {self.files[0].name} {self.dtype} ones of {self.dimensions}: "
                    "they were not encoded by the same retriever and settings. Encode the passages again into an empty folder."
                )
            if len(shard) > self.rows or (len(shard) < self.rows and path is not self.files[-1]):
                raise VectorsError(
                    f"{path} has {len(shard)} rows, {self.files[0].name} {self.rows}: all shards but the last must have the same number. "
                    "Encode the passages again into an empty folder."
                )
            total += len(shard)
        self.total = total

    def __len__(self) -> int:
        return self.total

    def take(self, places: NDArray[np.integer]) -> NDArray[np.float32]:
        """The vectors at `places`, an array of any shape: float32 `[*places.shape, dimensions]`. Only these rows are read, front to back."""
        wanted = places.reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise VectorsError(f"{self.folder} holds {len(self)} vectors; those at {wanted.min()} to {wanted.max()} were asked for.")
        taken = np.empty((wanted.size, self.dimensions), np.float32)
        order = np.argsort(wanted, kind="stable")
        shard_of = wanted[order] // self.rows
        for number in np.unique(shard_of):
            here = order[np.searchsorted(shard_of, number) : np.searchsorted(shard_of, number, "right")]
            taken[here] = open_shard(self.files[number])[wanted[here] - number * self.rows]
        return taken.reshape(*places.shape, self.dimensions)

    def blocks(self, start: int = 0) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The place of the first row and float32 rows, block by block, from the block on that begins at `start`.

        No block crosses a shard's end or is larger than BLOCK_BYTES (or ALIGNED rows, if those are more). The blocks do not
        depend on `start`: work done block by block can be gone on with.
        """
        step = max(1, BLOCK_BYTES // (4 * self.dimensions) // ALIGNED) * ALIGNED
        for number, path in enumerate(self.files):
            shard = open_shard(path)
            for first in range(0, len(shard), step):
                if (place := number * self.rows + first) >= start:
                    yield place, np.array(shard[first : first + step], np.float32)
