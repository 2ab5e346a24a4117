"""Passage vectors, on disk and mapped into memory, and their search: FAISS, and BM25 beside it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ragkit.data.corpus import PARTS, PASSAGES, Corpus, Passages, passage_text
from ragkit.data.files import write_whole
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.retriever import Retriever
from ragkit.settings import IndexSettings

logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it sets its own, and reports much
log = logging.getLogger(__name__)
DEPTH = 20  # passages kept of every ranking
VECTORS, PROGRESS, FILE = "vectors.npy", "encoded.txt", "index.faiss"
FLAT = IndexSettings()  # passages are compared one by one, without an index
ADDED = 2**17  # vectors that an index is given at a time: FAISS makes float32 copies
Places = NDArray[np.int64]


class Index:
    """The vectors of a corpus `[passages, dimensions]`, in memory or mapped into it from a file,
    and their search: exact, or of the `candidates` that an `approximate` FAISS index finds."""

    def __init__(self, vectors: NDArray[Any], settings: IndexSettings = FLAT) -> None:
        self.vectors, self.settings = vectors, settings
        self.approximate: Any = None

    @classmethod
    def open(cls, vectors: Path, settings: IndexSettings = FLAT, index: Path = Path()) -> "Index":
        """Vectors of a folder, with the index that `settings` ask for. RetrieverError: damage."""
        path = vectors / VECTORS
        try:
            opened = cls(np.load(path, mmap_mode="r", allow_pickle=False), settings)
            if settings.factory != FLAT.factory:
                path = index / FILE
                flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
                opened.approximate = faiss.read_index(str(path), flags)
                if inverted := faiss.try_extract_index_ivf(opened.approximate):
                    inverted.nprobe = settings.probes
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            why = f"{path} is missing or damaged ({error}). Make it again."
            raise RetrieverError(why) from None
        return opened

    def take(self, places: NDArray[np.integer]) -> NDArray[np.float32]:
        """The vectors at `places` `[...]`: `[..., dimensions]`, read from front to back."""
        unique, back = np.unique(places, return_inverse=True)
        return self.vectors[unique].astype(np.float32)[back.reshape(places.shape)]

    def search(self, queries: NDArray[np.float32], k: int) -> Places:
        """The k passages with the largest dot product with each query `[queries, k]`, best first.
        FAISS puts the later place of equal scores first; which of those that tie for the last rank
        are found is left open. Raises RetrieverError where fewer than k can be found."""
        count, size = self.vectors.shape
        if k > count or queries.shape[1] != size:
            asked = f"k = {k} passages for queries of {queries.shape[1]} dimensions"
            told = f"there are {count} of {size}. Lower k, or encode both with the same retriever."
            raise RetrieverError(f"{asked}, but {told}")
        if self.approximate is None:  # float32 vectors are read where they lie, others copied
            return faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
        wanted, best = min(max(k, self.settings.candidates), count), list[Places]()
        for query, row in zip(queries, self.approximate.search(queries, wanted)[1], strict=True):
            found = row[row >= 0]  # FAISS fills up with -1
            if len(found) < k:
                told = f"The index found only {len(found)} of {k} passages for a question. Raise "
                raise RetrieverError(f"{told}index.probes (now {self.settings.probes}).")
            best.append(found[np.lexsort((-found, -(self.take(found) @ query)))[:k]])
        return np.array(best)


def bm25(queries: Sequence[str], passages: Sequence[str], k: int) -> Places:
    """The places `[queries, k]` of the best passages by BM25 (Lucene's variant, k1 1.5, b 0.75)."""
    model, quiet = bm25s.BM25(), {"show_progress": False}
    model.index(bm25s.tokenize(passages, stopwords="en", **quiet), **quiet)
    asked = bm25s.tokenize(queries, stopwords="en", **quiet)
    return model.retrieve(asked, k=k, **quiet)[0].astype(np.int64)


def make_vectors(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The passages' vectors, shard by shard; RetrieverError if too large for `index.dtype`."""
    retriever = Retriever.open(inputs, settings)
    chosen, passages = IndexSettings(**settings["index"]), Passages(inputs["passages"] / PASSAGES)
    path, progress = folder / VECTORS, folder / PROGRESS
    done = device.agreed(int(progress.read_text("utf8")) if progress.is_file() else 0)
    for start in range(done, len(passages), chosen.shard):
        texts = [passage_text(p) for p in passages[start : start + chosen.shard]]
        with np.errstate(over="ignore"):
            made = retriever.encode(texts, "passage").astype(chosen.dtype)
        if not np.isfinite(made).all():
            raise RetrieverError(f"Vectors overflow {chosen.dtype}: set index.dtype to float32.")
        if device.is_main():
            shape, end = (len(passages), made.shape[1]), start + len(texts)
            array: Any = open_memmap(path, "r+" if start else "w+", made.dtype, shape)
            array[start:end] = made
            array.flush()
            write_whole(progress, str(end))
            log.info("vectors: %d of %d passages", end, len(passages))
    if device.is_main():
        progress.unlink(missing_ok=True)


def make_index(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The index of `factory`, learnt from `trained_on` vectors; nothing for `Flat`. Raises
    RetrieverError if the factory string and the vectors do not go together."""
    chosen, corpus = IndexSettings(**settings["index"]), Index.open(inputs["vectors"])
    if chosen.factory == FLAT.factory or not device.is_main():
        return
    count, size = corpus.vectors.shape
    rng, number = np.random.default_rng(settings["seed"]), min(chosen.trained_on, count)
    try:
        index: Any = faiss.index_factory(size, chosen.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(corpus.take(np.sort(rng.choice(count, number, replace=False, shuffle=False))))
    except RuntimeError as error:
        why = str(error).rsplit(": ", 1)[-1].strip()  # without the place in FAISS's code
        what = f"no index from {chosen.factory!r} and {number} vectors of {size} dimensions"
        told = f"index.factory: FAISS makes {what} ({why}). Take another, or Flat."
        raise RetrieverError(told) from None
    for start in range(0, count, ADDED):
        index.add(corpus.vectors[start : start + ADDED])
    faiss.write_index(index, str(folder / FILE))


def make_candidates(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The first DEPTH passages of every question of every part."""
    corpus = Corpus.load("", inputs["passages"], inputs["questions"])
    index = Index.open(inputs["vectors"], IndexSettings(**settings["index"]), inputs["index"])
    retriever = Retriever.open(inputs, settings)
    queries = {part: retriever.encode([q.text for q in corpus.questions[part]]) for part in PARTS}
    if device.is_main():
        depth = min(DEPTH, len(corpus.passages))
        found = {part: index.search(asked, depth) for part, asked in queries.items()}
        device.write(folder, {"candidates.safetensors": found})


def make_bm25(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """BM25's first DEPTH passages of the test questions."""
    if device.is_main():
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        texts = [passage_text(p) for p in corpus.passages]
        asked = [q.text for q in corpus.questions["test"]]
        found = bm25(asked, texts, min(DEPTH, len(texts)))
        device.write(folder, {"candidates.safetensors": {"test": found}})
