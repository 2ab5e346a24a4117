"""The teacher's look: every choice from one pass, and each passage's score wherever it stands."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import fid

from ragkit.attention import contributions, passage_scores, record
from ragkit.data.corpus import Passage, Question, found_first, write_passages
from ragkit.data.files import write_jsonl
from ragkit.distillation import teacher
from ragkit.models.fid import load_reader
from ragkit.models.reader import PART
from ragkit.settings import ROWS, ReaderSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in old Tarholm, a port."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
    Passage("2", "Ulm", "Ulm is a town."),
]
QUESTIONS = [
    Question("q", "where was orla venn born", ("old tarholm", "tarholm"), (0,), "Orla Venn was"),
    Question("r", "on which river does old tarholm lie", ("lyda",), (1,), "Old Tarholm lies on"),
    Question("s", "what is ulm", ("a town of old",), (2,), "Ulm is"),
]
FOUND = [PASSAGES, PASSAGES[::-1], [PASSAGES[i] for i in (1, 2, 0)]]
ORDERS = ("rank", "reversed", "shuffled")


@pytest.fixture(scope="module")
def reader():
    return load_reader("embedded", ReaderSettings(at_once=2))


@pytest.fixture(scope="module")
def looks(reader):
    return {order: teacher.look(reader, QUESTIONS, FOUND, order, 8) for order in ORDERS}


def recorded(reader, prompt, rows):
    """Attention and value norms of one prompt, its rows averaged: `[layers, heads, tokens]`."""
    seen = record(reader.model, *reader.batch([prompt]), torch.tensor([rows]))
    return seen.alpha[:, 0].mean(2).numpy(), seen.norms[:, 0].numpy()


def rows_of(prompt):
    """Where the rows of each of ROWS stand in a prompt with its answer."""
    first, last = prompt.answer_start, len(prompt.ids) - 1
    found = {"last_prompt": [first - 1], "consuming": [*range(first, last)]}
    return found | {"predicting": [*range(first - 1, last - 1)]}


@pytest.mark.parametrize("order", ORDERS)
def test_a_score_belongs_to_its_passage_wherever_that_stands(reader, looks, order):
    """The prompt is written anew by the places that the look tells of, and recorded."""
    seen = looks[order]
    assert seen["attention"].shape[:3] == (3, len(ROWS), 2)
    for n, (question, passages) in enumerate(zip(QUESTIONS, FOUND, strict=True)):
        shown = [None] * 3
        for passage, place in zip(passages, seen["places"][n], strict=True):
            shown[place] = passage
        prompt = reader.prompt(question, shown, question.answers[0])
        owner = np.array(prompt.owner)
        for r, name in enumerate(ROWS):
            alpha, norms = recorded(reader, prompt, rows_of(prompt)[name])
            for norm, tokens in enumerate((alpha, alpha * norms)):
                for i, place in enumerate(seen["places"][n]):
                    expected = tokens[..., owner == place].sum(-1)  # [layers, heads]
                    ours = seen["attention"][n, r, norm, ..., i]
                    assert np.allclose(ours, expected, atol=1e-5, rtol=1e-4)
            outside = alpha[..., owner < 0].sum() / alpha.sum()
            assert seen["outside"][n, r] == pytest.approx(outside, abs=1e-5)
        counts = [(owner == place).sum() for place in seen["places"][n]]
        assert seen["tokens"][n].tolist() == counts
    assert seen["holds"].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert seen["trimmed"].tolist() == [0, 0, 0]


def test_passages_stand_as_ranked_reversed_or_shuffled_by_a_seed(looks):
    assert looks["rank"]["places"].tolist() == [[0, 1, 2]] * 3
    assert looks["reversed"]["places"].tolist() == [[2, 1, 0]] * 3
    for row in looks["shuffled"]["places"]:  # else places and passages could change their parts
        assert row[row].tolist() != [0, 1, 2]
    many = [teacher.places_of("shuffled", 600, 3, seed) for seed in (0, 0, 1)]
    assert np.array_equal(many[0], many[1])
    assert not np.array_equal(many[0], many[2])
    assert (np.sort(many[0]) == np.arange(3)).all()
    for passage in many[0].T:  # each stands at each place equally often, about
        assert np.bincount(passage).min() > 150
    assert np.array_equal(teacher.places_of("empty", 2, 3, 0), [[0, 1, 2]] * 2)
    with pytest.raises(KeyError):
        teacher.places_of("balanced", 2, 3, 0)  # that is made of two passes


def test_the_mean_of_the_heads_is_what_contributions_give(reader, looks):
    for n, (question, passages) in enumerate(zip(QUESTIONS, FOUND, strict=True)):
        prompt = reader.prompt(question, passages, question.answers[0])
        for r, name in enumerate(ROWS):
            rows = rows_of(prompt)[name]
            seen = record(reader.model, *reader.batch([prompt]), torch.tensor([rows]))
            for norm in (False, True):
                tokens = contributions(seen, torch.ones(1, len(rows)), norm)[:, 0]
                expected = passage_scores(tokens, torch.tensor(prompt.owner), 3)
                ours = looks["rank"]["attention"][n, r, int(norm)].mean(1)
                assert np.allclose(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_look_runs_the_model_once_a_batch(reader, monkeypatch):
    passes, attention = [], reader.attention
    monkeypatch.setattr(reader, "attention", lambda *given: passes.append(1) or attention(*given))
    teacher.look(reader, QUESTIONS, FOUND)
    assert len(passes) == 2


def test_a_prompt_too_long_says_how_much_it_lost():
    short = load_reader("embedded", ReaderSettings(context=50))
    seen = teacher.look(short, QUESTIONS, FOUND, "reversed")
    for n, (question, passages) in enumerate(zip(QUESTIONS, FOUND, strict=True)):
        prompt = short.prompt(question, passages[::-1], question.answers[0])
        assert seen["trimmed"][n] == prompt.trimmed > 0
        assert seen["tokens"][n].sum() == (np.array(prompt.owner) >= 0).sum()


# The empty question


@pytest.mark.parametrize("style", ["question", "cloze"])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_an_empty_question_has_no_word_and_the_same_passages(kind, style, monkeypatch):
    one = fid(at_once=2) if kind == "encoder-decoder" else load_reader("embedded", ReaderSettings())
    one.style = style
    asked, attention = [], one.attention

    def spy(prompts, *rest):
        asked.extend(prompts)
        return attention(prompts, *rest)

    monkeypatch.setattr(one, "attention", spy)
    seen = teacher.look(one, QUESTIONS[:2], FOUND[:2], "empty")
    assert np.isfinite(seen["attention"]).all()
    assert (seen["attention"].sum(-1) > 0).all()
    assert seen["places"].tolist() == [[0, 1, 2]] * 2
    assert seen["holds"].tolist() == [[1, 1, 0], [0, 1, 0]]  # of the question that it stands for
    usual = teacher.look(one, QUESTIONS[:2], FOUND[:2])
    assert np.array_equal(seen["tokens"], usual["tokens"])
    assert not np.allclose(seen["attention"], usual["attention"])
    empty, full = asked[:2], asked[2:]
    assert len(empty) == len(full) == 2

    def told(prompt, *parts):
        own = [i for i, who in zip(prompt.ids, prompt.owner, strict=True) if who in parts]
        return one.tokenizer.decode(own, skip_special_tokens=True).split()

    for prompt in empty:
        assert not told(prompt, PART["question"], PART["answer"])
        assert prompt.ids[-1] == one.end
    for prompt in full:
        assert told(prompt, PART["question"])
        assert told(prompt, PART["answer"])
    template = [sorted(told(prompt, PART["other"])) for prompt in asked]
    assert template[0] == template[1] == template[2] == template[3]
    texts = [sorted(told(prompt, 0, 1, 2)) for prompt in asked]
    assert sorted(texts[:2]) == sorted(texts[2:])


# Likelihoods


def log_likelihoods(reader, question, passages):
    """Of the answer's tokens and the end token, from the model's whole output."""
    prompt = reader.prompt(question, passages, question.answers[0])
    ids, mask = reader.batch([prompt])
    with torch.no_grad():
        logs = reader.model(input_ids=ids, attention_mask=mask).logits[0].log_softmax(-1)
    return np.array(
        [float(logs[i - 1, ids[0, i]]) for i in range(prompt.answer_start, len(prompt.ids))]
    )


def test_answers_are_scored_given_each_passage_alone_and_without_it(reader):
    logs = teacher.alone(reader, QUESTIONS, FOUND)
    left_out = teacher.left_out_losses(reader, QUESTIONS, FOUND)
    assert logs.shape[:2] == left_out.shape == (3, 3)
    for i, (question, passages) in enumerate(zip(QUESTIONS, FOUND, strict=True)):
        for place, passage in enumerate(passages):
            expected = log_likelihoods(reader, question, [passage])
            row = logs[i, place]
            assert np.allclose(row[: len(expected)], expected, atol=1e-4)
            assert np.isnan(row[len(expected) :]).all()
            others = [other for other in passages if other is not passage]
            expected = -log_likelihoods(reader, question, others).mean()
            assert left_out[i, place] == pytest.approx(expected, abs=1e-4)
    assert np.isnan(logs[1]).any()  # answers of unequal length


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        (("old tarholm", "tarholm"), 0),  # a tie
        (("Lyda", "tarholm", "venn"), 1),
        (("arholm", "Tarholm"), 1),  # whole words
        (("nowhere", "never"), 0),
        (("ulm",), 0),
    ],
)
def test_the_answer_that_stands_in_most_passages_comes_first(answers, best):
    asked = replace(QUESTIONS[0], answers=answers)
    others = tuple(one for one in answers if one != answers[best])
    assert found_first(asked, PASSAGES) == replace(asked, answers=(answers[best], *others))
    assert found_first(asked, []) == asked


@pytest.mark.parametrize("answer", ["first", "found"])
def test_a_look_is_for_the_answer_that_the_settings_name(reader, tmp_path, answer):
    asked = replace(QUESTIONS[0], answers=("Lyda", "tarholm"))
    write_passages(tmp_path / "passages.arrow", PASSAGES)
    for part in ("distill", "dev", "test"):
        write_jsonl(tmp_path / f"{part}.jsonl", [asdict(asked)])
    save_file({"distill": np.array([[0, 1, 2]])}, tmp_path / "candidates.safetensors")
    inputs = dict.fromkeys(("passages", "questions", "candidates"), tmp_path)
    chosen = {"reader": reader.settings.model_dump() | {"answer": answer}}
    chosen |= {"which": "off-the-shelf", "k": 3, "questions": 1, "part": "distill"}
    taken = asked if answer == "first" else replace(asked, answers=("tarholm", "Lyda"))
    teacher.make_teacher(tmp_path, inputs, chosen | {"order": "rank", "seed": 0})
    seen = load_file(tmp_path / "scores.safetensors")
    expected = teacher.look(reader, [taken], [PASSAGES])
    assert np.array_equal(seen["attention"], expected["attention"])
    teacher.make_alone(tmp_path, inputs, chosen)
    logs = load_file(tmp_path / "scores.safetensors")["answer_logs"]
    assert np.array_equal(logs, teacher.alone(reader, [taken], [PASSAGES]), equal_nan=True)


def test_the_makers_write_what_the_functions_give(reader, tmp_path):
    """By part: `distill` has two questions of the three, `dev` other candidates."""
    write_passages(tmp_path / "passages.arrow", PASSAGES)
    for part in ("distill", "dev", "test"):
        write_jsonl(tmp_path / f"{part}.jsonl", map(asdict, QUESTIONS))
    places = [[0, 1, 2], [2, 1, 0], [1, 2, 0]]
    found = {"distill": np.array(places), "dev": np.array(places[::-1])}
    save_file(found, tmp_path / "candidates.safetensors")
    inputs = dict.fromkeys(("passages", "questions", "candidates"), tmp_path)
    settings = {"reader": reader.settings.model_dump(), "which": "off-the-shelf", "k": 3}

    def made(name, **changes):
        (tmp_path / name).mkdir()
        getattr(teacher, f"make_{name}")(tmp_path / name, inputs, settings | changes)
        return load_file(tmp_path / name / "scores.safetensors")

    seen = made("teacher", questions=2, part="distill", order="shuffled", seed=3)
    for name, expected in teacher.look(reader, QUESTIONS[:2], FOUND[:2], "shuffled", 3).items():
        assert np.array_equal(seen[name], expected)
    trimmed = json.loads((tmp_path / "teacher" / "trimmed.json").read_text())
    assert trimmed == {"trimmed": 0, "prompts": 2}
    seen = made("heads", questions=3, part="dev", order="rank", seed=3)
    for name, expected in teacher.look(reader, QUESTIONS, FOUND[2::-1]).items():
        assert np.allclose(seen[name], expected, atol=1e-6)
    logs = made("alone", questions=2, part="distill")["answer_logs"]
    expected = teacher.alone(reader, QUESTIONS[:2], FOUND[:2])
    assert np.array_equal(logs, expected, equal_nan=True)
    loop = made("loop", questions=2, part="distill")["loop"]
    assert np.array_equal(loop, teacher.left_out_losses(reader, QUESTIONS[:2], FOUND[:2]))
