"""Indicators against SciPy and by hand, on whole prompts of tiny readers, with everything that can be undefined."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from test_reader import PASSAGES, QUESTION, make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ragkit.attention.record import record
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.distillation.teacher import row_weights
from ragkit.errors import NounsError
from ragkit.experiment import choices, evidence
from ragkit.experiment.analysis import Analysis
from ragkit.indicators import measures as indicators
from ragkit.models.reader import PART, Reader
from ragkit.profile import AttentionSettings, ReaderSettings, load_profile

numbers = arrays(np.float64, 12, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.5]))


@given(numbers, numbers)
def test_spearman_is_scipys(x, y):
    ours = indicators.spearman(x, y)[0]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert np.allclose(
        choices.spearmans(np.stack([x, y], 1), y[:, None])[0, 0], ours, equal_nan=True
    )


def test_lift_averages_to_one_in_each_question():
    question = np.array([0, 0, 0, 1, 1, 2])
    lifts = indicators.lift(np.array([1.0, 2, 3, 5, 15, 0]), question)
    assert lifts[:3].mean() == lifts[3:5].mean() == 1
    assert np.isnan(lifts[5])  # nothing fell on that question's tokens


def test_closeness_is_the_best_cosine():
    tokens, wanted = (
        np.array([[1.0, 0], [0, 2], [1, 1], [0, 0], [np.nan, 1]]),
        np.array([[3.0, 0], [np.nan, 0], [0, 0]]),
    )
    assert np.allclose(
        indicators.closeness(tokens, wanted), [1, 0, np.sqrt(0.5), np.nan, np.nan], equal_nan=True
    )
    assert np.isnan(
        indicators.closeness(tokens, np.empty((0, 2)))
    ).all()  # a question without nouns


def test_a_token_that_comes_again_is_exactly_as_close():
    vectors = np.random.default_rng(0).normal(size=(40, 64))
    again = np.concatenate([vectors, vectors[::-1], vectors])
    close = indicators.closeness(again, vectors[:3])
    assert len(np.unique(close)) == 38  # the three wanted ones are all at 1


def test_the_closest_share_takes_ties_along():
    close = np.array([0.9, 0.1, 0.5, 0.5, 0.2, 0.5, 0.0, 0.0, 0.0, 0.0])
    one = np.zeros(10, dtype=int)
    assert indicators.closest(close, one, 0.2).tolist() == [
        True,
        False,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert indicators.closest(close, one, 0.01).sum() == 1
    assert indicators.closest(close, np.repeat([0, 1], 5), 0.2).tolist() == [
        True,
        *[False] * 4,
        True,
        *[False] * 4,
    ]
    assert indicators.closest(np.array([]), one[:0], 0.1).size == 0


def test_an_indicator_by_hand():
    attention, close = (
        np.array([4.0, 1, 1, 2, 1, 1, 1, 1, 1, 7]),
        np.array([1.0, 0.8, 0.1, 0.7, 0.0, 0.2, 0.3, 0.1, 0.2, 0.6]),
    )
    exact = close == 1
    row = indicators.indicator(attention, close, np.zeros(10, dtype=int), exact, 0.2).iloc[0]
    assert row["attention"] == pytest.approx((4 + 1) / 2 / attention.mean())
    assert row["attention (no exact)"] == pytest.approx((1 + 2) / 2 / attention.mean())
    assert row["Spearman"] == pytest.approx(stats.spearmanr(attention, close).statistic)
    assert row["Spearman (no exact)"] == pytest.approx(
        stats.spearmanr(attention[1:], close[1:]).statistic
    )


def test_what_is_undefined_is_nan_and_not_zero():
    question = np.repeat([0, 1, 2, 3], 5)
    attention = np.concatenate([np.ones(5), np.arange(5.0) + 1, np.arange(5.0) + 1, np.zeros(5)])
    close = np.concatenate(
        [np.arange(5.0), np.ones(5), np.full(5, np.nan), np.arange(5.0)]
    )  # constant attention, constant closeness, no goal, no attention
    table = indicators.indicator(attention, close, question, np.zeros(20, dtype=bool), 0.2)
    assert table["Spearman"].isna().all()
    assert table["attention"].isna().tolist() == [False, False, True, True]
    assert table["question"].tolist() == [0, 1, 2, 3]


def test_tenths_keep_the_mean():
    rng = np.random.default_rng(0)
    attention, close = rng.random(60), rng.random(60)
    table = indicators.deciles(attention, close, np.repeat([0, 1], 30))
    assert table.shape == (2, 10)
    assert np.allclose(table.mean(1), 1)
    order = np.argsort(close[:30])
    assert table[0, 9] == pytest.approx(attention[:30][order[-3:]].mean() / attention[:30].mean())


def test_tokens_hold_what_the_recorder_gives():
    one = make()
    found = [PASSAGES, PASSAGES[::-1]]
    tokens = indicators.look_at_tokens(one, [QUESTION, QUESTION], found)
    for number, passages in enumerate(found):
        prompt = one.prompt(QUESTION, passages, QUESTION.answers[0])
        ids, mask = one.batch([prompt])
        mine, owner = tokens.question == number, np.array(prompt.owner)
        assert tokens.ids[mine].tolist() == np.array(prompt.ids)[owner >= 0].tolist()
        assert tokens.owner[mine].tolist() == owner[owner >= 0].tolist()
        seen = record(one.model, ids, mask, torch.tensor([row_weights(prompt, "predicting")]))
        expected = (seen.alpha[:, 0].mean(2) * seen.norms[:, 0]).mean((0, 1)).numpy()[owner >= 0]
        assert np.allclose(
            tokens.attention(AttentionSettings(rows="predicting"))[mine], expected, atol=1e-6
        )
        assert tokens.from_end[mine].min() > 0
    assert np.allclose(tokens.mass.sum(-1), 1, atol=1e-5)


def test_nouns_become_tokens_by_their_characters():
    one = make()
    text = "where was maro elm born"
    inside = [
        one.tokenizer.decode([token])
        for token, is_noun in indicators.within_spans(one, text, [(10, 14), (15, 18)])
        if is_noun
    ]
    assert "".join(inside).replace(" ", "").replace("##", "") == "maroelm"
    assert not any(is_noun for _, is_noun in indicators.within_spans(one, text, []))
    assert indicators.within_spans(one, "", []) == []


def test_an_answer_of_one_sign_and_one_in_no_passage():
    one = make()
    for answer in ("a", "?", "zzz"):
        question = Question(
            "q", "where was maro elm born", (answer,), (0,), cloze="maro elm was born in"
        )
        tokens = indicators.look_at_tokens(one, [question], [PASSAGES])
        wanted = indicators.answer_ids(one, [question])[0]
        assert wanted
        table = one.model.get_input_embeddings().weight
        vectors, goal = (
            indicators.embeddings(one.tokenizer, np.array(ids), table, one.tokenizer)
            for ids in (tokens.ids, wanted)
        )
        row = indicators.indicator(
            tokens.attention(AttentionSettings()),
            indicators.closeness(vectors, goal),
            tokens.question,
            np.isin(tokens.ids, wanted),
            0.1,
        )
        assert np.isfinite(row["attention"]).all()


def test_a_token_of_another_tokenizer_is_the_mean_of_its_pieces():
    one = make()
    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    space = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    ids = np.array(
        [one.tokenizer.convert_tokens_to_ids("a"), one.tokenizer.convert_tokens_to_ids("z")]
    )
    vectors = indicators.embeddings(
        one.tokenizer, ids, torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]]), space
    )
    assert np.allclose(
        vectors, [[1, 0], [np.nan, np.nan]], equal_nan=True
    )  # 'z' has no piece there


def test_contextual_closeness_has_a_value_for_every_passage_token():
    one = make()
    tokens = indicators.look_at_tokens(one, [QUESTION], [PASSAGES])
    to_answer, to_nouns = indicators.contextual_closeness(one, [QUESTION], [PASSAGES], [[(0, 5)]])
    assert len(to_answer) == len(to_nouns) == len(tokens.ids)
    assert np.isfinite(to_answer).all()
    assert np.isnan(indicators.contextual_closeness(one, [QUESTION], [PASSAGES], [[]])[1]).all()


@pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA names no folder."
)
def test_the_questions_nouns_are_found_in_a_prompt_that_cuts_them_otherwise():
    """The small Llama's SentencePiece vocabulary puts other tokens at a text's beginning than in its middle."""
    llama = str(Path(os.environ["RAGKIT_REAL_DATA"]) / "models" / "stories260k")
    one = Reader.load(llama, ReaderSettings(model=llama, context=512))
    text = "who wrote the old song about a river"
    question, spans = (
        Question("q", text, ("Ulm",), (0,)),
        [(text.index(word), text.index(word) + len(word)) for word in ("song", "river")],
    )
    inside = indicators.asked_within_spans(one, question, PASSAGES, spans)
    prompt = one.prompt(question, PASSAGES)
    asked = [i for i, who in zip(prompt.ids, prompt.owner, strict=True) if who == PART["question"]]
    assert (
        "".join(
            one.tokenizer.convert_ids_to_tokens(
                [i for i, noun in zip(asked, inside, strict=True) if noun]
            )
        ).replace("▁", "")
        == "songriver"
    )
    _, to_nouns = indicators.contextual_closeness(one, [question], [PASSAGES], [spans])
    assert np.isfinite(to_nouns).all()


def test_contextual_closeness_to_the_answer_needs_no_noun_finder(tmp_path):
    def nouns():
        raise NounsError("none is there")

    lab = SimpleNamespace(
        profile=load_profile("smoke"), open=lambda name, make, *rest: make(tmp_path) or tmp_path
    )
    analysis = SimpleNamespace(
        lab=lab,
        set_name="toy",
        questions=[QUESTION],
        found=[PASSAGES],
        nouns=nouns,
        record=lambda which: {},
    )
    assert np.isfinite(Analysis.contextual(analysis, "answer")).all()
    with pytest.raises(NounsError):
        Analysis.contextual(analysis, "nouns")


def test_a_tokens_last_character():
    one = make()
    text = "Maro Elm was born in Ulm."
    tokens = indicators.look_at_tokens(one, [QUESTION], [[Passage("1", "Maro", text)]])
    places = indicators.last_characters(one, text, tokens.ids)
    assert places[-1] == len(text) - 1
    assert (np.diff(places) > 0).all()
    with pytest.raises(indicators.IndicatorError, match="other tokens"):
        indicators.last_characters(one, "Another text.", tokens.ids)


def test_leave_one_out_by_hand():
    values, works = (
        np.array([0.1, 0.2, 0.35, 0.5, 0.6]),
        np.array([False, False, False, True, True]),
    )
    printed, found = evidence.leave_one_out(values, works)
    assert printed == pytest.approx(0.8)  # 0.35 is on the wrong side of 0.3
    assert found == 1  # a line between 0.35 and 0.5 is found without either of them
    assert (
        evidence.leave_one_out(values, ~works)[1] < 0.5
    )  # an indicator that is lower where it works


def test_rank_correlations_are_scipys_and_keep_nan():
    rng = np.random.default_rng(0)
    x, y = rng.random((5, 8)), rng.random((5, 8))
    assert np.allclose(
        evidence.rank_correlation(x, y),
        [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)],
    )
    assert np.isnan(evidence.rank_correlation(np.ones(8), y[0]))


def test_resampling_leaves_out_what_is_undefined():
    values = [np.array([1.0, np.nan, 3.0] * 50), np.full(150, 2.0)]
    drawn = evidence.resampled(values, 500, 0)
    assert drawn[:, 0].mean() == pytest.approx(2.0, abs=0.05)
    assert (drawn[:, 1] == 2).all()
