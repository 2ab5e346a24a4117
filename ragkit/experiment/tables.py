"""What the systems of a run achieve on test, and whether its premises hold: tables of questions."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.data.corpus import CUTS, hits, reciprocal_ranks
from ragkit.data.text import exact_match, f1
from ragkit.distillation.targets import oracle_scores
from ragkit.errors import StoreError
from ragkit.experiment.graph import Of
from ragkit.experiment.lab import Lab, read_json
from ragkit.experiment.wanted import answered
from ragkit.settings import reference


def per_question(lab: Lab, set_name: str) -> pd.DataFrame:
    """Retrieval of every test question by BM25 (if the profile has it), the initial retriever and
    those distilled: columns set, system, seed, question, HR@1, 5, 20, MRR."""
    corpus, frames = lab.corpus(set_name), []
    searches = {"BM25": "bm25"} if lab.profile.evaluate.bm25 else {}
    searches["initial"] = "candidates"
    rankings = {(s, 0): lab.candidates(set_name, by)["test"] for s, by in searches.items()}
    for target, seed in product(lab.targets, lab.profile.distill.seeds):
        rankings[target, seed] = lab.distilled(set_name, target, seed)[0]
    for (system, seed), ranking in rankings.items():
        found, golds = ranking.tolist(), corpus.golds(corpus.questions["test"], ranking)
        row = {"set": set_name, "system": system, "seed": seed, "question": range(len(found))}
        row |= {f"HR@{k}": hits(found, golds, k) for k in CUTS}
        frames.append(pd.DataFrame({**row, "MRR": reciprocal_ranks(found, golds)}))
    return pd.concat(frames, ignore_index=True)


def answer_rows(lab: Lab, set_name: str, targets: Iterable[str] | None = None) -> pd.DataFrame:
    """By `wanted.answered`, EM and F1: columns set, system, reader, seed, question, EM, F1."""
    rows, questions = [], lab.corpus(set_name).questions["test"]
    for system, which, seed in answered(lab.graph, targets):
        stage = lab.graph.stage("answers", Of(set_name, which, target=system, seed=seed))
        answers = read_json(lab.open_stage(stage) / "answers.json")
        for number, (question, answer) in enumerate(zip(questions, answers, strict=False)):
            scores = [score(answer, question.answers) for score in (exact_match, f1)]
            rows.append((set_name, system, which, seed, number, *scores))
    columns = ["set", "system", "reader", "seed", "question", "EM", "F1"]
    return pd.DataFrame(rows, columns=columns)


def exact_by_case(lab: Lab, set_name: str, which: str) -> dict[str, NDArray[np.float64]]:
    """By case of `answers.premise_cases`: exact match on dev `[questions]`, NaN where left out."""
    stored = read_json(lab.open("premises", set_name, which) / "exact.json")
    return {case: np.array(values, dtype=np.float64) for case, values in stored.items()}


def initial(lab: Lab, set_name: str) -> float:
    """The initial retriever's HR@k on dev."""
    corpus, ranking, k = lab.corpus(set_name), lab.candidates(set_name)["dev"], lab.profile.k
    return float(hits(ranking.tolist(), corpus.golds(corpus.questions["dev"], ranking), k).mean())


def mixed_golds(lab: Lab, set_name: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where distillation's questions with gold and others stand `[n]`; which are gold `[n, k]`."""
    asked, candidates = lab.asked(set_name)
    gold = oracle_scores(candidates.tolist(), lab.corpus(set_name).golds(asked, candidates)) > 0
    places = np.flatnonzero(gold.any(1) & ~gold.all(1))
    return places, gold[places]


def gold_on_top(lab: Lab, set_name: str, scores: NDArray[Any]) -> NDArray[np.float64]:
    """Whether the passage of the highest score `[questions, k]` is gold; NaN if none or all are."""
    places, gold = mixed_golds(lab, set_name)
    right = np.full(len(scores), np.nan)
    right[places] = gold[np.arange(len(places)), scores[places].argmax(1)]
    return right


def top_is_gold(lab: Lab, set_name: str, scores: NDArray[Any]) -> float:
    """How often the passage with the highest score `[questions, k]` is gold, of `mixed_golds`."""
    return float(np.nanmean(gold_on_top(lab, set_name, scores)))


def published(lab: Lab, profile: str, table: str) -> pd.DataFrame:
    """A table of a profile's reference, or of this run if it is that profile's; else StoreError."""
    file = (lab.folder / "figures" if lab.base == profile else reference(profile)) / table
    if not file.is_file():
        told = "Work in a checkout, which holds it; the README says how it is made again."
        raise StoreError(f"No table {file}. {told}")
    return pd.read_csv(file)
