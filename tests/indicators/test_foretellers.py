"""What foretells: the checks by hand, and the stage against its parts."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats
from test_closeness import FOUND, NOUNS, QUESTIONS, READER, SETTINGS, inputs, reader  # noqa: F401

from ragkit.distillation import targets, teacher
from ragkit.indicators import closeness, foretellers, measures
from ragkit.models.fid import open_reader
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings

READ = AttentionSettings()


def seen_as(scores, holds):
    """A look whose scores `[questions, k]` are these, by every row, norm, layer and head."""
    attention = np.broadcast_to(
        np.array(scores, float)[:, None, None, None, None], (2, 3, 2, 1, 1, 3)
    )
    return {"attention": attention, "tokens": np.ones((2, 3)), "holds": np.array(holds)}


def test_the_checks_of_passages_by_hand():
    """The second question's passages all hold the answer: it tells nothing of the top one."""
    holds = [[0, 1, 0], [1, 1, 1]]
    looks = {"rank": seen_as([[3, 4, 1], [1, 1, 2]], holds)}
    looks["reversed"] = seen_as([[6, 2, 1], [1, 2, 5]], holds)
    other = np.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    found = measures.of_passages(looks, {"agrees with leaving out": other}, READ)
    first, second = found.to_dict("records")
    assert first["top holds the answer"] == 1
    assert np.isnan(second["top holds the answer"])
    assert first["top holds the answer, balanced"] == 0  # reversed, the first has far the most
    assert [first["last in place"], second["last in place"]] == [0, 1]
    assert [first["orders agree"], second["orders agree"]] == [0, 1]
    assert second["entropy"] == pytest.approx(stats.entropy([1, 1, 2]) / np.log(3))
    for row, scores in ((first, [3, 4, 1]), (second, [1, 1, 2])):
        place = row["follows the place"]
        assert place == pytest.approx(stats.spearmanr(scores, range(3)).statistic)
    by_scipy = stats.spearmanr([3, 4, 1], other[0]).statistic
    assert first["agrees with leaving out"] == pytest.approx(by_scipy)


def test_a_tie_at_the_top_counts_by_its_share():
    assert targets.top(np.array([[2.0, 2.0, 1.0]])).tolist() == [[0.5, 0.5, 0]]


def test_the_stage_holds_every_foreteller_of_the_rules(tmp_path, inputs, reader):  # noqa: F811
    """Of a taught reader, against the functions that the claims use, on the same questions."""
    settings = SETTINGS | {"which": "fine-tuned"}
    foretellers.make_foretellers(tmp_path, inputs, settings)
    made = json.loads((tmp_path / "foretellers.json").read_text())
    taught = open_reader(inputs, settings)
    tokens = closeness.look_at_tokens(taught, QUESTIONS, FOUND).texts
    words = closeness.in_words(taught, tokens, QUESTIONS, FOUND, NOUNS)
    spaces = {"": reader, ", own": taught, ", retriever": Retriever.open(inputs, settings)}
    seen = []
    for (ending, model), goal in itertools.product(spaces.items(), words.wanted):
        wanted, vectors = words.wanted[goal], closeness.space(words.forms, model)
        close = measures.closeness_to(words.tokens, wanted, vectors)
        exact = measures.exact(words.tokens, wanted)
        table = measures.indicator(tokens.attention(READ), close, tokens.question, exact, 0.05)
        for name in table.columns.drop("question"):
            assert made[f"{goal}{ending}: {name}"] == pytest.approx(table[name].mean(), nan_ok=True)
        seen.append(made[f"{goal}{ending}: Spearman"])
    assert len(set(seen)) == 6  # the spaces differ
    losses = [float(taught.losses([taught.prompt(q, p, q.answers[0])]).detach())
              for q, p in zip(QUESTIONS, FOUND, strict=True)]  # fmt: skip
    assert made["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    order = {way: teacher.look(taught, QUESTIONS, FOUND, way) for way in ("rank", "reversed")}
    alone = teacher.left_out_losses(taught, QUESTIONS, FOUND).astype(float)
    by_parts = measures.of_passages(order, {"agrees with leaving out": alone}, READ).mean()
    for name, value in by_parts.items():
        assert made[name] == pytest.approx(value, nan_ok=True)
