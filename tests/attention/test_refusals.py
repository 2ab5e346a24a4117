"""Readers that are not causal, that count positions in their own way, or cannot be recorded."""

import copy

import pytest
import torch
import transformers
from tiny_models import CONFIGS, SMALL, make, prompts
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from ragkit.attention import AttentionError, observe, record
from ragkit.attention.kernels import LazyMask

ROBERTAS = {
    "Roberta": {},
    "XLMRoberta": {},
    "Camembert": {},
    "RobertaPreLayerNorm": {},
    "XLMRobertaXL": {},
    "Data2VecText": {},
    "Xmod": {"default_language": "en_XX"},
}
BERT = {
    **SMALL,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def roberta(name, **settings):
    config = getattr(transformers, f"{name}Config")(**BERT, **ROBERTAS[name], **settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def not_causal(name):
    torch.manual_seed(0)
    if name == "bert":
        return BertLMHeadModel(BertConfig(**BERT)).eval()
    if name == "roberta encoder":
        return roberta("Roberta", is_decoder=False)
    config = copy.deepcopy(CONFIGS["llama" if name == "llama" else "gemma3"])
    setattr(
        config, "is_causal" if name == "llama" else "use_bidirectional_attention", name != "llama"
    )
    config._attn_implementation = "sdpa"
    kind = LlamaForCausalLM if name == "llama" else transformers.Gemma3ForCausalLM
    return kind(config).eval()


@pytest.mark.parametrize("name", ["bert", "roberta encoder", "llama", "gemma3"])
@pytest.mark.parametrize("row", [3, 11])
def test_a_reader_that_is_not_causal_is_refused(name, row):
    """From the last row, behind which nothing lies, too."""
    ids, mask = prompts([12])
    with pytest.raises(AttentionError, match="is not causal"):
        record(not_causal(name), ids, mask, torch.tensor([[row]]))


@pytest.mark.parametrize("name", ROBERTAS)
def test_the_roberta_family_keeps_its_own_positions(name):
    model, (ids, mask) = roberta(name, is_decoder=True), prompts([12, 17])
    eager = roberta(name, is_decoder=True, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    rows, each = torch.tensor([[11, 7], [16, 8]]), torch.arange(2)[:, None]
    with torch.no_grad():
        theirs = torch.stack(eager(ids, attention_mask=mask, output_attentions=True).attentions)
    seen = record(model, ids, mask, rows).alpha
    for ours, whole in zip(seen, theirs, strict=True):
        expected = whole[each, :, rows].transpose(1, 2) * mask[:, None, None]
        assert (ours - expected).abs().max() < 1e-5
    left, left_mask = prompts([12, 17], "left")
    with pytest.raises(AttentionError, match="pad on the right"):
        record(model, left, left_mask, torch.tensor([[16], [16]]))


def test_positions_are_given_only_behind_padding():
    model, given = make("llama"), []
    forward = model.model.forward

    def spy(position_ids=None, **rest):
        given.append(position_ids)
        return forward(position_ids=position_ids, **rest)

    model.model.forward = spy
    record(model, *prompts([4, 6]), torch.tensor([[3], [5]]))
    assert given == [None]
    record(model, *prompts([4, 6], "left"), torch.tensor([[5], [5]]))
    assert given[-1].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_a_reader_that_works_on_its_mask_is_refused():
    mask = LazyMask({"q_offset": 0})
    for work in (
        lambda: mask[:, :, :4],
        lambda: mask.shape,
        lambda: torch.zeros(2) + mask,
        lambda: torch.where(mask, 1, 0),
    ):
        with pytest.raises(AttentionError, match="changes its attention mask"):
            work()
    assert copy.copy(mask) == mask


def test_another_kernel_is_refused_with_the_file_to_change():
    with pytest.raises(AttentionError, match=r"'eager'.*config\.json"):
        record(make("gpt2", "eager"), *prompts([5]), torch.tensor([[4]]))


def test_observing_keeps_the_callers_gradients():
    model, (ids, mask), layers = make("gpt2"), prompts([5]), []
    observe(model, ids, mask, torch.tensor([[4]]), lambda alpha, norms: layers.append(alpha))
    assert all(alpha.requires_grad for alpha in layers)
    assert not record(model, ids, mask, torch.tensor([[4]])).alpha.requires_grad
