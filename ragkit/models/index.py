"""Search: exact dense search through FAISS, approximate indexes for millions of passages, and BM25 through bm25s."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
from numpy.typing import NDArray

from ragkit.errors import SearchError
from ragkit.experiment.store import NO_ROOM, write_whole
from ragkit.models.vectors import BLOCK_BYTES, Vectors, write_array
from ragkit.profile import IndexSettings

logging.getLogger("bm25s").setLevel(
    logging.WARNING
)  # on import it sets its own level, and reports every step
log = logging.getLogger(__name__)

FILE, RECORD, PARTIAL = "index.faiss", "index.json", "building"
MADE_WITH = {
    "ivfpq": ("trained_on", "lists", "code_bytes"),
    "hnsw": ("trained_on", "links", "effort"),
}  # the rest matters to a search only
# Read-only mappings. The first kind serves inverted lists, the second (FAISS 1.11 and later) HNSW's links and codes; neither both.
MAPPED = {
    "ivfpq": faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY,
    "hnsw": faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY,
}
SEARCHED_HARDER_BY = {"ivfpq": "index.probes", "hnsw": "index.effort"}
WANTED_A_CELL = 39  # training vectors, below which FAISS warns
CODE_VALUES = 256  # of a byte of a code
ROTATION_LEARNS_FROM = CODE_VALUES * 256  # vectors; FAISS's product quantiser takes no more either
LOOKED_AT = 64  # vectors by which an index knows its own
SAVING_SHARE = 0.05  # of the time in which hnsw grows


def check_k(k: int, n_passages: int) -> None:
    if k > n_passages:
        raise SearchError(
            f"k = {k} passages a question asked for, but the corpus holds {n_passages}. Lower k."
        )


def check_dimensions(queries: NDArray[np.float32], dimensions: int) -> None:
    if queries.shape[1] != dimensions:
        raise SearchError(
            f"Queries have {queries.shape[1]} dimensions, passages {dimensions}: they come from different retrievers."
        )


def check_finite(queries: NDArray[np.float32]) -> None:
    if not np.isfinite(queries).all():
        raise SearchError(
            "Some queries hold values that are not finite: the retriever is damaged, or its training went astray (lower distill.rate)."
        )


def search(
    queries: NDArray[np.float32], passages: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k passages with the largest dot product: indices and scores `[queries, k]`, best first."""
    check_k(k, len(passages))
    check_dimensions(queries, passages.shape[1])
    flat = faiss.IndexFlatIP(passages.shape[1])
    flat.add(np.ascontiguousarray(passages))
    scores, found = flat.search(np.ascontiguousarray(queries), k)
    return found, scores


def exact_search(
    queries: NDArray[np.float32], vectors: Vectors, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What `search` finds, from vectors on disk: places and scores `[queries, k]`, best first, a block in memory at a time.

    Of equal scores the later place comes first, as in FAISS; which of those that tie for the last rank are found is left open.
    """
    check_k(k, len(vectors))
    check_dimensions(queries, vectors.dimensions)
    check_finite(queries)
    queries = np.ascontiguousarray(queries, np.float32)
    scores, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, block in vectors.blocks():
        more, found = faiss.knn(
            queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        scores, places = best(np.hstack([scores, more]), np.hstack([places, found + start]), k)
    return places, scores


def best(
    scores: NDArray[np.float32], places: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best of each row, best first; of equal scores the later place."""
    order = np.lexsort((-places, -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


def description(vectors: Vectors, settings: IndexSettings) -> dict[str, Any]:
    """What an index is made of, as JSON values; `looked_at` tells vectors of the same shape from another retriever apart."""
    seen = vectors.take(np.linspace(0, len(vectors) - 1, LOOKED_AT).astype(np.int64))
    made_of = {
        "kind": settings.kind,
        "vectors": len(vectors),
        "dimensions": vectors.dimensions,
        "looked_at": hashlib.sha256(seen.tobytes()).hexdigest()[:20],
    }
    return made_of | {key: getattr(settings, key) for key in MADE_WITH[settings.kind]}


def read_record(path: Path) -> dict[str, Any] | None:
    """What was written of an index, whole or half built; None if nothing was."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise SearchError(
            f"{path} is damaged. Remove the folder {path.parent} and build the index again."
        )
    return record


def build(vectors: Vectors, settings: IndexSettings, folder: Path, seed: int) -> None:
    """Builds the index of `settings.kind` in `folder`; nothing for `exact`, which reads the vectors themselves.

    A build that was killed at any moment goes on where it stopped when it is called again, and ends in the same index, to the byte, as long as
    FAISS has as many threads as before (`faiss.omp_set_num_threads`: by itself it takes every core). For hnsw that must be one:
    several link vectors in whatever order they come to them, and no two graphs are alike.
    Memory: `trained_on` vectors in float32 while the quantiser learns, then for ivfpq 8 + `code_bytes` bytes a vector, for hnsw
    its dimensions plus 8 * `links` bytes a vector. Raises SearchError if settings and vectors do not go together, or if the folder
    holds (part of) another index.
    """
    if settings.kind == "exact":
        return
    plan = description(vectors, settings) | {"seed": seed}
    partial = folder / PARTIAL
    for path in (folder / RECORD, partial / RECORD):
        record = read_record(path)
        if record is not None and any(record.get(key) != value for key, value in plan.items()):
            raise SearchError(
                f"{path.parent} holds an index of other vectors or settings. Remove it, or choose another folder."
            )
    if not (folder / RECORD).is_file():
        check_settings(vectors, settings)
        partial.mkdir(parents=True, exist_ok=True)
        write_whole(partial / RECORD, json.dumps(plan))
        make = build_ivfpq if settings.kind == "ivfpq" else build_hnsw
        write_index(make(vectors, settings, partial, seed), folder / FILE)
        write_whole(
            folder / RECORD, json.dumps(plan | {"bytes": (folder / FILE).stat().st_size})
        )  # from now on the index counts
    shutil.rmtree(partial, ignore_errors=True)


def check_settings(vectors: Vectors, settings: IndexSettings) -> None:
    """Whether an ivfpq can be learnt; a hnsw always can."""
    if settings.kind != "ivfpq":
        return
    learning = min(settings.trained_on, len(vectors))
    more = (
        f"raise index.trained_on ({settings.trained_on})"
        if settings.trained_on < len(vectors)
        else "set index.kind to exact: so few are searched in no time"
    )
    if learning < WANTED_A_CELL * CODE_VALUES:
        raise SearchError(
            f"ivfpq learns its codes from {WANTED_A_CELL * CODE_VALUES} vectors or more; there are {learning}. Please {more}."
        )
    if settings.lists > learning // WANTED_A_CELL:
        raise SearchError(
            f"index.lists is {settings.lists}, but {learning} vectors to learn from are enough for {learning // WANTED_A_CELL} at most "
            f"({WANTED_A_CELL} a list). Lower index.lists to that, or {more}."
        )
    if vectors.dimensions % settings.code_bytes:
        divisors = [n for n in range(1, vectors.dimensions + 1) if vectors.dimensions % n == 0]
        near = min(divisors, key=lambda n: abs(n - settings.code_bytes))
        raise SearchError(
            f"index.code_bytes is {settings.code_bytes} and does not divide the vectors' {vectors.dimensions} dimensions. The nearest is {near}."
        )


def write_index(index: Any, path: Path) -> None:
    """Writes an index aside and renames it."""
    aside = path.with_name(f"{path.name}.new")
    try:
        faiss.write_index(index, str(aside))
    except (
        RuntimeError
    ) as error:  # FAISS has no kind of error for a full disk, but quotes the system's words
        number = next((n for n in NO_ROOM if os.strerror(n) in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(aside)) from error
    aside.replace(path)


def sample(vectors: Vectors, settings: IndexSettings, seed: int) -> NDArray[np.float32]:
    """The vectors `[trained_on or all, dimensions]` that a quantiser learns from, in the order of their places."""
    rng = np.random.default_rng(seed)
    return vectors.take(
        np.sort(
            rng.choice(
                len(vectors), min(settings.trained_on, len(vectors)), replace=False, shuffle=False
            )
        )
    )


def learn_ivfpq(vectors: Vectors, settings: IndexSettings, seed: int) -> Any:
    """An empty IVF-PQ (Jégou et al. 2011) for the inner product, behind a rotation of the vectors.

    Vectors need not be of unit length, and a vector's cell is that of the centre with which it has the largest inner product, among centres of one
    length: its direction decides, whatever its length, and a query enters the cells by the same rule (spherical k-means: Auvolat et
    al. 2015, FAISS's own choice too). Cells of k-means by distance put long passages, which many queries want, into cells of their own that few probes reach;
    on real passages (MiniLM's vectors as they come, lengths spread by 15 %) an eighth of the cells held 0.87 of the best five
    against 0.80, and 0.77 once vectors were given one more dimension that makes the search one by distance (Bachrach et al. 2014).
    The centres' common length is the mean of their vectors' projections, so that what is left for the code is small.

    The code is of the residual, which is rotated beforehand by its principal axes, dealt out so that every byte has as much variance to
    code: optimised product quantisation in closed form (Ge et al. 2013, section 3.2). Recall@5 from 32 bytes for 384 dimensions of the same passages, before
    anything is scored again: 0.69 without a rotation, 0.74 with iterated OPQ (minutes), 0.77 so (a second).
    """
    learning = sample(vectors, settings, seed)
    clusters = faiss.Kmeans(vectors.dimensions, settings.lists, niter=10, seed=seed, spherical=True)
    clusters.train(learning)
    learning = learning[:: -(-len(learning) // ROTATION_LEARNS_FROM)]
    directions = np.asarray(clusters.centroids)
    products, cells = faiss.knn(learning, directions, 1, metric=faiss.METRIC_INNER_PRODUCT)
    centres = directions * products.mean()
    residuals = learning - centres[cells[:, 0]]
    rotation = faiss.PCAMatrix(vectors.dimensions, vectors.dimensions)
    rotation.balanced_bins = settings.code_bytes
    rotation.train(residuals)
    rotation.have_bias = (
        False  # the shift by the mean would move queries too, and with them the ranking
    )
    cells_index = faiss.IndexFlatIP(vectors.dimensions)
    cells_index.add(rotation.apply_py(centres))
    inverted = faiss.IndexIVFPQ(
        cells_index,
        vectors.dimensions,
        settings.lists,
        settings.code_bytes,
        8,
        faiss.METRIC_INNER_PRODUCT,
    )
    inverted.pq.cp.seed = seed
    inverted.pq.train(rotation.apply_py(residuals))
    inverted.is_trained = True
    return faiss.IndexPreTransform(rotation, inverted)


def build_ivfpq(vectors: Vectors, settings: IndexSettings, partial: Path, seed: int) -> Any:
    """Learns the quantiser, then keeps the codes of each block in a file of its own: each vector is written twice in all, however many there are."""
    trained = partial / "trained.faiss"
    if not trained.is_file():
        log.info(
            "learning %d lists from %d vectors",
            settings.lists,
            min(settings.trained_on, len(vectors)),
        )
        write_index(learn_ivfpq(vectors, settings, seed), trained)
    index = faiss.read_index(str(trained))

    def kept() -> list[Path]:
        return sorted(partial.glob("codes-*.npy"))

    done = (
        int(kept()[-1].stem.removeprefix("codes-")) + len(np.load(kept()[-1], mmap_mode="r"))
        if kept()
        else 0
    )
    for start, block in vectors.blocks(done):
        write_array(partial / f"codes-{start:012d}.npy", index.sa_encode(block))
    inverted = faiss.extract_index_ivf(index)
    for path in kept():
        codes = np.load(path)
        inverted.add_sa_codes(codes, np.arange(inverted.ntotal, inverted.ntotal + len(codes)))
    index.ntotal = inverted.ntotal
    return index


def build_hnsw(vectors: Vectors, settings: IndexSettings, partial: Path, seed: int) -> Any:
    """A graph (Malkov and Yashunin 2020) over vectors of one byte a dimension, which are scored again exactly after all.

    Links follow the inner product itself (Morozov and Babenko 2018): on real passages of uneven length it found 0.99 of the best five with 50 in
    view, a graph by distance with one more dimension (Bachrach et al. 2014) 0.72. The graph is saved so seldom that saving takes SAVING_SHARE of the
    time at most, whatever its size: a kill costs about 20 times as long as one saving takes.
    """
    saved = partial / "graph.faiss"
    index: Any  # FAISS's type hints know neither the graph of an index read nor this constructor
    if saved.is_file():
        index = faiss.read_index(str(saved))
    else:
        index = faiss.IndexHNSWSQ(
            vectors.dimensions,
            faiss.ScalarQuantizer.QT_8bit,
            settings.links,
            faiss.METRIC_INNER_PRODUCT,
        )  # type: ignore[arg-type]
        index.hnsw.efConstruction = settings.effort
        index.train(sample(vectors, settings, seed))
    last, took = time.monotonic(), 0.0
    for start, block in vectors.blocks(index.ntotal):
        # the generator is not saved with the graph: levels must follow from the place alone
        index.hnsw.rng = faiss.RandomGenerator(seed + start)  # type: ignore[attr-defined]
        index.add(block)
        now = time.monotonic()
        if now - last > took / SAVING_SHARE:
            log.info("%d of %d vectors linked", index.ntotal, len(vectors))
            write_index(index, saved)
            last = time.monotonic()
            took = last - now
    return index


class Index:
    """The vectors of a corpus with what finds them: nothing but themselves (`approximate` None), or a FAISS index whose finds are scored again."""

    def __init__(self, vectors: Vectors, settings: IndexSettings, approximate: Any | None) -> None:
        self.vectors, self.settings, self.approximate = vectors, settings, approximate

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k passages with the largest dot product: places and scores `[queries, k]`, best first.

        An approximate index finds `candidates` passages (k, if that is more); those are scored exactly from the vectors on disk, and
        the best k of them are returned. Raises SearchError if k exceeds the corpus, queries have other dimensions than the vectors or are not
        finite, or the index finds fewer than k passages.
        """
        if self.approximate is None:
            return exact_search(queries, self.vectors, k)
        check_k(k, len(self.vectors))
        check_dimensions(queries, self.vectors.dimensions)
        check_finite(queries)
        queries = np.ascontiguousarray(queries, np.float32)
        wanted = min(max(k, self.settings.candidates), len(self.vectors))
        step = max(1, BLOCK_BYTES // (4 * wanted * self.vectors.dimensions))
        scores, places = (
            np.empty((len(queries), k), np.float32),
            np.empty((len(queries), k), np.int64),
        )
        for start in range(0, len(queries), step):
            asked = queries[start : start + step]
            found = self.approximate.search(asked, wanted)[1]
            if (least := int((found >= 0).sum(1).min())) < k:  # FAISS fills up with -1
                harder, now = (
                    SEARCHED_HARDER_BY[self.settings.kind],
                    getattr(
                        self.settings, SEARCHED_HARDER_BY[self.settings.kind].removeprefix("index.")
                    ),
                )
                raise SearchError(
                    f"The index found only {least} of the {k} passages asked for, for one question at least. Raise {harder} (now {now})."
                )
            exact = np.matmul(self.vectors.take(np.maximum(found, 0)), asked[:, :, None])[:, :, 0]
            exact[found < 0] = -np.inf
            scores[start : start + step], places[start : start + step] = best(exact, found, k)
        return places, scores


def open_index(vectors: Vectors, settings: IndexSettings, folder: Path) -> Index:
    """The index that `build` made in `folder`, mapped into memory: only the lists or links that a search looks at are read from disk.

    Raises SearchError if there is none, it is damaged, or it was made from other vectors or settings. Damage that leaves the file's size as it is goes
    unnoticed here; the hashes of a finished stage (`ragkit.store`) catch it.
    """
    if settings.kind == "exact":
        return Index(vectors, settings, None)
    record, path = read_record(folder / RECORD), folder / FILE
    if record is None:
        raise SearchError(f"{folder} holds no finished index. Build it first.")
    for key, value in description(vectors, settings).items():
        if (was := record.get(key)) == value:
            continue
        why = {
            "vectors": f"holds {was} vectors, the corpus {value}: it is the index of another corpus",
            "dimensions": f"has {was} dimensions, the passages' vectors {value}: they come from different retrievers",
            "looked_at": "was built from other vectors of the same number and dimensions: another retriever's, or those of another corpus",
        }.get(key, f"was built with index.{key} {was}, the profile says {value}")
        raise SearchError(f"The index in {folder} {why}. Build it again.")
    try:
        if path.stat().st_size != record["bytes"]:
            raise RuntimeError(
                f"{path.stat().st_size} bytes instead of {record['bytes']}"
            )  # a mapping would only end in a crash of the search
        approximate: Any = faiss.read_index(str(path), MAPPED[settings.kind])
        if (approximate.d, approximate.ntotal) != (vectors.dimensions, len(vectors)):
            raise RuntimeError(
                f"{approximate.ntotal} vectors of {approximate.d} dimensions instead of {len(vectors)} of {vectors.dimensions}"
            )
    except (OSError, RuntimeError, MemoryError, KeyError) as error:
        raise SearchError(
            f"The index {path} is missing, damaged or not whole ({error}). Remove the folder {folder} and build it again."
        ) from None
    if settings.kind == "ivfpq":
        faiss.extract_index_ivf(approximate).nprobe = settings.probes
    else:
        approximate.hnsw.efSearch = settings.effort
    return Index(vectors, settings, approximate)


def recall(index: Index, queries: NDArray[np.float32], k: int) -> float:
    """The share of the exact k best passages, over all queries, that the index finds among its own k."""
    best_places, found = exact_search(queries, index.vectors, k)[0], index.search(queries, k)[0]
    return float((best_places[:, :, None] == found[:, None, :]).any(2).mean())


def bm25(queries: list[str], passages: list[str], k: int) -> NDArray[np.int64]:
    """The k passages with the best BM25 score (Lucene's variant, k1 1.5, b 0.75), indices `[queries, k]`."""
    check_k(k, len(passages))
    model = bm25s.BM25()
    model.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    return model.retrieve(
        bm25s.tokenize(queries, stopwords="en", show_progress=False), k=k, show_progress=False
    )[0].astype(np.int64)
