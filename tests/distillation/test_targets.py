"""Targets: their temperature, the controls, and a module that needs no torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipy_entropy

from ragkit.data.corpus import Asked, Corpus, Passage, Question
from ragkit.distillation import targets
from ragkit.errors import DataError
from ragkit.settings import POOLINGS, ROWS, AttentionSettings

ATTENTION = AttentionSettings(rows="last_prompt", norm=True, layers="all", pooling="sum")
RNG = np.random.default_rng(0)


@given(arrays(np.float64, (4, 5), elements=st.floats(-50, 50)), st.floats(0.05, 20))
def test_softmax_and_entropy_agree_with_torch_and_scipy(scores, temperature):
    p = targets.softmax(scores, temperature)
    assert np.allclose(p, torch.tensor(scores / temperature).softmax(-1), rtol=1e-12, atol=0)
    expected = np.mean(scipy_entropy(p, axis=1)) / np.log(5)
    assert targets.entropy(p) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_a_target_has_the_wanted_entropy(seed, share):
    scores = np.random.default_rng(seed).normal(size=(50, 5))
    assert targets.entropy(targets.from_scores(7 * scores, share)) == pytest.approx(share, abs=1e-6)


def test_an_entropy_that_no_temperature_meets_gives_the_sharpest_target():
    scores = RNG.normal(size=(30, 5))
    certain = targets.from_scores(scores, 0.0)
    assert np.allclose(certain.max(1), 1)
    assert np.array_equal(certain.argmax(1), scores.argmax(1))
    equal = np.ones((30, 5))
    for share in (0.25, 0.5, 0.9):
        assert np.array_equal(targets.from_scores(equal, share), np.full((30, 5), 0.2))
    mostly = np.where(np.arange(30)[:, None] < 25, equal, scores)
    made = targets.from_scores(mostly, 0.5)
    assert np.allclose(made[:25], 0.2)
    assert np.allclose(made[25:].max(1), 1)


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(DataError, match="not all numbers"):
        targets.from_scores(np.array([[0.0, np.nan]]), 0.5)


def test_oracle_scores():
    assert targets.oracle_scores([[4, 7], [1, 2]], [(7,), ()]).tolist() == [[0, 1], [0, 0]]


def test_attention_scores_take_the_rows_norm_pooling_and_layers_asked_for():
    seen = RNG.normal(size=(4, len(ROWS), 2, 5, len(POOLINGS), 3)).astype(np.float32)
    for row, rows in enumerate(ROWS):
        for norm in (False, True):
            for pool, pooling in enumerate(POOLINGS):
                part = seen[:, row, int(norm), :, pool]
                expected = {"all": part.mean(1), "first": part[:, 0], "middle": part[:, 2]}
                for layers, values in {**expected, "last": part[:, 4]}.items():
                    chosen = AttentionSettings(rows=rows, norm=norm, layers=layers, pooling=pooling)
                    scores = targets.attention_scores({"attention": seen}, chosen)
                    assert np.allclose(scores, values, atol=1e-6)
                    assert scores.dtype == np.float64


@pytest.fixture
def asked():
    """Six questions with three candidates each; those of even number know their gold passage."""
    passages = [Passage(str(i), "", f"Place {i} is old.") for i in range(8)]
    questions = [
        Question(str(i), "where", (f"place {i}",), (i,) if i % 2 == 0 else ()) for i in range(6)
    ]
    corpus = Corpus("c", passages, {"distill": questions, "dev": [], "test": []})
    return Asked(corpus, questions, np.array([[i, i + 1, i + 2] for i in range(6)])[:, ::-1])


def test_every_named_target(asked):
    attention = RNG.normal(size=(6, len(ROWS), 2, 4, len(POOLINGS), 3)).astype(np.float32)
    logs = np.log(RNG.uniform(0.1, 1, size=(6, 3, 2))).astype(np.float32)
    logs[2, :, 1] = np.nan
    look = {"attention": attention, "answer_logs": logs}
    loop = {"loop": RNG.normal(size=(6, 3)).astype(np.float32)}
    made = {}
    for name in (*targets.TARGETS, "fine-tuned LOOP"):
        stored = loop if name == "fine-tuned LOOP" else look
        scores = targets.scores_of(name, stored, asked, ATTENTION)
        made[name] = targets.target_of(name, scores, 0.5, 3)
    for name, target in made.items():
        assert target.shape == (6, 3)
        assert np.allclose(target.sum(1), 1)
        if name not in ("uniform", "oracle", "answer string"):
            assert targets.entropy(target) == pytest.approx(0.5, abs=1e-6)
    for name in ("oracle", "answer string"):  # one passage of three: ties behind it stay ties
        assert np.array_equal(made[name].argmax(1), np.full(6, 2))
        assert np.allclose(made[name][:, 0], made[name][:, 1])
    taught = made["fine-tuned attention"]
    assert np.array_equal(taught.argmax(1), attention[:, 0, 1, :, 0].mean(1).argmax(1))
    assert np.array_equal(np.sort(made["shuffled"]), np.sort(taught))
    assert not np.array_equal(made["shuffled"], taught)
    mean_log = [np.nanmean(row, axis=1).argmax() for row in logs]
    assert made["fine-tuned perplexity"].argmax(1).tolist() == mean_log
    assert np.array_equal(made["fine-tuned LOOP"].argmax(1), loop["loop"].argmax(1))
    assert np.array_equal(made["uniform"], np.full((6, 3), 1 / 3))


def test_a_target_without_its_scores_is_refused(asked):
    for name in ("fine-tuned attention", "oracel"):
        with pytest.raises(DataError, match=name):
            targets.scores_of(name, None, asked, ATTENTION)


def test_targets_load_neither_torch_nor_transformers():
    code = (
        "import sys; from ragkit.distillation import targets; "
        "print(*({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
