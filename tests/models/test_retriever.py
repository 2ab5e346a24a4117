"""The retriever: batches change no vector, a folder's own settings are read, faults are said."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from ragkit.data.corpus import Passage
from ragkit.errors import RagkitError, RetrieverError
from ragkit.models.retriever import (
    Retriever,
    crop,
    embedded_tokenizer,
    train_by_cropping,
    with_pieces_of,
)
from ragkit.settings import RetrieverSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm. The family moved away in 1810."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
    Passage("2", "Ulm", "Ulm is a town on a river. It is old."),
]
TEXTS = [p.text for p in PASSAGES]
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
SETTINGS = RetrieverSettings(crop_steps=3, crop_batch=3, at_once=2, passage_tokens=32)


def other(**changes):
    return SETTINGS.model_copy(update=changes)


@pytest.fixture(scope="module")
def retriever():
    return train_by_cropping(PASSAGES, embedded_tokenizer(), SETTINGS, 0)


@pytest.fixture
def folder(retriever, tmp_path):
    """The folder of a retriever, to be changed."""
    retriever.save(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | changes))


def test_batches_change_no_vector(retriever):
    texts = TEXTS * 7 + ["ulm"]
    vectors = retriever.encode(texts)
    assert vectors.dtype == np.float32
    alone = np.concatenate([retriever.encode([text]) for text in texts])
    assert np.allclose(vectors, alone, atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with torch.no_grad():
        assert np.allclose(retriever(texts).numpy(), vectors, atol=1e-6)


def test_lower_precision_gives_much_the_same_vectors(folder, retriever):
    lower = Retriever.load(folder, other(dtype="bfloat16")).encode(TEXTS)
    assert lower.dtype == np.float32
    assert np.allclose(lower, retriever.encode(TEXTS), atol=0.05)
    assert not np.array_equal(lower, retriever.encode(TEXTS))


def test_gradients_reach_the_weights(retriever):
    retriever(["ulm", "orla venn"])[:, 0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in retriever.parameters())


def test_a_saved_retriever_gives_the_same_vectors(retriever, folder):
    for again in (Retriever.load(folder, SETTINGS), SentenceTransformer(str(folder))):
        assert np.allclose(again.encode(TEXTS), retriever.encode(TEXTS), atol=1e-6)


def by_hand(folder, pooling, normalise, prompt=""):
    """Vectors by transformers alone."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        states = model(**tokenizer(prompt + text, return_tensors="pt")).last_hidden_state[0]
        rows.append(states.mean(0) if pooling == "mean" else states[0])
    made = torch.stack(rows).detach()
    return (nn.functional.normalize(made) if normalise else made).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_folders_own_pooling_and_normalisation_are_read(folder, tmp_path, pooling, normalise):
    plain = Transformer(str(folder))
    parts = [plain, Pooling(plain.get_embedding_dimension(), pooling)]
    made = SentenceTransformer(
        modules=[*parts, *([Normalize()] if normalise else [])], device="cpu"
    )
    made.save(str(tmp_path / "saved"), create_model_card=False)
    read = Retriever.load(tmp_path / "saved", SETTINGS)
    assert np.allclose(read.encode(TEXTS), by_hand(folder, pooling, normalise), atol=1e-5)
    back = Retriever.load(tmp_path / "saved", other(normalise=not normalise))
    assert np.allclose(back.encode(TEXTS), by_hand(folder, pooling, not normalise), atol=1e-5)


@pytest.mark.parametrize("name", ["document", "passage"])
def test_a_folders_own_prompts_are_read(folder, name):
    prompts = {"query": "question is ", name: "text is "}
    edit(folder / "config_sentence_transformers.json", prompts=prompts)
    made = Retriever.load(folder, SETTINGS)
    for kind, prompt in (("query", "question is "), ("passage", "text is ")):
        expected = by_hand(folder, "mean", True, prompt)
        assert np.allclose(made.encode(TEXTS, kind), expected, atol=1e-5)
        with torch.no_grad():
            assert np.allclose(made(TEXTS, kind).numpy(), expected, atol=1e-5)


def test_a_plain_folder_of_transformers_is_mean_pooled(tmp_path):
    """As Contriever's."""
    config = BertConfig(vocab_size=5000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    embedded_tokenizer().save_pretrained(tmp_path)
    made = Retriever.load(tmp_path, SETTINGS).encode(TEXTS)
    assert np.allclose(made, by_hand(tmp_path, "mean", False), atol=1e-5)


def test_more_tokens_than_positions_are_refused(folder):
    with pytest.raises(RetrieverError, match=r"32 positions.*Lower retriever\.passage_tokens"):
        Retriever.load(folder, other(passage_tokens=33))


def test_a_missing_model_is_named():
    with pytest.raises(RagkitError, match=r"'/no/such' cannot be loaded.*Give a local folder"):
        Retriever.load("/no/such", SETTINGS)


def test_missing_weights_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1.output" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RagkitError, match=r"lacks 4 of its weights \(encoder.layer.1.output"):
        Retriever.load(folder, SETTINGS)


def test_a_tokenizer_without_a_pad_token_is_given_one(folder, retriever):
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert np.allclose(
        Retriever.load(folder, SETTINGS).encode(TEXTS), retriever.encode(TEXTS), atol=1e-6
    )


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"vocab_size": 5}),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}, "model_type": "unheard-of"}),
        ("config.json", {"quantization_config": BITS}),
        ("modules.json", {}),
    ],
)
def test_what_cannot_work_is_said_before_any_work(folder, file, changes):
    if file == "modules.json":
        (folder / file).write_text("{")
    else:
        edit(folder / file, **changes)
    with pytest.raises(RagkitError, match="model' cannot be loaded"):
        Retriever.load(folder, SETTINGS)


def test_vectors_that_are_not_finite_are_refused(folder):
    damaged = Retriever.load(folder, SETTINGS)
    with torch.no_grad():
        damaged.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RetrieverError, match="not finite"):
        damaged.encode(TEXTS)


def test_a_lone_surrogate_is_read(retriever):
    assert np.isfinite(retriever.encode(["who is \ud800 mayor"])).all()


def test_crops_are_spans_with_the_title_half_the_time():
    crops = [crop(PASSAGES[0], random.Random(i)) for i in range(200)]
    titled = [c for c in crops if c.startswith("Orla Venn ") and c not in PASSAGES[0].text]
    assert 60 < len(titled) < 140
    for c in crops:
        assert c.removeprefix("Orla Venn ") in PASSAGES[0].text or c in PASSAGES[0].text


def test_a_rate_too_high_is_said():
    with pytest.raises(RetrieverError, match=r"Lower retriever\.crop_rate"):
        train_by_cropping(PASSAGES, embedded_tokenizer(), other(crop_rate=1e30, crop_steps=5), 0)


def test_word_pieces_are_learnt_from_the_text_and_the_same_every_time(tmp_path):
    words = ["Hendrix", "guitar", "Żółw", "naïve", "Woodstock", "1969"]
    texts = [f"{one} met {two} ({i % 7})" for i, one in enumerate(words) for two in words] * 3
    first, again = (with_pieces_of(texts, 200) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    wanted = ["hendrix", "met", "zołw", "naive", "(", "5", ")"]
    assert first.tokenize("hendrix met Zołw naive (5)") == wanted
    assert first.tokenize("hexor")[0] == "he"  # of pieces, not unknown
    ids = first("Hendrix")["input_ids"]
    assert ids == [*embedded_tokenizer()("").input_ids, first.get_vocab()["hendrix"]]
    special = embedded_tokenizer().all_special_tokens
    assert first.convert_tokens_to_ids(special) == embedded_tokenizer().convert_tokens_to_ids(
        special
    )
    first.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("Woodstock") == ["woodstock"]
