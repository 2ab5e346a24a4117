"""Measures against SciPy, by brute force and by hand, with everything that can be undefined."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from scipy import stats
from scipy.spatial.distance import cosine

from ragkit.errors import DataError
from ragkit.indicators import measures
from ragkit.indicators.measures import Tokens
from ragkit.settings import ROWS, AttentionSettings

numbers = arrays(np.float64, 12, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.5]))
questions = arrays(np.int64, 12, elements=st.integers(0, 3)).map(np.sort)


def some_tokens(ids, question):
    n = len(ids)
    rng = np.random.default_rng(0)
    given = [np.array(ids), np.zeros(n, int), np.arange(n) % 2 == 1, np.array(question)]
    given += [np.arange(n), np.arange(n)]
    contribution = rng.random((n, len(ROWS), 2, 3)).astype(np.float32)
    return Tokens(*given, contribution, np.zeros((2, len(ROWS), 6), np.float32))


@given(numbers, numbers, questions)
def test_spearman_is_scipys_in_each_question(x, y, question):
    found = measures.spearman(x, y, question, 4)
    for number in range(4):
        a, b = x[question == number], y[question == number]
        if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
            assert np.isnan(found[number])
        else:
            assert found[number] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert measures.spearman(x[:3], np.arange(3.0)).shape == (1,)


def test_lift_averages_to_one_in_each_question():
    question = np.array([0, 0, 0, 1, 1, 2])
    lifts = measures.lift(np.array([1.0, 2, 3, 5, 15, 0]), question)
    assert lifts[:3].mean() == lifts[3:5].mean() == 1
    assert np.isnan(lifts[5])  # nothing fell on that question's tokens


def test_closeness_is_the_best_cosine():
    rng = np.random.default_rng(0)
    tokens, wanted = rng.normal(size=(20, 5)), rng.normal(size=(3, 5))
    best = [max(1 - cosine(token, goal) for goal in wanted) for token in tokens]
    assert np.allclose(measures.closeness(tokens, wanted), best)
    tokens = np.array([[1.0, 0], [0, 2], [1, 1], [0, 0], [np.nan, 1]])
    wanted = np.array([[3.0, 0], [np.nan, 0], [0, 0]])
    expected = [1, 0, np.sqrt(0.5), np.nan, np.nan]
    assert np.allclose(measures.closeness(tokens, wanted), expected, equal_nan=True)
    assert np.isnan(measures.closeness(tokens, np.empty((0, 2)))).all()  # a question without nouns


def test_a_token_that_comes_again_is_exactly_as_close():
    vectors = np.random.default_rng(0).normal(size=(40, 64))
    again = np.concatenate([vectors, vectors[::-1], vectors])
    close = measures.closeness(again, vectors[:3])
    assert len(np.unique(close)) == 38  # the three wanted ones are all at 1


def test_closeness_is_to_the_wanted_tokens_of_the_same_question():
    """Of three questions: one has no passage tokens, the last wants nothing."""
    tokens = some_tokens([7, 3, 3, 9, 7], [0, 0, 0, 2, 2])
    wanted = [[9], [3], []]
    table = np.random.default_rng(0).normal(size=(10, 4))
    close = measures.closeness_to(tokens, wanted, table)
    expected = [1 - cosine(table[i], table[9]) for i in (7, 3, 3)]
    assert np.allclose(close[:3], expected)
    assert np.isnan(close[3:]).all()
    assert measures.exact(tokens, [[3], [], [9, 7]]).tolist() == [False, True, True, True, True]


def test_vectors_are_dealt_anew_for_each_question():
    """The same prompt asked 400 times: a word is close by luck in some, and in others not."""
    n, table = 400, np.random.default_rng(0).normal(size=(4, 8))
    table[3] = np.nan  # has no vector, and gets none
    tokens = some_tokens([0, 1, 2, 3] * n, np.repeat(np.arange(n), 4))
    wanted = [[2]] * n
    first, again = (
        measures.closeness_to(tokens, wanted, table, np.random.default_rng(5)) for _ in range(2)
    )
    assert np.array_equal(first, again, equal_nan=True)
    rows = first.reshape(n, 4)
    assert (rows[:, 2] == 1).all()  # a wanted token stays the closest
    assert np.isnan(rows[:, 3]).all()
    assert len(np.unique(rows[:, 0])) == 3  # the pairs that 0 and 2 can get
    share = (rows[:, 0] > rows[:, 1]).mean()
    assert 0.4 < share < 0.6  # dealt once for all it would be 0 or 1


def test_the_closest_share_takes_ties_along():
    close = np.array([0.9, 0.1, 0.5, 0.5, 0.2, 0.5, 0.0, 0.0, 0.0, 0.0])
    one = np.zeros(10, dtype=int)
    assert np.flatnonzero(measures.closest(close, one, 0.2)).tolist() == [0, 2, 3, 5]
    assert measures.closest(close, one, 0.01).sum() == 1
    two = np.repeat([0, 1], 5)
    assert np.flatnonzero(measures.closest(close, two, 0.2)).tolist() == [0, 5]
    assert measures.closest(np.array([]), one[:0], 0.1).size == 0
    some = np.where(close > 0.15, close, np.nan)  # a fifth of the five that have a closeness
    assert np.flatnonzero(measures.closest(some, one, 0.2)).tolist() == [0]


def test_an_indicator_by_hand():
    attention = np.array([4.0, 1, 1, 2, 1, 1, 1, 1, 1, 7])
    close = np.array([1.0, 0.8, 0.1, 0.7, 0.0, 0.2, 0.3, 0.1, 0.2, 0.6])
    question = np.zeros(10, dtype=int)
    row = measures.indicator(attention, close, question, close == 1, 0.2).iloc[0]
    assert row["attention"] == pytest.approx((4 + 1) / 2 / attention.mean())
    assert row["attention (no exact)"] == pytest.approx((1 + 2) / 2 / attention.mean())
    assert row["Spearman"] == pytest.approx(stats.spearmanr(attention, close).statistic)
    without = stats.spearmanr(attention[1:], close[1:]).statistic
    assert row["Spearman (no exact)"] == pytest.approx(without)


def test_an_indicator_of_many_questions_is_that_of_each():
    rng = np.random.default_rng(1)
    question = np.repeat([0, 1, 2], [30, 50, 20])
    attention, close = rng.random(100), rng.random(100)
    table = measures.indicator(attention, close, question, np.zeros(100, dtype=bool), 0.1)
    for number, size in enumerate((3, 5, 2)):
        mine = question == number
        lifts = attention[mine] / attention[mine].mean()
        nearest = np.argsort(-close[mine])[:size]
        assert table["attention"][number] == pytest.approx(lifts[nearest].mean())
        if size > 2:
            within = stats.spearmanr(lifts[nearest], close[mine][nearest]).statistic
            assert table["Spearman closest"][number] == pytest.approx(within)


def test_what_is_undefined_is_nan_and_not_zero():
    """Constant attention, constant closeness, no goal, no attention."""
    question, rising = np.repeat([0, 1, 2, 3], 5), np.arange(5.0)
    attention = np.concatenate([np.ones(5), rising + 1, rising + 1, np.zeros(5)])
    close = np.concatenate([rising, np.ones(5), np.full(5, np.nan), rising])
    table = measures.indicator(attention, close, question, np.zeros(20, dtype=bool), 0.2)
    assert table["Spearman"].isna().all()
    assert table["attention"].isna().tolist() == [False, False, True, True]
    assert table["question"].tolist() == [0, 1, 2, 3]


def test_tenths_keep_the_mean():
    rng = np.random.default_rng(0)
    attention, close = rng.random(60), rng.random(60)
    table = measures.deciles(attention, close, np.repeat([0, 1], 30))
    assert table.shape == (2, 10)
    assert np.allclose(table.mean(1), 1)
    order = np.argsort(close[:30])
    assert table[0, 9] == pytest.approx(attention[:30][order[-3:]].mean() / attention[:30].mean())


def test_tokens_come_back_from_their_folder(tmp_path):
    tokens = some_tokens([4, 5, 6], [0, 0, 1])
    save_file(vars(tokens), tmp_path / "tokens.safetensors")
    again = Tokens.load(tmp_path)
    for name, value in vars(tokens).items():
        assert np.array_equal(getattr(again, name), value)
    chosen = AttentionSettings(rows="consuming", norm=False, layers="middle")
    assert np.array_equal(again.attention(chosen), tokens.contribution[:, 2, 0, 1])
    assert again.texts.ids.tolist() == [4, 6]  # without the title's
    assert np.array_equal(again.texts.contribution, tokens.contribution[::2])
    assert np.array_equal(again.texts.mass, tokens.mass)


def test_a_closeness_that_is_not_there_is_named(tmp_path):
    there = {"answer/input": np.array([0.5, 1.0]), "answer/exact": np.array([0, 1], np.uint8)}
    save_file(there, tmp_path / "closeness.safetensors")
    close, exact = measures.load_closeness(tmp_path, "answer", "input")
    assert close.tolist() == [0.5, 1.0]
    assert exact.tolist() == [False, True]
    with pytest.raises(DataError, match=r"answer in the space 'contextual'.*Choose another"):
        measures.load_closeness(tmp_path, "answer", "contextual")
    with pytest.raises(DataError, match="nouns in the space 'input'"):
        measures.load_closeness(tmp_path, "nouns", "input")


def test_stored_results_are_read_without_the_heavy_libraries():
    code = (
        "import sys, ragkit.indicators.measures; "
        "print([m for m in ('torch', 'transformers', 'spacy', 'datasets') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_a_lead_is_over_tokens_of_the_same_question_and_cell():
    lifts = np.array([4.0, 1, 3, 9, 2, 5, np.nan, 8, 7])
    near = np.array([1, 0, 0, 0, 1, 0, 0, 1, 0], dtype=bool)
    cells = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 0], [5, 5, 5, 5, 6, 6, 6, 6, 6]])
    question = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1])
    # the first leads over the mean of 1 and 3, the fifth over 5 alone; the eighth has no like
    made = measures.matched_lead(lifts, near, cells, question)
    assert made[0] == pytest.approx(((4 - 2) + (2 - 5)) / 2)
    assert np.isnan(made[1])


def test_groups_of_any_number_keep_the_mean():
    rng = np.random.default_rng(0)
    attention, close = rng.random(40), rng.random(40)
    table = measures.deciles(attention, close, np.zeros(40, int), 20)
    order = np.argsort(close)
    assert table.shape == (1, 20)
    assert table[0] == pytest.approx(attention[order].reshape(20, 2).mean(1) / attention.mean())
