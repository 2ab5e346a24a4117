"""The profile `real`: real text, a GGUF reader, a retriever that is trained on the passages."""

import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gguf_files import small_llama, write_gguf
from spelt import byte_level

from ragkit.data.files import write_jsonl
from ragkit.data.sets import GOLD_KEYS, read_tsv
from ragkit.data.worlds import build_world
from ragkit.experiment import claims, tables
from ragkit.experiment.analysis import Analysis
from ragkit.experiment.graph import Graph, Of
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.wanted import stages as stages_of
from ragkit.settings import WorldSet

DATA, MODELS = (os.environ.get(f"RAGKIT_REAL_{name}", "") for name in ("DATA", "MODELS"))
SMALL = {
    "reader.context": 1024, "reader.steps": 2, "reader.batch": 2, "reader.answer_tokens": 5,
    "retriever.crop_steps": 4, "retriever.crop_batch": 8, "retriever.vocabulary": 400,
    "retriever.passage_tokens": 64, "distill.seeds": [0], "distill.epochs": 1,
    "indicators.questions": 6, "evaluate.answered": 4, "evaluate.bootstrap": 100,
    "attention.chosen": 2, "nouns": "embedded", "variations": ["reverse KL"],
}  # fmt: skip


def profile_of(**changes):
    """The profile `real` with changes."""
    plain = (list, dict)
    told = {k: json.dumps(v) if isinstance(v, plain) else v for k, v in changes.items()}
    return changed_profile("real", [f"{key}={value}" for key, value in told.items()])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text of a world as a user's files: nothing says that it is one. And a random reader."""
    home = tmp_path_factory.mktemp("files")
    sizes = {"entities": 40, "distill": 12, "dev": 6, "test": 6}
    world = build_world(WorldSet(source="world", name="w", world="almanac", seed=3, **sizes))
    with open(home / "p.tsv", "w", encoding="utf8", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["id", "text", "title"])
        rows.writerows([p.id, p.text, p.title] for p in world.passages)
    asked = [q for part in world.questions.values() for q in part]
    ids = [world.passages[q.gold[0]].id for q in asked]
    pairs = zip(asked, ids, strict=True)
    told = [{"question": q.text, "answer": list(q.answers), "gold_id": one} for q, one in pairs]
    write_jsonl(home / "q.jsonl", told)
    tokenizer = byte_level()
    model = small_llama(tokenizer.get_vocab_size(), max_position_embeddings=1024)
    return home, write_gguf(home / "small.gguf", model, tokenizer, "F32")


@pytest.fixture(scope="module")
def lab(files, tmp_path_factory):
    home, reader = files
    nq = {"source": "files", "name": "nq", "passages": f"{home}/p.tsv"}
    nq |= {"questions": f"{home}/q.jsonl", "distill": 12, "dev": 6, "test": 6}
    changed = {"sets.0": nq, "reader.model": str(reader), "distill.questions": 8}
    return Lab(profile_of(**SMALL | changed), tmp_path_factory.mktemp("runs"))


def test_every_stage_can_be_made_and_the_claims_are_asked(lab):
    for stage in stages_of(lab.graph):
        lab.open_stage(stage)
    assert {name.split(" ")[0] for name in lab.targets} == {
        "off-the-shelf", "fine-tuned", "uniform", "shuffled", "answer", "oracle"
    }  # fmt: skip
    analysis = Analysis(lab, "nq")
    parts = {claim: claims.part(analysis, claim) for claim in claims.JUDGES}
    table = claims.ledger({"nq": parts}, lab.profile.judge, {})
    verdicts = table.set_index("claim")["verdict"]
    assert verdicts["C8"] == "not comparable"  # one set
    assert verdicts["C4"] == "not yet measured"  # no noun finder
    assert np.isfinite(tables.per_question(lab, "nq")["HR@5"]).all()
    look = lab.look("nq", "fine-tuned")
    assert len(look["attention"]) == 8
    place = lab.example("nq", "distill")
    assert 0 < place < 8
    fewer = lab.profile.distill.model_copy(update={"questions": place})  # the rest is Step 1's
    other = lab.with_graph(Graph(lab.profile.model_copy(update={"distill": fewer})))
    assert other.example("nq", "distill") == 0
    assert np.isfinite(look["attention"]).all()


def test_step_1_and_step_2_share_no_question_and_the_retriever_knows_the_texts_words(lab):
    stage = lab.graph.stage("step1", Of("nq"))
    assert stage.settings["questions"] == 8
    vocabulary = json.loads((lab.open("retriever", "nq") / "model/tokenizer.json").read_text())
    words = set(vocabulary["model"]["vocab"])
    assert len(words) == 400
    title = lab.corpus("nq").passages[0].title.lower().split()[-1]
    assert title[0] in words


@pytest.mark.slow
@pytest.mark.skipif(not (DATA and MODELS), reason="RAGKIT_REAL_DATA or _MODELS is not set")
def test_the_whole_run_with_the_true_weights(tmp_path, ragkit):
    """Forty questions of NaturalQuestions over a tenth of the passages, SmolLM2 from its GGUF file,
    every notebook. By MiniLM, for a retriever trained for a minute finds nothing to tell of."""
    data, models = Path(DATA).resolve(), Path(MODELS).resolve()
    with gzip.open(data / "nq/nq-open-gold.jsonl.gz", "rt", encoding="utf8") as file:
        asked = [json.loads(line) for line, _ in zip(file, range(40), strict=False)]
    write_jsonl(tmp_path / "q.jsonl", asked)
    golds = {str(next(row[key] for key in GOLD_KEYS if key in row)) for row in asked}
    passages = enumerate(read_tsv(data / "wiki/psgs_w100.sample.tsv.gz"))
    kept = [p for place, p in passages if place % 10 == 0 or p.id in golds]
    with open(tmp_path / "p.tsv", "w", encoding="utf8", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["id", "text", "title"])
        rows.writerows([p.id, p.text, p.title] for p in kept)
    nq = {"source": "files", "name": "nq", "passages": f"{tmp_path}/p.tsv"}
    nq |= {"questions": f"{tmp_path}/q.jsonl", "distill": 20, "dev": 8, "test": 12}
    changed = {"sets.0": nq, "distill.questions": 12, "nouns": str(models / "en_core_web_sm")}
    (reader,) = (models / "smollm2").glob("*.gguf")
    changed |= {"reader.model": str(reader), "retriever.model": str(models / "minilm")}
    given = SMALL | changed | {"retriever.passage_tokens": 128}
    profile = profile_of(**given)
    plain = (list, dict)
    sets = [f"{k}={json.dumps(v) if isinstance(v, plain) else v}" for k, v in given.items()]
    options = [part for one in sets for part in ("--set", one)]
    ended = ragkit("reproduce", "--profile", "real", "--runs", tmp_path, *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = tmp_path / profile.name
    ledger = pd.read_csv(run / "figures/09_ledger.csv").set_index("claim")["verdict"]
    assert ledger["C8"] == "not comparable"
    assert (run / "figures/10_orders.csv").is_file()
