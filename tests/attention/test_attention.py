"""Attention rows against an independent float64 softmax, for each way a model can be called."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, attention_matrix, caught, encoder_decoder, make, places, prompts
from transformers import FalconForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.models.gemma2 import modeling_gemma2

from ragkit.attention import (
    AttentionError,
    Record,
    contributions,
    observe,
    passage_scores,
    pooled,
    record,
)

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-10}
SIDES = {"right": [[11, 7], [16, 8]], "left": [[16, 7], [16, 8]], "none": [[16, 7], [16, 0]]}


def expect_parity(model, ids, mask, rows, bound):
    seen = record(model, ids, mask, rows)
    calls = []
    with caught(calls):
        extra = {"position_ids": places(mask)}
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    assert len(seen.alpha) == model.config.num_hidden_layers == len(calls)
    each = torch.arange(len(ids))[:, None]
    for layer, call in enumerate(calls):
        whole = attention_matrix(**call)[each, :, rows].transpose(1, 2)
        expected = whole.masked_fill(~mask[:, None, None].bool(), 0)
        assert (seen.alpha[layer].double() - expected).abs().max() < bound
        served = call["query"].shape[1] // call["value"].shape[1]
        norms = call["value"].double().norm(dim=-1).repeat_interleave(served, 1) * mask[:, None]
        assert torch.allclose(seen.norms[layer].double(), norms, rtol=bound)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", SIDES)
def test_rows_equal_an_independent_softmax(name, side):
    ids, mask = prompts([12, 17] if side != "none" else [17, 17], side)
    seen = expect_parity(make(name), ids, mask, torch.tensor(SIDES[side]), BOUND[torch.float32])
    assert torch.allclose(seen.alpha.sum(-1), torch.ones(()), atol=1e-5)
    assert (seen.alpha[:, 0][..., mask[0] == 0] == 0).all()


# Gemma 2's own softmax is float32 whatever its dtype: there is no float64 to compare with.
DTYPES = [(name, dtype) for name in ("falcon-alibi", "llama", "gemma3") for dtype in BOUND]


@pytest.mark.parametrize(("name", "dtype"), [*DTYPES, ("gemma2", torch.bfloat16)])
def test_other_dtypes(name, dtype):
    model, (ids, mask) = make(name).to(dtype), prompts([12, 17])
    seen = expect_parity(model, ids, mask, torch.tensor(SIDES["right"]), BOUND[dtype])
    assert seen.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["falcon-alibi", "llama", "gpt2"])
def test_autocast_keeps_the_softmax_in_float32(name):
    ids, mask = prompts([12, 17])
    model, rows, calls = make(name), torch.tensor(SIDES["right"]), []
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = record(model, ids, mask, rows)
        with caught(calls):
            model.base_model(**given, use_cache=False)
    assert seen.alpha.dtype == torch.float32
    for layer, call in enumerate(calls):
        for side in ("query", "key"):
            call[side] = call[side].bfloat16()  # as the kernel gets them under autocast
        whole = attention_matrix(**call)[torch.arange(2)[:, None], :, rows].transpose(1, 2)
        assert (seen.alpha[layer].double() - whole * mask[:, None, None]).abs().max() < 1e-5


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "falcon-alibi"])
def test_agrees_with_the_eager_path_where_that_is_right(name):
    ids, mask = prompts([17, 17])
    model, eager = make(name), make(name, "eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        theirs = torch.stack(eager(ids, attention_mask=mask, output_attentions=True).attentions)
    ours = record(model, ids, mask, torch.tensor([[3, 16]] * 2)).alpha
    assert (ours - theirs[:, :, :, [3, 16]]).abs().max() < 1e-5


def test_falcons_eager_path_doubles_its_alibi_bias():
    """If this fails, transformers has mended Falcon: then the notes on it can go."""
    model, eager = make("falcon-alibi"), make("falcon-alibi", "eager")
    assert isinstance(model, FalconForCausalLM)
    eager.load_state_dict(model.state_dict())
    ids, mask = prompts([24])
    with torch.no_grad():
        assert (model(ids).logits - eager(ids).logits).abs().max() > 1e-2
        theirs = eager(ids, output_attentions=True).attentions[0][0, :, 23].double()
    calls = []
    with caught(calls):
        model.base_model(input_ids=ids, attention_mask=mask)
    query, key = calls[0]["query"].double()[0, :, 23], calls[0]["key"].double()[0]
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])  # ALiBi's, for four heads
    plain, bias = torch.einsum("hd,hkd->hk", query, key), torch.arange(24) * slopes[:, None]
    once, twice = (((plain + times * bias) / 8**0.5).softmax(-1) for times in (1, 2))
    ours = record(model, ids, mask, torch.tensor([[23]])).alpha[0, 0, :, 0].double()
    assert (ours - once).abs().max() < 1e-5
    assert (theirs - twice).abs().max() < 1e-5


@pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ,
    reason="RAGKIT_REAL_DATA is not set: no trained model to test on",
)
@pytest.mark.parametrize("dtype", BOUND)
def test_trained_llama(dtype):
    folder = Path(os.environ["RAGKIT_REAL_DATA"]) / "models/stories260k"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    expect_parity(model, ids, mask, torch.tensor([[39, 12], [29, 3]]), BOUND[dtype])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_recording_leaves_the_model_as_it_was(name):
    model, (ids, mask) = make(name), prompts([9])
    before, usual = model(ids).logits, model.config._attn_implementation
    kernel, own = torch.nn.functional.scaled_dot_product_attention, vars(modeling_gemma2).copy()
    record(model, ids, mask, torch.tensor([[8]]))
    with pytest.raises(AttentionError):
        record(model, ids, mask, torch.tensor([[9]]))
    assert torch.nn.functional.scaled_dot_product_attention is kernel
    assert vars(modeling_gemma2) == own
    assert torch.equal(before, model(ids).logits)
    assert model.config._attn_implementation == usual
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.model.layers)


def test_the_head_and_the_last_layers_output_are_not_computed():
    model, (ids, mask), ran = make("llama"), prompts([9]), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *unused, name=name: ran.append(name))
    record(model, ids, mask, torch.tensor([[8]]))
    assert "model.layers.1.mlp" in ran
    assert "model.layers.2.self_attn.k_proj" in ran
    unneeded = {"model.layers.2.self_attn.o_proj", "model.layers.2.mlp", "model.norm", "lm_head"}
    assert not unneeded & set(ran)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token(name):
    one = torch.tensor([[5]])
    seen = expect_parity(make(name), one, torch.ones_like(one), one * 0, 1e-5)
    assert torch.equal(seen.alpha.unique(), torch.ones(1))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_cross_attention(kind):
    model, (ids, mask) = encoder_decoder(kind), prompts([12, 17])
    answer, calls = torch.tensor([[0, 7, 8], [0, 9, 4]]), []
    with torch.no_grad():
        states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    seen = record(model, answer, mask, torch.tensor([[0, 2]] * 2), states)
    assert seen.alpha.shape == (3, 2, 4, 2, 17)
    given = {"encoder_outputs": (states,), "attention_mask": mask, "decoder_input_ids": answer}
    with caught(calls):
        model(**given, use_cache=False)
    for layer, call in enumerate(calls[1::2]):
        expected = attention_matrix(**call)[:, :, [0, 2]]
        assert (seen.alpha[layer].double() - expected).abs().max() < 1e-5
        norms = call["value"].norm(dim=-1) * mask[:, None]
        assert torch.allclose(seen.norms[layer], norms, atol=1e-5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = torch.stack(model(**given, output_attentions=True).cross_attentions)
    assert (seen.alpha - theirs[:, :, :, [0, 2]]).abs().max() < 1e-5


def test_gradients_equal_finite_differences():
    model, (ids, mask) = make("gpt2").double(), prompts([7])
    table, owner = model.get_input_embeddings(), torch.tensor([-1, 0, 0, 1, 1, -2, -2])

    def score(shift):
        table.weight.data[int(ids[0, 2])] += shift
        layers = []
        observe(model, ids, mask, torch.tensor([[6]]), lambda *layer: layers.append(layer))
        table.weight.data[int(ids[0, 2])] -= shift
        seen = Record(*(torch.stack(part) for part in zip(*layers, strict=True)))
        return passage_scores(contributions(seen, torch.ones(1, 1))[:, 0].sum(0), owner, 2)[0]

    score(torch.zeros(32).double()).backward()
    way = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    measured = (score(1e-5 * way) - score(-1e-5 * way)) / 2e-5
    assert measured.abs() > 1e-3
    assert torch.allclose(table.weight.grad[ids[0, 2]] @ way, measured, rtol=1e-5)
    assert not record(model, ids, mask, torch.tensor([[6]])).alpha.requires_grad


def test_contributions_and_passage_scores_by_hand():
    model, (ids, mask) = make("gpt2"), prompts([6])
    seen = record(model, ids, mask, torch.tensor([[4, 5]]))
    ours = contributions(seen, torch.tensor([[1.0, 1.0]]))
    by_hand = torch.zeros(2, 6)
    for layer in range(2):
        for head in range(4):
            for row in range(2):
                by_hand[layer] += seen.alpha[layer, 0, head, row] * seen.norms[layer, 0, head] / 8
    assert torch.allclose(ours[:, 0], by_hand, atol=1e-6)
    owner, first = torch.tensor([-1, 0, 0, 1, -2, -1]), by_hand[0]
    expected = torch.stack([first[1:3].sum(), first[3], torch.tensor(0.0)])
    assert torch.allclose(passage_scores(first, owner, 3), expected)


def test_reduced_on_the_fly_is_the_same_as_from_the_record():
    model, (ids, mask) = make("falcon-alibi"), prompts([12, 17])
    rows = torch.tensor([[11, 7], [16, 16]])
    uses = torch.tensor([[[1.0, 0], [1, 0]], [[1, 1], [1, 0]]])
    reduced = pooled(lambda visit: observe(model, ids, mask, rows, visit), uses)
    seen = record(model, ids, mask, rows)
    for norm in (0, 1):
        for group in (0, 1):
            expected = contributions(seen, uses[group], bool(norm))
            assert torch.allclose(reduced[norm, :, group].mean(2), expected, atol=1e-7)
            for head in range(4):
                one = Record(seen.alpha[:, :, head : head + 1], seen.norms[:, :, head : head + 1])
                expected = contributions(one, uses[group], bool(norm))
                assert torch.allclose(reduced[norm, :, group, :, head], expected, atol=1e-7)


def test_nothing_of_size_tokens_times_tokens_is_made():
    """The largest tensor made, seen by a spy on every operation, grows with rows x tokens."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "attention" not in str(func):
                self.size = max(self.size, out.numel())
            return out

    model, (ids, mask) = make("llama"), prompts([2048])
    model.config.max_position_embeddings = 2048
    with Largest() as largest:
        record(model, ids, mask, torch.tensor([[2047, 5]]))
    assert largest.size < 2048 * 2048


def test_a_base_model_is_recorded_like_its_reader():
    model, (ids, mask) = make("llama"), prompts([9])
    assert isinstance(model.base_model, LlamaModel)
    rows = torch.tensor([[8]])
    ours = record(model.base_model, ids, mask, rows)
    assert torch.equal(ours.alpha, record(model, ids, mask, rows).alpha)
