"""Small GGUF files, written as llama.cpp's converter does, and the same weights as a folder."""

import json

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def small_llama(vocabulary, **changes):
    """A random Llama of SmolLM2's shape (three query heads a key head, tied embeddings), cut to two
    layers and few dimensions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 512}
    special = {"bos_token_id": 1, "eos_token_id": 2, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
    config = {"vocab_size": vocabulary, "tie_word_embeddings": True, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes | special | config | changes)).eval()


def write_gguf(path, model, tokenizer, kind="F32", **told):
    """Writes a Llama with a byte-level tokenizer (tokenizers.Tokenizer); its matrices are rounded
    to `kind`, in the model too. `told` are further keys, or other values of some; tensors in
    `extra` are added, those in `without` left out."""
    without, extra = told.pop("without", ()), told.pop("extra", {})
    config, writer = model.config, GGUFWriter(path, told.pop("architecture", "llama"))
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    special = {one.content for one in tokenizer.get_added_tokens_decoder().values()}
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(told.pop("pre", "smollm"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    if template := told.pop("template", None):
        writer.add_chat_template(template)
    for key, value in told.items():
        writer.add_string(key.replace("__", "."), value)
    rounded = GGMLQuantizationType[kind]
    for name, weight in dict(model.named_parameters()).items():
        stored = name
        for ours, theirs in NAMES.items():
            stored = stored.replace(ours, theirs)
        array = weight.detach().numpy()
        if stored in without:
            continue
        if array.ndim == 1:
            writer.add_tensor(stored, array)
            continue
        data = quants.quantize(array, rounded)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(quants.dequantize(data, rounded)))
        if "attn_q" in stored or "attn_k" in stored:  # llama.cpp's order of the rotary dimensions
            key = "num_attention_heads" if "attn_q" in stored else "num_key_value_heads"
            shape = (getattr(config, key), 2, -1, data.shape[-1])
            data = np.ascontiguousarray(data.reshape(shape).swapaxes(1, 2)).reshape(data.shape)
        writer.add_tensor(stored, data, raw_dtype=rounded)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_folder(folder, model, tokenizer):
    """The same model as a folder."""
    model.save_pretrained(folder)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
