"""Vectors on disk and their search: exact is exact, approximate finds most, faults are said."""

import faiss
import numpy as np
import pytest

from ragkit.data.corpus import Passage, write_passages
from ragkit.errors import RetrieverError
from ragkit.models import index
from ragkit.models.index import Index, bm25, make_index, make_vectors
from ragkit.settings import IndexSettings


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Indexes are given 1024 vectors at a time, so often."""
    monkeypatch.setattr(index, "ADDED", 1024)


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


def written(folder, array, **settings):
    """The vectors as their stage writes them, with an encoder or of an array."""
    encoder = array if isinstance(array, Encoder) else Encoder(array)
    inputs = dict.fromkeys(("passages", "retriever"), folder.parent / f"{folder.name} from")
    inputs["passages"].mkdir(exist_ok=True)
    texts = map(str, range(len(encoder.array)))
    write_passages(inputs["passages"] / "passages.arrow", [Passage(i, "", i) for i in texts])
    given = {"dtype": str(encoder.array.dtype), **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index.Retriever, "load", lambda *_: encoder)
        make_vectors(folder, inputs, {"retriever": {}, "index": given})
    return Index.open(folder)


def built(vectors, folder, settings):
    make_index(folder, {"vectors": vectors}, {"index": settings.model_dump(), "seed": 0})
    return Index.open(vectors, settings, folder)


# Vectors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [1, 7, 2500])
def test_vectors_are_one_array(tmp_path, dtype, count):
    array = np.random.default_rng(count).standard_normal((count, 6)).astype(dtype)
    made = written(tmp_path, array)
    assert made.vectors.shape == array.shape
    places = np.random.default_rng(0).integers(count, size=(4, 5, 3))
    assert made.take(places).dtype == np.float32
    assert (made.take(places) == array[places]).all()
    assert made.take(np.empty((0, 2), np.int64)).shape == (0, 2, 6)


def test_a_killed_encoding_goes_on(tmp_path):
    array = np.random.default_rng(0).standard_normal((35, 6)).astype(np.float32)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, Encoder(array, dies_at=3), shard=10)
    again = Encoder(array)
    written(tmp_path, again, shard=10)
    assert again.calls == 2
    assert (Index.open(tmp_path).vectors == array).all()
    assert [path.name for path in tmp_path.iterdir()] == [index.VECTORS]


def test_vectors_too_large_for_their_type_are_not_written(tmp_path):
    with pytest.raises(RetrieverError, match=r"overflow float16: set index\.dtype to float32"):
        written(tmp_path, np.full((3, 4), 1e6, np.float32), dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_damaged_and_missing_vectors_are_named(tmp_path, cut):
    with pytest.raises(RetrieverError, match="missing or damaged"):
        Index.open(tmp_path)
    written(tmp_path, np.ones((9, 4), np.float32))
    path = tmp_path / index.VECTORS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RetrieverError, match=r"vectors\.npy is missing or damaged"):
        Index.open(tmp_path)


# Exact search


@pytest.mark.parametrize(
    ("count", "dimensions", "asked"), [(1, 3, 1), (10, 1, 3), (4000, 17, 40), (5001, 33, 7)]
)
def test_exact_search_is_exact(tmp_path, count, dimensions, asked):
    rng = np.random.default_rng(count)
    array = rng.standard_normal((count, dimensions), np.float32)
    queries = rng.standard_normal((asked, dimensions), np.float32)
    reference = queries.astype(np.float64) @ array.astype(np.float64).T
    flat = faiss.IndexFlatIP(dimensions)
    flat.add(array)
    for k in {1, min(20, count), min(150, count)}:
        places = written(tmp_path, array).search(queries, k)
        assert places.dtype == np.int64
        best = -np.sort(-reference, axis=1)[:, :k]
        # ranks may change where float32 sees no difference
        assert np.allclose(np.take_along_axis(reference, places, 1), best, rtol=1e-6, atol=1e-6)
        assert all(len(set(row)) == k for row in places.tolist())
        assert (places == flat.search(queries, k)[1]).all()
        assert (places == Index(array).search(queries, k)).all()


def test_ties_get_every_better_passage_and_an_order(tmp_path):
    """Whole numbers: products are exact, and most scores tie."""
    rng = np.random.default_rng(0)
    array = rng.integers(-2, 3, (3000, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    reference = queries @ array.T
    places = written(tmp_path, array).search(queries, 25)
    scores = np.take_along_axis(reference, places, 1)
    assert (scores == -np.sort(-reference, axis=1)[:, :25]).all()
    assert all(len(set(row)) == 25 for row in places.tolist())
    # equal scores: the later place first, as in FAISS
    assert ((np.diff(scores) < 0) | (np.diff(places) < 0)).all()


def test_odd_queries_get_a_sentence():
    opened = Index(np.ones((9, 4), np.float32))
    for queries, k, words in (
        (np.ones((1, 4), np.float32), 10, r"k = 10 .* there are 9 of 4\. Lower k"),
        (np.ones((1, 3), np.float32), 5, "queries of 3 dimensions.*same retriever"),
    ):
        with pytest.raises(RetrieverError, match=words):
            opened.search(queries, k)
    assert opened.search(np.ones((2, 4)), 5).shape == (2, 5)


def test_bm25_finds_the_words():
    texts = ["a river in the north", "the mayor of a port", "a port on the river"]
    assert bm25(["which mayor", "which river and port"], texts, 1).tolist() == [[1], [2]]


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
    opened = built(vectors, tmp_path, settings)
    assert [path.name for path in tmp_path.iterdir()] == [index.FILE]
    exact, places = made.search(queries, 5), opened.search(queries, 5)
    scores = np.einsum("qkd,qd->qk", made.take(places), queries)
    assert (np.diff(scores) <= 1e-5).all()

    def recall(found):
        return (exact[:, :, None] == found[:, None, :]).any(2).mean()

    assert recall(places) > 0.9
    few = Index.open(vectors, settings.model_copy(update={"candidates": 1}), tmp_path)
    # five are found, none to choose from
    assert recall(few.search(queries, 5)) < recall(places)


def test_an_index_is_mapped_not_loaded(corpus, tmp_path):
    opened = built(corpus[2], tmp_path, CELLS)
    lists = faiss.downcast_InvertedLists(opened.approximate.invlists)
    assert isinstance(lists, faiss.OnDiskInvertedLists)


def test_exact_search_needs_no_index(corpus, tmp_path):
    assert built(corpus[2], tmp_path, IndexSettings()).approximate is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nonsense", r"from 'nonsense' .* of 16 dimensions \(could not parse"),
        ("IVF8,PQ5", r"from 'IVF8,PQ5' .*\(The dimension of the vector"),
        ("IVF300,SQ8", r"'IVF300,SQ8' and 200 vectors .*\(Number of training points .* Flat"),
        ("PQ4", r"'PQ4' and 200 vectors .*\(Number of training points"),
    ],
)
def test_factories_that_no_index_can_have_are_named(corpus, tmp_path, factory, words):
    settings = IndexSettings(factory=factory, trained_on=200)
    with pytest.raises(RetrieverError, match=words):
        built(corpus[2], tmp_path, settings)
    assert not list(tmp_path.iterdir())


def test_too_few_finds_are_never_silent(corpus, tmp_path):
    few = built(corpus[2], tmp_path, CELLS.model_copy(update={"probes": 1}))
    with pytest.raises(RetrieverError, match=r"found only \d+ of 2000 .*index\.probes \(now 1\)"):
        few.search(corpus[1], 2000)


@pytest.mark.parametrize("cut", [0, 3, 1000, 150_000, -1])
def test_a_damaged_or_missing_index_is_refused(corpus, tmp_path, cut):
    with pytest.raises(RetrieverError, match=r"index\.faiss is missing or damaged"):
        Index.open(corpus[2], CELLS, tmp_path)
    built(corpus[2], tmp_path, CELLS)
    path = tmp_path / index.FILE
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RetrieverError, match=r"index\.faiss is missing or damaged"):
        Index.open(corpus[2], CELLS, tmp_path)
