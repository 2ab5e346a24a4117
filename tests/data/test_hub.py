"""Sets of the hub, read from folders in the hub's own formats; what is wrong with them is named."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hub_tables import write_nq, write_pools, write_trivia, write_wiki

from ragkit.data.corpus import Corpus, Passage, Passages, passage_settings, write_passages
from ragkit.data.sets import make_passages, make_questions
from ragkit.data.text import normalise
from ragkit.errors import DataError
from ragkit.settings import HubSet, HubTable

TOLD = "Town {0} lies on the river Nr{0} and was founded by Count N{0}."
TOWNS = [Passage(str(100 + i), f"Town {i}", TOLD.format(i)) for i in range(25)]
ASKED = [(f"which river does town {i} lie on", (f"Nr{i}", f"the Nr{i}")) for i in range(25)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def hub_set(tmp_path, **changes):
    write_nq(tmp_path / "nq", ASKED[:20], ASKED[20:])
    write_wiki(tmp_path / "wiki", TOWNS)
    questions = nq(tmp_path, config="nq_open", rows={"train": 20, "validation": 5})
    files = "data/psgs_w100/no_embeddings/{split}-*.parquet"
    passages = HubTable(dataset=str(tmp_path / "wiki"), files=files, rows={"train": 25})
    given = {"questions": questions, "passages": passages, "distill": 10, "dev": 5, "test": 5}
    return HubSet(source="hub", name="nq", **given | changes)


def pool_set(tmp_path, rows, pools, **columns):
    """A set of one table in Tevatron's layout."""
    write_pools(tmp_path / "pools", rows)
    columns |= {"question": "query", "answer": "answers"}
    files = "default/wikipedia-nq-{split}.parquet"
    table = HubTable(dataset=str(tmp_path / "pools"), files=files, columns=columns)
    changes = {"passages": None, "pools": pools, "train": "dev", "heldout": "dev"}
    return hub_set(tmp_path, questions=table, **changes)


def made(settings, folder):
    passages, questions = folder / "passages", folder / "questions"
    passages.mkdir(parents=True)
    questions.mkdir()
    make_passages(passages, {}, as_json(passage_settings(settings)))
    inputs = {"passages": passages}
    make_questions(questions, inputs, as_json({"set": settings.model_dump(mode="json")}))
    return Corpus.load(settings.name, passages, questions)


def as_json(value):
    return json.loads(json.dumps(value))


def test_nq_and_wikipedia(tmp_path):
    one = made(hub_set(tmp_path), tmp_path / "made")
    sizes = {part: len(questions) for part, questions in one.questions.items()}
    assert sizes == {"distill": 10, "dev": 5, "test": 5}
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


def test_passages_from_a_tsv(tmp_path):
    rows = [("id", "text", "title"), *((p.id, p.text, p.title) for p in TOWNS)]
    (tmp_path / "p.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    whole = made(hub_set(tmp_path, passages=str(tmp_path / "p.tsv")), tmp_path / "made")
    assert list(whole.passages) == TOWNS


def test_trivia_answers_come_with_their_aliases(tmp_path):
    write_trivia(tmp_path / "trivia", ASKED[:20], ASKED[20:])
    table = HubTable(dataset=str(tmp_path / "trivia"), config="unfiltered.nocontext")
    one = made(hub_set(tmp_path, questions=table), tmp_path / "made")
    assert one.questions["test"][0].answers in [answers for _, answers in ASKED]


@pytest.mark.parametrize("pools", [["negative", "positive"], ["negative"]])
@pytest.mark.parametrize("gold", [False, True])
def test_pools_make_the_corpus(tmp_path, gold, pools):
    """Also where the column of the gold passages is one of the pools."""
    others = [[TOWNS[(i + n) % 25] for n in (1, 2)] for i in range(25)]
    rows = [(q, a, [TOWNS[i]], others[i]) for i, (q, a) in enumerate(ASKED)]
    pools = tuple(f"{name}_passages" for name in pools)
    columns = {"gold": "positive_passages"} if gold else {}
    one = made(pool_set(tmp_path, rows, pools, **columns), tmp_path / "made")
    asked = [q for questions in one.questions.values() for q in questions]
    assert len({q.id for q in asked}) == 20  # all three parts from one split, none twice
    assert len({p.id for p in one.passages}) == len(one.passages)
    for q in asked:
        right = next(p for p in TOWNS if p.title.lower() == " ".join(q.text.split()[3:5]))
        assert right in list(one.passages) or not (gold or "positive_passages" in pools)
        assert (q.gold != ()) is gold
        assert not gold or [one.passages[i] for i in q.gold] == [right]


def nq(folder, **changes):
    return HubTable(dataset=str(folder / "nq"), **changes)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: {"questions": nq(t, config="other")}, "cannot be loaded .*whole files"),
        (lambda t: {"questions": nq(t, rows={"train": 87925})}, "the profile expects 87925"),
        (lambda t: {"questions": nq(t, columns={"question": "query"})},
         r"no column 'query' \(our 'question'\); there are question, answer"),
        (lambda t: {"heldout": "test"}, "split"),
        (lambda t: {"distill": 30}, "Lower distill, dev or test"),
        (lambda t: {"passages": str(t / "none.tsv")}, "No file"),
        (lambda t: {"passages": None, "pools": ("answer",)}, "a passage of the pool: no 'text'"),
        (lambda t: cut(next((t / "wiki").rglob("train-00001*"))) or {}, "whole files"),
        (lambda t: {"questions": HubTable(dataset="nobody/no-such-name")}, "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, monkeypatch, spoil, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    settings = hub_set(tmp_path)
    with pytest.raises(DataError, match=words):
        made(settings.model_copy(update=spoil(tmp_path)), tmp_path / "made")


def test_a_question_stands_in_one_part_only(tmp_path, caplog):
    """Asked twice in train: once. In train and validation: kept for test."""
    settings = hub_set(tmp_path / "a")
    again = [(f"Which river does the town {i} lie on?", ("Nr0",)) for i in (3, 4, 22, 23)]
    write_nq(tmp_path / "twice", ASKED[:20] + again, ASKED[20:])
    table = HubTable(dataset=str(tmp_path / "twice"), config="nq_open")
    settings = settings.model_copy(update={"questions": table, "distill": 15})
    one = made(settings, tmp_path / "made")
    texts = [normalise(q.text) for questions in one.questions.values() for q in questions]
    assert len(set(texts)) == len(texts) == 25
    for why in ("repeated", "in another split"):
        assert f"nq: 2 questions were left out ({why})" in caplog.text
    with pytest.raises(DataError, match="21 questions asked for, 20 different there"):
        made(settings.model_copy(update={"distill": 16}), tmp_path / "more")


def test_sets_over_the_same_passages_share_them(tmp_path):
    one = hub_set(tmp_path)
    other = one.model_copy(update={"name": "other", "seed": 9, "distill": 3})
    assert passage_settings(one) == passage_settings(other)
    before = passage_settings(one)
    write_wiki(tmp_path / "wiki2", TOWNS[:5])
    (tmp_path / "wiki2" / "data").rename(tmp_path / "wiki" / "more")
    assert passage_settings(one)["contents"] != before["contents"]


def test_a_title_that_is_no_text_is_refused(tmp_path):
    rows = [(q, a, [], [Passage("1", 3.5, "x")]) for q, a in ASKED]
    with pytest.raises(DataError, match=r"\(1\): 'title' is no text but 3\.5"):
        made(pool_set(tmp_path, rows, ("negative_passages",)), tmp_path / "made")


def test_a_set_takes_its_passages_from_one_place(tmp_path):
    for given in ({"passages": None}, {"pools": ("a",)}):
        with pytest.raises(ValueError, match="give either 'passages'"):
            hub_set(tmp_path / str(given), **given)


def test_passages_are_memory_mapped(tmp_path):
    """200 MB of passages opened, and some of them read, in a process that may grow by 60 MB."""
    many = (Passage(str(i), f"T{i}", "word " * 200) for i in range(200_000))
    write_passages(tmp_path / "many.arrow", many)
    code = (
        "import sys\nfrom pathlib import Path\nfrom ragkit.data.corpus import Passages\n"
        "def anonymous():\n    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon')) // 1024\n"
        "before = anonymous()\npassages = Passages(Path(sys.argv[1]))\n"
        "assert passages[199_999].id == '199999' and len(passages[5:9]) == 4\n"
        "assert sum(1 for _ in passages) == 200_000\nprint(anonymous() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "many.arrow")]
    environment = os.environ | {"PYTHONPATH": "."}
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    assert int(ended.stdout) < 60


def test_places_and_slices_are_those_of_a_list(tmp_path):
    stored = write_passages(tmp_path / "p.arrow", TOWNS)
    slices = [slice(3, 9), slice(None, None, 5), slice(20, 99), slice(9, 3)]
    for place in (0, -1, np.int64(7), *slices):
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
