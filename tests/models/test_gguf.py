"""Readers from GGUF files: the same as from the folder with the same weights, or refused."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import save_folder, small_llama, write_gguf
from spelt import byte_level
from test_folders import PASSAGES, QUESTION
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM

from ragkit.attention import record
from ragkit.data.corpus import Passage, Question
from ragkit.distillation.teacher import look
from ragkit.errors import RagkitError, ReaderError
from ragkit.experiment.plan import shape_of
from ragkit.experiment.provenance import model_files
from ragkit.models import step1
from ragkit.models.fid import load_reader
from ragkit.pages import judge
from ragkit.profile import load_profile
from ragkit.settings import ReaderSettings

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TEXTS = [
    "The mayor of Velmar,  born in  1961; is Tilda Brann's  2nd.\n\n 3 x",
    "12\t34  5 ñandú 世界 </s> T. H.",
]


def digits():
    """SmolLM2's way to cut texts."""
    made, alone = byte_level(), pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([alone, words])
    return made


def written(folder, kind="F32", model=None, **told):
    """A GGUF file, and the model that was written."""
    tokenizer = digits()
    model = model or small_llama(tokenizer.get_vocab_size())
    file = write_gguf(folder / "small.gguf", model, tokenizer, kind, template=TEMPLATE, **told)
    return file, model


def load(place, **settings):
    return load_reader(place, ReaderSettings(model=str(place), context=256, **settings))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_file_reads_as_the_folder_with_its_weights(tmp_path, kind):
    file, model = written(tmp_path, kind)
    one, two = load(file), load(save_folder(tmp_path / "folder", model, digits()))
    vocabulary = two.tokenizer.get_vocab()  # GPT-2's own end token comes with its class
    assert one.tokenizer.get_vocab() == vocabulary | {"<|endoftext|>": one.known}
    assert (one.end, one.pad, one.known) == (two.end, two.pad, two.known) == (2, 2, len(vocabulary))
    assert one.tokenizer.chat_template == TEMPLATE
    assert one.model.config.max_position_embeddings == 512
    for text in TEXTS:
        how = {"return_offsets_mapping": True}
        assert dict(one.tokenizer(text, **how)) == dict(two.tokenizer(text, **how))
    prompts = [one.prompt(QUESTION, PASSAGES[:n], "Tilda Brann") for n in (1, 2)]
    assert prompts == [two.prompt(QUESTION, PASSAGES[:n], "Tilda Brann") for n in (1, 2)]
    with torch.no_grad():
        logits = [r.model(*r.batch(prompts)).logits for r in (one, two)]
    assert torch.allclose(*logits, atol=1e-5)
    assert logits[0].std() > 0.1
    assert one.answer(prompts) == two.answer(prompts)
    looks = [look(r, [QUESTION], [PASSAGES]) for r in (one, two)]
    assert np.allclose(*(seen["attention"] for seen in looks), rtol=1e-4)


def test_a_file_is_read_in_the_readers_precision_and_trained_in_float32(tmp_path):
    file, _ = written(tmp_path, "Q8_0")
    settings = ReaderSettings(model=str(file), context=256, dtype="bfloat16")
    kinds = (load_reader(file, settings), load_reader(file, settings, to_train=True))
    found = [{weight.dtype for weight in one.model.parameters()} for one in kinds]
    assert found == [{torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_1_from_a_file_ends_in_a_folder_that_opens(tmp_path, dtype):
    file, _ = written(tmp_path, "Q8_0")
    chosen = ReaderSettings(
        model=str(file), context=256, steps=4, batch=2, checkpoints=0, dtype=dtype
    )
    one = load_reader(file, chosen, to_train=True)
    step1.fine_tune(one, lambda rng: (QUESTION, rng.sample(PASSAGES, 2)), tmp_path, 0)
    kept = tmp_path / "fine-tuned"
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {
        p.name for p in kept.iterdir()
    }
    two = load_reader(kept, chosen)
    prompt = one.prompt(QUESTION, PASSAGES, "Tilda Brann")
    assert two.prompt(QUESTION, PASSAGES, "Tilda Brann") == prompt
    assert [two.tokenizer(text)["input_ids"] for text in TEXTS] == [
        one.tokenizer(text)["input_ids"] for text in TEXTS
    ]
    assert two.tokenizer.chat_template == TEMPLATE
    with torch.no_grad():
        before, after = load(file).losses([prompt]), two.losses([prompt])
        assert torch.allclose(after, one.losses([prompt]), rtol=0.02)
    assert after < before


def test_a_path_starts_from_the_profile_and_the_files_hash_is_kept(tmp_path):
    file, _ = written(tmp_path)
    shipped = Path(step1.__file__).parents[1] / "assets/profiles/smoke.yaml"
    (tmp_path / "mine.yaml").write_text(shipped.read_text("utf8"))
    profile = load_profile(str(tmp_path / "mine.yaml"), ["reader.model=small.gguf"])
    assert profile.reader.model == str(file)
    before = model_files(profile.reader.model)
    assert list(before) == ["small.gguf"]
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    assert model_files(profile.reader.model) != before


def test_a_plan_knows_its_size(tmp_path):
    file, model = written(tmp_path, "Q8_0")
    weights, config = shape_of(str(file))
    assert weights == model.num_parameters()
    assert (config.num_hidden_layers, config.hidden_size) == (2, 96)


def test_the_judge_reads_a_file(tmp_path):
    assert judge.load(str(written(tmp_path)[0])).settings.context == 512


# Refused


def test_missing_weights_are_named(tmp_path):
    file, _ = written(tmp_path, without=["blk.1.ffn_up.weight"])
    with pytest.raises(RagkitError, match=r"small\.gguf' lacks 1 of its weights.*up_proj"):
        load(file)


def test_an_untied_head_is_no_tied_one(tmp_path):
    tokenizer = digits()
    model = small_llama(tokenizer.get_vocab_size(), tie_word_embeddings=False)
    file, model = written(tmp_path, model=model)
    prompt = load(file).prompt(QUESTION, PASSAGES)
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        assert torch.allclose(load(file).model(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"extra": {"rope_freqs.weight": np.ones(16, np.float32)}}, "16 of its .* weights"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(96, np.float32)}}, "96 of its .* weights"),
        ({"llama__rope__scaling__type": "yarn"}, r"the scaling of its positions \(yarn\)"),
        ({"pre": "deepseek-llm"}, r"how its tokenizer cuts words \(deepseek-llm\)"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, told, words):
    file, _ = written(tmp_path, **told)
    with pytest.raises(ReaderError, match=f"does not read {words}.*Give the model's folder"):
        load(file)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    file, _ = written(tmp_path)
    whole = file.read_bytes()
    (tmp_path / "other").mkdir()
    other, _ = written(tmp_path / "other", architecture="gptj")
    with pytest.raises(RagkitError, match=r"small\.gguf' cannot be loaded: .*architecture.*gptj"):
        load(other)
    for content in (whole[: len(whole) // 2], whole[:300], b"GGUF", b"PK\3\4" + whole[4:], b""):
        file.write_bytes(content)
        with pytest.raises(
            RagkitError, match=r"small\.gguf' cannot be loaded: it is no whole GGUF"
        ):
            load(file)
    file.write_bytes(whole)
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    with pytest.raises(RagkitError, match=r"cannot be loaded: the package gguf is missing"):
        load(file)
    with pytest.raises(RagkitError, match=r"no such folder or file"):
        load(tmp_path / "gone.gguf")


# The real one


REAL = Path(os.environ.get("RAGKIT_REAL_MODELS", ".")) / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = pytest.mark.skipif(
    "RAGKIT_REAL_MODELS" not in os.environ, reason="RAGKIT_REAL_MODELS is not set: no real models"
)
OSSA = [
    Passage("0", "Velmar", "Velmar is a port on the river Ossa. Its mayor is Tilda Brann."),
    Passage("1", "Ossa", "The Ossa is a river of 312 km. It rises in the Keld mountains."),
]
LONG = Question("q", "how long is the river ossa", ("312 km",), (1,))


@pytest.mark.slow
@HERE
@pytest.mark.parametrize("chat", [False, True])
def test_smollm2_answers_and_looks(chat):
    one = load_reader(REAL, ReaderSettings(model=str(REAL), context=512, chat=chat))
    assert one.tokenizer.decode([one.end]) == "<|im_end|>"
    text = "question: who was born in  1961?\nanswer: Tilda Brann"
    assert one.tokenizer.decode(one.tokenizer(text)["input_ids"]) == text
    (answer,) = one.answer([one.prompt(LONG, OSSA)])
    assert "312" in answer
    prompt = one.prompt(LONG, OSSA, "312 km")
    wrong = replace(LONG, answers=("Tilda Brann",))
    with torch.no_grad():
        right, other = one.losses([prompt, one.prompt(wrong, OSSA, "Tilda Brann")])
    assert right < other
    expect_eager(one, prompt)


def expect_eager(one, prompt):
    """The recorded attention of the rows that predict the answer, against transformers' own eager
    attention in float64."""
    rows = [*range(prompt.answer_start - 1, len(prompt) - 1)]
    ids, mask = one.batch([prompt])
    seen = record(one.model, ids, mask, torch.tensor([rows]))
    eager = LlamaForCausalLM(one.model.config).double().eval()
    eager.load_state_dict(one.model.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        # the softmax of eager attention is float32 whatever its dtype
        whole = torch.stack(eager(ids, output_attentions=True).attentions)[:, :, :, rows]
    assert (seen.alpha.double() - whole).abs().max() < 1e-3
