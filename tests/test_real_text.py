"""The whole experiment on real text: Wikipedia passages, NQ questions, models in Hugging Face folders."""

import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from ragkit.lab import TARGETS, Lab
from ragkit.profile import load_profile

pytestmark = pytest.mark.skipif("RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA is not set: no real data to run on")
DATA = Path(os.environ.get("RAGKIT_REAL_DATA", "."))
PASSAGES = 1200


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small random BERT with BERT's real vocabulary, and a small random Falcon with Falcon's real tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = BertTokenizerFast(str(DATA / "tokenizers/bert-base-uncased.vocab.txt"))
    bert = BertModel(BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), add_pooling_layer=False)
    bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((DATA / "tokenizers/falcon.tokenizer.json.gz").read_bytes()))
    falcon_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    falcon = FalconForCausalLM(FalconConfig(vocab_size=len(falcon_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
                                            multi_query=False, parallel_attn=False, new_decoder_architecture=False))  # fmt: skip
    falcon.save_pretrained(folder / "falcon")
    falcon_tokenizer.save_pretrained(folder / "falcon")
    return folder


def write_profile(folder, models, reader):
    """A profile on the first passages, which hold the gold passages of the first questions."""
    with gzip.open(DATA / "wiki/psgs_w100.sample.tsv.gz", "rt", encoding="utf8", newline="") as source:
        (folder / "p.tsv").write_text("".join(itertools.islice(source, PASSAGES)), "utf8", newline="")
    with gzip.open(DATA / "nq/nq-open-gold.jsonl.gz", "rt", encoding="utf8") as source:
        (folder / "q.jsonl").write_text("".join(itertools.islice(source, 60)), "utf8")
    (folder / "real.yaml").write_text(
        f"""
name: real
judge: false
k: 3
sets: [{{source: files, name: nq, passages: {folder}/p.tsv, questions: {folder}/q.jsonl, distill: 24, dev: 12, test: 24}}]
retriever: {{model: {models}/bert, normalise: false}}
reader: {{model: {reader}, context: 400, steps: 3, batch: 2}}
distill: {{seeds: [0], epochs: 1}}
evaluate: {{answered: 6}}
"""
    )
    return load_profile(str(folder / "real.yaml"))


@pytest.mark.parametrize("which", ["falcon", "llama"])
def test_the_whole_experiment_on_real_text(tmp_path, models, which):
    reader = models / "falcon" if which == "falcon" else DATA / "models/stories260k"
    lab = Lab(write_profile(tmp_path, models, reader), tmp_path / "runs")
    table = lab.per_question("nq")
    assert set(table["system"]) == {"BM25", "initial", *TARGETS}
    means = table.groupby("system")["HR@20"].mean()
    assert means["BM25"] > 0.6  # real words find real passages
    assert np.isfinite(lab.teacher("nq", "fine-tuned")["attention"]).all()
    answers = lab.answer_rows("nq")
    assert answers["EM"].between(0, 1).all()
    assert lab.off_the_shelf_style("nq") == "question"  # real questions come without clozes
    lab.opened.clear()
    lab.store.status.clear()
    lab.per_question("nq")
    assert set(lab.store.status.values()) == {"reused"}
