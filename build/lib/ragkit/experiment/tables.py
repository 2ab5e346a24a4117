"""What the systems of a run achieve on its test questions, and whether its premises hold: tables for notebooks 02, 04 and the ledger."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.models import index
from ragkit.indicators import metrics
from ragkit.experiment.lab import READERS, TARGETS, UNTAUGHT, Lab
from ragkit.data.passages import Passage
from ragkit.profile import WorldSet
from ragkit.models.retriever import passage_text
from ragkit.experiment.stages import DEPTH


def retrieval_rows(lab: Lab, set_name: str, targets: Iterable[str] | None = None) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Test rankings by (system, seed): BM25 if the profile has it, the initial retriever, the distilled ones of the targets (default: all)."""
    rows = {}
    if lab.profile.evaluate.bm25:
        corpus = lab.corpus(set_name)
        texts = [passage_text(p) for p in corpus.passages]
        rows["BM25", 0] = index.bm25([q.text for q in corpus.questions["test"]], texts, min(DEPTH, len(texts)))
    rows["initial", 0] = lab.candidates(set_name)["test"]
    for target in lab.targets if targets is None else targets:
        for seed in lab.profile.distill.seeds:
            rows[target, seed] = lab.distilled(set_name, target, seed)[0]
    return rows


def per_question(lab: Lab, set_name: str, targets: Iterable[str] | None = None) -> pd.DataFrame:
    """Retrieval of every test question by every system (see `retrieval_rows`): columns system, seed, question, HR@1, HR@5, HR@20, MRR."""
    corpus = lab.corpus(set_name)
    questions, frames = corpus.questions["test"], []
    for (system, seed), ranking in retrieval_rows(lab, set_name, targets).items():
        found, golds = ranking.tolist(), corpus.golds(questions, ranking)
        columns = {f"HR@{k}": metrics.hits(found, golds, k) for k in metrics.CUTS} | {"MRR": metrics.reciprocal_ranks(found, golds)}
        frames.append(pd.DataFrame({"set": set_name, "system": system, "seed": seed, "question": range(len(questions)), **columns}))
    return pd.concat(frames, ignore_index=True)


def answer_rows(lab: Lab, set_name: str, targets: Iterable[str] | None = None) -> pd.DataFrame:
    """EM and F1 of test questions under every system (see `retrieval_rows`): columns system, reader, seed, question, EM, F1.

    Each regime answers with its own reader; BM25 and the controls answer with the fine-tuned one.
    """
    questions = lab.corpus(set_name).questions["test"][: lab.profile.evaluate.answered]
    cases: list[tuple[str, str, int, list[list[Passage]], str]] = []
    for which in READERS:
        cases.append(("closed book", which, 0, [[] for _ in questions], f"candidates/{set_name}"))
    rankings = retrieval_rows(lab, set_name, targets)
    for (system, seed), ranking in rankings.items():
        upstream = lab.step2_name(set_name, system, seed) if system in TARGETS else f"candidates/{set_name}"
        readers = READERS if system == "initial" else READERS[:1] if system.startswith(UNTAUGHT) else READERS[1:]
        for which in readers:
            cases.append((system, which, seed, lab.found(set_name, "test", ranking), upstream))
    loaded, frames = {which: lab.reader(set_name, which) for which in READERS}, []
    for system, which, seed, found, upstream in cases:
        made_by = [upstream, *([] if which in UNTAUGHT else [f"step1/{set_name}"])]  # each run of Step 1 has its own baselines
        answers = lab.answers(set_name, f"{system}-{which}-{seed}".replace(",", "").replace(" ", "-"), loaded[which], questions, found, made_by)
        scored = {
            "EM": [metrics.exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)],
            "F1": [metrics.f1(a, q.answers) for a, q in zip(answers, questions, strict=True)],
        }
        frames.append(pd.DataFrame({"set": set_name, "system": system, "reader": which, "seed": seed, "question": range(len(answers)), **scored}))
    return pd.concat(frames, ignore_index=True)


def premises(lab: Lab, set_name: str) -> pd.DataFrame:
    """The premises on dev: can this reader read, and is there room for the retriever to improve?"""
    corpus, found = lab.corpus(set_name), lab.found(set_name, "dev")
    dev = corpus.questions["dev"]
    ranking = lab.candidates(set_name)["dev"]
    golds = corpus.golds(dev, ranking)
    initial = metrics.hits(ranking.tolist(), golds, lab.profile.k)
    rows: list[tuple[str, float]] = [(f"initial HR@{lab.profile.k}", float(initial.mean()))]
    questions = dev[: lab.profile.evaluate.answered]
    rng = random.Random(lab.profile.seed)
    with_gold, same_kind, permuted = [], [], []
    for q, passages, places in zip(questions, found[: len(questions)], golds[: len(questions)], strict=True):
        gold = corpus.passages[places[0]] if places else passages[0]
        rest = [p for p in passages if p.id != gold.id][: lab.profile.k - 1]
        with_gold.append(rng.sample([gold, *rest], len(rest) + 1))
        permuted.append(rng.sample(with_gold[-1], len(with_gold[-1])))
        others = [corpus.passages[o.gold[0]] for o in dev if q.relation and o.relation == q.relation and o.entity != q.entity]
        chosen = rng.sample(others, min(len(others), lab.profile.k - 1))
        same_kind.append(rng.sample([gold, *chosen], len(chosen) + 1))
    for which in READERS:
        reader, results = lab.reader(set_name, which), {}
        cases: dict[str, list[list[Passage]]] = {
            "gold among the passages": with_gold,
            "the same, permuted": permuted,
            "no passages": [[] for _ in questions],
        }
        if questions[0].relation:
            cases["same kind of fact, other entities"] = same_kind
        for case, given in cases.items():
            upstream = f"step1/{set_name}" if which == "fine-tuned" else f"candidates/{set_name}"
            answers = lab.answers(set_name, f"premise-{which}-{case}".replace(",", "").replace(" ", "-"), reader, questions, given, [upstream])
            results[case] = float(np.mean([metrics.exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)]))
        rows += [(f"{which}: EM, {case}", value) for case, value in results.items()]
    return pd.DataFrame(rows, columns=["premise", "value"]).assign(set=set_name)


def ceiling(lab: Lab, set_name: str) -> pd.DataFrame:
    """How far the oracle, the best possible teacher, takes the retriever: HR on dev after Step 2.

    In an embedded world also with the passages' side trained, with the first seed, which shows what leaving the index as it is costs; on real
    text that would mean to encode every passage again at every look. Columns set, trained, seed, HR.
    """
    cases = [(lab.profile.distill.side, seed, lab) for seed in lab.profile.distill.seeds]
    if lab.profile.distill.side == "query" and isinstance(lab.sets[set_name], WorldSet):
        cases.append(("both", lab.profile.distill.seeds[0], lab.varied("both sides", set_name)))
    rows = [{"trained": side, "seed": seed, "HR": each.distilled(set_name, "oracle", seed)[1][-1]["hr"]} for side, seed, each in cases]
    return pd.DataFrame(rows).assign(set=set_name)
