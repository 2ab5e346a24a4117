"""The `paper` profile here: its stages and formats, small random models, real text."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hub_tables import write_nq, write_trivia, write_wiki
from logs import read_log
from safetensors.numpy import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from ragkit.data.files import read_jsonl
from ragkit.data.sets import read_tsv
from ragkit.experiment import models
from ragkit.experiment.graph import Of
from ragkit.experiment.lab import Lab, changed_profile

pytestmark = pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ,
    reason="RAGKIT_REAL_DATA is not set: no real data to run on",
)
DATA = Path(os.environ.get("RAGKIT_REAL_DATA", ".")).resolve()
PASSAGES = 10_400  # 256 codes need 39 vectors each to learn from


def write_contriever(folder):
    """BERT's classes and vocabulary, as Contriever's."""
    folder.mkdir()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(**shape, intermediate_size=64)).save_pretrained(folder)
    vocabulary = DATA / "tokenizers" / "bert-base-uncased.vocab.txt"
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Everything that the profile fetches, in the hub's formats."""
    folder = tmp_path_factory.mktemp("hub")
    files = {"nq": "nq/NQ-open.dev.jsonl", "trivia": "triviaqa/trivia-dev.sample.jsonl"}
    asked = {}
    for name, file in files.items():
        rows = [row for _, row in read_jsonl(DATA / file)][:400]
        asked[name] = [(row["question"], row.get("answers") or row["answer"]) for row in rows]
    write_nq(folder / "nq", asked["nq"][:300], asked["nq"][300:])
    write_trivia(folder / "trivia", asked["trivia"][:300], asked["trivia"][300:])
    rows = zip(read_tsv(DATA / "wiki/psgs_w100.sample.tsv.gz"), range(PASSAGES), strict=False)
    write_wiki(folder / "wiki", [passage for passage, _ in rows])
    write_contriever(folder / "contriever")
    return folder


@pytest.fixture(scope="module")
def changes(hub, falcon):
    """Places and sizes only: kinds, formats and precision stay as the profile has them."""
    rows = {"train": 300, "validation": 100}
    changed = {
        "device": "cpu", "threads": 1, "index.factory": "OPQ8,IVF16,PQ8",
        "retriever.model": hub / "contriever", "reader.model": falcon,
        "sets.0.questions.dataset": hub / "nq", "sets.0.questions.rows": rows,
        "sets.1.questions.dataset": hub / "trivia", "sets.1.questions.rows": rows,
        "retriever.at_once": 64, "index.shard": 4000, "index.probes": 12, "index.candidates": 200,
        "reader.steps": 2, "reader.batch": 4, "reader.at_once": 2, "reader.checkpoints": 1,
        "distill.questions": 12, "distill.seeds": [0], "distill.epochs": 1,
        "indicators.questions": 4, "evaluate.answered": 4, "evaluate.bootstrap": 200,
        "variations": ["reverse KL"],
    }  # fmt: skip
    for place in (0, 1):
        changed[f"sets.{place}.passages.dataset"] = hub / "wiki"
        changed[f"sets.{place}.passages.rows"] = {"train": PASSAGES}
        changed |= {f"sets.{place}.{part}": n for part, n in
                    (("distill", 24), ("dev", 12), ("test", 16))}  # fmt: skip
    plain = (list, dict)
    return [f"{k}={json.dumps(v) if isinstance(v, plain) else v}" for k, v in changed.items()]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, changes, hub):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Lab(changed_profile("paper", changes), tmp_path_factory.mktemp("runs"))


def test_the_index_finds_what_an_exact_search_finds(lab):
    for name in ("nq", "trivia"):
        asked = models.retriever(lab, name).encode(
            [q.text for q in lab.corpus(name).questions["dev"]]
        )
        exact, found = (
            models.vectors(lab, name).search(asked, 5),
            lab.candidates(name)["dev"][:, :5],
        )
        assert (exact[:, :, None] == found[:, None, :]).any(2).mean() > 0.9


def test_both_sets_share_passages_encoding_and_index(lab):
    for kind in ("passages", "retriever", "vectors", "index"):
        one, two = (lab.graph.stage(kind, Of(name)) for name in ("nq", "trivia"))
        assert one.key == two.key
    assert lab.graph.stage("questions", Of("nq")).key != two.key
    assert len(lab.corpus("nq").passages) == PASSAGES


def test_step_1_computes_in_half_precision_and_keeps_float32_weights(lab):
    home = lab.open("step1", "nq")
    weights = load_file(home / "fine-tuned" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}
    losses = [row["loss"] for row in read_log(home)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_attention_teaches_the_retriever(lab):
    look = lab.look("nq", "fine-tuned")
    assert look["attention"].shape == (12, 3, 2, 2, 4, 5)  # two layers of four heads
    assert np.isfinite(look["attention"]).all()
    ranking, curve = lab.distilled("nq", "fine-tuned attention", 0)
    assert ranking.shape == (16, 20)
    assert np.isfinite(curve[-1]["loss"])
    stage = lab.graph.stage("answers", Of("nq", "fine-tuned", target="fine-tuned attention"))
    assert len(json.loads((lab.open_stage(stage) / "answers.json").read_text())) == 4


@pytest.mark.slow
def test_the_whole_run_with_all_notebooks(lab, changes, hub, ewt, ragkit):
    ewt.to_disk(hub / "nouns")
    changes = [*changes, f"nouns={hub / 'nouns'}"]
    given = [part for change in changes for part in ("--set", change)]
    ended = ragkit("reproduce", "--profile", "paper", "--runs", lab.runs, *given,
                   HF_HUB_OFFLINE="1")  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = lab.runs / changed_profile("paper", changes).name
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["notebooks"]) == 10
    assert manifest["stages"]["vectors/nq"]["units"] == {"passages": PASSAGES}
    table = pd.read_csv(run / "figures" / "04_main_table.csv")
    assert set(table["set"]) == {"nq", "trivia"}
    assert "BM25" not in set(table["system"])
    hits = table[["HR@1", "HR@5", "HR@20", "MRR"]].dropna().to_numpy()
    assert hits.max() > 0  # hits are told by the answer
    page = (run / "report" / "01_data.html").read_text("utf8")
    assert "CC BY-SA 3.0" in page
    assert "0ae2454140a2d6864475c83f26e6dc9cd4ab9ce4" in page
