"""Prompts with owners, answers, likelihoods and Step 1."""

import pytest
import torch
from transformers import FalconForCausalLM

from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.data.vocabulary import build_tokenizer
from ragkit.errors import ReaderError
from ragkit.models import reader
from ragkit.models.pretrain import reader_config
from ragkit.models.reader import PART, Reader
from ragkit.profile import ReaderSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm. The family moved away in 1810."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
]
QUESTION = Question("q", "where was orla venn born", ("Ulm",), (0,), cloze="Orla Venn was born in")


def make(**settings):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = reader_config(tokenizer)
    config._attn_implementation = "sdpa"
    return Reader(FalconForCausalLM(config), tokenizer, ReaderSettings(**settings))


def test_owners_give_back_the_texts():
    one = make()
    prompt = one.prompt(QUESTION, PASSAGES, "Ulm")
    for number, passage in enumerate(PASSAGES):
        own = [i for i, who in zip(prompt.ids, prompt.owner, strict=True) if who == number]
        assert own == one.tokenizer(passage.text, add_special_tokens=False).input_ids
    asked = [i for i, who in zip(prompt.ids, prompt.owner, strict=True) if who == PART["question"]]
    assert asked == one.tokenizer(QUESTION.text, add_special_tokens=False).input_ids
    assert prompt.owner.index(PART["answer"]) == prompt.answer_start
    assert prompt.ids[-1] == one.end


def test_cloze_prompts_end_with_the_statement():
    one = make()
    one.style = "cloze"
    assert one.tokenizer.decode(one.prompt(QUESTION, PASSAGES).ids).endswith(
        "orla venn was born in"
    )


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
    prompts = [
        one.prompt(QUESTION, PASSAGES, "Ulm"),
        one.prompt(QUESTION, PASSAGES[:1], "Old Tarholm"),
    ]
    batched = one.losses(prompts)
    for loss, prompt in zip(batched, prompts, strict=True):
        ids = torch.tensor([prompt.ids])
        logits = one.model(ids).logits[0, :-1].log_softmax(-1)
        by_hand = -torch.stack(
            [logits[i - 1, ids[0, i]] for i in range(prompt.answer_start, len(prompt.ids))]
        ).mean()
        assert torch.isclose(loss, by_hand, atol=1e-5)


def test_batched_answers_equal_single_ones():
    one = make()
    prompts = [
        one.prompt(QUESTION, PASSAGES),
        one.prompt(QUESTION, PASSAGES[:1]),
        one.prompt(QUESTION, []),
    ]
    assert one.answer(prompts) == [one.answer([p])[0] for p in prompts]


def draw(rng):
    place = rng.choice(["ulm", "old", "port"])
    return Question("q", "where was orla venn born", (place,), (0,)), [
        Passage("0", "Orla Venn", f"Orla Venn was born in {place}.")
    ]


def test_step1_learns_and_a_killed_one_ends_with_the_same_result(tmp_path, monkeypatch):
    whole = make(steps=120, batch=4)
    (tmp_path / "a").mkdir()
    losses = reader.fine_tune(whole, draw, tmp_path / "a", 0)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    calls = []

    def dies(rng):
        calls.append(1)
        if len(calls) > 4 * 110:
            raise KeyboardInterrupt
        return draw(rng)

    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt):
        reader.fine_tune(make(steps=120, batch=4), dies, tmp_path / "b", 0)
    resumed = make(steps=120, batch=4)
    assert reader.fine_tune(resumed, draw, tmp_path / "b", 0) == losses
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )


def test_a_loss_that_is_not_a_number_stops_step1(tmp_path):
    one = make(steps=3, batch=2)
    with torch.no_grad():
        one.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ReaderError, match=r"Lower reader\.rate"):
        reader.fine_tune(one, lambda rng: (QUESTION, PASSAGES), tmp_path, 0)


def test_the_embedded_reader_loads_and_matches_the_tokenizer():
    one = Reader.load("embedded", ReaderSettings())
    assert one.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert one.model.config.alibi
