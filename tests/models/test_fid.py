"""The encoder-decoder reader end to end on a tiny random T5, and against the model's own forward
pass.
"""

import random

import pytest
import torch
import transformers
from logs import read_log
from tiny_models import fid as make

from ragkit.data import worlds
from ragkit.data.corpus import Passage, Question
from ragkit.data.text import exact_match
from ragkit.errors import ReaderError
from ragkit.models.fid import FidReader, load_reader
from ragkit.models.reader import PART
from ragkit.models.retriever import embedded_tokenizer
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
        texts = {number: passage.text, PART["title"]: passage.title}
        texts[PART["question"]] = QUESTION.text
        for who, text in texts.items():
            own = [i for i, w in zip(block, owner, strict=True) if w == who]
            assert own == one.tokenizer(text, add_special_tokens=False).input_ids
    assert set(prompt.owner[prompt.answer_start :]) == {PART["answer"]}
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
    parts = [torch.tensor([p.ids]).tensor_split([p.answer_start], 1) for p in prompts]
    ids, labels = zip(*parts, strict=True)
    alone = one.model(input_ids=ids[0], labels=labels[0]).loss
    assert torch.isclose(batched[0], alone, atol=1e-5)
    blocks = ids[1].split(prompts[1].blocks, 1)
    states = torch.cat([one.model.encoder(block).last_hidden_state for block in blocks], dim=1)
    together = one.model(encoder_outputs=(states,), labels=labels[1]).loss
    assert torch.isclose(batched[1], together, atol=1e-5)


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
    assert tokens.shape == (2, 3, 3, 2, 4, max(len(p.ids) for p in prompts))
    one.model.set_attn_implementation("eager")
    for i, (prompt, length) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            encoded, read = one.encoded([prompt]), one.read([prompt])
            out = one.model(**encoded, decoder_input_ids=read, output_attentions=True)
        states = encoded["encoder_outputs"].last_hidden_state
        for layer, alpha in enumerate(out.cross_attentions):
            value = one.model.decoder.block[layer].layer[1].EncDecAttention.v(states)
            norms = value.view(-1, 4, 8).norm(dim=-1).T
            for group, read in enumerate(([0], range(length - 1), range(1, length))):
                plain = alpha[0, :, list(read)].mean(1)
                for norm, expected in enumerate((plain, plain * norms)):
                    ours = tokens[norm, layer, group, i]
                    assert torch.allclose(ours[:, : prompt.answer_start], expected, atol=1e-6)
                    assert (ours[:, prompt.answer_start :] == 0).all()


def clozes(n):
    """Statements of the measured worlds to be ended, each with five passages about one kind of fact
    and different entities.
    """
    for i in range(n):
        rng = random.Random(f"clozes {i}")
        world = rng.choice(sorted(worlds.SPEC["worlds"]))
        kind, relation = rng.choice(sorted(worlds.relations(world)))
        entities = worlds.make_entities(world, 5, rng, reserved=True, kind=kind)
        texts = [worlds.write_passage(one, relation, rng.randrange(5), rng) for one in entities]
        passages = [Passage("", e.name, text) for e, text in zip(entities, texts, strict=True)]
        asked = rng.choice(entities)
        cloze = worlds.state(asked, relation, 0)[0].rstrip()
        yield Question("", "", asked.facts[relation], (), cloze=cloze), passages


@pytest.fixture(scope="module")
def shipped():
    one = load_reader("embedded encoder-decoder", ReaderSettings())
    assert isinstance(one, FidReader)
    one.style = "cloze"
    return one


def test_the_shipped_one_knows_whose_fact_is_meant(shipped):
    pairs = list(clozes(50))
    answers = shipped.answer([shipped.prompt(*pair) for pair in pairs])
    right = [exact_match(said, q.answers) for said, (q, _) in zip(answers, pairs, strict=True)]
    assert sum(right) >= 0.9 * len(pairs)


@torch.no_grad()
@pytest.mark.parametrize("which", ["random", "shipped"])
def test_batched_answers_are_the_models_own_greedy_ones(shipped, which):
    one = make(answer_tokens=4) if which == "random" else shipped
    asked = [(QUESTION, PASSAGES), (QUESTION, PASSAGES[:1]), (OTHER, []), *clozes(5)]
    prompts = [one.prompt(*pair) for pair in asked]
    for prompt, answer in zip(prompts, one.answer(prompts), strict=True):
        encoded, ids = one.encoded([prompt]), torch.tensor([[one.start]])
        for _ in range(one.settings.answer_tokens):
            best = one.model(**encoded, decoder_input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
            if int(best) == one.end:
                break
        assert answer == one.text_of(ids[0, 1:])


def draw(rng):
    place = rng.choice(["ulm", "old", "port"])
    passages = [Passage("0", "Orla Venn", f"Orla Venn was born in {place}."), PASSAGES[1]]
    return Question("q", "where was orla venn born", (place,), (0,)), passages


def test_end_to_end(tmp_path):
    """Step 1, saving, loading (which finds out what kind of reader it is), answers."""
    one = make(steps=30, batch=4, rate=1e-2)
    fine_tune(one, draw, tmp_path, 0)
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    again = load_reader(tmp_path / "fine-tuned", one.settings)
    assert isinstance(again, FidReader)
    prompts = [one.prompt(QUESTION, PASSAGES)]
    assert again.answer(prompts) == one.answer(prompts)


def test_a_model_that_names_no_start_is_refused():
    size = {"vocab_size": 60, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.BartConfig(**size, encoder_attention_heads=2, decoder_attention_heads=2)
    config.decoder_start_token_id = None
    with pytest.raises(ReaderError, match="decoder_start_token_id"):
        FidReader(
            transformers.BartForConditionalGeneration(config),
            embedded_tokenizer(),
            ReaderSettings(),
        )
