"""Targets: temperatures, orders of the passages, heads, controls; a module that needs no torch."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from scipy.stats import entropy as scipy_entropy
from scipy.stats import zscore

from ragkit.data.corpus import Asked, Corpus, Passage, Question
from ragkit.distillation import targets
from ragkit.errors import DataError
from ragkit.settings import POOLINGS, ROWS, AttentionSettings, DistillSettings

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


def seen(rng, n=6, k=3, layers=5, heads=4):
    """A look of random scores."""
    shape, places = (n, len(ROWS), 2, layers, heads, k), np.tile(np.arange(k), (n, 1))
    tokens, holds = rng.integers(1, 9, (n, k)), rng.random((n, k)) < 0.5
    attention = rng.gamma(1.0, size=shape).astype(np.float32)
    return {"attention": attention, "tokens": tokens, "places": places, "holds": holds}


def test_attention_scores_take_the_rows_norm_pooling_and_layers_asked_for():
    look = seen(RNG)
    for row, rows in enumerate(ROWS):
        for norm, pooling in product((False, True), POOLINGS):
            part = look["attention"][:, row, int(norm)].mean(2)  # [questions, layers, k]
            part = part / look["tokens"][:, None] if pooling == "mean" else part
            expected = {"all": part.mean(1), "first": part[:, 0], "middle": part[:, 2]}
            for layers, values in {**expected, "last": part[:, 4]}.items():
                chosen = AttentionSettings(rows=rows, norm=norm, layers=layers, pooling=pooling)
                scores = targets.attention_scores(look, chosen)
                assert np.allclose(scores, values, atol=1e-6)
                assert scores.dtype == np.float64


def test_a_passage_without_a_token_left_has_a_mean_of_nothing():
    look = seen(RNG)
    look["tokens"][0, 1], look["attention"][0, ..., 1] = 0, 0
    assert targets.attention_scores(look, AttentionSettings(pooling="mean"))[0, 1] == 0


# Orders of the passages


def placed(content, places, effect, settings=ATTENTION):
    """A look whose only scores are content plus what the place adds, under some settings."""
    look = seen(RNG, *content.shape, 1, 1)
    look["attention"][:] = 0
    row, norm = ROWS.index(settings.rows), int(settings.norm)
    look["attention"][:, row, norm, 0, 0] = content + effect[places]
    return look | {"places": places}


def looks_of(content, effect):
    """All passes over the same questions; under an empty one there is no content."""
    n, k = content.shape
    ranks = np.tile(np.arange(k), (n, 1))
    shuffled = np.argsort(np.random.default_rng(1).random((n, k)), axis=1)
    looks = {"rank": placed(content, ranks, effect), "shuffled": placed(content, shuffled, effect)}
    looks["reversed"] = placed(content, k - 1 - ranks, effect)
    return looks | {"empty": placed(0 * content, ranks, effect)}


def in_order(looks, order, **changes):
    changed = {"order": order, **changes}
    needed = {role: looks[role] for role in (*targets.LOOKS[order], "heads") if role in looks}
    return targets.ordered(needed, ATTENTION.model_copy(update=changed))


def test_one_pass_is_taken_as_it_is():
    looks = looks_of(RNG.random((40, 5)), np.arange(5.0))
    for order in ("rank", "reversed", "shuffled"):
        expected = targets.attention_scores(looks[order], ATTENTION)
        assert np.array_equal(in_order(looks, order), expected)


def test_orders_by_hand():
    """Two questions of two passages; the first place adds 4."""
    content, effect = np.array([[1.0, 3.0], [2.0, 1.0]]), np.array([4.0, 0.0])
    looks = looks_of(content, effect)
    assert in_order(looks, "rank").tolist() == [[5, 3], [6, 1]]
    assert in_order(looks, "reversed").tolist() == [[1, 7], [2, 5]]
    assert in_order(looks, "balanced").tolist() == [[0, 0], [0, 0]]  # 1, -1 and -1, 1
    assert in_order(looks, "calibrated").tolist() == content.tolist()
    looks["shuffled"] = placed(content, np.array([[1, 0], [0, 1]]), effect)
    # standardised: -1, 1 and 1, -1; at place 0 stand 1 and 1, at place 1 -1 and -1
    assert in_order(looks, "levelled").tolist() == [[0, 0], [0, 0]]
    looks["shuffled"] = placed(content, np.array([[0, 1], [0, 1]]), effect / 4)
    # 2, 3 and 3, 1: standardised -1, 1 and 1, -1: nothing in the place
    assert in_order(looks, "levelled").tolist() == [[-1, 1], [1, -1]]


def test_balanced_is_the_mean_of_both_orders_standardised():
    looks = looks_of(RNG.random((30, 5)), np.array([3.0, 0, 0, 1, 2]))
    parts = [in_order(looks, order) for order in ("rank", "reversed")]
    expected = (zscore(parts[0], axis=1) + zscore(parts[1], axis=1)) / 2
    assert np.allclose(in_order(looks, "balanced"), expected)


def test_levelled_takes_off_each_places_mean_and_needs_no_label():
    looks = looks_of(RNG.random((200, 5)), np.array([3.0, 0, 0, 1, 2]))
    standard = zscore(in_order(looks, "shuffled"), axis=1)
    expected = standard.copy()
    for place in range(5):
        here = looks["shuffled"]["places"] == place
        expected[here] -= standard[here].mean()
    ours = in_order(looks, "levelled")
    assert np.allclose(ours, expected)
    for place in range(5):
        assert ours[looks["shuffled"]["places"] == place].mean() == pytest.approx(0, abs=1e-12)
    looks["shuffled"]["holds"] = ~looks["shuffled"]["holds"]
    assert np.array_equal(in_order(looks, "levelled"), ours)


@pytest.mark.parametrize("effect", [(4.0, 3, 2, 1, 0), (4, 0.6, 0, 0.8, 2.8)])
def test_what_is_done_against_places_recovers_the_content(effect):
    """One passage of five is a little better; its place in the prompt counts more. Two orders take
    off what falls evenly from first to last, and not that both ends are favoured."""
    rng = np.random.default_rng(0)
    best = rng.integers(0, 5, 2000)
    looks = looks_of(np.eye(5)[best] + 0.1 * rng.normal(size=(2000, 5)), np.array(effect))
    right = {order: (in_order(looks, order).argmax(1) == best).mean() for order in targets.LOOKS}
    assert max(right[order] for order in ("rank", "reversed", "shuffled")) < 0.35
    assert min(right[order] for order in ("calibrated", "levelled")) > 0.99
    assert right["balanced"] > 0.99 if effect[2] == 2 else 0.35 < right["balanced"] < 0.5


# Heads


def planted(look, heads, settings=ATTENTION):
    """The same look with heads that attend to what holds an answer, under some settings."""
    row, norm = ROWS.index(settings.rows), int(settings.norm)
    for layer, head in heads:
        look["attention"][:, row, norm, layer, head] *= 1 + 9 * look["holds"]
    return look


def heads_of(chosen):
    return set(zip(*map(np.ndarray.tolist, np.nonzero(chosen)), strict=True))


def test_the_heads_that_look_at_holders_are_chosen():
    heads = {(0, 3), (2, 1), (4, 0)}
    look = planted(seen(RNG, n=200), heads)
    chosen = ATTENTION.model_copy(update={"heads": "chosen", "chosen": 3})
    assert heads_of(targets.chosen_heads(look, chosen)) == heads
    for changes in ({"rows": "consuming"}, {"norm": False}):  # elsewhere nothing was planted
        other = chosen.model_copy(update=changes)
        assert heads_of(targets.chosen_heads(look, other)) != heads
        again = planted(seen(RNG, n=200), heads, other)
        assert heads_of(targets.chosen_heads(again, other)) == heads


def test_heads_are_chosen_by_one_look_and_read_in_another():
    heads, others = {(0, 3), (2, 1)}, {(4, 0), (1, 1)}
    looks = {"heads": planted(seen(RNG, n=200), heads)}
    looks |= {order: planted(seen(RNG, n=50), others) for order in ("rank", "reversed")}
    parts = {}
    for order in ("rank", "reversed"):
        picked = looks[order]["attention"][:, 0, 1]
        parts[order] = np.mean([picked[:, layer, head] for layer, head in heads], axis=0)
        scores = in_order(looks, order, heads="chosen", chosen=2)
        assert np.allclose(scores, parts[order])
    expected = sum(zscore(part, axis=1) for part in parts.values()) / 2
    assert np.allclose(in_order(looks, "balanced", heads="chosen", chosen=2), expected, atol=1e-5)


def test_shares_by_hand_over_questions_that_tell():
    look = seen(RNG, n=3, k=2, layers=1, heads=2)
    look["holds"] = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.uint8)
    look["attention"][0, 0, 1, 0] = [[3, 1], [1, 4]]
    assert targets.shares_of_heads(look, ATTENTION).tolist() == [[0.75, 0.2]]
    mean = ATTENTION.model_copy(update={"pooling": "mean"})
    look["tokens"][0] = [6, 2]
    assert np.allclose(targets.shares_of_heads(look, mean), [[0.5, 1 / 13]])


@pytest.mark.parametrize("holds", [0, 1])
def test_without_a_question_that_tells_the_first_heads_are_taken(holds):
    look = seen(RNG) | {"holds": np.full((6, 3), holds, dtype=np.uint8)}
    chosen = targets.chosen_heads(look, ATTENTION.model_copy(update={"chosen": 6}))
    assert heads_of(chosen) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}


def test_as_many_heads_are_chosen_as_asked_for_and_of_ties_the_first():
    look = seen(RNG)
    for number in (1, 4, 20, 21):
        settings = ATTENTION.model_copy(update={"chosen": number})
        assert targets.chosen_heads(look, settings).sum() == min(number, 20)
    look["attention"][:] = 1
    settings = ATTENTION.model_copy(update={"chosen": 2})
    assert heads_of(targets.chosen_heads(look, settings)) == {(0, 0), (0, 1)}


# Targets by name


def test_names_of_the_main_table_tell_reader_and_signal():
    names = targets.TARGETS
    pairs = [targets.teacher_of(name) for name in names]
    readers = (*targets.READERS, *targets.CLOZES, "encoder-decoder")
    expected = set(product(readers, ("attention", "balanced", "chosen heads")))
    expected |= {("fine-tuned", "perplexity")}
    assert set(pairs) - {None} == expected - {("encoder-decoder", "balanced")}
    assert [name for name in names if targets.teacher_of(name) is None] == [
        "uniform", "answer string", "oracle"
    ]  # fmt: skip
    assert targets.teacher_of("shuffled") == ("fine-tuned", "attention")
    assert targets.teacher_of("step 50 attention") == ("step 50", "attention")
    assert targets.teacher_of("off-the-shelf cloze EMDR2") == ("off-the-shelf cloze", "EMDR2")
    for name, what in names.items():
        assert what.startswith("control: ") == (
            targets.teacher_of(name) is None or name == "shuffled"
        )


@pytest.mark.parametrize("order", ["rank", "levelled"])
def test_the_signal_says_how_the_attention_is_read(order):
    mine = AttentionSettings(order=order, rows="consuming", chosen=7)
    for name in ("fine-tuned attention", "shuffled", "oracle", "fine-tuned LOOP"):
        assert targets.attention_of(name, mine) == mine
    balanced = targets.attention_of("fine-tuned cloze balanced", mine)
    assert balanced == mine.model_copy(update={"order": "balanced"})
    heads = targets.attention_of("encoder-decoder chosen heads", mine)
    assert heads == mine.model_copy(update={"heads": "chosen"})


def test_scores_as_they_are_make_questions_of_clearer_scores_sharper():
    scores = RNG.normal(size=(50, 5)) * np.linspace(0.1, 3, 50)[:, None]
    settings = DistillSettings(standardise=False, entropy=0.5)
    made = targets.target_of("fine-tuned attention", scores, settings, 0)
    assert targets.entropy(made) == pytest.approx(0.5, abs=1e-6)
    logs = np.log(made) - np.log(made).mean(1, keepdims=True)
    ratio = logs / (scores - scores.mean(1, keepdims=True))
    assert np.allclose(ratio, ratio[0, 0])  # one temperature, nothing else
    usual = targets.target_of("fine-tuned attention", scores, DistillSettings(), 0)
    assert np.allclose(usual, targets.from_scores(targets.standardise(scores), 0.5))
    sharp = [targets.entropy(one[25:]) for one in (made, usual)]
    assert sharp[0] < sharp[1]


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
    logs = np.log(RNG.uniform(0.1, 1, size=(6, 3, 2))).astype(np.float32)
    logs[2, :, 1] = np.nan
    looks = {role: seen(RNG) for role in ("rank", "reversed", "heads")}
    looks["alone"] = {"answer_logs": logs}
    looks["loop"] = {"loop": RNG.normal(size=(6, 3)).astype(np.float32)}
    made = {}
    for name in (*targets.TARGETS, "fine-tuned LOOP"):
        scores = targets.scores_of(name, looks, asked, ATTENTION)
        made[name] = targets.target_of(name, scores, DistillSettings(), 3)
    for name, target in made.items():
        assert target.shape == (6, 3)
        assert np.allclose(target.sum(1), 1)
        if name not in ("uniform", "oracle", "answer string"):
            assert targets.entropy(target) == pytest.approx(0.5, abs=1e-6)
    for name in ("oracle", "answer string"):  # one passage of three: ties behind it stay ties
        assert np.array_equal(made[name].argmax(1), np.full(6, 2))
        assert np.allclose(made[name][:, 0], made[name][:, 1])
    taught, attention = made["fine-tuned attention"], looks["rank"]["attention"][:, 0, 1]
    assert np.array_equal(taught.argmax(1), attention.mean((1, 2)).argmax(1))
    assert np.array_equal(np.sort(made["shuffled"]), np.sort(taught))
    assert not np.array_equal(made["shuffled"], taught)
    for name, changes in {
        "balanced": {"order": "balanced"},
        "chosen heads": {"heads": "chosen"},
    }.items():
        scores = targets.ordered(looks, ATTENTION.model_copy(update=changes))
        assert np.allclose(made[f"off-the-shelf {name}"], targets.from_scores(scores, 0.5))
        assert not np.allclose(made[f"off-the-shelf {name}"], taught)
    mean_log = [np.nanmean(row, axis=1).argmax() for row in logs]
    assert made["fine-tuned perplexity"].argmax(1).tolist() == mean_log
    assert np.array_equal(made["fine-tuned LOOP"].argmax(1), looks["loop"]["loop"].argmax(1))
    assert np.array_equal(made["uniform"], np.full((6, 3), 1 / 3))


def test_a_target_without_its_scores_is_refused(asked):
    for name, looks in (("fine-tuned attention", {}), ("oracel", {"rank": seen(RNG)})):
        with pytest.raises(DataError, match=name):
            targets.scores_of(name, looks, asked, ATTENTION)


def test_looks_are_read_by_their_roles(tmp_path):
    for role in ("reversed", "alone", "candidates"):
        (tmp_path / role).mkdir()
        made = {"number": np.array([len(role)])}
        save_file(made, tmp_path / role / "scores.safetensors")
    found = targets.read_looks({path.name: path for path in tmp_path.iterdir()})
    assert {role: int(one["number"][0]) for role, one in found.items()} == {
        "reversed": 8,
        "alone": 5,
    }


def test_targets_load_neither_torch_nor_transformers():
    code = (
        "import sys; from ragkit.distillation import targets; "
        "print(*({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
