"""Passage vectors on disk and their search: through FAISS, and BM25 through bm25s."""

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
VECTORS, PROGRESS, FILE = "vectors.npy", "encoded.txt", "index.faiss"
EXACT = "Flat"  # the factory string that needs no index
A_CELL, CODES = 39, 256  # vectors to learn a cell from (FAISS warns below), codes of a byte
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


def build(vectors: Vectors, settings: IndexSettings, folder: Path, seed: int) -> None:
    """Builds the index of `settings.factory`; nothing for `Flat`, which reads the vectors.

    What it learns, from `trained_on` vectors drawn by the seed, is kept when a build is killed.
    Raises RetrieverError if the factory string and the vectors do not go together.
    """
    if settings.factory == EXACT:
        return
    learnt = folder / "learnt.faiss"
    if learnt.is_file():
        index = faiss.read_index(str(learnt))
    else:
        index = learn(vectors, settings, seed)
        write_index(index, learnt)
    for start, block in vectors.blocks():
        index.add(block)
        log.info("index: %d of %d passages", start + len(block), len(vectors))
    write_index(index, folder / FILE)
    learnt.unlink()


def learn(vectors: Vectors, settings: IndexSettings, seed: int) -> Any:
    """An index that has learnt its cells and codes, without vectors."""
    number = min(settings.trained_on, len(vectors))
    try:
        index: Any = faiss.index_factory(
            vectors.dimensions, settings.factory, faiss.METRIC_INNER_PRODUCT
        )
    except RuntimeError as error:
        raise RetrieverError(
            f"index.factory: FAISS makes no index of {vectors.dimensions} dimensions from "
            f"{settings.factory!r} ({reason(error)})."
        ) from None
    inverted = faiss.try_extract_index_ivf(index)
    cells = max(inverted.nlist if inverted else 0, CODES if "PQ" in settings.factory else 0)
    if number < A_CELL * cells:
        raise RetrieverError(
            f"index.factory {settings.factory!r} learns from {A_CELL * cells} vectors or more, "
            f"and there are {number}. Take fewer cells, raise index.trained_on, or search so few "
            f"exactly: index.factory: {EXACT}."
        )
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(vectors), number, replace=False, shuffle=False)
    index.train(vectors.take(np.sort(chosen)))
    return index


def reason(error: Exception) -> str:
    """FAISS's own words, without the place in its code."""
    return str(error).rsplit(": ", 1)[-1].strip()


def write_index(index: Any, path: Path) -> None:
    """Writes an index aside and renames it."""
    aside = path.with_name(f"{path.name}.new")
    faiss.write_index(index, str(aside))
    aside.replace(path)


class Index:
    """The vectors of a corpus with what finds them: a FAISS index, or None to look at all."""

    def __init__(self, vectors: Vectors, settings: IndexSettings, approximate: Any) -> None:
        self.vectors, self.settings, self.approximate = vectors, settings, approximate

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k passages with the largest dot product: places and scores `[queries, k]`.

        Best first. An approximate index finds `candidates` passages, whose scores are computed
        exactly from the vectors on disk. Raises RetrieverError if k exceeds the corpus or what the
        index finds, or queries have other dimensions or are not finite.
        """
        if self.approximate is None:
            return exact_search(queries, self.vectors, k)
        check_k(k, len(self.vectors))
        queries = checked(queries, self.vectors.dimensions)
        wanted = min(max(k, self.settings.candidates), len(self.vectors))
        step = max(1, BLOCK_BYTES // (4 * wanted * self.vectors.dimensions))
        scores = np.empty((len(queries), k), np.float32)
        places = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), step):
            asked = queries[start : start + step]
            found = self.approximate.search(asked, wanted)[1]
            if (least := int((found >= 0).sum(1).min())) < k:  # FAISS fills up with -1
                raise RetrieverError(
                    f"The index found only {least} of {k} passages for a question. "
                    f"Raise index.probes (now {self.settings.probes})."
                )
            exact = np.matmul(self.vectors.take(np.maximum(found, 0)), asked[:, :, None])[:, :, 0]
            exact[found < 0] = -np.inf
            scores[start : start + step], places[start : start + step] = best(exact, found, k)
        return places, scores


def open_index(vectors: Path, index: Path, settings: IndexSettings) -> Index:
    """What searches the vectors in one folder by the index in another, mapped into memory.

    Raises RetrieverError if the index is missing, damaged or made from other vectors.
    """
    opened, path = Vectors(vectors), index / FILE
    if settings.factory == EXACT:
        return Index(opened, settings, None)
    try:
        approximate: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise RetrieverError(
            f"The index {path} is missing or damaged ({reason(error)}). Build it again."
        ) from None
    if (approximate.d, approximate.ntotal) != (opened.dimensions, len(opened)):
        raise RetrieverError(
            f"The index {path} holds {approximate.ntotal} vectors of {approximate.d} dimensions, "
            f"{opened.path} {len(opened)} of {opened.dimensions}. Build it again."
        )
    if (inverted := faiss.try_extract_index_ivf(approximate)) is not None:
        inverted.nprobe = settings.probes
    return Index(opened, settings, approximate)


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
    """The index over them; nothing where they are searched exactly."""
    if device.is_main():
        chosen = IndexSettings(**settings["index"])
        build(Vectors(inputs["vectors"]), chosen, folder, settings["seed"])


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
        sample = queries["dev"][:RECALL_QUESTIONS]
        cuts = [] if passages.approximate is None else sorted({min(5, depth), depth})
        write_json(
            folder / "recall.json", {f"recall@{k}": recall(passages, sample, k) for k in cuts}
        )


def make_bm25(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """BM25's first DEPTH passages of the test questions."""
    if device.is_main():
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        texts = [passage_text(p) for p in corpus.passages]
        asked = [q.text for q in corpus.questions["test"]]
        found = bm25(asked, texts, min(DEPTH, len(texts)))
        write_arrays(folder / "candidates.safetensors", {"test": found})
