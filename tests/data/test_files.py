"""Files of passages and questions: real formats read, bad lines named."""

import csv
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ragkit.data.corpus import (
    Corpus,
    Passage,
    hits,
    passage_settings,
    reciprocal_ranks,
    write_passages,
)
from ragkit.data.files import contents, file_hash, read_jsonl, write_whole
from ragkit.data.sets import make_passages, make_questions, read_questions, read_tsv
from ragkit.data.text import normalise
from ragkit.errors import DataError
from ragkit.settings import FileSet

HEADER = "id\ttext\ttitle\n"
REAL = pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA is not set: no real data to read"
)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, "utf8")
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
        (HEADER + '1\t"never closed\n' + "x\n" * 100_000, "line 2: field larger .*are CSV's"),
        (HEADER + '1\t"Brann"\tB\n', "line 2: are these quotes CSV's or part of the text"),
        (HEADER + '1\t"A ""b"""\tT\n2\t"C" d\tU\n', "line 3: .*the file's quotes are CSV's"),
        (HEADER + '2\t"C" d\tU\n1\t"A ""b"""\tT\n', "line 3: quotes are doubled .*of the text"),
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
    told = {"cut.tsv.gz": "damaged", "plain.tsv.gz": "no gzip file", "latin.tsv": "not UTF-8"}
    for name, words in (told | {"none.tsv": "Check the path"}).items():
        with pytest.raises(DataError, match=f"{name}.* {words}"):
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
        read_questions(path, [Passage("1", "T", "x")])


def made(tmp_path, rows, **sizes):
    """The stages of a set of files, through JSON as the graph hands their settings on."""
    passages = write(tmp_path, "p.tsv", HEADER + "a\tx\tT\nb\ty\tU\n")
    questions = write(tmp_path, "q.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    paths = {"passages": str(passages), "questions": str(questions)}
    settings = FileSet(source="files", name="f", **paths, **sizes)
    whole = json.loads(json.dumps([passage_settings(settings), settings.model_dump(mode="json")]))
    for name in ("passages", "questions"):
        (tmp_path / name).mkdir(exist_ok=True)
    make_passages(tmp_path / "passages", {}, whole[0])
    inputs = {"passages": tmp_path / "passages"}
    make_questions(tmp_path / "questions", inputs, {"set": whole[1]})
    return settings, Corpus.load("f", tmp_path / "passages", tmp_path / "questions")


def test_repeated_questions_are_one(tmp_path, caplog):
    """After normalisation, with the answers and gold passages of all; counted, and said."""
    rows = [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(6)]
    rows.append({"question": "Q0?", "answer": "b", "gold_id": "b"})
    rows.append({"question": "the q0", "answer": "a0"})
    _, corpus = made(tmp_path, rows, distill=2, dev=2, test=2)
    asked = [question for part in corpus.questions.values() for question in part]
    assert sorted(normalise(question.text) for question in asked) == [f"q{i}" for i in range(6)]
    (merged,) = (question for question in asked if question.text == "q0")
    assert (merged.answers, merged.gold) == (("a0", "b"), (1,))
    assert "f: 2 questions were left out (repeated)" in caplog.text
    with pytest.raises(DataError, match=r"7 questions asked for, 6 different .*Lower distill"):
        made(tmp_path, rows, distill=3, dev=2, test=2)


def test_an_edited_file_changes_the_settings_that_read_it(tmp_path):
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
    settings, _ = made(tmp_path, rows, distill=1, dev=1, test=1)
    before = passage_settings(settings), contents(settings.questions)
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write('{"question": "more", "answer": "a"}\n')
    assert passage_settings(settings) == before[0]
    assert contents(settings.questions) != before[1]


def rows_of(path):
    return [(q.text, q.answers) for q in read_questions(path, [])]


def test_arrays_and_indented_objects_are_read_with_their_lines(tmp_path):
    """DPR's own JSON, and what `jq` writes."""
    rows = [{"question": f"q{i}", "answers": [f"a{i}"], "ctxs": []} for i in range(3)]
    array = write(tmp_path, "dpr.json", json.dumps(rows, indent=4))
    assert rows_of(array) == [(f"q{i}", (f"a{i}",)) for i in range(3)]
    lines = array.read_text().splitlines()
    assert all(lines[number - 1].strip() == "{" for number, _ in read_jsonl(array))
    objects = write(tmp_path, "jq.json", "\n".join(json.dumps(row, indent=2) for row in rows))
    assert rows_of(objects) == rows_of(array)
    for text, words in (
        (array.read_text()[:-20], "line 16: not valid JSON .*line 2[0-9]"),
        ('[\n{"question": "q", "answer": "a"},\n7]', "line 3: expected an object"),
        ('{"version": "1.1", "data": [{"paragraphs": []}]}', "line 1: expected an object .*SQuAD"),
        ('{\n "version": "1.1",\n "data": []\n}', "line 1: expected an object .*SQuAD"),
    ):
        with pytest.raises(DataError, match=words):
            rows_of(write(tmp_path, "bad.json", text))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("['Tilda Brann', 'T. Brann']", ("Tilda Brann", "T. Brann")),
        ('["it\'s"]', ("it's",)),
        ("[sic]", ("[sic]",)),
        ("[1, 2]", "the answer 1 is no text"),
        ("[]", "no answers"),
        ([1912], "the answer 1912 is no text"),
        (float("nan"), "the answer nan is no text"),
        (["a", None], "the answer None is no text"),
        ([["a"]], r"the answer \['a'\] is no text"),
        ({"value": "Ulm", "aliases": ["Ulm", "City of Ulm"]}, ("Ulm", "City of Ulm")),
        ({"value": "a", "aliases": None}, ("a",)),
        ({"value": "a", "aliases": "b"}, ("a", "b")),
        ({"value": "a", "aliases": 5}, "the answer 5 is no text"),
    ],
)
def test_answers_are_texts(tmp_path, answer, right):
    path = write(tmp_path, "q.jsonl", json.dumps({"question": "q", "answer": answer}))
    if isinstance(right, tuple):
        assert rows_of(path) == [("q", right)]
    else:
        with pytest.raises(DataError, match=f"line 1: {right}"):
            rows_of(path)


def test_a_gold_passage_of_null_is_none(tmp_path):
    row = {"question": "q", "answer": "a", "gold_id": None, "psg_id": 7}
    path = write(tmp_path, "q.jsonl", json.dumps(row))
    assert read_questions(path, [Passage("6", "", "x"), Passage("7", "", "y")])[0].gold == (1,)
    path = write(tmp_path, "q.jsonl", json.dumps(row | {"psg_id": None}))
    assert read_questions(path, [])[0].gold == ()


def test_half_a_character_is_named(tmp_path):
    row = {"question": "who is \ud800 mayor", "answer": "a"}
    for text in (json.dumps(row), json.dumps([row])):
        with pytest.raises(DataError, match=r"line 1: not valid JSON .*surrogates"):
            rows_of(write(tmp_path, "q.jsonl", text))


def test_marks_at_the_start_and_line_ends(tmp_path):
    (tmp_path / "p.tsv").write_bytes(f"\ufeff{HEADER}1\ta\tb\n".replace("\n", "\r\n").encode())
    assert list(read_tsv(tmp_path / "p.tsv")) == [Passage("1", "b", "a")]
    (tmp_path / "q.jsonl").write_bytes('\ufeff{"question": "q", "answer": "a"}\r\n'.encode())
    assert rows_of(tmp_path / "q.jsonl") == [("q", ("a",))]
    (tmp_path / "q.jsonl").write_bytes('{"question": "q"}'.encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8"):
        rows_of(tmp_path / "q.jsonl")


RAW = [
    ("1", '"The Song of Ossa is an opera.', "The Song"),
    ("2", '"Brann" is a name, ""oddly"".', '"Brann"'),
    ("3", 'a 6" gun', "G"),
]


def test_quotes_are_read_as_the_file_means_them(tmp_path):
    raw = write(tmp_path, "raw.tsv", HEADER + "".join("\t".join(row) + "\n" for row in RAW))
    more = [("4", 'two\nlines, a \t tab, "q"', "T\nU"), ("5", "", "none"), ("6", "z", '"')]
    csv_rows = [*RAW, *more]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        with (tmp_path / "quoted.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=quoting)
            writer.writerows([("id", "text", "title"), *csv_rows])
        found = [(p.id, p.text, p.title) for p in read_tsv(tmp_path / "quoted.tsv")]
        assert found == [row for row in csv_rows if row[1]]
    assert [(p.id, p.text, p.title) for p in read_tsv(raw)] == RAW


def test_hits_and_ranks():
    found, golds = [[3, 1, 2], [4, 5, 6], [7, 8, 9]], [(2, 3), (6,), ()]
    assert hits(found, golds, 1).tolist() == [1, 0, 0]
    assert hits(found, golds, 3).tolist() == [1, 1, 0]
    assert reciprocal_ranks(found, golds).tolist() == [1, 1 / 3, 0]


def test_files_are_written_whole_and_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "one")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert file_hash(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert file_hash(path) == hashlib.sha256(b"one").hexdigest()
    write_whole(path, "more")
    assert file_hash(path) == hashlib.sha256(b"more").hexdigest()


@REAL
def test_real_passages_and_questions(tmp_path):
    folder = Path(os.environ["RAGKIT_REAL_DATA"])
    source = folder / "wiki/psgs_w100.sample.tsv.gz"
    passages = write_passages(tmp_path / "p.arrow", read_tsv(source))
    assert len(passages) == 25316 - 79  # 79 records have no text; none of them is a gold passage
    questions = read_questions(folder / "nq/nq-open-gold.jsonl.gz", passages)
    assert len(questions) == 2655
    assert sum(bool(q.gold) for q in questions) == 2655
    assert len(read_questions(folder / "nq/NQ-open.dev.jsonl", [])) == 3610
    trivia = read_questions(folder / "triviaqa/trivia-dev.sample.jsonl", [])
    assert len(trivia) == 2000
    assert np.mean([len(q.answers) for q in trivia]) > 5  # aliases are kept
    (tmp_path / "p.tsv").write_bytes(gzip.decompress(source.read_bytes()))
    assert list(read_tsv(tmp_path / "p.tsv")) == list(passages)
