"""The encoder-decoder reader end to end on a tiny random T5, and against the model's own forward
pass.
"""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.data.vocabulary import build_tokenizer
from ragkit.errors import ReaderError
from ragkit.models.fid import FidReader, load_reader
from ragkit.models.reader import PART
from ragkit.models.step1 import fine_tune
from ragkit.settings import ReaderSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm. The family moved away in 1810."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
    Passage("2", "Ulm", "Ulm is a town on a river. It is old."),
]
QUESTION = Question("q", "where was orla venn born", ("Ulm",), (0,), cloze="Orla Venn was born in")
OTHER = Question(
    "r", "on which river does old tarholm lie", ("Lyda river",), (1,), cloze="Old Tarholm lies on"
)


def make(**settings):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "dropout_rate": 0.0}
    special = {"pad_token_id": pad, "decoder_start_token_id": pad}
    config = T5Config(
        vocab_size=len(tokenizer),
        num_layers=2,
        num_decoder_layers=3,
        eos_token_id=tokenizer.eos_token_id,
        **size,
        **special,
    )
    return FidReader(T5ForConditionalGeneration(config), tokenizer, ReaderSettings(**settings))


def test_owners_give_back_the_texts_and_blocks_the_passages():
    one = make()
    prompt = one.prompt(QUESTION, PASSAGES, "Ulm")
    assert len(prompt.blocks) == 3
    assert sum(prompt.blocks) == prompt.answer_start
    start = 0
    for number, (passage, length) in enumerate(zip(PASSAGES, prompt.blocks, strict=True)):
        block, owner = prompt.ids[start : start + length], prompt.owner[start : start + length]
        start += length
        assert set(owner) <= {number, *PART.values()}
        for text, who in (
            (passage.text, number),
            (QUESTION.text, PART["question"]),
            (passage.title, PART["title"]),
        ):
            assert [i for i, w in zip(block, owner, strict=True) if w == who] == one.tokenizer(
                text, add_special_tokens=False
            ).input_ids
    assert prompt.owner[prompt.answer_start :] == [PART["answer"]] * (
        len(prompt.ids) - prompt.answer_start
    )
    assert prompt.ids[-1] == one.end
    assert len(one.prompt(QUESTION, []).blocks) == 1


def test_a_long_block_is_cut_at_the_end_of_its_passage():
    whole = make().prompt(QUESTION, PASSAGES)
    short = make(context=max(whole.blocks) - 3).prompt(QUESTION, PASSAGES)
    assert max(short.blocks) == max(whole.blocks) - 3
    assert short.trimmed == len(whole.ids) - len(short.ids) > 0
    assert short.owner.count(PART["question"]) == whole.owner.count(PART["question"])
    with pytest.raises(ReaderError, match=r"Raise reader\.context"):
        make(context=5).prompt(QUESTION, PASSAGES)


def test_losses_equal_the_models_own_forward():
    """One passage: then the model's own loss from ids and labels is the same thing. Several: states
    put together by hand.
    """
    one = make()
    prompts = [one.prompt(QUESTION, PASSAGES[:1], "Ulm"), one.prompt(OTHER, PASSAGES, "Lyda river")]
    batched = one.losses(prompts)
    labels = torch.tensor([prompts[0].ids[prompts[0].answer_start :]])
    assert torch.isclose(
        batched[0],
        one.model(
            input_ids=torch.tensor([prompts[0].ids[: prompts[0].answer_start]]), labels=labels
        ).loss,
        atol=1e-5,
    )
    blocks = torch.tensor(prompts[1].ids[: prompts[1].answer_start]).split(list(prompts[1].blocks))
    states = torch.cat(
        [one.model.encoder(block[None]).last_hidden_state for block in blocks], dim=1
    )
    labels = torch.tensor([prompts[1].ids[prompts[1].answer_start :]])
    assert torch.isclose(
        batched[1], one.model(encoder_outputs=(states,), labels=labels).loss, atol=1e-5
    )


def test_attention_equals_the_models_own_cross_attention():
    one = make()
    prompts = [one.prompt(QUESTION, PASSAGES, "Ulm"), one.prompt(OTHER, PASSAGES[:1], "Lyda river")]
    answers = [len(p.ids) - p.answer_start for p in prompts]  # with their end token
    rows = torch.tensor([[p.answer_start - 1 + i for i in range(max(answers))] for p in prompts])
    uses = torch.zeros(3, *rows.shape)
    for i, length in enumerate(answers):
        uses[0, i, 0], uses[1, i, : length - 1], uses[2, i, 1:length] = 1, 1, 1
    rows = rows.minimum(torch.tensor([[len(p.ids) - 2] for p in prompts]))
    tokens = one.attention(prompts, rows, uses)
    assert tokens.shape == (2, 3, 3, 2, max(len(p.ids) for p in prompts))
    one.model.set_attn_implementation("eager")
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            states, mask = one.states([prompt])
            answer = torch.tensor([[one.start, *prompt.ids[prompt.answer_start : -1]]])
            out = one.model(
                encoder_outputs=(states,),
                attention_mask=mask,
                decoder_input_ids=answer,
                output_attentions=True,
            )
        for layer, alpha in enumerate(out.cross_attentions):
            value = (
                one.model.decoder.block[layer]
                .layer[1]
                .EncDecAttention.v(states)
                .view(1, -1, 4, 8)
                .norm(dim=-1)
                .transpose(1, 2)
            )
            for group, rows in enumerate(
                ([0], range(len(answer[0]) - 1), range(1, len(answer[0])))
            ):
                plain = alpha[0, :, list(rows)].mean(1)
                for norm, expected in enumerate((plain.mean(0), (plain * value[0]).mean(0))):
                    ours = tokens[norm, layer, group, i]
                    assert torch.allclose(ours[: prompt.answer_start], expected, atol=1e-6)
                    assert (ours[prompt.answer_start :] == 0).all()


def test_batched_answers_are_the_models_own_greedy_ones():
    one = make(answer_tokens=4)
    prompts = [
        one.prompt(QUESTION, PASSAGES),
        one.prompt(QUESTION, PASSAGES[:1]),
        one.prompt(OTHER, []),
    ]
    answers = one.answer(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            states, mask = one.states([prompt])
            ids = torch.tensor([[one.start]])
            for _ in range(4):
                best = (
                    one.model(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=ids)
                    .logits[:, -1:]
                    .argmax(-1)
                )
                ids = torch.cat([ids, best], 1)
                if int(best) == one.end:
                    break
        assert answer == one.text_of(ids[0, 1:])


def draw(rng):
    place = rng.choice(["ulm", "old", "port"])
    return Question("q", "where was orla venn born", (place,), (0,)), [
        Passage("0", "Orla Venn", f"Orla Venn was born in {place}."),
        PASSAGES[1],
    ]


def test_end_to_end(tmp_path):
    """Step 1, saving, loading (which finds out what kind of reader it is), answers."""
    one = make(steps=30, batch=4, rate=1e-2)
    losses = fine_tune(one, draw, tmp_path, 0)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    again = load_reader(tmp_path / "fine-tuned", one.settings)
    assert isinstance(again, FidReader)
    prompts = [one.prompt(QUESTION, PASSAGES)]
    assert again.answer(prompts) == one.answer(prompts)


def test_a_model_that_names_no_start_is_refused():
    config = BartConfig(
        vocab_size=60,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    config.decoder_start_token_id = None
    with pytest.raises(ReaderError, match="decoder_start_token_id"):
        FidReader(BartForConditionalGeneration(config), build_tokenizer(), ReaderSettings())
