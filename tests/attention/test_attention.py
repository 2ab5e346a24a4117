"""Attention rows against an independent float64 softmax, for each way a model can be called."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, attention_matrix, caught, make, places, prompts
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    MptConfig,
    MptForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ragkit.attention import (
    AttentionError,
    Record,
    contributions,
    observe,
    passage_scores,
    pooled,
    record,
    record_cross,
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
        norms = (
            call["value"]
            .double()
            .norm(dim=-1)
            .repeat_interleave(call["query"].shape[1] // call["value"].shape[1], 1)
            * mask[:, None]
        )
        assert torch.allclose(seen.norms[layer].double(), norms, rtol=bound)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", SIDES)
def test_rows_equal_an_independent_softmax(name, side):
    ids, mask = prompts([12, 17] if side != "none" else [17, 17], side)
    seen = expect_parity(make(name), ids, mask, torch.tensor(SIDES[side]), BOUND[torch.float32])
    assert torch.allclose(seen.alpha.sum(-1), torch.ones(()), atol=1e-5)
    assert (seen.alpha[:, 0][..., mask[0] == 0] == 0).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ("falcon-alibi", "llama", "gemma2", "gemma3")
        for dtype in BOUND
        if (name, dtype) != ("gemma2", torch.float64)
    ],
)  # Gemma 2's own softmax is float32 whatever its dtype: there is no float64 to compare with
def test_other_dtypes(name, dtype):
    ids, mask = prompts([12, 17])
    seen = expect_parity(
        make(name).to(dtype), ids, mask, torch.tensor(SIDES["right"]), BOUND[dtype]
    )
    assert seen.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["falcon-alibi", "llama", "gpt2"])
def test_autocast_keeps_the_softmax_in_float32(name):
    ids, mask = prompts([12, 17])
    model, rows, calls = make(name), torch.tensor(SIDES["right"]), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = record(model, ids, mask, rows)
        with caught(calls):
            model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False
            )
    assert seen.alpha.dtype == torch.float32
    for layer, call in enumerate(calls):
        call["query"], call["key"] = (
            call["query"].bfloat16(),
            call["key"].bfloat16(),
        )  # as the kernel gets them under autocast
        whole = attention_matrix(**call)[torch.arange(2)[:, None], :, rows].transpose(1, 2)
        assert (seen.alpha[layer].double() - whole * mask[:, None, None]).abs().max() < 1e-5


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "falcon-alibi"])
def test_agrees_with_the_eager_path_where_that_is_right(name):
    ids, mask = prompts([17, 17])
    model, eager = make(name), make(name, "eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        theirs = torch.stack(eager(ids, attention_mask=mask, output_attentions=True).attentions)[
            :, :, :, [3, 16]
        ]
    assert (record(model, ids, mask, torch.tensor([[3, 16]] * 2)).alpha - theirs).abs().max() < 1e-5


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
    bias = (
        torch.arange(24) * torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None]
    )  # ALiBi's slopes for four heads
    by_hand = {
        times: ((torch.einsum("hd,hkd->hk", query, key) + times * bias) / 8**0.5).softmax(-1)
        for times in (1, 2)
    }
    assert (
        record(model, ids, mask, torch.tensor([[23]])).alpha[0, 0, :, 0].double() - by_hand[1]
    ).abs().max() < 1e-5
    assert (theirs - by_hand[2]).abs().max() < 1e-5


@pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ,
    reason="RAGKIT_REAL_DATA is not set: no trained model to test on",
)
@pytest.mark.parametrize("dtype", BOUND)
def test_trained_llama(dtype):
    model = LlamaForCausalLM.from_pretrained(
        Path(os.environ["RAGKIT_REAL_DATA"]) / "models/stories260k",
        dtype=dtype,
        attn_implementation="sdpa",
    )
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    expect_parity(model, ids, mask, torch.tensor([[39, 12], [29, 3]]), BOUND[dtype])


def test_recording_leaves_the_model_as_it_was():
    for name in ("llama", "gemma2"):
        model, (ids, mask) = make(name), prompts([9])
        before = model(ids).logits
        kernel = torch.nn.functional.scaled_dot_product_attention
        record(model, ids, mask, torch.tensor([[8]]))
        with pytest.raises(AttentionError):
            record(model, ids, mask, torch.tensor([[9]]))
        assert torch.nn.functional.scaled_dot_product_attention is kernel
        assert torch.equal(before, model(ids).logits)
        assert model.config._attn_implementation == ("sdpa" if name == "llama" else "eager")
        assert not any(
            layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers
        )


def test_the_blockwise_forward_is_gemma2s_own(monkeypatch):
    """It also makes the next layer's input: in blocks, it must be the same model."""
    monkeypatch.setattr("ragkit.attention.kernels.BLOCK", 4)
    model, (ids, mask) = make("gemma2"), prompts([13, 17], "left")
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, position_ids=places(mask)).logits
        model.set_attn_implementation("ragkit_blockwise")
        ours = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    assert (theirs - ours)[mask.bool()].abs().max() < 1e-4


def test_the_head_and_the_last_layers_output_are_not_computed():
    model, (ids, mask), ran = make("llama"), prompts([9]), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *unused, name=name: ran.append(name))
    record(model, ids, mask, torch.tensor([[8]]))
    assert "model.layers.1.mlp" in ran
    assert "model.layers.2.self_attn.k_proj" in ran
    assert not {
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp",
        "model.norm",
        "lm_head",
    } & set(ran)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token(name):
    """A lone query: transformers packs the heads that share a key head."""
    model = make(name)
    seen = record(model, torch.tensor([[5]]), torch.tensor([[1]]), torch.tensor([[0]]))
    heads = model.config.num_attention_heads
    assert torch.allclose(seen.alpha, torch.ones(model.config.num_hidden_layers, 1, heads, 1, 1))
    calls = []
    with caught(calls):
        model.base_model(torch.tensor([[5]]), use_cache=False)
    for norms, call in zip(seen.norms, calls, strict=True):
        own = call["value"].norm(dim=-1)
        assert torch.allclose(norms, own.repeat_interleave(heads // own.shape[1], 1), rtol=1e-5)


def encoder_decoder(kind):
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model = T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        return model.eval()
    config = BartConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        init_std=0.3,
        max_position_embeddings=64,
    )
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_cross_attention(kind):
    model, (ids, mask) = encoder_decoder(kind), prompts([12, 17])
    answer = torch.tensor([[0, 7, 8], [0, 9, 4]])
    with torch.no_grad():
        states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    seen = record_cross(model, states, mask, answer, torch.tensor([[0, 2]] * 2))
    assert seen.alpha.shape == (3, 2, 4, 2, 17)
    calls = []
    with caught(calls):
        model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=answer,
            use_cache=False,
        )
    for layer, call in enumerate(calls[1::2]):
        assert (
            seen.alpha[layer].double() - attention_matrix(**call)[:, :, [0, 2]]
        ).abs().max() < 1e-5
        assert torch.allclose(
            seen.norms[layer], call["value"].norm(dim=-1) * mask[:, None], atol=1e-5
        )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=answer,
            output_attentions=True,
        ).cross_attentions
    assert (seen.alpha - torch.stack(theirs)[:, :, :, [0, 2]]).abs().max() < 1e-5


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


def refused(model, match):
    ids, mask = prompts([5])
    ran = []
    model.base_model.register_forward_pre_hook(lambda *unused: ran.append(1))
    with pytest.raises(AttentionError, match=match):
        record(model, ids, mask, torch.tensor([[4]]))
    return not ran


def test_what_cannot_be_recorded_is_refused_before_any_work():
    assert refused(make("gpt2", "eager"), "attn_implementation='sdpa'")
    assert refused(
        MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=60)).eval(),
        "code of its own",
    )
    assert refused(
        BloomForCausalLM(BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=60)).eval(),
        "code of its own",
    )
    assert refused(make("llama").train(), r"reader\.eval")
    assert refused(encoder_decoder("t5"), "record_cross")
    with pytest.raises(AttentionError, match="no encoder-decoder"):
        record_cross(
            make("llama"),
            torch.zeros(1, 3, 32),
            torch.ones(1, 3),
            torch.ones(1, 1).long(),
            torch.zeros(1, 1).long(),
        )


def test_attention_of_another_kind_is_refused_at_its_first_layer():
    shape = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    two_calls = DiffLlamaForCausalLM(DiffLlamaConfig(**shape, attn_implementation="sdpa")).eval()
    assert not refused(two_calls, "Layer 0 made 2 attention calls")
    sinks = GptOssForCausalLM(
        GptOssConfig(
            **shape, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0
        )
    ).eval()
    assert not refused(sinks, "s_aux")


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
    owner = torch.tensor([-1, 0, 0, 1, -2, -1])
    assert torch.allclose(
        passage_scores(by_hand[0], owner, 3),
        torch.stack([by_hand[0][1:3].sum(), by_hand[0][3], torch.tensor(0.0)]),
    )
    assert torch.allclose(passage_scores(by_hand[0], owner, 2, "mean")[0], by_hand[0][1:3].mean())


def test_reduced_on_the_fly_is_the_same_as_from_the_record():
    model, (ids, mask) = make("falcon-alibi"), prompts([12, 17])
    rows, uses = (
        torch.tensor([[11, 7], [16, 16]]),
        torch.tensor([[[1.0, 0], [1, 0]], [[1, 1], [1, 0]]]),
    )
    reduced = pooled(lambda visit: observe(model, ids, mask, rows, visit), uses)
    seen = record(model, ids, mask, rows)
    for norm in (0, 1):
        for group in (0, 1):
            assert torch.allclose(
                reduced[norm, :, group], contributions(seen, uses[group], bool(norm)), atol=1e-7
            )


def test_nothing_of_size_tokens_times_tokens_is_made():
    """The largest tensor made, seen by a spy on every operation, grows with rows x tokens."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "attention" not in str(func):
                self.size = max(self.size, out.numel())
            return out

    for name in ("llama", "gemma2"):
        model, (ids, mask) = make(name), prompts([2048])
        model.config.max_position_embeddings = 2048
        with Largest() as largest:
            record(model, ids, mask, torch.tensor([[2047, 5]]))
        assert largest.size < 2048 * 2048 if name == "llama" else largest.size <= 256 * 2048 * 4


def test_a_base_model_is_recorded_like_its_reader():
    model, (ids, mask) = make("llama"), prompts([9])
    assert isinstance(model.base_model, LlamaModel)
    rows = torch.tensor([[8]])
    ours = record(model.base_model, ids, mask, rows)
    assert torch.equal(ours.alpha, record(model, ids, mask, rows).alpha)
