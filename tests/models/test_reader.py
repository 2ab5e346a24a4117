"""Prompts with owners, answers and likelihoods."""

import errno
import shutil
import socket

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

from ragkit.data.corpus import Passage, Question
from ragkit.errors import RagkitError, ReaderError
from ragkit.models.fid import load_reader
from ragkit.models.reader import PART, Reader
from ragkit.models.retriever import embedded_tokenizer
from ragkit.settings import EMBEDDED, ReaderSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm. The family moved away in 1810."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
]
QUESTION = Question("q", "where was orla venn born", ("Ulm",), (0,), cloze="Orla Venn was born in")


def make(**settings):
    torch.manual_seed(0)
    tokenizer = embedded_tokenizer()
    config = FalconConfig.from_pretrained(EMBEDDED["embedded"])
    config._attn_implementation = "sdpa"
    return Reader(FalconForCausalLM(config), tokenizer, ReaderSettings(**settings))


def test_cloze_prompts_end_with_the_statement():
    one = make()
    one.style = "cloze"
    text = one.tokenizer.decode(one.prompt(QUESTION, PASSAGES).ids)
    assert text.endswith("orla venn was born in")


def test_a_long_prompt_loses_passage_tokens_evenly_and_never_the_question():
    whole = make().prompt(QUESTION, PASSAGES)
    short = make(context=len(whole.ids)).prompt(QUESTION, PASSAGES)
    assert len(short.ids) <= len(whole.ids) - 8
    assert short.trimmed == 8
    for part in (PART["question"], PART["title"], PART["other"]):
        assert short.owner.count(part) == whole.owner.count(part)
    kept = [short.owner.count(n) / whole.owner.count(n) for n in range(2)]
    assert abs(kept[0] - kept[1]) < 0.1


def test_a_question_longer_than_the_context_is_refused():
    with pytest.raises(ReaderError, match=r"Raise reader\.context"):
        make(context=12).prompt(QUESTION, PASSAGES)


def test_losses_equal_the_full_computation():
    one = make()
    pairs = (PASSAGES, "Ulm"), (PASSAGES[:1], "Old Tarholm")
    prompts = [one.prompt(QUESTION, *pair) for pair in pairs]
    for loss, prompt in zip(one.losses(prompts), prompts, strict=True):
        ids, answer = torch.tensor([prompt.ids]), range(prompt.answer_start, len(prompt.ids))
        logs = one.model(ids).logits[0].log_softmax(-1)
        by_hand = [-logs[i - 1, prompt.ids[i]] for i in answer]
        assert torch.isclose(loss, torch.stack(by_hand).mean(), atol=1e-5)


def test_batched_answers_equal_single_ones():
    one = make()
    prompts = [one.prompt(QUESTION, PASSAGES[:n]) for n in (2, 1, 0)]
    assert one.answer(prompts) == [one.answer([p])[0] for p in prompts]


def test_the_embedded_reader_loads_and_matches_the_tokenizer():
    one = load_reader("embedded", ReaderSettings())
    assert one.tokenizer.get_vocab() == embedded_tokenizer().get_vocab()
    assert one.model.config.alibi


def test_a_missing_model_folder():
    with pytest.raises(RagkitError, match=r"'/no/such/model' cannot be .*Give a local folder"):
        load_reader("/no/such/model", ReaderSettings())


def test_a_hub_name_without_network(monkeypatch):
    def unreachable(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's own tries
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(RagkitError, match=r"'some-lab/some-reader' cannot be loaded.*no network"):
        load_reader("some-lab/some-reader", ReaderSettings())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_model_folder_is_named(tmp_path, damage):
    weights = shutil.copytree(EMBEDDED["embedded"], tmp_path / "mine") / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RagkitError, match="mine' cannot be loaded"):
        load_reader(str(tmp_path / "mine"), ReaderSettings())


def test_a_context_larger_than_the_models_positions_is_refused(tmp_path):
    folder = shutil.copytree(EMBEDDED["embedded"], tmp_path / "gpt2")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    config = GPT2Config(vocab_size=3000, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(RagkitError, match=r"64 positions.*reader\.context"):
        load_reader(folder, ReaderSettings(context=65))
    assert load_reader(folder, ReaderSettings(context=64)).settings.context == 64


def test_attention_that_is_not_a_number_is_refused():
    one = load_reader("embedded", ReaderSettings())
    with torch.no_grad():
        one.model.transformer.h[0].self_attention.query_key_value.weight.fill_(float("nan"))
    prompts = [one.prompt(QUESTION, PASSAGES)]
    with pytest.raises(ReaderError, match="FalconForCausalLM's attention is not a number"):
        one.attention(prompts, torch.tensor([[1]]), torch.ones(1, 1, 1))
