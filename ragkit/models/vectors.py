"""Passage vectors on disk: one array, mapped into memory when it is read."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.data.files import write_whole
from ragkit.data.passages import Passage, passage_text
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.retriever import Retriever
from ragkit.settings import IndexSettings

log = logging.getLogger(__name__)
VECTORS, PROGRESS = "vectors.npy", "encoded.txt"
BLOCK_BYTES = 2**26  # of float32 values handed out at once
ALIGNED = 1024  # rows, as many as FAISS multiplies at a time: blocks add up as one array would


class Vectors:
    """The vectors of a corpus, `[len(self), dimensions]`; only those asked for are read from disk.

    Raises RetrieverError, which names the file, if it is missing, damaged or half encoded.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VECTORS
        if not self.path.is_file() or (folder / PROGRESS).exists():
            raise RetrieverError(f"{self.path} is missing or half made. Encode the passages first.")
        try:
            self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise RetrieverError(f"{self.path} is damaged ({error}). Encode again.") from None
        self.dimensions = int(self.array.shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def take(self, places: NDArray[np.integer]) -> NDArray[np.float32]:
        """The vectors at `places` `[...]`: `[..., dimensions]`, read from front to back."""
        wanted = places.reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise RetrieverError(
                f"{self.path} holds {len(self)} vectors; "
                f"those at {wanted.min()} to {wanted.max()} were asked for."
            )
        taken = np.empty((wanted.size, self.dimensions), np.float32)
        order = np.argsort(wanted, kind="stable")
        taken[order] = self.array[wanted[order]]
        return taken.reshape(*places.shape, self.dimensions)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The place of the first row and the rows, block by block of about BLOCK_BYTES."""
        step = max(1, BLOCK_BYTES // (4 * self.dimensions) // ALIGNED) * ALIGNED
        for first in range(0, len(self), step):
            yield first, np.array(self.array[first : first + step], np.float32)


def encode(
    passages: Sequence[Passage], retriever: Retriever, settings: IndexSettings, folder: Path
) -> None:
    """Writes the passages' vectors; a killed encoding goes on behind its last whole shard."""
    path, progress = folder / VECTORS, folder / PROGRESS
    done = int(progress.read_text("utf8")) if progress.is_file() and path.is_file() else 0
    done = device.agreed(done)
    array: Any = np.lib.format.open_memmap(path, "r+") if done and device.is_main() else None
    for start in range(done, len(passages), settings.shard):
        texts = [passage_text(p) for p in passages[start : start + settings.shard]]
        made = retriever.encode(texts, "passage").astype(settings.dtype)
        if not np.isfinite(made).all():
            raise RetrieverError(
                f"{path}: some vectors hold values that are not finite. float16 ends at 65504 (set "
                "index.dtype to float32); else the retriever is damaged."
            )
        if device.is_main():
            if array is None:
                write_whole(progress, "0")
                shape = (len(passages), made.shape[1])
                array = np.lib.format.open_memmap(path, "w+", made.dtype, shape)
            array[start : start + len(texts)] = made
            array.flush()
            write_whole(progress, str(start + len(texts)))
            log.info("vectors: %d of %d passages", start + len(texts), len(passages))
    if device.is_main():
        progress.unlink(missing_ok=True)
    device.wait()
