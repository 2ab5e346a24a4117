"""Readers from other people's folders: right, or refused with a sentence before any work."""

import json
from dataclasses import replace

import pytest
import torch
from spelt import SPECIAL, TEXT, byte_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkit.data.corpus import Passage, Question
from ragkit.errors import RagkitError, ReaderError
from ragkit.models.fid import load_reader
from ragkit.models.reader import PART
from ragkit.settings import ReaderSettings

PASSAGES = [
    Passage("0", "Velmar", "Velmar is a port on the river Ossa.  Its mayor is Tilda Brann."),
    Passage("1", "Ossa", "The Ossa is a river of 312 km in the north."),
]
QUESTION = Question("q", "who is the mayor of velmar", ("Tilda Brann",), (0,), cloze="The mayor is")
ANSWERS = ["Tilda Brann", "T. H. Brann", "1,961", "“Ossa”", "ñandú 世界", "St. Ossa Inc."]


def template(single):
    specials = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    return processors.TemplateProcessing(single=single, special_tokens=specials)


def sentencepiece():
    """As Llama 2's: a Prepend normaliser, no pre-tokeniser."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = [normalizers.Replace("\n", " "), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(TEXT, BpeTrainer(vocab_size=600, special_tokens=SPECIAL))
    made.pre_tokenizer = None
    made.post_processor = template("<s> $A")
    words = decoders.Replace("▁", " ")
    made.decoder = decoders.Sequence([words, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Replace("\n", " ")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    made.train_from_iterator(TEXT, trainer)
    return made


TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}


def write(folder, tokenizer, **config):
    """The folder of a random Llama of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 512, "initializer_range": 0.3}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"vocab_size": tokenizer.get_vocab_size()} | config
    LlamaForCausalLM(LlamaConfig(**sizes, **special)).save_pretrained(folder)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def edit(path, **changes):
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | changes))


def load(folder, style="question", **settings):
    one = load_reader(folder, ReaderSettings(context=256, **settings))
    one.style = style
    return one


# Prompts and answers are one text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", ["question", "cloze"])
def test_an_answer_is_cut_with_its_prompt_as_one_text(tmp_path, kind, style):
    one = load(write(tmp_path, TOKENIZERS[kind]()), style)
    pieces = one.pieces(QUESTION, PASSAGES)
    for answer in ANSWERS[:3]:
        prompt = one.prompt(QUESTION, PASSAGES, answer)
        text = "".join(piece for piece, _ in pieces) + " " + answer
        assert prompt.ids == [*one.tokenizer(text)["input_ids"], one.end]
        assert one.tokenizer.decode(prompt.ids[prompt.answer_start : -1]).strip() == answer
        assert set(prompt.owner[prompt.answer_start :]) == {PART["answer"]}
        assert prompt.ids[: prompt.answer_start] == one.prompt(QUESTION, PASSAGES).ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_passages_and_the_question_own_their_words(tmp_path, kind):
    one = load(write(tmp_path, TOKENIZERS[kind]()))
    prompt = one.prompt(QUESTION, PASSAGES)
    texts = {0: PASSAGES[0].text, 1: PASSAGES[1].text, PART["question"]: QUESTION.text}
    for who, text in texts.items():
        own = [i for i, owner in zip(prompt.ids, prompt.owner, strict=True) if owner == who]
        assert "".join(one.tokenizer.decode(own).split()) == "".join(text.split())


TEMPLATES = ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> $A </s> </s>"]


@pytest.mark.parametrize("single", TEMPLATES)
def test_a_prompt_ends_with_its_own_last_token(tmp_path, single):
    tokenizer = byte_level()
    tokenizer.post_processor = template(single)
    one = load(write(tmp_path, tokenizer))
    plain, answered = (one.prompt(QUESTION, PASSAGES, a) for a in (None, "Tilda Brann"))
    assert one.tokenizer.decode(plain.ids[-1:]) == ":"
    assert answered.ids[: answered.answer_start] == plain.ids
    assert answered.ids.count(one.end) == 1
    assert answered.ids[-1] == one.end
    assert plain.ids.count(SPECIAL.index("<s>")) == single.count("<s>")


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_gold_answer_that_is_generated_is_kept_whole(tmp_path, answer):
    one = load(write(tmp_path, byte_level()))
    ids = one.tokenizer(f" {answer}\nquestion: no more", add_special_tokens=False)["input_ids"]
    assert one.text_of(torch.tensor(ids)) == answer
    ids = one.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    assert one.text_of(torch.tensor([*ids, one.end])) == answer


def test_the_rest_of_a_cloze_ends_with_its_sentence(tmp_path):
    one = load(write(tmp_path, byte_level()), "cloze")
    ids = one.tokenizer(" Tilda Brann. She is", add_special_tokens=False)["input_ids"]
    assert one.text_of(torch.tensor(ids)) == "Tilda Brann"


def test_answers_may_be_as_long_as_the_set_needs(tmp_path):
    folder = write(tmp_path, byte_level())
    one = load(folder, answer_tokens=None)
    longest = "Tilda Brann, born in 1961 near the river Ossa in the north"
    asked = [replace(QUESTION, answers=(answer, longest * 2)) for answer in ("Ossa", longest)]
    one.fit(asked)
    ids = one.tokenizer(" " + longest, add_special_tokens=False)["input_ids"]
    assert one.answer_tokens == len(ids) + 1 > 8
    fixed = load(folder, answer_tokens=8)
    fixed.fit(asked)
    assert fixed.answer_tokens == 8


@pytest.mark.parametrize("style", ["question", "cloze"])
def test_question_first_is_another_prompt_for_every_style(tmp_path, style):
    folder = write(tmp_path, byte_level())
    layouts = ("passages first", "question first")
    readers = [load(folder, style, layout=layout) for layout in layouts]
    after, before = (one.prompt(QUESTION, PASSAGES) for one in readers)
    assert before.owner.index(PART["question"]) < before.owner.index(0)
    assert after.owner.index(PART["question"]) > after.owner.index(1)


# Greedy is greedy


OWN = [{"repetition_penalty": 1.5}, {"num_beams": 4}, {"do_sample": True, "temperature": 2.0}]


@pytest.mark.parametrize("own", OWN)
def test_answers_are_greedy_whatever_the_folder_says(tmp_path, own):
    folder = write(tmp_path, byte_level())
    edit(folder / "generation_config.json", **own, eos_token_id=[2, 5], suppress_tokens=[7])
    one = load(folder, answer_tokens=12)
    prompts = [one.prompt(QUESTION, PASSAGES[:n]) for n in range(3)]
    for prompt, answer in zip(prompts, one.answer(prompts), strict=True):
        ids = torch.tensor([prompt.ids])
        for _ in range(12):
            with torch.no_grad():
                best = one.model(ids).logits[:, -1:].argmax(-1)
            if int(best) == one.end:
                break
            ids = torch.cat([ids, best], 1)
        assert answer == one.text_of(ids[0, len(prompt.ids) :])


# Odd folders


def test_missing_weights_are_named(tmp_path):
    folder = write(tmp_path, byte_level())
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(RagkitError, match=r"lacks 9 of its weights \(model\.layers\.2"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 300},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"model_type": "unheard-of", "auto_map": {"AutoModelForCausalLM": "code.Model"}},
        {"num_key_value_heads": 3},
    ],
)
def test_what_cannot_work_is_said_before_any_work(tmp_path, changes):
    folder = write(tmp_path / "mine", byte_level())
    edit(folder / "config.json", **changes)
    with pytest.raises(RagkitError, match="mine' cannot be loaded"):
        load(folder)


def test_a_model_that_stumbles_over_its_mask_is_said_before_any_work(tmp_path, monkeypatch):
    def stumbles(*_, **__):
        raise IndexError("too many indices for tensor of dimension 2")

    monkeypatch.setattr(LlamaForCausalLM, "forward", stumbles)
    monkeypatch.setattr("transformers.LlamaModel.forward", stumbles)
    with pytest.raises(RagkitError, match=r"cannot be loaded.*IndexError: too many indices"):
        load(write(tmp_path, byte_level()))


def test_a_pad_token_beyond_the_embedding_is_not_used(tmp_path):
    folder = write(tmp_path, byte_level())
    plain = load(folder)
    tokenizer = plain.tokenizer
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    one = load(folder)
    prompts = [one.prompt(QUESTION, PASSAGES[:n], "Ossa") for n in range(3)]
    assert one.pad == one.end
    assert torch.allclose(one.losses(prompts), plain.losses(prompts))
    odd = one.prompt(QUESTION, [Passage("0", "T", "a <pad> b")])
    with pytest.raises(ReaderError, match=r"token \d+ \('<pad>'\) lies beyond its \d+ embeddings"):
        one.answer([odd])


def test_no_end_token_is_said(tmp_path):
    folder = write(tmp_path, byte_level())
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ReaderError, match=r"no end token.*tokenizer_config\.json"):
        load(folder)


def test_no_limit_of_positions_is_no_limit(tmp_path):
    """Some configs say -1."""
    folder = write(tmp_path, byte_level())
    one = load(folder)
    one.model.config.max_position_embeddings = -1
    again = type(one)(one.model, one.tokenizer, ReaderSettings(context=4096))
    assert again.settings.context == 4096


def test_the_positions_of_a_nested_text_config_count(tmp_path):
    one = load(write(tmp_path, byte_level()))
    text = one.model.config

    class Nested:
        is_encoder_decoder = False

        def get_text_config(self, decoder):
            return text

    one.model.config = Nested()
    with pytest.raises(ReaderError, match=r"512 positions.*Lower reader\.context"):
        type(one)(one.model, one.tokenizer, ReaderSettings(context=513))


def test_a_lone_surrogate_is_read(tmp_path):
    one = load(write(tmp_path, byte_level()))
    odd = replace(QUESTION, text="who is \ud800 mayor", answers=("\udfff x",))
    prompt = one.prompt(odd, PASSAGES, odd.answers[0])
    assert "who is ? mayor" in one.tokenizer.decode(prompt.ids)
    assert torch.isfinite(one.losses([prompt])).all()
