"""The retriever: batches change no vector, crops, and what it cannot read is said."""

import random

import numpy as np
import pytest
import torch

from ragkit.data.passages import Passage
from ragkit.errors import RagkitError, RetrieverError
from ragkit.models.retriever import Retriever, crop, train_by_cropping
from ragkit.settings import RetrieverSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm. The family moved away in 1810."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
    Passage("2", "Ulm", "Ulm is a town on a river. It is old."),
]
SETTINGS = RetrieverSettings(crop_steps=3, crop_batch=3, at_once=2, passage_tokens=32)


@pytest.fixture(scope="module")
def retriever():
    return train_by_cropping(PASSAGES, SETTINGS, 0)


def test_batches_change_no_vector(retriever):
    texts = [p.text for p in PASSAGES] * 7 + ["ulm"]
    vectors = retriever.encode(texts)
    assert vectors.dtype == np.float32
    alone = np.concatenate([retriever.encode([text]) for text in texts])
    assert np.allclose(vectors, alone, atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with torch.no_grad():
        assert np.allclose(retriever(texts).numpy(), vectors, atol=1e-6)


def test_gradients_reach_the_weights(retriever):
    retriever(["ulm", "orla venn"]).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in retriever.parameters())


def test_a_saved_retriever_gives_the_same_vectors(retriever, tmp_path):
    retriever.save(tmp_path)
    again = Retriever.load(tmp_path, SETTINGS)
    assert np.array_equal(again.encode(["ulm", "a town"]), retriever.encode(["ulm", "a town"]))


def test_more_tokens_than_positions_are_refused(retriever, tmp_path):
    retriever.save(tmp_path)
    more = SETTINGS.model_copy(update={"passage_tokens": 33})
    with pytest.raises(RetrieverError, match=r"32 positions.*Lower retriever\.passage_tokens"):
        Retriever.load(tmp_path, more)


def test_a_missing_model_is_named():
    with pytest.raises(RagkitError, match=r"'/no/such' cannot be loaded.*Give a local folder"):
        Retriever.load("/no/such", SETTINGS)


def test_crops_are_spans_with_the_title_half_the_time():
    crops = [crop(PASSAGES[0], random.Random(i)) for i in range(200)]
    titled = [c for c in crops if c.startswith("Orla Venn ") and c not in PASSAGES[0].text]
    assert 60 < len(titled) < 140
    for c in crops:
        assert c.removeprefix("Orla Venn ") in PASSAGES[0].text or c in PASSAGES[0].text


def test_a_rate_too_high_is_said():
    wild = SETTINGS.model_copy(update={"crop_rate": 1e30, "crop_steps": 5})
    with pytest.raises(RetrieverError, match=r"Lower retriever\.crop_rate"):
        train_by_cropping(PASSAGES, wild, 0)
