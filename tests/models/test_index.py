"""Vectors on disk and their search: exact is exact, approximate finds most, faults are said."""

from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from ragkit.data.passages import Passage
from ragkit.errors import RetrieverError
from ragkit.models import index, vectors
from ragkit.models.index import (
    Vectors,
    bm25,
    build,
    encode,
    exact_search,
    open_index,
    recall,
    search,
)
from ragkit.settings import IndexSettings


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 1024 rows, so that there are many."""
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 1)


class Encoder:
    """Looks the vectors of passages up by their text, and notes how often it was asked."""

    def __init__(self, array, dies_at=None):
        self.array, self.dies_at, self.calls = array, dies_at, 0

    def encode(self, texts, kind):
        assert kind == "passage"
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return self.array[[int(text) for text in texts]]


def passages(count):
    return [Passage(str(i), "", str(i)) for i in range(count)]


def written(folder, array):
    folder.mkdir(exist_ok=True)
    encode(passages(len(array)), Encoder(array), IndexSettings(dtype=str(array.dtype)), folder)
    return Vectors(folder)


# Vectors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [1, 7, 2500])
def test_vectors_are_one_array(tmp_path, dtype, count):
    array = np.random.default_rng(count).standard_normal((count, 6)).astype(dtype)
    made = written(tmp_path, array)
    assert (len(made), made.dimensions) == array.shape
    places = np.random.default_rng(0).integers(count, size=(4, 5, 3))
    assert made.take(places).dtype == np.float32
    assert (made.take(places) == array[places]).all()
    assert made.take(np.empty((0, 2), np.int64)).shape == (0, 2, 6)
    starts, blocks = zip(*made.blocks(), strict=True)
    assert (np.concatenate(blocks) == array).all()
    assert list(starts) == list(range(0, count, 1024))


def test_a_killed_encoding_goes_on(tmp_path):
    settings = IndexSettings(shard=10)
    array = np.random.default_rng(0).standard_normal((35, 6)).astype(np.float32)
    with pytest.raises(KeyboardInterrupt):
        encode(passages(35), Encoder(array, dies_at=3), settings, tmp_path)
    with pytest.raises(RetrieverError, match="half made"):
        Vectors(tmp_path)
    again = Encoder(array)
    encode(passages(35), again, settings, tmp_path)
    assert again.calls == 2
    assert (Vectors(tmp_path).take(np.arange(35)) == array).all()
    assert [path.name for path in tmp_path.iterdir()] == [vectors.VECTORS]


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_damaged_and_missing_vectors_are_named(tmp_path, cut):
    with pytest.raises(RetrieverError, match="Encode the passages first"):
        Vectors(tmp_path)
    path = written(tmp_path, np.ones((9, 4), np.float32)).path
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RetrieverError, match=r"vectors\.npy is damaged"):
        Vectors(tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [(np.nan, "float32", "damaged"), (1e6, "float16", r"set index\.dtype to float32")],
)
def test_vectors_that_are_not_finite_are_not_written(tmp_path, value, dtype, words):
    made = Encoder(np.full((3, 4), value, np.float32))
    with pytest.raises(RetrieverError, match=words), np.errstate(over="ignore"):
        encode(passages(3), made, IndexSettings(dtype=dtype), tmp_path)


def test_places_beyond_the_vectors_are_refused(tmp_path):
    made = written(tmp_path, np.ones((7, 4), np.float32))
    for places in ([7], [-1, 2]):
        with pytest.raises(RetrieverError, match="holds 7 vectors"):
            made.take(np.array(places))


# Exact search


@pytest.mark.parametrize(
    ("count", "dimensions", "asked"), [(1, 3, 1), (10, 1, 3), (4000, 17, 40), (5001, 33, 7)]
)
def test_exact_search_is_exact(tmp_path, count, dimensions, asked):
    rng = np.random.default_rng(count)
    array = rng.standard_normal((count, dimensions), np.float32)
    queries = rng.standard_normal((asked, dimensions), np.float32)
    written(tmp_path, array)
    reference = queries.astype(np.float64) @ array.astype(np.float64).T
    for k in {1, min(20, count), min(150, count)}:
        places, scores = open_index(tmp_path, tmp_path, IndexSettings()).search(queries, k)
        assert (places.dtype, scores.dtype) == (np.int64, np.float32)
        best = -np.sort(-reference, axis=1)[:, :k]
        # ranks may change where float32 sees no difference
        assert np.allclose(np.take_along_axis(reference, places, 1), best, rtol=1e-6, atol=1e-6)
        assert all(len(set(row)) == k for row in places.tolist())
        assert np.allclose(scores, best, rtol=1e-5, atol=1e-5)
        flat_places, flat_scores = search(queries, array, k)
        assert (places == flat_places).all()
        assert np.allclose(scores, flat_scores, rtol=1e-6, atol=1e-6)


def test_ties_get_every_better_passage_and_an_order(tmp_path):
    """Whole numbers: products are exact, and most scores tie."""
    rng = np.random.default_rng(0)
    array = rng.integers(-2, 3, (3000, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    reference = queries @ array.T
    places, scores = exact_search(queries, written(tmp_path, array), 25)
    assert (scores == -np.sort(-reference, axis=1)[:, :25]).all()
    assert (np.take_along_axis(reference, places, 1) == scores).all()
    assert all(len(set(row)) == 25 for row in places.tolist())
    # equal scores: the later place first, as in FAISS
    assert ((np.diff(scores) < 0) | (np.diff(places) < 0)).all()


def test_odd_queries_get_a_sentence(tmp_path):
    written(tmp_path, np.ones((9, 4), np.float32))
    opened = open_index(tmp_path, tmp_path, IndexSettings())
    for queries, k, words in (
        (np.ones((1, 4), np.float32), 10, r"k = 10 .* holds 9\. Lower k\."),
        (np.ones((1, 3), np.float32), 5, "different retrievers"),
        (np.full((1, 4), np.nan, np.float32), 5, "not finite"),
    ):
        with pytest.raises(RetrieverError, match=words):
            opened.search(queries, k)
    assert [part.shape for part in opened.search(np.ones((0, 4), np.float32), 5)] == [(0, 5)] * 2
    assert opened.search(np.ones((2, 4)), 5)[0].shape == (2, 5)


def test_bm25_finds_the_words():
    texts = ["a river in the north", "the mayor of a port", "a port on the river"]
    assert bm25(["which mayor", "which river and port"], texts, 1).tolist() == [[1], [2]]
    with pytest.raises(RetrieverError, match="Lower k"):
        bm25(["river"], texts, 4)


# Approximate search

CELLS = IndexSettings(factory="IVF64,SQ8", trained_on=3000, probes=16, candidates=60)
CODES = IndexSettings(factory="IVF8,PQ8x4", trained_on=10_000, probes=4, candidates=200)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """10,500 vectors of 16 dimensions around 200 centres, and 100 queries beside some of them."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((200, 16))
    made = centres[rng.integers(200, size=10_500)] + 0.3 * rng.standard_normal((10_500, 16))
    asked = made[rng.integers(len(made), size=100)] + 0.2 * rng.standard_normal((100, 16))
    folder = tmp_path_factory.mktemp("corpus")
    return written(folder, made.astype(np.float16)), asked.astype(np.float32), folder


@pytest.mark.parametrize("settings", [CELLS, CODES], ids=["cells", "codes"])
def test_an_approximate_index_finds_most_and_scores_it_exactly(corpus, tmp_path, settings):
    made, queries, vectors = corpus
    build(made, settings, tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == [index.FILE]
    opened = open_index(vectors, tmp_path, settings)
    places, scores = opened.search(queries, 5)
    by_hand = np.einsum("qkd,qd->qk", made.take(places), queries)
    assert np.allclose(scores, by_hand, rtol=1e-5, atol=1e-4)
    assert (np.diff(scores) <= 0).all()
    found = recall(opened, queries, 5)
    assert found > 0.9
    few = open_index(vectors, tmp_path, settings.model_copy(update={"candidates": 1}))
    assert recall(few, queries, 5) < found  # five are found, none to choose from
    assert recall(open_index(vectors, tmp_path, IndexSettings()), queries, 5) == 1


def test_a_killed_build_keeps_what_was_learnt(corpus, tmp_path, monkeypatch):
    made, whole, cut = corpus[0], tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    build(made, CELLS, whole, 0)

    def dies():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(made, "blocks", dies)
        with pytest.raises(KeyboardInterrupt):
            build(made, CELLS, cut, 0)
    monkeypatch.setattr(index, "learn", None)
    build(made, CELLS, cut, 0)
    assert (whole / index.FILE).read_bytes() == (cut / index.FILE).read_bytes()


def test_an_index_is_mapped_not_loaded(corpus, tmp_path):
    build(corpus[0], CELLS, tmp_path, 0)
    opened = open_index(corpus[2], tmp_path, CELLS)
    lists = faiss.downcast_InvertedLists(opened.approximate.invlists)
    assert isinstance(lists, faiss.OnDiskInvertedLists)


def test_exact_search_needs_no_index(corpus, tmp_path):
    build(corpus[0], IndexSettings(), tmp_path, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nonsense", r"16 dimensions from 'nonsense' \(could not parse"),
        ("IVF8,PQ5", r"from 'IVF8,PQ5' \(The dimension of the vector"),
        ("IVF300,SQ8", r"'IVF300,SQ8' learns from 11700 vectors or more, and there are 10000"),
        ("PQ4x4", r"learns from 9984 vectors or more, and there are 9000.*index\.factory: Flat"),
    ],
)
def test_factories_that_no_index_can_have_are_named(corpus, tmp_path, factory, words):
    settings = IndexSettings(factory=factory, trained_on=9000 if "x4" in factory else 10_000)
    with pytest.raises(RetrieverError, match=words):
        build(corpus[0], settings, tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_too_few_finds_are_never_silent(corpus, tmp_path):
    build(corpus[0], CELLS, tmp_path, 0)
    few = open_index(corpus[2], tmp_path, CELLS.model_copy(update={"probes": 1}))
    with pytest.raises(RetrieverError, match=r"found only \d+ of 2000 .*index\.probes \(now 1\)"):
        few.search(corpus[1], 2000)
    with pytest.raises(RetrieverError, match="not finite"):
        few.search(np.full((1, 16), np.nan, np.float32), 5)


@pytest.mark.parametrize("cut", [0, 3, 1000, 150_000, -1])
def test_a_damaged_or_missing_index_is_refused(corpus, tmp_path, cut):
    with pytest.raises(RetrieverError, match="missing or damaged"):
        open_index(corpus[2], tmp_path, CELLS)
    build(corpus[0], CELLS, tmp_path, 0)
    path = tmp_path / index.FILE
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RetrieverError, match="missing or damaged"):
        open_index(corpus[2], tmp_path, CELLS)


def test_an_index_of_other_vectors_is_refused(corpus, tmp_path):
    (tmp_path / "index").mkdir()
    build(corpus[0], CELLS, tmp_path / "index", 0)
    written(tmp_path / "fewer", corpus[0].take(np.arange(10_000)))
    with pytest.raises(RetrieverError, match=r"holds \(10500, 16\) .* \(10000, 16\)"):
        open_index(tmp_path / "fewer", tmp_path / "index", CELLS)


def test_recall_counts_what_an_index_finds(tmp_path):
    made = written(tmp_path, np.eye(6, dtype=np.float32))
    half = SimpleNamespace(vectors=made, search=lambda q, k: (np.array([[0, 5]] * len(q)), None))
    assert recall(half, np.array([[3, 2, 0, 0, 0, 0]], np.float32), 2) == 0.5
