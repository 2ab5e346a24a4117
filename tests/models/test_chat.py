"""Instruct models asked by their own chat template: one turn, one text, the right end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from spelt import LETTERS
from test_folders import PASSAGES, QUESTION, template
from tiny_models import fid
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkit.errors import ReaderError
from ragkit.indicators.closeness import within_spans
from ragkit.models.reader import PART, Reader
from ragkit.settings import ReaderSettings

SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]
CHATML = (
    "{{ '<|turn|>system\nBe kind.<|end|>\n' }}{% for m in messages %}"
    "{{ '<|turn|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (  # the header ends its line with a word
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = (  # the header ends with a special token; no token ends an answer
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '<|end|>' + m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant<|end|>' }}{% endif %}"
)
KIND = "<|turn|>system\nBe kind.<|end|>\n<|turn|>user\n"
NO_HEADER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
WRAPPED = {  # template, text before the prompt, text behind it, space before the answer, end
    "ChatML": (CHATML, KIND, "<|end|>\n<|turn|>assistant\n", "", "<|end|>"),
    "Llama 2": (LLAMA_2, "<s>[INST] ", " [/INST]", " ", "</s>"),
    "no header": (NO_HEADER, "user: ", "", " ", "</s>"),
    "bare": (BARE, "<|turn|>user<|end|>", "\n<|turn|>assistant<|end|>", " ", "</s>"),
}


def make(chat_template, single="$A", **settings):
    """A reader with random weights and a byte-level tokenizer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), template(single)
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [LETTERS], BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=letters)
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=64, max_position_embeddings=512, **sizes
    )
    chosen = {"context": 512, "chat": True} | settings
    return Reader(LlamaForCausalLM(config), tokenizer, ReaderSettings(model="mine", **chosen))


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_prompt_is_one_turn_of_one_text(kind, single):
    chat_template, before, behind, space, end = WRAPPED[kind]
    one, plain = make(chat_template, single), make(None, single, chat=False)
    prompt = one.prompt(QUESTION, PASSAGES, "Tilda Brann")
    inner = "".join(text for text, _ in plain.pieces(QUESTION, PASSAGES))
    inner = f"{before}{inner}{behind}{space}Tilda Brann{end}"
    starts = "<s>" if "<s>" in single and not before.startswith("<s>") else ""
    assert one.tokenizer.decode(prompt.ids) == starts + inner
    assert prompt.ids[-1] == SPECIAL.index(end)
    assert prompt.ids.count(SPECIAL.index("<s>")) == ("<s>" in single or kind == "Llama 2")
    answer = prompt.ids[prompt.answer_start : -1]
    assert one.tokenizer.decode(answer) == space + "Tilda Brann"
    assert prompt.ids[: prompt.answer_start] == one.prompt(QUESTION, PASSAGES).ids
    asked = plain.prompt(QUESTION, PASSAGES)
    for who in (0, 1, PART["title"], PART["question"]):
        texts = []
        for reader, given in ((one, prompt), (plain, asked)):
            own = [i for i, owner in zip(given.ids, given.owner, strict=True) if owner == who]
            texts.append("".join(reader.tokenizer.decode(own).split()))
        assert texts[0] == texts[1]
    wrapping = one.tokenizer(behind, add_special_tokens=False)["input_ids"]
    owners = prompt.owner[prompt.answer_start - len(wrapping) - 1 : prompt.answer_start]
    assert set(owners) == {PART["other"]}
    spans = [(QUESTION.text.index("mayor"), QUESTION.text.index("mayor") + 5)]
    ids = np.array(prompt.ids)[np.array(prompt.owner) == PART["question"]]
    inside = within_spans(one, QUESTION.text, spans, ids)
    assert one.tokenizer.decode(ids[inside]).strip() == "mayor"


@pytest.mark.parametrize("kind", WRAPPED)
def test_generation_ends_with_the_turn(kind):
    one = make(WRAPPED[kind][0])
    ends = {SPECIAL.index(WRAPPED[kind][4]), SPECIAL.index("</s>")}
    assert set(one.model.generation_config.eos_token_id) == ends
    ids = one.tokenizer("Tilda Brann", add_special_tokens=False)["input_ids"]
    assert one.text_of(torch.tensor([*ids, one.end])) == "Tilda Brann"
    prompts = [one.prompt(QUESTION, PASSAGES[:n]) for n in (1, 2)]
    assert len(one.answer(prompts)) == 2


def test_without_it_nothing_changes():
    plain, other = make(CHATML, chat=False), make(None, chat=False)
    prompts = [one.prompt(QUESTION, PASSAGES, "Ossa") for one in (plain, other)]
    assert prompts[0] == prompts[1]


def test_a_statement_is_no_turn():
    one, plain = make(CHATML), make(None, chat=False)
    one.style = plain.style = "cloze"
    given = (replace(QUESTION, cloze="The mayor is"), PASSAGES, "Ossa")
    assert one.prompt(*given).ids[:-1] == plain.prompt(*given).ids[:-1]


@pytest.mark.parametrize(
    ("chat_template", "words"),
    [
        (None, "it has none"),
        ("{{ raise_exception('No system turn') }}", "No system turn"),
        ("{{ messages[0]['none']['content'] }}", "no attribute 'none'"),
        ("{{ 'hello' }}", "it drops the question"),
        ("{{ strftime_now('%d') }}{{ messages[0]['content'] }}", "it writes the day's date"),
    ],
)
def test_a_template_that_cannot_ask_is_named(chat_template, words):
    with pytest.raises(ReaderError, match=rf"mine cannot be asked.*{words}.*reader\.chat"):
        make(chat_template)


def test_an_encoder_decoder_has_no_turns():
    with pytest.raises(ReaderError, match=r"no turns.*reader\.chat"):
        fid(chat=True)
