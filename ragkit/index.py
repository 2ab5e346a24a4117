"""Search: dense search through FAISS, exact or approximate over vectors on disk, and BM25 through bm25s."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
from numpy.typing import NDArray

from ragkit import RagkitError
from ragkit.profile import IndexSettings
from ragkit.vectors import Vectors

logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it sets its own level, and reports every step
log = logging.getLogger(__name__)

FILE = "index.faiss"
SAVED_EVERY = 1_000_000  # vectors added between two writes of a growing index: often enough to lose little, seldom enough to write little
PER_LIST = 39  # training vectors that FAISS asks for in each cell
RESCORED = 128  # queries scored again at a time: their candidates' vectors are in memory

Found = tuple[NDArray[np.int64], NDArray[np.float32]]  # places and scores `[queries, k]`, best first


class SearchError(RagkitError):
    """A search that cannot be done."""


def check_k(k: int, n_passages: int) -> None:
    if k > n_passages:
        raise SearchError(f"k = {k} passages a question asked for, but the corpus holds {n_passages}. Lower k.")


def check_dimensions(queries: NDArray[np.float32], dimensions: int) -> None:
    if queries.shape[1] != dimensions:
        raise SearchError(f"Queries have {queries.shape[1]} dimensions, passages {dimensions}: they come from different retrievers.")


def search(queries: NDArray[np.float32], passages: NDArray[np.float32], k: int) -> Found:
    """The k passages with the largest dot product: indices and scores `[queries, k]`, best first."""
    check_k(k, len(passages))
    check_dimensions(queries, passages.shape[1])
    scores, found = faiss.knn(np.ascontiguousarray(queries), np.ascontiguousarray(passages), k, metric=faiss.METRIC_INNER_PRODUCT)
    return found, scores


def search_exactly(queries: NDArray[np.float32], passages: Vectors, k: int) -> Found:
    """As `search`, over vectors on disk: block by block, so that only one block is in memory."""
    check_k(k, len(passages))
    check_dimensions(queries, passages.dimensions)
    queries = np.ascontiguousarray(queries)
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start, block in passages.blocks():
        scores, found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(scores, found + start)
    best.finalize()
    return best.I, best.D


def build(passages: Vectors, settings: IndexSettings, folder: Path, seed: int) -> None:
    """Writes the index of `ivfpq` or `hnsw`; an exact search needs none.

    Vectors are added block by block. The index is written as it grows, and a killed build goes on from what is written.
    IVF-PQ: Jegou et al. 2011, 'Product quantization for nearest neighbor search'; HNSW: Malkov and Yashunin 2016.
    """
    if settings.kind == "exact":
        return
    growing = folder / f"{FILE}.growing"
    index = read(growing) if growing.is_file() else trained(passages, settings, seed)
    index.verbose = False
    saved = index.ntotal
    for start, block in passages.blocks():
        if start < index.ntotal:
            continue
        index.add(block)
        if index.ntotal - saved >= SAVED_EVERY and index.ntotal < len(passages):
            write(index, growing)
            saved = index.ntotal
            log.info("index: %d of %d vectors", saved, len(passages))
    write(index, folder / FILE)
    growing.unlink(missing_ok=True)


def trained(passages: Vectors, settings: IndexSettings, seed: int) -> Any:
    """An empty index; that of `ivfpq` has learnt its cells and codes from a sample drawn by the seed."""
    size = passages.dimensions
    if settings.kind == "hnsw":
        index: Any = faiss.IndexHNSWSQ(size, faiss.ScalarQuantizer.QT_fp16, settings.links, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]
        index.hnsw.efConstruction = settings.effort
        index.train(next(passages.blocks())[1][:1000])  # half precision learns nothing, but FAISS asks for the call
        return index
    sample = min(settings.trained_on, len(passages))
    if settings.lists * PER_LIST > sample:
        raise SearchError(
            f"index.lists is {settings.lists}, but {sample} vectors to learn from allow {sample // PER_LIST} cells at most ({PER_LIST} vectors each). "
            "Lower index.lists, raise index.trained_on, or use the exact index for so few passages."
        )
    if size % settings.code_bytes:
        raise SearchError(f"index.code_bytes is {settings.code_bytes}, which does not part {size} dimensions evenly. Take a divisor of {size}.")
    places = np.sort(np.random.default_rng(seed).choice(len(passages), sample, replace=False))
    cells = faiss.IndexFlatIP(size)
    index = faiss.IndexIVFPQ(cells, size, settings.lists, settings.code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = index.pq.cp.seed = seed
    index.pq.cp.min_points_per_centroid = 1  # small corpora are searched so in tests: no warning a code book
    index.train(passages.take(places))
    return index


def write(index: faiss.Index, path: Path) -> None:
    """Writes an index aside and renames it."""
    aside = path.with_name(f"{path.name}.new")
    faiss.write_index(index, str(aside))
    aside.replace(path)


def read(path: Path, flags: int = 0) -> Any:
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SearchError(f"The index {path} is damaged or not whole ({reason}). Remove the stage's folder, then give the same command.") from None


class Index:
    """Searches the vectors of a corpus: exactly, or by an approximate index whose best candidates are scored again exactly."""

    def __init__(self, vectors: Vectors, settings: IndexSettings, faster: faiss.Index | None) -> None:
        self.vectors, self.settings, self.faster = vectors, settings, faster

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """The k passages with the largest dot product `[queries, k]`, best first, as far as the index finds them."""
        if self.faster is None:
            return search_exactly(queries, self.vectors, k)
        check_k(k, len(self.vectors))
        check_dimensions(queries, self.vectors.dimensions)
        near = self.faster.search(np.ascontiguousarray(queries), min(max(k, self.settings.candidates), len(self.vectors)))[1]
        if (near >= 0).sum(1).min(initial=k) < k:
            knob = "index.probes" if self.settings.kind == "ivfpq" else "index.effort"
            raise SearchError(f"The index found fewer than {k} passages for a question. Raise {knob}.")
        parts = [self.scored_again(queries[i : i + RESCORED], near[i : i + RESCORED], k) for i in range(0, len(queries), RESCORED)]
        places, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
        return places, scores

    def scored_again(self, queries: NDArray[np.float32], near: NDArray[np.int64], k: int) -> Found:
        """The best k of each question's candidates `[queries, candidates]` by their exact scores; -1 marks none."""
        scores = np.einsum("qd,qcd->qc", queries, self.vectors.take(near.clip(min=0)))
        scores[near < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(near, order, 1), np.take_along_axis(scores, order, 1)


def open_index(vectors: Vectors, settings: IndexSettings, folder: Path) -> Index:
    """The index that `build` wrote, memory-mapped. Raises SearchError if it is damaged, or not of these vectors."""
    if settings.kind == "exact":
        return Index(vectors, settings, None)
    index = read(folder / FILE, faiss.IO_FLAG_MMAP if settings.kind == "ivfpq" else faiss.IO_FLAG_MMAP_IFC)
    if index.d != vectors.dimensions:
        raise SearchError(f"The index {folder / FILE} has {index.d} dimensions, the vectors {vectors.dimensions}: they come from different retrievers.")
    if index.ntotal != len(vectors):
        raise SearchError(f"The index {folder / FILE} holds {index.ntotal} vectors, the corpus {len(vectors)} passages: it is the index of another corpus.")
    if settings.kind == "ivfpq":
        index.nprobe = settings.probes
    else:
        index.hnsw.efSearch = max(settings.effort, settings.candidates)
    return Index(vectors, settings, index)


def recall(index: Index, queries: NDArray[np.float32], k: int) -> float:
    """The share of the exact first k passages that an index finds, mean over queries."""
    exact, found = search_exactly(queries, index.vectors, k)[0], index.search(queries, k)[0]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))


def bm25(queries: list[str], passages: list[str], k: int) -> NDArray[np.int64]:
    """The k passages with the best BM25 score (Lucene's variant, k1 1.5, b 0.75), indices `[queries, k]`."""
    check_k(k, len(passages))
    model = bm25s.BM25()
    model.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    return model.retrieve(bm25s.tokenize(queries, stopwords="en", show_progress=False), k=k, show_progress=False)[0].astype(np.int64)
