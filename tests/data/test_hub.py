"""Sets of the hub, read from folders in the hub's own formats; what is wrong with them is named."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hub_tables import write_nq, write_pools, write_trivia, write_wiki

from ragkit.data import questions as corpus
from ragkit.data.passages import Passage, Passages, write_passages
from ragkit.data.questions import Corpus
from ragkit.errors import DataError
from ragkit.profile import HubSet, HubTable

TOWNS = [
    Passage(
        str(100 + i),
        f"Town {i}",
        f"Town {i} lies on the river Nr{i} and was founded by Count N{i}.",
    )
    for i in range(25)
]
ASKED = [(f"which river does town {i} lie on", (f"Nr{i}", f"the Nr{i}")) for i in range(25)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def hub_set(tmp_path, **changes):
    write_nq(tmp_path / "nq", ASKED[:20], ASKED[20:])
    write_wiki(tmp_path / "wiki", TOWNS)
    questions = HubTable(
        dataset=str(tmp_path / "nq"),
        config="nq_open",
        rows={"train": 20, "validation": 5},
        licence="CC BY-SA 3.0",
    )
    passages = HubTable(
        dataset=str(tmp_path / "wiki"),
        files="data/psgs_w100/no_embeddings/{split}-*.parquet",
        rows={"train": 25},
    )
    sizes = {"distill": 10, "dev": 5, "test": 5}
    return HubSet(
        **{
            "source": "hub",
            "name": "nq",
            "questions": questions,
            "passages": passages,
            **sizes,
            **changes,
        }
    )


def made(settings, folder):
    folder.mkdir()
    corpus.build(settings, folder)
    return Corpus.load(settings.name, folder)


def test_nq_and_wikipedia(tmp_path):
    one = made(hub_set(tmp_path), tmp_path / "made")
    assert {part: len(questions) for part, questions in one.questions.items()} == {
        "distill": 10,
        "dev": 5,
        "test": 5,
    }
    assert list(one.passages) == TOWNS
    ids = [q.id for questions in one.questions.values() for q in questions]
    assert len(set(ids)) == 20
    assert all(q.id.startswith("validation:") for q in one.questions["test"])
    assert all(q.id.startswith("train:") for q in one.questions["dev"])
    first = one.questions["test"][0]
    assert dict(ASKED)[first.text] == first.answers
    again = made(hub_set(tmp_path / "again"), tmp_path / "made-again")
    assert again.questions["distill"] == one.questions["distill"]
    other = made(hub_set(tmp_path / "other", seed=1), tmp_path / "made-other")
    assert other.questions["distill"] != one.questions["distill"]


def test_hits_are_told_by_the_answer_where_no_gold_passage_is_known(tmp_path):
    one = made(hub_set(tmp_path), tmp_path / "made")
    question = one.questions["test"][0]
    right = int(question.text.split()[4])
    ranking = np.array([[(right + 1) % 25, right, (right + 2) % 25]])
    assert one.golds([question], ranking) == [(right,)]
    assert one.golds([question], ranking[:, :1]) == [()]


def test_a_subset_of_the_passages_is_drawn_by_the_seed(tmp_path):
    few = made(hub_set(tmp_path, most_passages=7), tmp_path / "few")
    assert len(few.passages) == 7
    assert [p.id for p in few.passages] == sorted(p.id for p in few.passages)
    assert list(
        made(hub_set(tmp_path / "b", most_passages=7), tmp_path / "few-again").passages
    ) == list(few.passages)
    assert list(
        made(hub_set(tmp_path / "c", most_passages=7, seed=3), tmp_path / "few-other").passages
    ) != list(few.passages)


def test_passages_from_a_tsv(tmp_path):
    (tmp_path / "p.tsv").write_text(
        "id\ttext\ttitle\n" + "".join(f"{p.id}\t{p.text}\t{p.title}\n" for p in TOWNS)
    )
    whole = made(hub_set(tmp_path, passages=str(tmp_path / "p.tsv")), tmp_path / "made")
    assert list(whole.passages) == TOWNS
    assert (
        len(
            made(
                hub_set(tmp_path / "b", passages=str(tmp_path / "p.tsv"), most_passages=3),
                tmp_path / "made-few",
            ).passages
        )
        == 3
    )


def test_trivia_answers_come_with_their_aliases(tmp_path):
    write_trivia(tmp_path / "trivia", ASKED[:20], ASKED[20:])
    table = HubTable(dataset=str(tmp_path / "trivia"), config="unfiltered.nocontext")
    one = made(hub_set(tmp_path, questions=table), tmp_path / "made")
    assert one.questions["test"][0].answers in [answers for _, answers in ASKED]


@pytest.mark.parametrize("gold", [False, True])
def test_pools_make_the_corpus(tmp_path, gold):
    rows = [
        (q, a, [TOWNS[i]], [TOWNS[(i + 1) % 25], TOWNS[(i + 2) % 25]])
        for i, (q, a) in enumerate(ASKED)
    ]
    write_pools(tmp_path / "pools", rows)
    columns = {"question": "query", "answer": "answers"} | (
        {"gold": "positive_passages"} if gold else {}
    )
    table = HubTable(
        dataset=str(tmp_path / "pools"),
        files="default/wikipedia-nq-{split}.parquet",
        columns=columns,
    )
    pools = ("negative_passages",) if gold else ("positive_passages", "negative_passages")
    settings = hub_set(
        tmp_path, questions=table, passages=None, pools=pools, train="dev", heldout="dev"
    )
    one = made(settings, tmp_path / "made")
    asked = [q for questions in one.questions.values() for q in questions]
    assert len({q.id for q in asked}) == 20  # all three parts from one split, none twice
    assert len({p.id for p in one.passages}) == len(one.passages)
    for q in asked:
        right = next(p for p in TOWNS if p.title.lower() == " ".join(q.text.split()[3:5]))
        assert right in list(one.passages)
        assert (q.gold != ()) is gold
        assert not gold or [one.passages[i] for i in q.gold] == [right]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: {"questions": HubTable(dataset=str(t / "nq"), config="other")}, "no whole|does not hold whole data files"),
        (lambda t: {"questions": HubTable(dataset=str(t / "nq"), rows={"train": 87925})}, "has 20 rows; the profile expects 87925"),
        (lambda t: {"questions": HubTable(dataset=str(t / "nq"), columns={"question": "query"})}, r"no column 'query' \(our 'question'\); there are question, answer"),  # noqa: E501
        (lambda t: {"heldout": "test"}, "split"),
        (lambda t: {"distill": 30}, "Lower distill, dev or test"),
        (lambda t: {"passages": str(t / "none.tsv")}, "No file"),
        (lambda t: {"passages": None, "pools": ("answer",)}, "a passage of the pool has no 'text'"),
        (lambda t: cut(next((t / "wiki").rglob("train-00001*"))) or {}, "does not hold whole data files"),
        (lambda t: {"questions": HubTable(dataset="nobody/nothing-of-this-name")}, "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, monkeypatch, spoil, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    settings = hub_set(tmp_path)
    with pytest.raises(DataError, match=words):
        made(settings.model_copy(update=spoil(tmp_path)), tmp_path / "made")


def test_a_set_takes_its_passages_from_one_place(tmp_path):
    for given in ({"passages": None}, {"pools": ("a",)}):
        with pytest.raises(ValueError, match="give either 'passages'"):
            hub_set(tmp_path / str(given), **given)


def test_cards_say_where_the_data_come_from(tmp_path):
    rows = corpus.card(hub_set(tmp_path))
    assert [row["what"] for row in rows] == ["questions", "passages"]
    assert rows[0]["licence"] == "CC BY-SA 3.0"
    assert str(tmp_path / "nq") in rows[0]["source"]


def test_passages_are_memory_mapped(tmp_path):
    """200 MB of passages opened, and some of them read, in a process that may grow by 60 MB."""
    write_passages(
        tmp_path / "many.arrow", (Passage(str(i), f"T{i}", "word " * 200) for i in range(200_000))
    )
    code = (
        "import sys, resource\nfrom pathlib import Path\nfrom ragkit.passages import Passages\n"
        "def anonymous():\n    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) // 1024\n"
        "before = anonymous()\npassages = Passages(Path(sys.argv[1]))\n"
        "assert passages[199_999].id == '199999' and len(passages[5:9]) == 4\nassert sum(1 for _ in passages) == 200_000\nprint(anonymous() - before)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "many.arrow")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 60


def test_places_and_slices_are_those_of_a_list(tmp_path):
    stored = write_passages(tmp_path / "p.arrow", TOWNS)
    for place in (
        0,
        -1,
        np.int64(7),
        slice(3, 9),
        slice(None, None, 5),
        slice(20, 99),
        slice(9, 3),
    ):
        assert stored[place] == TOWNS[place]
    with pytest.raises(IndexError):
        stored[25]
    with pytest.raises(DataError, match="same id '100'"):
        write_passages(tmp_path / "twice.arrow", [*TOWNS, TOWNS[0]])
    with pytest.raises(DataError, match="no passages"):
        write_passages(tmp_path / "none.arrow", [])
    cut(tmp_path / "p.arrow")
    with pytest.raises(DataError, match="cannot be read"):
        Passages(tmp_path / "p.arrow")
