"""Readers that are not causal, that count positions in their own way, or cannot be recorded."""

import copy

import pytest
import torch
import transformers
from tiny_models import CONFIGS, SMALL, encoder_decoder, make, prompts

from ragkit.attention import AttentionError, record

ROBERTAS = ["Roberta", "XLMRoberta", "Camembert", "RobertaPreLayerNorm", "XLMRobertaXL"]
ROBERTAS += ["Data2VecText", "Xmod"]
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
BERT = {**SMALL, **SHAPE, "intermediate_size": 64, "max_position_embeddings": 64}


def tiny(name, head="ForCausalLM", **settings):
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}{head}")(config).eval()


def not_causal(name):
    if name == "bert":
        return tiny("Bert", "LMHeadModel", **BERT)
    if name == "roberta encoder":
        return tiny("Roberta", **BERT, is_decoder=False)
    config = copy.deepcopy(CONFIGS["llama" if name == "llama" else "gemma3"])
    setting = "is_causal" if name == "llama" else "use_bidirectional_attention"
    setattr(config, setting, name != "llama")
    config._attn_implementation = "sdpa"
    kind = "LlamaForCausalLM" if name == "llama" else "Gemma3ForCausalLM"
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("name", ["bert", "roberta encoder", "llama", "gemma3"])
@pytest.mark.parametrize("row", [3, 11])
def test_a_reader_that_is_not_causal_is_refused(name, row):
    """From the last row, behind which nothing lies, too."""
    ids, mask = prompts([12])
    with pytest.raises(AttentionError, match="is not causal"):
        record(not_causal(name), ids, mask, torch.tensor([[row]]))


@pytest.mark.parametrize("name", ROBERTAS)
def test_the_roberta_family_keeps_its_own_positions(name):
    """Padded on the left, too: they begin behind the padding index, wherever the padding is."""
    own = {**BERT, "is_decoder": True, **({"default_language": "en_XX"} if name == "Xmod" else {})}
    model, (ids, mask) = tiny(name, **own), prompts([12, 17])
    eager = tiny(name, **own, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    rows, each = torch.tensor([[11, 7], [16, 8]]), torch.arange(2)[:, None]
    with torch.no_grad():
        theirs = torch.stack(eager(ids, attention_mask=mask, output_attentions=True).attentions)
    seen = record(model, ids, mask, rows).alpha
    for ours, whole in zip(seen, theirs, strict=True):
        expected = whole[each, :, rows].transpose(1, 2) * mask[:, None, None]
        assert (ours - expected).abs().max() < 1e-5
    ids[0], mask[0], rows[0] = ids[0].roll(5), mask[0].roll(5), rows[0] + 5
    seen[:, 0] = seen[:, 0].roll(5, -1)
    assert torch.equal(record(model, ids, mask, rows).alpha, seen)


def test_another_kernel_is_refused_with_the_file_to_change():
    with pytest.raises(AttentionError, match=r"'eager'.*config\.json"):
        record(make("gpt2", "eager"), *prompts([5]), torch.tensor([[4]]))


def refused(model, match):
    """Whether it is refused before any work."""
    ids, mask = prompts([5])
    ran = []
    model.base_model.register_forward_pre_hook(lambda *unused: ran.append(1))
    with pytest.raises(AttentionError, match=match):
        record(model, ids, mask, torch.tensor([[4]]))
    return not ran


def test_what_cannot_be_recorded_is_refused_before_any_work():
    assert refused(make("gpt2", "eager"), "attn_implementation='sdpa'")
    assert refused(tiny("Mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=60), "code of its own")
    bloom = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 60}
    assert refused(tiny("Bloom", **bloom), "code of its own")
    assert refused(make("llama").train(), r"reader\.eval")
    assert refused(encoder_decoder("t5"), "its encoder's states")
    states, one = torch.zeros(1, 3, 32), torch.ones(1, 1).long()
    with pytest.raises(AttentionError, match="no encoder-decoder"):
        record(make("llama"), one, torch.ones(1, 3), one * 0, states)


def test_attention_of_another_kind_is_refused_at_its_first_layer():
    shape = {"vocab_size": 60, **SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}
    two_calls = tiny("DiffLlama", **shape, attn_implementation="sdpa")
    assert not refused(two_calls, "Layer 0 attends 2 times, not 1")
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    sinks = tiny("GptOss", **shape, head_dim=8, **experts, pad_token_id=0)
    assert not refused(sinks, "s_aux")
