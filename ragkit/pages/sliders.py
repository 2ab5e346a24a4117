"""A page on which one turns every choice behind p_ATTN and sees what the reader would teach.

It works offline: it holds the scores of a sample of the questions for distillation as JSON:

    {"entropy", "theta", "choices": {axis: [names]}, "start": {axis: index}, "sets": [{
        "name", "of", "examples": [{"question", "answers", "passages": [[title, text]]}],
        "gold": array, "retr": array, "readers": [{"name", "attention": array,
            "indicators": [{"goal", "measure", "means": array}]}]}]}

An array is {"axes": [names], "shape": [sizes], "values": [numbers in C order]}. `examples` belong
to the first questions of the arrays; `of` says from how many the sample was taken. `means` are over
test questions, with the axes rows, norm, layer, where the last layer stands for the mean of all (an
indicator of averaged attention is no average of indicators); null where undefined.
"""

import json
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.distillation import targets
from ragkit.experiment.lab import Lab
from ragkit.settings import POOLINGS, ROWS, asset

QUESTIONS, EXAMPLES = 200, 12
NUMBERS = 400_000  # scores a reader at most, or the page grows too heavy: fewer questions then


def array(axes: str, values: NDArray[Any]) -> dict[str, Any]:
    """An array for the page, its numbers rounded to five significant digits."""
    numbers = [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.ravel().tolist()]
    return {"axes": axes.split(), "shape": list(values.shape), "values": numbers}


def sample(n: int, numbers: int) -> NDArray[np.int64]:
    """Which of n questions, each of so many numbers a reader, go to the page.

    They are evenly spread over all, and so are the examples, which come first.
    """
    size = min(n, QUESTIONS, max(EXAMPLES, NUMBERS // numbers))
    spread = np.linspace(0, n - 1, size).astype(np.int64)
    first = spread[np.linspace(0, size - 1, min(size, EXAMPLES)).astype(np.int64)]
    return np.concatenate([first, np.setdiff1d(spread, first)])


def indicators(lab: Lab, name: str) -> dict[str, list[dict[str, Any]]]:
    """Each reader's indicators by choice, from notebook 08's table; none where it is missing."""
    path = lab.figures / "08_by_layer.csv"
    found: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        return found
    table = pd.read_csv(path, dtype={"layer": str})
    for (reader, goal), part in table[table["set"] == name].groupby(["reader", "goal"]):
        layers = [*map(str, range(1, part["layer"].nunique())), "mean"]
        order = pd.MultiIndex.from_product([ROWS, ("off", "on"), layers])
        values = part.set_index(["rows", "norm", "layer"]).reindex(order)
        for measure in ("attention", "Spearman"):
            shaped = values[measure].to_numpy().reshape(len(ROWS), 2, len(layers))
            told = {"goal": goal, "measure": measure, "means": array("rows norm layer", shaped)}
            found.setdefault(str(reader), []).append(told)
    return found


def set_data(lab: Lab, name: str) -> dict[str, Any]:
    """What the page needs of one question set."""
    from ragkit.experiment import models  # it loads torch: only who writes the page waits

    scores = {which: lab.teacher(name, which)["attention"] for which in lab.readers()}
    asked, candidates = lab.asked(name)
    chosen = sample(len(asked), max(one[0].size for one in scores.values()))
    corpus, questions, found = lab.corpus(name), [asked[i] for i in chosen], candidates[chosen]
    queries = models.retriever(lab, name).encode([q.text for q in questions])
    retr = np.einsum("qd,qkd->qk", queries, models.vectors(lab, name).take(found))
    gold = targets.oracle_scores(found.tolist(), corpus.golds(questions, found))
    examples = []
    for question, row in zip(questions[:EXAMPLES], found, strict=False):
        passages = [[corpus.passages[i].title, corpus.passages[i].text] for i in row]
        said = {"question": question.text, "answers": list(question.answers)}
        examples.append({**said, "passages": passages})
    means, readers = indicators(lab, name), []
    for which, one in scores.items():
        attention = array("question rows norm layer pooling passage", one[chosen])
        readers.append({"name": which, "attention": attention, "indicators": means.get(which, [])})
    arrays = {"gold": array("question passage", gold), "retr": array("question passage", retr)}
    return {"name": name, "of": len(asked), "examples": examples, **arrays, "readers": readers}


def data(lab: Lab) -> dict[str, Any]:
    """Everything the page holds."""
    own, distill = lab.profile.attention, lab.profile.distill
    choices = {"rows": list(ROWS), "norm": ["off", "on"], "pooling": list(POOLINGS)}
    start = {"rows": ROWS.index(own.rows), "norm": int(own.norm)}
    return {
        "entropy": distill.entropy,
        "theta": distill.retriever_temperature,
        "choices": choices,
        "start": start | {"pooling": POOLINGS.index(own.pooling)},
        "sets": [set_data(lab, name) for name in lab.sets],
    }


def body(lab: Lab) -> str:
    """The page's HTML, without the frame that the report gives every page."""
    # With "<" written as an escape no text can end the script element or open a comment in it.
    held = json.dumps(data(lab), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = asset("sliders.html").read_text("utf8")
    return page.replace("{{data}}", held.replace("<", "\\u003c"))
