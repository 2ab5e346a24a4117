"""The recipe of the embedded reader: what its first weights do, what its loss looks at, and that a
stopped run goes on.
"""

import json

import pytest
import torch

from ragkit.data import prose
from ragkit.data.files import file_hash
from ragkit.data.vocabulary import build_tokenizer
from ragkit.models import pretrain
from ragkit.models.reader import embedded_reader


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_first_weights_match_and_copy(tokenizer):
    """Keys equal queries in the later layers, and value times output is a multiple of the
    identity.
    """
    config = pretrain.reader_config(tokenizer)
    attention = pretrain.start(config).transformer.h[1].self_attention
    heads, hidden = config.num_attention_heads, config.hidden_size
    query, key, value = attention.query_key_value.weight.view(
        heads, 3, hidden // heads, hidden
    ).unbind(1)
    assert torch.equal(query, key)
    torch.testing.assert_close(
        attention.dense.weight @ value.reshape(hidden, hidden),
        pretrain.COPYING * torch.eye(hidden),
        atol=1e-5,
        rtol=0,
    )


def test_encoding_keeps_text_and_marks(tokenizer):
    """Tokens of the spans are those of the whole page, and the marked answers read as the
    answers.
    """
    page = pretrain.pages(pretrain.SHORT_PAGES + 3, 0)[0]
    ids, kinds = pretrain.encode(tokenizer, [page])
    assert ids[0].tolist() == [
        *tokenizer("".join(text for text, _ in page)).input_ids,
        tokenizer.eos_token_id,
    ]
    marked = ids[0][kinds[0] == list(pretrain.WEIGHTS).index("answer")]
    assert (
        tokenizer.decode(marked).split()
        == tokenizer.decode(
            tokenizer(" ".join(t for t, k in page if k == "answer")).input_ids[1:]
        ).split()
    )


def test_steps_draw_the_same_pages_again():
    assert pretrain.pages(7000, 0) == pretrain.pages(7000, 0)
    assert pretrain.pages(7000, 0) != pretrain.pages(7000, 1)


def test_a_stopped_pretraining_goes_on_with_the_same_result(tmp_path, monkeypatch):
    """Stopped after a checkpoint and started again: the same weights as in one go."""
    monkeypatch.setattr(pretrain, "entity_matching", lambda *_: {})
    whole = pretrain.pretrain(tmp_path / "whole", 6, 0, check_every=2)
    pages = pretrain.pages

    def stop_at_five(step: int, seed: int) -> list[list[prose.Span]]:
        if step == 5:
            raise KeyboardInterrupt
        return pages(step, seed)

    monkeypatch.setattr(pretrain, "pages", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "halves", 6, 0, check_every=2)
    monkeypatch.setattr(pretrain, "pages", pages)
    halves = pretrain.pretrain(tmp_path / "halves", 6, 0, check_every=2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True)
    )
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "halves/curve.jsonl").read_text().splitlines()
    ] == [2, 4, 6]


def test_the_shipped_reader_is_the_one_its_card_names():
    """Hash as noted, under 20 MB, safetensors only."""
    folder = embedded_reader()
    for line in (folder / "sha256.txt").read_text().splitlines():
        digest, name = line.split()
        assert file_hash(folder / name) == digest
    assert (folder / "model.safetensors").stat().st_size < 20e6
    assert not list(folder.glob("*.pt")) + list(folder.glob("*.bin"))
