"""The search of passages: by their vectors through FAISS, and BM25 through bm25s."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
from numpy.typing import NDArray

from ragkit.data.files import write_arrays, write_json
from ragkit.data.passages import Passages, passage_text
from ragkit.data.questions import PARTS, PASSAGES, Corpus
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.retriever import Retriever
from ragkit.models.vectors import BLOCK_BYTES, Vectors, encode
from ragkit.settings import IndexSettings, RetrieverSettings

logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it sets its own, and reports much
DEPTH = 20  # passages kept of every ranking
FILE = "index.faiss"
EXACT = "Flat"  # the factory string that needs no index
A_CELL, CODES = 39, 256  # vectors to learn a cell from (FAISS warns below), codes of a byte
RECALL_QUESTIONS = 200  # of dev, searched exactly too, to see what an approximate index misses
Found = tuple[NDArray[np.int64], NDArray[np.float32]]  # places and scores [queries, k], best first


def checked(queries: NDArray[Any], shape: tuple[int, ...], k: int) -> NDArray[np.float32]:
    """Queries that k of so many passages of so many dimensions can be found for.

    Raises RetrieverError on others.
    """
    if k > shape[0]:
        raise RetrieverError(
            f"k = {k} passages a question asked for, but the corpus holds {shape[0]}. Lower k."
        )
    if queries.shape[1] != shape[1]:
        raise RetrieverError(
            f"Queries have {queries.shape[1]} dimensions, passages {shape[1]}: "
            "they come from different retrievers."
        )
    if not np.isfinite(queries).all():
        raise RetrieverError(
            "Some queries hold values that are not finite: the retriever is damaged, "
            "or its training went astray (lower distill.rate)."
        )
    return np.ascontiguousarray(queries, np.float32)


def search(queries: NDArray[np.float32], passages: NDArray[np.float32], k: int) -> Found:
    """The k passages with the largest dot product."""
    queries = checked(queries, passages.shape, k)
    flat = faiss.IndexFlatIP(passages.shape[1])
    flat.add(np.ascontiguousarray(passages))
    scores, found = flat.search(queries, k)
    return found, scores


def exact_search(queries: NDArray[np.float32], vectors: Vectors, k: int) -> Found:
    """What `search` finds, from vectors on disk, a block in memory at a time.

    Of equal scores the later place comes first, as in FAISS; which of those that tie for the last
    rank are found is left open.
    """
    queries = checked(queries, vectors.array.shape, k)
    scores, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, block in vectors.blocks():
        some = min(k, len(block))
        more, found = faiss.knn(queries, block, some, metric=faiss.METRIC_INNER_PRODUCT)
        places, scores = best(np.hstack([places, found + start]), np.hstack([scores, more]), k)
    return places, scores


def best(places: NDArray[np.int64], scores: NDArray[np.float32], k: int) -> Found:
    """The k best of each row, best first; of equal scores the later place."""
    order = np.lexsort((-places, -scores))[:, :k]
    return np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)


def build(vectors: Vectors, settings: IndexSettings, folder: Path, seed: int) -> None:
    """Builds the index of `settings.factory`; nothing for `Flat`, which reads the vectors.

    What it learnt is kept when a build is killed. Raises RetrieverError if the factory string and
    the vectors do not go together.
    """
    if settings.factory == EXACT:
        return
    learnt = folder / "learnt.faiss"
    if not learnt.is_file():
        write_index(learn(vectors, settings, seed), learnt)
    index = faiss.read_index(str(learnt))
    for _, block in vectors.blocks():
        index.add(block)
    write_index(index, folder / FILE)
    learnt.unlink()


def learn(vectors: Vectors, settings: IndexSettings, seed: int) -> Any:
    """An index without vectors, its cells and codes learnt from `trained_on` drawn by the seed."""
    number, kind = min(settings.trained_on, len(vectors)), faiss.METRIC_INNER_PRODUCT
    try:
        index: Any = faiss.index_factory(vectors.dimensions, settings.factory, kind)
    except RuntimeError as error:
        what = f"no index of {vectors.dimensions} dimensions from {settings.factory!r}"
        raise RetrieverError(f"index.factory: FAISS makes {what} ({reason(error)}).") from None
    inverted = faiss.try_extract_index_ivf(index)
    cells = max(inverted.nlist if inverted else 0, CODES if "PQ" in settings.factory else 0)
    if number < A_CELL * cells:
        raise RetrieverError(
            f"index.factory {settings.factory!r} learns from {A_CELL * cells} vectors or more, "
            f"and there are {number}. Take fewer cells, raise index.trained_on, or search so few "
            f"exactly: index.factory: {EXACT}."
        )
    drawn = np.random.default_rng(seed).choice(len(vectors), number, replace=False, shuffle=False)
    index.train(vectors.take(np.sort(drawn)))
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

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """The k passages with the largest dot product.

        An approximate index finds `candidates`, which are scored exactly from the vectors on disk.
        Raises RetrieverError if k exceeds the corpus or what the index finds, or queries have other
        dimensions or are not finite.
        """
        if self.approximate is None:
            return exact_search(queries, self.vectors, k)
        queries = checked(queries, self.vectors.array.shape, k)
        wanted = min(max(k, self.settings.candidates), len(self.vectors))
        step = max(1, BLOCK_BYTES // (4 * wanted * self.vectors.dimensions))
        parts = [(np.empty((0, k), np.int64), np.empty((0, k), np.float32))]
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
            parts.append(best(found, exact, k))
        places, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
        return places, scores


def open_index(vectors: Path, index: Path, settings: IndexSettings) -> Index:
    """What searches the vectors in one folder by the index in another, mapped into memory.

    Raises RetrieverError if the index is missing, damaged or made from other vectors.
    """
    opened, path = Vectors(vectors), index / FILE
    if settings.factory == EXACT:
        return Index(opened, settings, None)
    try:
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        approximate: Any = faiss.read_index(str(path), flags)
    except RuntimeError as error:
        why = f"is missing or damaged ({reason(error)})"
        raise RetrieverError(f"The index {path} {why}. Build it again.") from None
    holds = (approximate.ntotal, approximate.d)
    if holds != opened.array.shape:
        raise RetrieverError(
            f"The index {path} holds {holds} vectors and dimensions, {opened.path} "
            f"{opened.array.shape}. Build it again."
        )
    if (inverted := faiss.try_extract_index_ivf(approximate)) is not None:
        inverted.nprobe = settings.probes
    return Index(opened, settings, approximate)


def recall(index: Index, queries: NDArray[np.float32], k: int) -> float:
    """The share of the exact k best passages that the index finds among its own k."""
    exact, found = exact_search(queries, index.vectors, k)[0], index.search(queries, k)[0]
    return float((exact[:, :, None] == found[:, None, :]).any(2).mean())


def bm25(queries: Sequence[str], passages: Sequence[str], k: int) -> NDArray[np.int64]:
    """The places `[queries, k]` of the best passages by BM25 (Lucene's variant, k1 1.5, b 0.75)."""
    if k > len(passages):
        raise RetrieverError(f"k = {k}, but there are {len(passages)} passages. Lower k.")
    model, quiet = bm25s.BM25(), {"show_progress": False}
    model.index(bm25s.tokenize(passages, stopwords="en", **quiet), **quiet)
    asked = bm25s.tokenize(queries, stopwords="en", **quiet)
    return model.retrieve(asked, k=k, **quiet)[0].astype(np.int64)


def make_vectors(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The passages' vectors."""
    encoding = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(inputs["retriever"] / "model", encoding)
    passages = Passages(inputs["passages"] / PASSAGES)
    encode(passages, retriever, IndexSettings(**settings["index"]), folder)


def make_index(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The index over them; nothing where they are searched exactly."""
    if device.is_main():
        chosen = IndexSettings(**settings["index"])
        build(Vectors(inputs["vectors"]), chosen, folder, settings["seed"])


def make_candidates(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The first DEPTH passages of every question, and the share of the true ones found."""
    corpus = Corpus.load("", inputs["passages"], inputs["questions"])
    index = open_index(inputs["vectors"], inputs["index"], IndexSettings(**settings["index"]))
    encoding = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(inputs["retriever"] / "model", encoding)
    queries = {part: retriever.encode([q.text for q in corpus.questions[part]]) for part in PARTS}
    if device.is_main():
        depth = min(DEPTH, len(corpus.passages))
        found = {part: index.search(asked, depth)[0] for part, asked in queries.items()}
        write_arrays(folder / "candidates.safetensors", found)
        sample = queries["dev"][:RECALL_QUESTIONS]
        cuts = [] if index.approximate is None else sorted({min(5, depth), depth})
        write_json(folder / "recall.json", {f"recall@{k}": recall(index, sample, k) for k in cuts})


def make_bm25(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """BM25's first DEPTH passages of the test questions."""
    if device.is_main():
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        texts = [passage_text(p) for p in corpus.passages]
        asked = [q.text for q in corpus.questions["test"]]
        found = bm25(asked, texts, min(DEPTH, len(texts)))
        write_arrays(folder / "candidates.safetensors", {"test": found})
