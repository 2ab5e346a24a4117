"""A page on which one turns every choice behind p_ATTN and sees at once what the reader would teach; it works offline.

The page holds the stored scores of a sample of the questions for distillation, as one JSON object:

    {"entropy", "theta", "choices": {axis: [names]}, "start": {axis: index}, "sets": [{
        "name", "of", "examples": [{"question", "answers", "passages": [[title, text]]}],
        "gold": array, "retr": array, "readers": [{"name", "attention": array, "indicators": [{"goal", "measure", "means": array}]}]}]}

An array is {"axes": [names], "shape": [sizes], "values": [numbers in C order]}. `examples` belong to the first questions of the
arrays; `of` says from how many the sample was taken. `means` are over test questions, with the axes rows, norm, layer, where the last
layer stands for the mean of all (an indicator of averaged attention is no average of indicators); null where undefined.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.distillation import targets as distill
from ragkit.distillation import teacher
from ragkit.data.questions import Corpus
from ragkit.profile import Profile
from ragkit.models.retriever import Retriever
from ragkit.experiment.store import Store
from ragkit.models.vectors import Vectors

QUESTIONS, EXAMPLES = 200, 12
NUMBERS = 400_000  # at most so many scores a reader, or the page grows too heavy: fewer questions where readers are deep


def array(axes: list[str], values: NDArray[Any]) -> dict[str, Any]:
    """An array for the page, its numbers rounded to five significant digits."""
    return {"axes": axes, "shape": list(values.shape), "values": [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.ravel().tolist()]}


def sample(n: int, numbers: int) -> NDArray[np.int64]:
    """Which questions go to the page: evenly spread over all n, the examples first (evenly spread, too)."""
    size = min(n, QUESTIONS, max(EXAMPLES, NUMBERS // numbers))
    spread = np.linspace(0, n - 1, size).astype(np.int64)
    first = spread[np.linspace(0, size - 1, min(size, EXAMPLES)).astype(np.int64)]
    return np.concatenate([first, np.setdiff1d(spread, first)])


def stored_scores(store: Store, profile: Profile, name: str) -> dict[str, NDArray[np.float32]]:
    """The attention scores of every reader that looked at the set's present candidates; a run that was cut off may hold older ones."""
    records, home = store.records(), f"candidates/{name}"
    found = {}
    for stage, saved in records.items():
        if stage.startswith(f"teacher/{name}/") and home in records:
            made_from = saved["record"]
            if made_from["upstream"][home] == records[home]["key"] and made_from["profile"]["k"] == profile.k:
                found[stage.rpartition("/")[2]] = teacher.load(store.folder / "stages" / stage)["attention"]
    return found


def stored_indicators(run: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Each reader's indicators under every choice, from notebook 08's table; empty where that has not been run."""
    path = run / "figures" / "08_by_layer.csv"
    if not path.is_file():
        return {}
    table = pd.read_csv(path, dtype={"layer": str})
    table = table[table["set"] == name]
    found: dict[str, list[dict[str, Any]]] = {}
    for (reader, goal), part in table.groupby(["reader", "goal"]):
        layers = part["layer"].nunique()
        order = pd.MultiIndex.from_product([teacher.ROWS, ("off", "on"), [*map(str, range(1, layers)), "mean"]])
        for measure in ("attention", "Spearman"):
            values = part.set_index(["rows", "norm", "layer"])[measure].reindex(order).to_numpy().reshape(len(teacher.ROWS), 2, layers)
            found.setdefault(str(reader), []).append({"goal": goal, "measure": measure, "means": array(["rows", "norm", "layer"], values)})
    return found


def set_data(run: Path, profile: Profile, name: str) -> dict[str, Any] | None:
    """What the page needs of one question set; None where no reader's scores are stored."""
    stages, scores = run / "stages", stored_scores(Store(run), profile, name)
    if not scores:
        return None
    n = min(map(len, scores.values()))
    chosen = sample(n, max(one[0].size for one in scores.values()))
    corpus = Corpus.load(name, stages / "corpus" / name)
    questions = [corpus.questions["distill"][i] for i in chosen]
    folder = stages / "retriever" / name
    candidates = load_file(stages / "candidates" / name / "candidates.safetensors")["distill"][chosen, : profile.k]
    queries = Retriever.load(str(folder / "model"), profile.retriever).encode([q.text for q in questions])
    retr = np.einsum("qd,qkd->qk", queries, Vectors(stages / "vectors" / name).take(candidates))
    gold = distill.oracle_scores(candidates.tolist(), corpus.golds(questions, candidates))
    examples = [
        {"question": q.text, "answers": list(q.answers), "passages": [[corpus.passages[i].title, corpus.passages[i].text] for i in row]}
        for q, row in zip(questions[:EXAMPLES], candidates, strict=False)
    ]
    means = stored_indicators(run, name)
    axes = ["question", "rows", "norm", "layer", "pooling", "passage"]
    return {
        "name": name,
        "of": n,
        "examples": examples,
        "gold": array(["question", "passage"], gold.astype(int)),
        "retr": array(["question", "passage"], retr),
        "readers": [{"name": reader, "attention": array(axes, one[chosen]), "indicators": means.get(reader, [])} for reader, one in scores.items()],
    }


def data(run: Path, profile: Profile) -> dict[str, Any]:
    """Everything the page holds; `sets` is empty where no reader's scores are stored."""
    start = profile.attention
    return {
        "entropy": profile.distill.entropy,
        "theta": profile.distill.retriever_temperature,
        "choices": {"rows": list(teacher.ROWS), "norm": ["off", "on"], "pooling": list(teacher.POOLINGS)},
        "start": {"rows": teacher.ROWS.index(start.rows), "norm": int(start.norm), "pooling": teacher.POOLINGS.index(start.pooling)},
        "sets": [found for one in profile.sets if (found := set_data(run, profile, one.name))],
    }


def body(run: Path, profile: Profile) -> str:
    """The page's HTML (without the frame that the report gives every page), or a sentence where there is nothing to turn."""
    held = data(run, profile)
    if not held["sets"]:
        return "<h1>Sliders</h1><p>This run holds no reader's passage scores. Notebook 03 makes them; then write the report again.</p>"
    # With "<" written as an escape no text can end the script element or open a comment in it.
    embedded = json.dumps(held, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return resources.files("ragkit").joinpath("assets/sliders.html").read_text("utf8").replace("{{data}}", embedded)
