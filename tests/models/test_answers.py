"""Stages of answers, made by the embedded reader from the folders of other stages."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from ragkit.data.corpus import Asked, Corpus, write_passages
from ragkit.data.files import write_jsonl
from ragkit.data.worlds import build_world
from ragkit.models import answers, fid
from ragkit.models.answers import make_answers, make_premises, premise_cases
from ragkit.settings import ReaderSettings, WorldSet

SET = {"source": "world", "name": "a", "world": "almanac", "seed": 5, "entities": 24}
SETTINGS = {"reader": ReaderSettings().model_dump(), "answered": 6, "k": 3, "seed": 0}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The folder of a corpus and of candidates, whose second is gold, and the corpus."""
    folder = tmp_path_factory.mktemp("stages")
    corpus = build_world(WorldSet(**SET, distill=20, dev=12, test=8))
    write_passages(folder / "passages.arrow", corpus.passages)
    for part, questions in corpus.questions.items():
        write_jsonl(folder / f"{part}.jsonl", map(asdict, questions))
    ranking = {}
    for part in ("dev", "test"):
        rows = [[(q.gold[0] + 1) % 40 + 60, q.gold[0], 7, 8] for q in corpus.questions[part]]
        ranking[part] = np.array(rows)
    save_file(ranking, folder / "candidates.safetensors")
    return dict.fromkeys(("passages", "questions", "candidates"), folder), corpus


def read(path):
    return json.loads(path.read_text("utf8"))


def test_answers_come_from_the_first_k_passages_or_none(stages, tmp_path):
    inputs = {**stages[0], "ranking": stages[0]["candidates"]}
    settings = {**SETTINGS, "which": "off-the-shelf cloze"}
    made = {}
    for name, changes in {"k": {}, "one": {"k": 1}, "none": {"closed_book": True}}.items():
        (tmp_path / name).mkdir()
        make_answers(tmp_path / name, inputs, {"closed_book": False, **settings, **changes})
        made[name] = read(tmp_path / name / "answers.json")
        assert len(made[name]) == 6
    golds = [q.answers for q in stages[1].questions["test"][:6]]
    right = {name: sum(map(answers.exact_match, made[name], golds)) for name in made}
    assert right["k"] > right["none"]
    assert made["one"] != made["k"]


def test_a_reader_is_asked_by_clozes_where_its_name_ends_so(stages, tmp_path, monkeypatch):
    """The same weights, before Step 1 and after it."""
    opened, load = [], fid.load_reader

    def spy(name, *rest):
        opened.append(name)
        return load("embedded", *rest)

    monkeypatch.setattr(fid, "load_reader", spy)
    question = stages[1].questions["test"][0]
    folders = {"fine-tuned": tmp_path / "fine-tuned", "step 10": tmp_path / "step-10"}
    for which, folder in ({"off-the-shelf": "embedded"} | folders).items():
        inputs = stages[0] if folder == "embedded" else {**stages[0], "step1": tmp_path}
        for name, style in ((which, "question"), (f"{which} cloze", "cloze")):
            reader = fid.open_reader(inputs, {**SETTINGS, "which": name})
            assert opened.pop() == folder
            assert reader.style == style
            said = reader.tokenizer.decode(reader.prompt(question, []).ids)
            assert ("answer" in said) is (style == "question")
    assert fid.open_reader(stages[0], SETTINGS).style == "question"  # as Step 1 opens it


def test_a_ranking_of_step_2_is_taken_before_candidates(stages, tmp_path):
    inputs = {**stages[0], "ranking": tmp_path}
    for place, name in enumerate(("candidates", "ranking")):
        save_file({"test": np.full((8, 2), place)}, tmp_path / f"{name}.safetensors")
        asked = Asked.open(inputs, "test", 3, 1)
        assert asked.candidates.tolist() == [[place]] * 3
        assert asked.passages == [[stages[1].passages[place]] for _ in asked.questions]


def test_premises_show_gold_passages_and_none(stages, tmp_path):
    make_premises(tmp_path, stages[0], {**SETTINGS, "which": "off-the-shelf cloze"})
    exact = {case: np.array(values) for case, values in read(tmp_path / "exact.json").items()}
    assert exact["gold among the passages"].mean() > exact["no passages"].mean()
    assert {case: one.shape for case, one in exact.items()} == dict.fromkeys(exact, (6,))
    assert len(exact) == 4


def test_premises_are_kept_question_by_question(stages, tmp_path, monkeypatch):
    """Real text: a question whose gold passage is not known keeps its place."""
    known = Asked.open(stages[0], "dev", 6)
    asked = [replace(q, gold=(), relation="") for q in known.questions]
    asked[1] = replace(asked[1], answers=("no such words",))
    real = replace(known, questions=asked)
    monkeypatch.setattr(answers.Asked, "open", lambda *_: real)
    told = SimpleNamespace(
        prompt=lambda q, _: q, answer=lambda asked: ["", *(q.answers[0] for q in asked[1:])]
    )
    monkeypatch.setattr(answers, "open_reader", lambda *_: told)
    make_premises(tmp_path, {}, {**SETTINGS, "which": "fine-tuned"})
    exact = read(tmp_path / "exact.json")
    assert exact["gold among the passages"] == [0, None, 1, 1, 1, 1]
    assert exact["no passages"] == [0, 1, 1, 1, 1, 1]


def test_cases_hold_what_their_names_say(stages):
    asked = Asked.open(stages[0], "dev", 6)
    cases = premise_cases(asked, 3, 0)
    for name, pairs in cases.items():
        assert [q for q, _ in pairs] == asked.questions
        holds = [asked.corpus.passages[q.gold[0]] in passages for q, passages in pairs]
        assert all(holds) is (name != "no passages")
    one, two = cases["gold among the passages"], cases["the same, permuted"]
    assert [set(found) for _, found in one] == [set(found) for _, found in two]
    assert one != two


def test_questions_without_a_known_gold_passage_count_in_no_gold_case(stages):
    """Real text: gold is what holds an answer among those found; some questions have none."""
    world = Asked.open(stages[0], "dev", 6)
    asked = [replace(q, gold=(), relation="") for q in world.questions]
    asked[0] = replace(asked[0], answers=("no such words",))
    real = Corpus("r", world.corpus.passages, {**world.corpus.questions, "dev": asked})
    cases = premise_cases(Asked(real, asked, world.candidates), 3, 0)
    expected = {"gold among the passages": 5, "the same, permuted": 5, "no passages": 6}
    assert {name: len(pairs) for name, pairs in cases.items()} == expected
