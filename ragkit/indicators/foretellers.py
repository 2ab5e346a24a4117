"""What can be known of a reader before any retriever learns from it: the indicators, and simpler
checks (`assets/foretelling.yaml` says what each is)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from ragkit.data.text import exact_match
from ragkit.distillation import targets, teacher
from ragkit.indicators import closeness, measures
from ragkit.indicators.measures import Floats
from ragkit.models import device
from ragkit.models.answers import premise_cases
from ragkit.models.fid import open_reader
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings


def of_passages(
    looks: targets.Looks, others: Mapping[str, Floats], settings: AttentionSettings
) -> pd.DataFrame:
    """The checks of a reader's attention over passages, a row a question: by its looks in rank and
    in reversed order, and against `others`, further scores of the passages `[questions, k]`."""
    rank, back = (targets.attention_scores(looks[o], settings) for o in ("rank", "reversed"))
    holds, (n, k) = looks["rank"]["holds"].astype(float), rank.shape
    both = targets.standardise(rank) + targets.standardise(back)
    telling = holds.max(1, keepdims=True) > holds.min(1, keepdims=True)
    shares = rank / rank.sum(1, keepdims=True)
    found = {"top holds the answer": rank, "top holds the answer, balanced": both}
    table = {
        name: np.where(telling, targets.top(s) * holds, np.nan).sum(1) for name, s in found.items()
    }
    table["entropy"] = special.entr(shares).sum(1) / np.log(k)
    table["last in place"] = targets.top(rank)[:, -1]
    table["orders agree"] = (targets.top(rank) * targets.top(back)).sum(1)
    question = np.repeat(np.arange(n), k)
    places = {"follows the place": np.tile(np.arange(k, dtype=float), (n, 1))}
    for name, other in (places | dict(others)).items():
        table[name] = measures.spearman(rank.ravel(), other.ravel(), question, n)
    return pd.DataFrame(table)


def make_foretellers(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`foretellers.json`: each foreteller of a reader, its mean over the first questions of dev; the
    indicators in three spaces: the base reader's, `own`, the `retriever`'s."""
    asked, nouns, base = closeness.opened(inputs, settings)
    reader, questions, found = open_reader(inputs, settings), asked.questions, asked.passages
    looks = {one: teacher.look(reader, questions, found, one) for one in ("rank", "reversed")}
    likely = targets.likelihood({"answer_logs": teacher.alone(reader, questions, found)})
    left_out = teacher.left_out_losses(reader, questions, found).astype(float)
    others = {"agrees with leaving out": left_out, "agrees with perplexity": likely}
    values = dict(of_passages(looks, others, AttentionSettings()).mean())
    pairs = premise_cases(asked, settings["k"], settings["seed"])["gold among the passages"]
    answers = reader.answer([reader.prompt(*pair) for pair in pairs])
    right = [exact_match(one, q.answers) for one, (q, _) in zip(answers, pairs, strict=True)]
    whole = [reader.prompt(q, p, q.answers[0]) for q, p in zip(questions, found, strict=True)]
    losses = teacher.answer_losses(reader, whole, reader.settings.at_once)
    values |= {"exact match": np.mean(right), "loss": np.nanmean(np.nanmean(losses, axis=1))}
    tokens = closeness.look_at_tokens(reader, questions, found).texts
    spaces = {"": base, ", own": reader, ", retriever": Retriever.open(inputs, settings)}
    for space, model in spaces.items():
        tables, _ = closeness.indicators_of((reader, model), tokens, questions, found, nouns)
        for goal, table in tables.items():
            means = table.drop(columns="question").mean()
            values |= {f"{goal}{space}: {name}": mean for name, mean in means.items()}
    made = {name: float(value) for name, value in values.items()}
    device.write(folder, {"foretellers.json": made})
