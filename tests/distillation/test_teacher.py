"""The teacher's look: every choice from one pass, and calibration that reads the passages once."""

import numpy as np
import pytest
import torch
from test_reader import PASSAGES, QUESTION, make

from ragkit.attention.record import contributions, passage_scores, record
from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.distillation import teacher
from ragkit.experiment.stages import make_teacher
from ragkit.profile import AttentionSettings

OTHER = Question(
    "r", "on which river does old tarholm lie", ("Lyda river",), (1,), cloze="Old Tarholm lies on"
)


def by_hand(one, prompt, rows, norm):
    ids, mask = one.batch([prompt])
    seen = record(one.model, ids, mask, torch.tensor([rows]))
    return contributions(seen, torch.ones(1, len(rows)), norm)[:, 0]


def test_a_look_holds_what_each_choice_gives_alone():
    one = make(at_once=2)
    questions, found = [QUESTION, OTHER], [PASSAGES, PASSAGES[::-1]]
    scores = teacher.look(one, questions, found)
    for i, (question, passages) in enumerate(zip(questions, found, strict=True)):
        prompt = one.prompt(question, passages, question.answers[0])
        owner = torch.tensor(prompt.owner)
        for r, row_type in enumerate(teacher.ROWS):
            for norm in (False, True):
                tokens = by_hand(one, prompt, teacher.row_weights(prompt, row_type), norm)
                for pool, pooling in enumerate(teacher.POOLINGS):
                    expected = torch.stack(
                        [passage_scores(layer, owner, 2, pooling) for layer in tokens]
                    )
                    assert np.allclose(
                        scores["attention"][i, r, int(norm), :, pool], expected, atol=1e-6
                    )
                if not norm:
                    assert scores["outside"][i, r] == pytest.approx(
                        float(tokens[:, owner < 0].sum() / tokens.sum()), abs=1e-5
                    )


def test_a_look_runs_the_model_once_a_batch(monkeypatch):
    one, passes = make(at_once=2), []
    attention = one.attention
    monkeypatch.setattr(one, "attention", lambda *given: passes.append(1) or attention(*given))
    teacher.look(one, [QUESTION, OTHER, QUESTION], [PASSAGES] * 3)
    assert len(passes) == 2


@pytest.mark.parametrize("style", ["question", "cloze"])
def test_calibration_reads_the_passages_once_and_gives_both_scores(style):
    one, read = make(), []
    one.style = style
    one.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: read.append(args[0].shape[1])
    )
    asked, blank = teacher.calibrated_scores(one, QUESTION, PASSAGES, AttentionSettings())
    whole = one.prompt(QUESTION, PASSAGES)
    assert sum(read) < 1.5 * len(whole.ids)
    for scores, text in ((asked, None), (blank, "N/A")):
        question = QUESTION if text is None else Question("n", text, ("",), (0,), cloze=text)
        prompt = one.prompt(question, PASSAGES)
        tokens = by_hand(one, prompt, [len(prompt.ids) - 1], True).mean(0)
        assert torch.allclose(
            scores, passage_scores(tokens, torch.tensor(prompt.owner), 2), atol=1e-5
        )


def test_what_a_reader_saw_before_is_not_computed_again(monkeypatch, tmp_path):
    one = make()
    passages = [*PASSAGES, Passage("9", "Ulm", "Ulm is a town.")]
    corpus = Corpus("c", passages, {"distill": [QUESTION, OTHER, QUESTION]})
    first, then = np.array([[0, 1], [1, 0], [0, 1]]), np.array([[0, 1], [2, 0], [0, 1]])
    for name, candidates in (("first", first), ("anew", then)):
        (tmp_path / name).mkdir()
        make_teacher(one, corpus, candidates, 3, 2, tmp_path / name)
    asked = []
    look = teacher.look
    monkeypatch.setattr(
        teacher,
        "look",
        lambda reader, questions, found: asked.append(questions) or look(reader, questions, found),
    )
    for name, candidates in (("again", then), ("same", first)):
        (tmp_path / name).mkdir()
        make_teacher(
            one,
            corpus,
            candidates,
            3,
            2,
            tmp_path / name,
            known=(first, teacher.load(tmp_path / "first")),
        )
    assert asked == [
        [OTHER]
    ]  # the only question with other candidates, and none where all are the same
    for name, expected in (("again", "anew"), ("same", "first")):
        made, whole = teacher.load(tmp_path / name), teacher.load(tmp_path / expected)
        for part in whole:
            assert np.allclose(made[part], whole[part], atol=1e-5, equal_nan=True), part


def test_answers_of_another_length_are_made_room_for():
    nan = np.nan
    old = {"answer_logs": np.array([[[-1.0]], [[-2.0]]]), "attention": np.zeros((2, 1))}
    new = {"answer_logs": np.array([[[-3.0, -4.0]]]), "attention": np.ones((1, 1))}
    made = teacher.replaced(old, new, np.array([1]))
    assert np.array_equal(made["answer_logs"], [[[-1.0, nan]], [[-3.0, -4.0]]], equal_nan=True)
    assert made["attention"].tolist() == [[0], [1]]
    assert old["attention"].tolist() == [[0], [0]]
