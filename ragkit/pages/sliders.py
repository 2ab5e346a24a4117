"""A page on which one turns every choice behind p_ATTN and sees what the reader would teach. It
works offline, on the scores that it holds as JSON: `assets/sliders.html` says in which form."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.distillation import targets
from ragkit.experiment.lab import Lab
from ragkit.settings import POOLINGS, ROWS, asset

QUESTIONS, EXAMPLES = 200, 12
NUMBERS = 400_000  # scores a reader at most, or the page grows too heavy: fewer questions then


def rounded(values: NDArray[Any]) -> list[Any]:
    """An array for the page, its numbers rounded to five significant digits."""
    return np.vectorize(lambda value: float(f"{value:.5g}"))(values).tolist()


def of_layers(look: targets.Scores) -> NDArray[Any]:
    """A reader's scores, the mean of all heads, as the page holds them."""
    sums, tokens = look["attention"].mean(4), np.maximum(look["tokens"], 1)
    return np.stack([sums, sums / tokens[:, None, None, None]], axis=4)


def set_data(lab: Lab, name: str) -> dict[str, Any]:
    """What the page needs of a set; its questions are in random order: the first are a sample."""
    import torch  # only who writes the page waits for it and what follows

    from ragkit.models import device
    from ragkit.models.index import Index
    from ragkit.models.retriever import Retriever

    device.start(lab.profile.device, lab.profile.threads)
    retriever = Retriever.load(lab.open("retriever", name) / "model", lab.profile.retriever)
    vectors = Index.open(lab.open("vectors", name))
    scores = {which: of_layers(lab.look(name, which)) for which in lab.readers()}
    asked, candidates = lab.asked(name)
    n = min(QUESTIONS, max(EXAMPLES, NUMBERS // max(one[0].size for one in scores.values())))
    corpus, questions, found = lab.corpus(name), asked[:n], candidates[:n]
    with torch.no_grad():  # not by `encode`, which all processes of a run share: one writes pages
        queries = retriever([q.text for q in questions]).float().cpu().numpy()
    examples = []
    for one, row in zip(questions[:EXAMPLES], found, strict=False):
        passages = [[corpus.passages[i].title, corpus.passages[i].text] for i in row]
        examples.append({"question": one.text, "answers": one.answers, "passages": passages})
    return {
        "name": name,
        "of": len(asked),
        "examples": examples,
        "gold": targets.oracle_scores(found.tolist(), corpus.golds(questions, found)).tolist(),
        "retr": rounded(np.einsum("qd,qkd->qk", queries, vectors.take(found))),
        "readers": [{"name": w, "attention": rounded(one[:n])} for w, one in scores.items()],
    }


def data(lab: Lab) -> dict[str, Any]:
    """Everything the page holds."""
    own, distill = lab.profile.attention, lab.profile.distill
    choices = {"rows": ROWS, "norm": ("off", "on"), "pooling": POOLINGS}
    places = (ROWS.index(own.rows), int(own.norm), POOLINGS.index(own.pooling))
    given = {"choices": choices, "start": dict(zip(choices, places, strict=True))}
    given |= {"entropy": distill.entropy, "theta": distill.retriever_temperature}
    return given | {"sets": [set_data(lab, name) for name in lab.sets]}


def body(lab: Lab) -> str:
    """The page's HTML, without the frame that the report gives every page."""
    # With "<" written as an escape no text can end the script element or open a comment in it.
    held = json.dumps(data(lab), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = asset("sliders.html").read_text("utf8")
    return page.replace("{{data}}", held.replace("<", "\\u003c"))
