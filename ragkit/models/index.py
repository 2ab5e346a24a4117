"""Passage vectors on disk and their search: exact through FAISS, and BM25 through bm25s."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
from numpy.typing import NDArray

from ragkit.data.files import write_arrays, write_json, write_whole
from ragkit.data.passages import Passages, passage_text
from ragkit.data.questions import PARTS, PASSAGES, Corpus
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.retriever import Retriever
from ragkit.settings import IndexSettings, RetrieverSettings

logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it sets its own, and reports much
log = logging.getLogger(__name__)

DEPTH = 20  # passages kept of every ranking
VECTORS, PROGRESS = "vectors.npy", "encoded.txt"
BLOCK_BYTES = 2**26  # of float32 values handed out at once
ALIGNED = (
    1024  # rows, as many as FAISS multiplies at a time: blocks are added up as one array would be
)
RECALL_QUESTIONS = 200  # of dev, searched exactly too, to see what an approximate index misses


class Vectors:
    """The vectors of a corpus, `[len(self), dimensions]`, of which only what is asked for is read
    from disk.

    Raises RetrieverError, which names the file, if it is missing, damaged or half encoded.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VECTORS
        if not self.path.is_file() or (folder / PROGRESS).exists():
            raise RetrieverError(f"{self.path} is missing or half made. Encode the passages first.")
        try:
            self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise RetrieverError(
                f"{self.path} is damaged ({str(error).splitlines()[0]}). "
                "Remove it and encode the passages again."
            ) from None
        self.dimensions = int(self.array.shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def take(self, places: NDArray[np.integer]) -> NDArray[np.float32]:
        """The vectors at `places`, an array of any shape: float32 `[*places.shape, dimensions]`,
        read front to back.
        """
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
        """The place of the first row and float32 rows, block by block, none larger than BLOCK_BYTES
        (or ALIGNED rows).
        """
        step = max(1, BLOCK_BYTES // (4 * self.dimensions) // ALIGNED) * ALIGNED
        for first in range(0, len(self), step):
            yield first, np.array(self.array[first : first + step], np.float32)


def encode(
    passages: Sequence[Any], retriever: Retriever, settings: IndexSettings, folder: Path
) -> None:
    """Writes the passages' vectors to `folder`; a killed encoding goes on where its last part was
    written.
    """
    path, progress = folder / VECTORS, folder / PROGRESS
    done = 0
    if progress.is_file() and path.is_file():
        done = int(progress.read_text("utf8"))
    done = device.agreed(done)
    array: Any = np.lib.format.open_memmap(path, "r+") if done and device.is_main() else None
    for start in range(done, len(passages), settings.shard):
        texts = [passage_text(p) for p in passages[start : start + settings.shard]]
        made = retriever.encode(texts, "passage").astype(settings.dtype)
        if not np.isfinite(made).all():
            hint = (
                "set index.dtype to float32 (float16 ends at 65504)"
                if settings.dtype == "float16"
                else ""
            )
            raise RetrieverError(
                f"{path}: some vectors hold values that are not finite: "
                f"{hint or 'the retriever is damaged'}."
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


def check_k(k: int, n_passages: int) -> None:
    if k > n_passages:
        raise RetrieverError(
            f"k = {k} passages a question asked for, but the corpus holds {n_passages}. Lower k."
        )


def checked(queries: NDArray[np.floating], dimensions: int) -> NDArray[np.float32]:
    """Queries that can be searched for; raises RetrieverError on others."""
    if queries.shape[1] != dimensions:
        raise RetrieverError(
            f"Queries have {queries.shape[1]} dimensions, passages {dimensions}: "
            "they come from different retrievers."
        )
    if not np.isfinite(queries).all():
        raise RetrieverError(
            "Some queries hold values that are not finite: the retriever is damaged, "
            "or its training went astray (lower distill.rate)."
        )
    return np.ascontiguousarray(queries, np.float32)


def search(
    queries: NDArray[np.float32], passages: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k passages with the largest dot product: places and scores `[queries, k]`, best first."""
    check_k(k, len(passages))
    flat = faiss.IndexFlatIP(passages.shape[1])
    flat.add(np.ascontiguousarray(passages))
    scores, found = flat.search(checked(queries, passages.shape[1]), k)
    return found, scores


def exact_search(
    queries: NDArray[np.float32], vectors: Vectors, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What `search` finds, from vectors on disk, a block in memory at a time.

    Of equal scores the later place comes first, as in FAISS; which of those that tie for the last
    rank are found is left open.
    """
    check_k(k, len(vectors))
    queries = checked(queries, vectors.dimensions)
    scores, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, block in vectors.blocks():
        some = min(k, len(block))
        more, found = faiss.knn(queries, block, some, metric=faiss.METRIC_INNER_PRODUCT)
        scores, places = best(np.hstack([scores, more]), np.hstack([places, found + start]), k)
    return places, scores


def best(
    scores: NDArray[np.float32], places: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best of each row, best first; of equal scores the later place."""
    order = np.lexsort((-places, -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


class Index:
    """The vectors of a corpus with what finds them."""

    def __init__(self, vectors: Vectors, settings: IndexSettings) -> None:
        self.vectors, self.settings = vectors, settings

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k passages with the largest dot product: places and scores `[queries, k]`, best
        first.

        Raises RetrieverError if k exceeds the corpus, or queries have other dimensions or are not
        finite.
        """
        return exact_search(queries, self.vectors, k)


def open_index(vectors: Path, index: Path, settings: IndexSettings) -> Index:
    """What searches the vectors of one folder by the index of another, which is empty for the exact
    one.
    """
    return Index(Vectors(vectors), settings)


def recall(index: Index, queries: NDArray[np.float32], k: int) -> float:
    """The share of the exact k best passages, over all queries, that the index finds among its own
    k.
    """
    exact, found = exact_search(queries, index.vectors, k)[0], index.search(queries, k)[0]
    return float((exact[:, :, None] == found[:, None, :]).any(2).mean())


def bm25(queries: Sequence[str], passages: Sequence[str], k: int) -> NDArray[np.int64]:
    """The k passages with the best BM25 score (Lucene's variant, k1 1.5, b 0.75): places `[queries,
    k]`.
    """
    check_k(k, len(passages))
    model = bm25s.BM25()
    model.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize(queries, stopwords="en", show_progress=False)
    return model.retrieve(asked, k=k, show_progress=False)[0].astype(np.int64)


def make_vectors(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The passages' vectors."""
    retriever = RetrieverSettings(**settings["retriever"])
    encode(
        Passages(inputs["passages"] / PASSAGES),
        Retriever.load(inputs["retriever"] / "model", retriever),
        IndexSettings(**settings["index"]),
        folder,
    )


def make_index(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Nothing: exact search reads the vectors themselves."""


def make_candidates(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The first DEPTH passages of every question, by part, and how many of the true ones the index
    finds.
    """
    corpus = Corpus.load("", inputs["passages"], inputs["questions"])
    passages = open_index(inputs["vectors"], inputs["index"], IndexSettings(**settings["index"]))
    retriever = Retriever.load(
        inputs["retriever"] / "model", RetrieverSettings(**settings["retriever"])
    )
    queries = {part: retriever.encode([q.text for q in corpus.questions[part]]) for part in PARTS}
    if device.is_main():
        depth = min(DEPTH, len(corpus.passages))
        found = {part: passages.search(asked, depth)[0] for part, asked in queries.items()}
        write_arrays(folder / "candidates.safetensors", found)
        write_json(folder / "recall.json", {})


def make_bm25(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """BM25's first DEPTH passages of the test questions."""
    if device.is_main():
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        texts = [passage_text(p) for p in corpus.passages]
        asked = [q.text for q in corpus.questions["test"]]
        found = bm25(asked, texts, min(DEPTH, len(texts)))
        write_arrays(folder / "candidates.safetensors", {"test": found})
