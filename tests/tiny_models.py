"""Tiny readers with random weights, and what reaches their attention, caught independently."""

import contextlib
import copy
import math

import torch
import transformers
from transformers.models.gemma2 import modeling_gemma2

SMALL = {"vocab_size": 60, "initializer_range": 0.3}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**SMALL, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
DEEP = {**WIDE, "num_hidden_layers": 3, "intermediate_size": 64}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**DEEP, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
GEMMA |= {"layer_types": SLIDING}
FALCON = {**WIDE, "num_hidden_layers": 2, "alibi": False}
SEQUENTIAL = {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": False}
GPT2 = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS = {
    "falcon-alibi": transformers.FalconConfig(
        **FALCON | SEQUENTIAL | {"num_hidden_layers": 3, "alibi": True}
    ),
    "falcon-rotary": transformers.FalconConfig(**FALCON),
    "falcon-grouped": transformers.FalconConfig(
        **FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "llama": transformers.LlamaConfig(**DEEP, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt-neox": transformers.GPTNeoXConfig(**DEEP),
    "opt": transformers.OPTConfig(**WIDE, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32),
    "qwen2": transformers.Qwen2Config(**DEEP, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**DEEP, num_key_value_heads=2, head_dim=16),
    "phi": transformers.PhiConfig(**DEEP, partial_rotary_factor=0.5),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=1.5),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA),
}


def make(name, implementation=None, seed=0):
    """A tiny model; `implementation` None is what a plain `from_pretrained` would take."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    config._attn_implementation = implementation or ("eager" if name == "gemma2" else "sdpa")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def encoder_decoder(kind):
    """A tiny T5 or BART of two encoder and three decoder layers."""
    torch.manual_seed(0)
    if kind == "t5":
        size = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
        config = transformers.T5Config(vocab_size=60, d_model=32, **size, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        return model.eval()
    size = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    size |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    size |= {"init_std": 0.3, "max_position_embeddings": 64}
    config = transformers.BartConfig(vocab_size=60, d_model=32, **size)
    return transformers.BartForConditionalGeneration(config).eval()


def fid(**settings):
    """A tiny random T5 of four heads with the embedded tokenizer, as a reader."""
    from ragkit.models.fid import FidReader  # the other tests here need no more than attention
    from ragkit.models.retriever import embedded_tokenizer
    from ragkit.settings import ReaderSettings

    torch.manual_seed(0)
    tokenizer = embedded_tokenizer()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "dropout_rate": 0.0}
    size |= {"vocab_size": len(tokenizer), "num_layers": 2, "num_decoder_layers": 3}
    special = {"pad_token_id": pad, "decoder_start_token_id": pad}
    config = transformers.T5Config(**size, **special, eos_token_id=tokenizer.eos_token_id)
    model = transformers.T5ForConditionalGeneration(config)
    return FidReader(model, tokenizer, ReaderSettings(**settings))


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
    names = ("query", "key", "value", "mask", "dropout_p", "is_causal")
    kernel = torch.nn.functional.scaled_dot_product_attention
    own = modeling_gemma2.eager_attention_forward
    plain = {"mask": None, "is_causal": False, "scale": None, "softcap": None}

    def spy(*given, **rest):
        call = plain | dict(zip(names, given, strict=False)) | rest
        calls.append(call | {"mask": call.get("attn_mask", call["mask"])})
        return kernel(*given, **rest)

    def own_spy(module, query, key, value, attention_mask, **rest):
        call = plain | {"query": query, "key": key, "value": value, "mask": attention_mask}
        calls.append(call | {"scale": rest.get("scaling"), "softcap": rest.get("softcap")})
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
    logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key)
    logits = logits * (1 / math.sqrt(size) if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        logits = logits + torch.full((n, key.shape[2]), -math.inf, dtype=torch.float64).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        logits = torch.where(mask, logits, -math.inf)
    elif mask is not None:
        logits = logits + mask.double()
    return logits.softmax(-1)


def places(mask):
    """Position ids that begin at each prompt's first token."""
    return (mask.cumsum(1) - 1).clamp(min=0)
