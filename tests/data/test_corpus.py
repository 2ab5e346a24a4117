"""Files of passages and questions: real formats read, bad lines named."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ragkit.data import questions as corpus
from ragkit.data.passages import Passage, read_tsv, write_passages
from ragkit.errors import DataError, SearchError
from ragkit.models.index import search
from ragkit.profile import FileSet

HEADER = "id\ttext\ttitle\n"
REAL = pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA is not set: no real data to read"
)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_dpr_file_plain_or_gzipped(tmp_path):
    text = HEADER + '1\t"A quoted ""text"", with tab"\tTitle\n2\tPlain\tOther\n'
    plain = list(read_tsv(write(tmp_path, "p.tsv", text)))
    (tmp_path / "p.tsv.gz").write_bytes(gzip.compress(text.encode()))
    assert plain == list(read_tsv(tmp_path / "p.tsv.gz"))
    assert plain[0].text == 'A quoted "text", with tab'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER + "1\tonly two\n", "line 2: expected 3"),
        ("a\tb\n", "line 1: expected the header"),
        (HEADER, "no passages"),
        (HEADER + "1\tone\tA\n2\ttwo\tB\n1\tthree\tC\n", "Passages 1 and 3 have the same id '1'"),
        (HEADER + '1\t"never closed' + "x" * 200_000 + "\tA\n", "line 2: not a tab-separated row"),
    ],
)
def test_bad_passages_are_named(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        write_passages(tmp_path / "p.arrow", read_tsv(write(tmp_path, "p.tsv", text)))


def test_files_that_are_damaged_or_no_text_are_named(tmp_path):
    whole = gzip.compress((HEADER + "1\tone\tA\n" * 1000).encode())
    (tmp_path / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.tsv.gz").write_text(HEADER)
    (tmp_path / "latin.tsv").write_bytes((HEADER + "1\tM\xfcnchen\tA\n").encode("latin-1"))
    for name, words in (
        ("cut.tsv.gz", "damaged"),
        ("plain.tsv.gz", "no gzip file"),
        ("latin.tsv", "not UTF-8"),
    ):
        with pytest.raises(DataError, match=f"{name} .*{words}"):
            list(read_tsv(tmp_path / name))


def test_empty_passages_are_left_out_and_said(tmp_path, caplog):
    found = list(read_tsv(write(tmp_path, "p.tsv", HEADER + "1\tfine\tT\n2\t \tT\n")))
    assert [p.id for p in found] == ["1"]
    assert "1 passages without text were left out (the first at line 3)" in caplog.text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2: not valid JSON"),
        ('{"question": " ", "answer": ["a"]}', "line 2: 'question' is missing or empty"),
        ('{"question": "q", "answer": []}', "line 2: no answers"),
        ('{"question": "q", "answer": ["a"], "gold_id": "99"}', "line 2: gold passage '99'"),
        ("[1]", "line 2: expected an object"),
    ],
)
def test_bad_questions_are_named(tmp_path, line, words):
    path = write(tmp_path, "q.jsonl", '{"question": "q", "answer": ["a"]}\n' + line + "\n")
    with pytest.raises(DataError, match=words):
        corpus.read_questions(path, [Passage("1", "T", "x")])


def test_triviaqa_answers_with_aliases(tmp_path):
    row = {"question": "q", "answer": {"value": "Ulm", "aliases": ["Ulm", "City of Ulm"]}}
    assert corpus.read_questions(write(tmp_path, "q.jsonl", json.dumps(row)), [])[0].answers == (
        "Ulm",
        "City of Ulm",
    )


def test_a_missing_file_and_a_large_k(tmp_path):
    with pytest.raises(DataError, match="Check the path"):
        list(read_tsv(tmp_path / "none.tsv"))
    with pytest.raises(SearchError, match="Lower k"):
        search(np.ones((1, 2), dtype=np.float32), np.ones((3, 2), dtype=np.float32), 4)
    with pytest.raises(SearchError, match="different retrievers"):
        search(np.ones((1, 2), dtype=np.float32), np.ones((3, 3), dtype=np.float32), 1)


def test_too_many_questions_asked_for(tmp_path):
    passages = write(tmp_path, "p.tsv", HEADER + "1\tx\tT\n")
    questions = write(tmp_path, "q.jsonl", '{"question": "q", "answer": ["a"]}\n')
    with pytest.raises(DataError, match="Lower distill, dev or test"):
        corpus.build(
            FileSet(source="files", name="f", passages=str(passages), questions=str(questions)),
            tmp_path,
        )


@REAL
def test_real_passages_and_questions(tmp_path):
    folder = Path(os.environ["RAGKIT_REAL_DATA"])
    passages = write_passages(
        tmp_path / "p.arrow", read_tsv(folder / "wiki/psgs_w100.sample.tsv.gz")
    )
    assert len(passages) == 25316 - 79  # 79 records have no text; none of them is a gold passage
    questions = corpus.read_questions(folder / "nq/nq-open-gold.jsonl.gz", passages)
    assert len(questions) == 2655
    assert sum(bool(q.gold) for q in questions) == 2655
    assert len(corpus.read_questions(folder / "nq/NQ-open.dev.jsonl", [])) == 3610
    trivia = corpus.read_questions(folder / "triviaqa/trivia-dev.sample.jsonl", [])
    assert len(trivia) == 2000
    assert np.mean([len(q.answers) for q in trivia]) > 5  # aliases are kept
    (tmp_path / "p.tsv").write_bytes(
        gzip.decompress((folder / "wiki/psgs_w100.sample.tsv.gz").read_bytes())
    )
    assert list(read_tsv(tmp_path / "p.tsv")) == list(passages)
