"""Every causal and encoder-decoder architecture of transformers, tiny and random: right or refused.

Right: the recorded rows are those of the eager path (`output_attentions`). Falcon's adds the ALiBi
bias twice: there they are those of an independent softmax of what reaches the fused kernel. Rows of
a prompt padded on the left are right or refused, too. As a script it prints a line for each.
"""

import collections
import copy
import inspect
import sys

import pytest
import torch
import transformers
from tiny_models import attention_matrix, caught, prompts
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from ragkit.attention import AttentionError, record

SIZES = {
    64: "vocab_size vocab_size_per_layer_input text_vocab_size intermediate_size d_ff ffn_dim dff "
    "encoder_ffn_dim decoder_ffn_dim n_inner d_inner ffn_hidden_size dim_ff mlp_hidden_size "
    "intermediate_size_mlp max_position_embeddings n_positions n_ctx max_source_positions "
    "max_target_positions max_seq_len",
    32: "hidden_size d_model n_embd embed_dim dim word_embed_proj_dim embedding_size emb_dim "
    "hidden_dim moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "expert_intermediate_size moe_shared_expert_intermediate_size",
    16: "q_lora_rank kv_lora_rank",
    8: "head_dim d_kv kv_channels attention_head_size d_head qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
    "num_heads num_encoder_attention_heads num_decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts num_moe_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok "
    "num_experts_per_token moe_topk top_k eos_token_id",
    1: "bos_token_id",
    0: "pad_token_id decoder_start_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "n_mamba_heads": 2}
# What the general sizes do not fit: the configuration's own checks, or its code, ask for these.
SPECIAL = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "zamba": {**MAMBA, "num_hidden_layers": 3, "layer_types": ["mamba", "mamba", "hybrid"]},
    "zamba2": {**MAMBA, "layer_types": ["mamba", "hybrid"], "mamba_ngroups": 1},
    "axk1": {"n_group": 2, "topk_group": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"per_layer_config": None},
    "reformer": {"axial_pos_embds": False},
    "encoder-decoder": {"encoder": {"is_decoder": False}, "decoder": {"add_cross_attention": True}},
    "mamba2": {"head_dim": 16},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
# Those that cannot be made tiny, or read no text alone, and why.
UNMADE = {
    "cohere_compass_text": "its rotary settings lack a kind of its own layers",
    "dots3_note": "its settings by layer name the layers of the full size",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model; its parts must fit that one",
    "gemma4_unified_assistant": "drafts for another model; its parts must fit that one",
    "musicgen": "reads four code books of sound, no text",
    "musicgen_melody": "reads four code books of sound, no text",
    "nemo_speechlm": "its head repeats sizes of its sound encoder's",
    "vibevoice_asr": "sound encoders of 686 million weights, whatever its text model",
    "voxtral_realtime": "reads no text without sound",
    "zamba": "ties weights across its layers by a pattern that two or three do not fit",
}


def small(config_class, **special):
    """Arguments that make a configuration small, its parts too."""
    known = {name for one in config_class.__mro__ for name in getattr(one, "__annotations__", {})}
    known |= set(inspect.signature(config_class.__init__).parameters)
    given = {name: size for name, size in SMALL.items() if name in known}
    given = {name: size for name, size in given.items() if name not in config_class.attribute_map}
    for name, part in (config_class.sub_configs or {}).items():
        if part.__name__ == "AutoConfig":
            part = type(getattr(config_class(), name))
            if part is type(None):
                continue
            given[name] = {"model_type": part.model_type, **small(part)}
        else:
            given[name] = small(part)
    if "kv_lora_rank" in known or config_class.model_type.startswith("dots3"):
        given["num_key_value_heads"] = SMALL["num_attention_heads"]
    if "is_decoder" in known:
        given["is_decoder"] = True
    for name, value in special.items():
        given[name] = {**given[name], **value} if isinstance(given.get(name), dict) else value
    return given


def weights(model_class, config):
    with torch.device("meta"):
        return sum(one.numel() for one in model_class(copy.deepcopy(config)).parameters())


def made(config_class, model_class):
    """The reader as it is loaded by default, with weights that make its attention uneven."""
    config = config_class(**small(config_class, **SPECIAL.get(config_class.model_type, {})))
    parts = [getattr(config, name) for name in config_class.sub_configs]
    own = [part for part in parts if type(part) is model_class.config_class]
    try:
        size = weights(model_class, config)
    except Exception:
        if not own:
            raise
        config = own[0]  # the reader takes only the text's configuration
        size = weights(model_class, config)
    assert size < 1.2e8, f"{size:.0f} weights"
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model


def reads_text(model):
    """Raises what the reader raises on nothing but text, without our code."""
    ids, mask = prompts([12])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False, **more)


def twin(model):
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    eager = type(model)(config).eval()
    eager.load_state_dict(model.state_dict())
    return eager


def matrices(run, model, cross=False):
    """All of attention `[layer][batch, heads, queries, keys]`, without our code."""
    if model.config.model_type == "falcon":
        calls = []
        with caught(calls):
            run(model)
        return [attention_matrix(**call) for call in calls]
    with torch.no_grad():
        return run(twin(model), output_attentions=True)[f"{'cross_' * cross}attentions"]


def expect_same(seen, theirs, rows, mask):
    assert len(theirs) == len(seen.alpha), f"{len(theirs)} layers, not {len(seen.alpha)}"
    each = torch.arange(len(rows))[:, None]
    for ours, whole in zip(seen.alpha, theirs, strict=True):
        expected = whole[each, :, rows].transpose(1, 2) * mask[:, None, None]
        apart = float((ours.double() - expected.double()).abs().max())
        assert apart < 3e-5, f"apart by {apart:.2g}"


def decoder(model):
    ids, mask = prompts([12, 17])
    rows = torch.tensor([[11, 7], [16, 8]])
    seen = record(model, ids, mask, rows)

    def run(one, **more):
        return one.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **more)

    expect_same(seen, matrices(run, model), rows, mask)
    left, left_mask = ids.clone(), mask.clone()
    left[0], left_mask[0] = ids[0].roll(5), mask[0].roll(5)
    try:
        moved = record(model, left, left_mask, rows + torch.tensor([[5], [0]]))
    except AttentionError as refusal:
        return f"left padding refused: {refusal}"
    moved = moved.alpha[:, 0, ..., 5:]
    apart = float((moved - seen.alpha[:, 0, ..., :12]).abs().max())
    assert apart < 1e-4, f"left padding apart by {apart:.2g}"
    return ""


def encoder_decoder(model):
    if not model.config.is_encoder_decoder:  # hears and writes: a decoder over sounds and text
        return decoder(model)
    ids, mask = prompts([12, 17])
    answer, rows = torch.tensor([[2, 7, 8], [2, 9, 4]]), torch.tensor([[0, 2]] * 2)
    with torch.no_grad():
        states = model.get_encoder()(input_ids=ids, attention_mask=mask)[0]
    seen = record(model, answer, mask, rows, states)

    def run(one, **more):
        more["encoder_hidden_states"], more["encoder_attention_mask"] = states, mask
        return one.get_decoder()(input_ids=answer, use_cache=False, **more)

    expect_same(seen, matrices(run, model, cross=True), rows, mask)
    return ""


def outcome(config_class, model_class, try_it):
    """What became of one architecture: (right, refused, wrong or unmade; why)."""
    try:
        model = made(config_class, model_class)
    except Exception as error:
        return "unmade", f"{type(error).__name__}: {error}"
    try:
        return "right", try_it(model)
    except AttentionError as refusal:
        return "refused", str(refusal)
    except Exception as error:
        try:
            reads_text(model)
        except Exception as own:
            return "unmade", f"reads no text alone: {type(own).__name__}: {own}"
        return "wrong", f"{type(error).__name__}: {error}"


def sweep(mapping, try_it, only=()):
    transformers.logging.set_verbosity_error()
    results = {}
    for config_class, model_class in mapping.items():
        kind = config_class.model_type
        if not only or kind in only:
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            results[kind] = outcome(config_class, model_class, try_it)
            print(kind, *results[kind], flush=True)
    return results


SWEEPS = {
    "decoders": (MODEL_FOR_CAUSAL_LM_MAPPING, decoder, 120),
    "encoder-decoders": (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, encoder_decoder, 24),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEEPS)
def test_every_architecture_is_right_or_refused(kind):
    mapping, try_it, least = SWEEPS[kind]
    results = sweep(mapping, try_it)
    of = {
        what: {name: why for name, (result, why) in results.items() if result == what}
        for what in ("right", "refused", "wrong", "unmade")
    }
    assert not of["wrong"]
    assert set(of["unmade"]) <= set(UNMADE)
    assert len(of["right"]) >= least
    assert all("Use another reader." in why or "causal" in why for why in of["refused"].values())


if __name__ == "__main__":
    for mapping, try_it, _ in SWEEPS.values():
        results = sweep(mapping, try_it, sys.argv[1:])
        print(collections.Counter(result for result, _ in results.values()))
