"""Tiny readers with random weights, and what reaches their attention, caught independently."""

import contextlib
import copy
import math

import torch
import transformers
from transformers import (
    BartConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)
from transformers.models.gemma2 import modeling_gemma2

SMALL = {
    "vocab_size": 60,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**SMALL, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
DEEP = {**WIDE, "num_hidden_layers": 3, "intermediate_size": 64}
GEMMA = {
    **DEEP,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CONFIGS = {
    "falcon-alibi": FalconConfig(
        **WIDE,
        num_hidden_layers=3,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
    ),
    "falcon-rotary": FalconConfig(**WIDE, num_hidden_layers=2, alibi=False),
    "falcon-grouped": FalconConfig(
        **WIDE, num_hidden_layers=2, alibi=False, new_decoder_architecture=True, num_kv_heads=2
    ),
    "llama": LlamaConfig(**DEEP, num_key_value_heads=2),
    "gpt2": GPT2Config(
        **SMALL,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt-neox": GPTNeoXConfig(**DEEP),
    "opt": OPTConfig(**WIDE, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32),
    "qwen2": Qwen2Config(**DEEP, num_key_value_heads=2),
    "qwen3": Qwen3Config(**DEEP, num_key_value_heads=2, head_dim=16),
    "phi": PhiConfig(**DEEP, partial_rotary_factor=0.5),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=1.5),
    "gemma3": Gemma3TextConfig(**GEMMA),
}
KINDS = {
    "falcon": "FalconForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi": "PhiForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def make(name, implementation=None, seed=0):
    """A tiny model; `implementation` None is what a plain `from_pretrained` would take."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    config._attn_implementation = implementation or ("eager" if name == "gemma2" else "sdpa")
    return getattr(transformers, KINDS[config.model_type])(config).eval()


def encoder_decoder(kind):
    """A tiny T5 or BART of two encoder and three decoder layers."""
    torch.manual_seed(0)
    if kind == "t5":
        size = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
        config = T5Config(vocab_size=60, d_model=32, **size, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        return model.eval()
    size = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    size |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    size |= {"init_std": 0.3, "max_position_embeddings": 64}
    config = BartConfig(vocab_size=60, d_model=32, **size)
    return transformers.BartForConditionalGeneration(config).eval()


def prompts(sizes, side="right", seed=1):
    """Random ids and mask `[batch, tokens]`, padded to one side."""
    ids = torch.randint(
        3, 60, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.ones_like(ids)
    for row, size in enumerate(sizes):
        gap = max(sizes) - size
        mask[row, slice(0, gap) if side == "left" else slice(size, None)] = 0
    return ids * mask, mask


@contextlib.contextmanager
def caught(calls):
    """Appends what reaches the fused kernel, or Gemma 2's own attention function, to `calls`."""
    places = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    kernel = torch.nn.functional.scaled_dot_product_attention
    own = modeling_gemma2.eager_attention_forward

    def spy(*given, **rest):
        call = dict(zip(places, given, strict=False)) | rest
        calls.append(
            {
                "query": call["query"],
                "key": call["key"],
                "value": call["value"],
                "mask": call.get("attn_mask"),
                "is_causal": call.get("is_causal", False),
                "scale": call.get("scale"),
                "softcap": None,
            }
        )
        return kernel(*given, **rest)

    def own_spy(module, query, key, value, attention_mask, **rest):
        calls.append(
            {
                "query": query,
                "key": key,
                "value": value,
                "mask": attention_mask,
                "is_causal": False,
                "scale": rest.get("scaling"),
                "softcap": rest.get("softcap"),
            }
        )
        return own(module, query, key, value, attention_mask, **rest)

    torch.nn.functional.scaled_dot_product_attention = spy
    modeling_gemma2.eager_attention_forward = own_spy
    try:
        with torch.no_grad():
            yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = kernel
        modeling_gemma2.eager_attention_forward = own


def attention_matrix(query, key, mask, is_causal, scale, softcap, **unused):
    """All of attention in float64 `[batch, heads, queries, keys]`, from the formula."""
    heads, n, size = query.shape[1:]
    key = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key) * (
        1 / math.sqrt(size) if scale is None else scale
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        logits = logits + torch.full((n, key.shape[2]), -math.inf, dtype=torch.float64).triu(1)
    if mask is not None:
        logits = (
            torch.where(mask, logits, -math.inf)
            if mask.dtype == torch.bool
            else logits + mask.double()
        )
    return logits.softmax(-1)


def places(mask):
    """Position ids that begin at each prompt's first token."""
    return (mask.cumsum(1) - 1).clamp(min=0)
