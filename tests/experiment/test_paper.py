"""The `paper` profile on this machine: its own stages, notebooks and formats, with small random models of its architectures and real text."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hub_tables import write_nq, write_trivia, write_wiki
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedTokenizerFast,
)

from ragkit.data.files import read_jsonl
from ragkit.data.passages import read_tsv

pytestmark = pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ,
    reason="RAGKIT_REAL_DATA is not set: no real data to run on",
)
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RAGKIT_REAL_DATA", ".")).resolve()


def write_contriever(folder):
    """BERT's classes and vocabulary, as Contriever's."""
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = BertTokenizerFast(str(DATA / "tokenizers/bert-base-uncased.vocab.txt"))
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_falcon(folder):
    """Falcon-RW's classes (ALiBi) and tokenizer."""
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "tokenizer.json").write_bytes(
        gzip.decompress((DATA / "tokenizers/falcon.tokenizer.json.gz").read_bytes())
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False, parallel_attn=False,
        new_decoder_architecture=False,
    )  # fmt: skip
    FalconForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory, ewt):
    """Everything that the profile fetches, in the hub's formats: questions, passages, models; and a noun finder."""
    folder = tmp_path_factory.mktemp("hub")
    nq = [(row["question"], row["answer"]) for _, row in read_jsonl(DATA / "nq/NQ-open.dev.jsonl")][
        :400
    ]
    trivia = [
        (row["question"], row["answers"])
        for _, row in read_jsonl(DATA / "triviaqa/trivia-dev.sample.jsonl")
    ][:400]
    write_nq(folder / "nq", nq[:300], nq[300:])
    write_trivia(folder / "trivia", trivia[:300], trivia[300:])
    write_wiki(
        folder / "wiki",
        [
            p
            for p, _ in zip(
                read_tsv(DATA / "wiki/psgs_w100.sample.tsv.gz"), range(10_400), strict=False
            )
        ],
    )
    write_contriever(folder / "contriever")
    write_falcon(folder / "falcon")
    ewt.to_disk(folder / "nouns")
    return folder


def changes(hub):
    """Places and sizes only: kinds, formats, precision and the rest stay as the profile has them."""
    places = {
        "machine.device": "cpu", "threads": 1, "retriever.model": hub / "contriever", "reader.model": hub / "falcon", "nouns.model": hub / "nouns",
        "sets.0.questions.dataset": hub / "nq", "sets.1.questions.dataset": hub / "trivia",
        "sets.0.questions.rows": {"train": 300, "validation": 100}, "sets.1.questions.rows": {"train": 300, "validation": 100},
    }  # fmt: skip
    sizes = {
        "retriever.at_once": 64, "index.shard": 4000, "index.lists": 16, "index.probes": 8, "index.code_bytes": 8, "index.candidates": 100,
        "reader.steps": 4, "reader.batch": 4, "reader.at_once": 2, "reader.checkpoints": 1, "distill.questions": 24, "distill.seeds": [0], "distill.epochs": 1,
        "indicators.questions": 8, "evaluate.answered": 8, "evaluate.bootstrap": 200, "choices.variations": ["reverse KL"],
    }  # fmt: skip
    for place in (0, 1):
        places |= {
            f"sets.{place}.passages.dataset": hub / "wiki",
            f"sets.{place}.passages.rows": {"train": 10_400},
        }
        sizes |= {f"sets.{place}.distill": 24, f"sets.{place}.dev": 12, f"sets.{place}.test": 16}
    return [
        f"{key}={json.dumps(value) if isinstance(value, list | dict) else value}"
        for key, value in (places | sizes).items()
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, hub):
    """The folder of the finished run."""
    runs = tmp_path_factory.mktemp("runs")
    command = [
        sys.executable,
        "-m",
        "ragkit",
        "reproduce",
        "--profile",
        "paper",
        "--runs",
        str(runs),
    ]
    command += [part for change in changes(hub) for part in ("--set", change)]
    environment = os.environ | {"HF_HOME": str(hub / "home"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return runs / "paper"


def test_every_notebook_ran(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["notebooks"]) == 10
    assert all(what.startswith("ran") for what in manifest["notebooks"].values())
    assert manifest["profile"]["index"]["kind"] == "ivfpq"
    assert manifest["profile"]["reader"]["dtype"] == "bfloat16"


def test_the_main_table_has_both_sets(run):
    table = pd.read_csv(run / "figures" / "04_main_table.csv")
    assert set(table["set"]) == {"nq", "trivia"}
    assert "BM25" not in set(table["system"])
    assert (
        table[["HR@1", "HR@5", "HR@20", "MRR"]].dropna().to_numpy().max() > 0
    )  # hits are told by the answer


def test_the_index_finds_what_an_exact_search_finds(run):
    for name in ("nq", "trivia"):
        assert (
            json.loads((run / "stages" / "candidates" / name / "recall.json").read_text())[
                "recall@5"
            ]
            > 0.9
        )


def test_both_sets_share_one_file_of_passages_one_encoding_and_one_index(run):
    files = [
        *(run / "stages" / "vectors" / "nq").glob("*.npy"),
        *(run / "stages" / "index" / "nq").glob("index*"),
        run / "stages/corpus/nq/passages.arrow",
    ]
    assert len(files) > 3
    for file in files:
        assert file.samefile(file.parent.parent / "trivia" / file.name)
    work = json.loads((run / "stages" / "vectors" / "trivia" / "stage.json").read_text())["work"]
    assert work.get("passages", 0) == 0


def test_throughput_is_recorded(run):
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert stages["vectors/nq"]["work"]["passages"] == 10_400
    assert stages["vectors/nq"]["work"]["tokens"] > 100_000
    assert stages["teacher/nq/fine-tuned"]["work"]["questions"] == 24
    assert "vectors" in (run / "report" / "manifest.html").read_text("utf8")


def test_the_data_are_named_with_their_licences(run):
    page = (run / "report" / "01_data.html").read_text("utf8")
    assert "CC BY-SA 3.0" in page
    assert "0ae2454140a2d6864475c83f26e6dc9cd4ab9ce4" in page


def test_step_1_kept_float32_weights(run):
    from safetensors.numpy import load_file

    weights = load_file(run / "stages" / "step1" / "nq" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}
