"""The teacher's look: every choice from one pass."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ragkit.attention import contributions, passage_scores, record
from ragkit.data.corpus import Passage, Question, write_passages
from ragkit.data.files import write_arrays, write_jsonl
from ragkit.distillation import teacher
from ragkit.models.fid import load_reader
from ragkit.settings import POOLINGS, ROWS, ReaderSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in old Tarholm, a port."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
]
QUESTIONS = [
    Question("q", "where was orla venn born", ("old tarholm", "tarholm"), (0,), "Orla Venn was"),
    Question("r", "on which river does old tarholm lie", ("lyda",), (1,), "Old Tarholm lies on"),
]


@pytest.fixture(scope="module")
def reader():
    return load_reader("embedded", ReaderSettings(at_once=2))


def by_hand(reader, prompt, rows, norm):
    """Token contributions `[layers, tokens]`, from a recording of these rows."""
    ids, mask = reader.batch([prompt])
    seen = record(reader.model, ids, mask, torch.tensor([rows]))
    return contributions(seen, torch.ones(1, len(rows)), norm)[:, 0]


def test_a_look_holds_what_each_choice_gives_alone(reader):
    found = [PASSAGES, PASSAGES[::-1]]
    scores = teacher.look(reader, QUESTIONS, found)
    for i, (question, passages) in enumerate(zip(QUESTIONS, found, strict=True)):
        prompt = reader.prompt(question, passages, question.answers[0])
        owner = torch.tensor(prompt.owner)
        first = prompt.answer_start
        places = {
            "last_prompt": [first - 1],
            "predicting": list(range(first - 1, len(prompt.ids) - 2)),
            "consuming": list(range(first, len(prompt.ids) - 1)),
        }
        for r, row_type in enumerate(ROWS):
            for norm in (False, True):
                tokens = by_hand(reader, prompt, places[row_type], norm)
                for pool, pooling in enumerate(POOLINGS):
                    expected = [passage_scores(layer, owner, 2, pooling) for layer in tokens]
                    made = scores["attention"][i, r, int(norm), :, pool]
                    assert np.allclose(made, torch.stack(expected), atol=1e-5, rtol=1e-4)
                if not norm:
                    share = float(tokens[:, owner < 0].sum() / tokens.sum())
                    assert scores["outside"][i, r] == pytest.approx(share, abs=1e-5)
    assert scores["trimmed"].tolist() == [0, 0]


def test_a_look_runs_the_model_once_a_batch(reader, monkeypatch):
    passes, attention = [], reader.attention
    monkeypatch.setattr(reader, "attention", lambda *given: passes.append(1) or attention(*given))
    teacher.look(reader, [*QUESTIONS, QUESTIONS[0]], [PASSAGES] * 3)
    assert len(passes) == 2


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
    logs = teacher.look(reader, QUESTIONS, [PASSAGES] * 2)["answer_logs"]
    left_out = teacher.left_out_losses(reader, QUESTIONS, [PASSAGES] * 2)
    for i, question in enumerate(QUESTIONS):
        for place, passage in enumerate(PASSAGES):
            expected = log_likelihoods(reader, question, [passage])
            row = logs[i, place]
            assert np.allclose(row[: len(expected)], expected, atol=1e-4)
            assert np.isnan(row[len(expected) :]).all()
            others = log_likelihoods(reader, question, [PASSAGES[1 - place]])
            assert left_out[i, place] == pytest.approx(-others.mean(), abs=1e-4)
    assert np.isnan(logs[1]).any()  # answers of unequal length


def test_the_makers_write_what_the_functions_give(reader, tmp_path):
    write_passages(tmp_path / "passages.arrow", PASSAGES)
    for part in ("distill", "dev", "test"):
        write_jsonl(tmp_path / f"{part}.jsonl", map(asdict, [*QUESTIONS, QUESTIONS[0]]))
    (tmp_path / "style.json").write_text(json.dumps({"off-the-shelf": "question"}))
    found = np.array([[0, 1], [1, 0], [0, 1]])
    write_arrays(tmp_path / "candidates.safetensors", {"distill": found})
    inputs = dict.fromkeys(("passages", "questions", "candidates", "style"), tmp_path)
    settings = {
        **{"reader": reader.settings.model_dump(), "which": "off-the-shelf"},
        **{"questions": 2, "k": 2},
    }
    for name, make in (("teacher", teacher.make_teacher), ("loop", teacher.make_loop)):
        (tmp_path / name).mkdir()
        make(tmp_path / name, inputs, settings)
    passages = [PASSAGES, PASSAGES[::-1]]
    seen = load_file(tmp_path / "teacher" / "scores.safetensors")
    for name, expected in teacher.look(reader, QUESTIONS, passages).items():
        assert np.array_equal(seen[name], expected, equal_nan=True)
    trimmed = json.loads((tmp_path / "teacher" / "trimmed.json").read_text())
    assert trimmed == {"trimmed": 0, "prompts": 2}
    loop = load_file(tmp_path / "loop" / "scores.safetensors")["loop"]
    assert np.array_equal(loop, teacher.left_out_losses(reader, QUESTIONS, passages))
