"""What can be known of a reader before any retriever learns from it (`assets/foretelling.yaml`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragkit.data.text import exact_match
from ragkit.distillation import targets, teacher
from ragkit.indicators import closeness, measures
from ragkit.models import device
from ragkit.models.answers import premise_cases
from ragkit.models.fid import open_reader
from ragkit.models.reader import Reader
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings


def make_foretellers(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`foretellers.json`: all foretellers on dev, the indicators in three spaces (base: plain)."""
    asked, nouns, base = closeness.opened(inputs, settings)
    reader, questions, found = open_reader(inputs, settings), asked.questions, asked.passages
    looks = {one: teacher.look(reader, questions, found, one) for one in ("rank", "reversed")}
    likely = targets.likelihood({"answer_logs": teacher.alone(reader, questions, found)})
    left_out = teacher.left_out_losses(reader, questions, found).astype(float)
    others = {"agrees with leaving out": left_out, "agrees with perplexity": likely}
    values = dict(measures.of_passages(looks, others, AttentionSettings()).mean())
    pairs = premise_cases(asked, settings["k"], settings["seed"])["gold among the passages"]
    answers = reader.answer([reader.prompt(*pair) for pair in pairs])
    right = [exact_match(one, q.answers) for one, (q, _) in zip(answers, pairs, strict=True)]
    whole = [reader.prompt(q, p, q.answers[0]) for q, p in zip(questions, found, strict=True)]
    losses = teacher.answer_losses(reader, whole, reader.settings.at_once)
    values |= {"exact match": np.mean(right), "loss": np.nanmean(np.nanmean(losses, axis=1))}
    seen = closeness.look_at_tokens(reader, questions, found).texts, questions, found, nouns
    spaces: dict[str, Reader | Retriever] = {"": base, ", own": reader}
    spaces[", retriever"] = Retriever.open(inputs, settings)
    for space, model in spaces.items():
        for goal, table in closeness.indicators_of((reader, model), *seen)[0].items():
            means = table.drop(columns="question").mean()
            values |= {f"{goal}{space}: {name}": mean for name, mean in means.items()}
    device.write(folder, {"foretellers.json": {name: float(one) for name, one in values.items()}})
