"""What must hold for any input: properties of the rows, and clear errors instead of nonsense."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import attention_matrix, encoder_decoder, make, prompts

from ragkit.attention import AttentionError, contributions, observe, passage_scores, pooled, record
from ragkit.attention.kernels import Call, attention_rows, value_norms
from ragkit.attention.record import pool


@st.composite
def calls(draw):
    """Any call of the fused kernel with some rows of it; every query sees at least its own key."""
    batch, kv_heads, group, size = (draw(st.integers(1, 3)) for _ in range(4))
    queries = draw(st.integers(1, 9))
    keys = queries + draw(st.integers(0, 4))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    query = torch.randn(batch, kv_heads * group, queries, size)
    key, value = torch.randn(batch, kv_heads, keys, size), torch.randn(batch, kv_heads, keys, 2)
    heads = draw(st.sampled_from([1, kv_heads * group]))
    allowed = torch.rand(batch, heads, queries, keys) < 0.6
    allowed |= torch.eye(queries, keys, dtype=torch.bool)
    additive = torch.randn(allowed.shape).masked_fill(~allowed, -math.inf)
    mask = draw(st.sampled_from([None, allowed, additive, torch.randn(queries, keys)]))
    scale, softcap = draw(st.sampled_from([None, 0.3, 2.0])), draw(st.sampled_from([None, 1.0]))
    rows = torch.randint(0, queries, (batch, draw(st.integers(1, 4))))
    return Call(query, key, value, mask, draw(st.booleans()), scale, softcap), rows


@settings(deadline=None, max_examples=80)
@given(calls())
def test_rows_are_those_of_the_formula_and_sum_to_one(case):
    call, rows = case
    ours = attention_rows(call, rows)
    each = torch.arange(len(rows))[:, None]
    expected = attention_matrix(**vars(call))[each, :, rows].transpose(1, 2)
    assert (ours.double() - expected).abs().max() < 1e-5
    assert torch.allclose(ours.sum(-1), torch.ones(()), atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(calls(), st.integers(0, 10**6))
def test_heads_in_another_order_keep_their_own_contributions(case, seed):
    call, rows = case
    order = torch.randperm(call.key.shape[1], generator=torch.Generator().manual_seed(seed))
    group = call.query.shape[1] // len(order)
    heads = (order[:, None] * group + torch.arange(group)).flatten()
    by_head = call.mask is not None and call.mask.dim() == 4 and call.mask.shape[1] > 1
    mask = call.mask[:, heads] if by_head else call.mask
    query, key, value = call.query[:, heads], call.key[:, order], call.value[:, order]
    other = replace(call, query=query, key=key, value=value, mask=mask)
    uses = torch.ones(1, *rows.shape)
    usual, turned = (pool(attention_rows(c, rows), value_norms(c), uses) for c in (call, other))
    for ours, theirs in zip(usual, turned, strict=True):
        assert torch.allclose(ours[:, :, heads], theirs, atol=1e-5)


MODELS = {name: make(name) for name in ("falcon-alibi", "gpt2", "llama", "gemma2")}


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.integers(0, 10**6),
    st.data(),
)
def test_batch_padding_and_its_content_change_nothing(name, sizes, seed, data):
    model = MODELS[name]
    ids, mask = prompts(sizes, "right", seed)
    last = torch.tensor(sizes)[:, None] - 1
    usual = record(model, ids, mask, last)
    order = data.draw(st.permutations(range(len(sizes))))
    shuffled = record(model, ids[order], mask[order], last[order])
    assert torch.allclose(shuffled.alpha, usual.alpha[:, order], atol=1e-5)
    filled = record(model, torch.where(mask.bool(), ids, 7), mask, last)
    assert torch.allclose(filled.alpha, usual.alpha, atol=1e-5)
    left, left_mask = prompts(sizes, "left", seed)
    for row, size in enumerate(sizes):
        left[row, max(sizes) - size :] = ids[row, :size]
    other = record(model, left, left_mask, torch.full_like(last, max(sizes) - 1))
    for row, size in enumerate(sizes):
        alone = record(
            model, ids[row : row + 1, :size], mask[row : row + 1, :size], last[row : row + 1]
        )
        for padded, columns in ((usual, slice(0, size)), (other, slice(max(sizes) - size, None))):
            assert torch.allclose(padded.alpha[:, row, ..., columns], alone.alpha[:, 0], atol=1e-5)
            assert torch.allclose(
                padded.norms[:, row, :, columns], alone.norms[:, 0], rtol=1e-4, atol=1e-4
            )
            assert torch.allclose(padded.alpha[:, row].sum(-1), torch.ones(()), atol=1e-5)


BAD = {
    "no row": (lambda i, m: (i, m, torch.zeros(1, 0, dtype=torch.long)), "at least one"),
    "too far": (lambda i, m: (i, m, torch.tensor([[6]])), "between 0 and 5"),
    "before": (lambda i, m: (i, m, torch.tensor([[-1]])), "between 0 and 5"),
    "on padding": (lambda i, m: (i, m, torch.tensor([[5]])), "on padding"),
    "no fractions": (lambda i, m: (i, m, torch.tensor([[1.0]])), "whole numbers"),
    "another batch": (lambda i, m: (i, m, torch.tensor([[1], [1]])), "batch 1"),
    "flat rows": (lambda i, m: (i, m, torch.tensor([1])), "batch 1"),
    "all masked": (lambda i, m: (i, m * 0, torch.tensor([[1]])), "on padding"),
    "no tokens": (lambda i, m: (i[:, :0], m[:, :0], torch.tensor([[0]])), "do not fit"),
    "short mask": (lambda i, m: (i, m[:, :3], torch.tensor([[1]])), "do not fit"),
    "long mask": (lambda i, m: (i[:, 2:], m, torch.tensor([[1]])), "do not fit"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["falcon-alibi", "gemma2"])
def test_input_that_makes_no_sense_is_refused(name, case):
    ids, mask = prompts([6])
    mask[0, 5] = 0
    change, match = BAD[case]
    with pytest.raises(AttentionError, match=match):
        record(MODELS[name], *change(ids, mask))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(0, 7),
    st.integers(0, 3),
    st.integers(-3, 9),
    st.integers(0, 10**6),
)
def test_fuzzed_input_gives_numbers_or_a_clear_error(batch, tokens, rows, place, seed):
    """Whatever comes in: a result is finite, or AttentionError is raised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (batch, tokens), generator=generator)
    mask = (torch.rand(batch, tokens, generator=generator) < 0.7).long()
    try:
        seen = record(MODELS["llama"], ids, mask, torch.full((batch, rows), place))
    except AttentionError:
        return
    assert seen.alpha.isfinite().all()
    assert torch.allclose(seen.alpha.sum(-1), torch.ones(()), atol=1e-4)


def test_numbers_that_are_none_are_refused():
    """Whether the reader is broken, or overflows in float16 only."""
    model, (ids, mask), last = make("gpt2"), prompts([5]), torch.tensor([[4]])
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.mul_(1e6)
    assert record(model, ids, mask, last).alpha.isfinite().all()
    with pytest.raises(AttentionError, match="load it in float32"):
        record(model.half(), ids, mask, last)
    with torch.no_grad():
        model.float().transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(AttentionError, match="not a number"):
        record(model, ids, mask, last)


def test_a_mask_that_is_not_heeded_is_noticed():
    model = encoder_decoder("bart")
    heedful = model.model.decoder.forward

    def heedless(encoder_attention_mask, **rest):
        return heedful(**rest)

    states, (_, mask) = torch.randn(2, 6, 32), prompts([4, 6])
    ids, rows = torch.tensor([[2]] * 2), torch.tensor([[0]] * 2)
    record(model, ids, mask, rows, states)
    model.model.decoder.forward = heedless
    record(model, ids, torch.ones_like(mask), rows, states)
    with pytest.raises(AttentionError, match="attends to padding"):
        record(model, ids, mask, rows, states)


def test_groups_and_passages_without_tokens():
    (ids, mask), model, last = prompts([6]), MODELS["llama"], torch.tensor([[5]])
    with pytest.raises(AttentionError, match="group of rows is empty"):
        pooled(lambda visit: observe(model, ids, mask, last, visit), torch.zeros(1, 1, 1))
    tokens = contributions(record(model, ids, mask, last), torch.ones(1, 1))[:, 0]
    scores = passage_scores(tokens, torch.tensor([-1, 0, 0, -2, 2, 2]), 3)
    assert scores.shape == (3, 3)
    assert scores.isfinite().all()
    assert (scores[:, 1] == 0).all()
    with pytest.raises(AttentionError, match="0 passages"):
        passage_scores(tokens, torch.tensor([-1] * 6), 0)
    with pytest.raises(AttentionError, match="6 tokens with 5 owners"):
        passage_scores(tokens, torch.tensor([-1] * 5), 2)
