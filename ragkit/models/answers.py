"""Answers of readers as stages: to the test questions, and those that show what a reader can."""

import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragkit.data.corpus import Asked, Pair
from ragkit.data.text import exact_match
from ragkit.models import device
from ragkit.models.fid import open_reader


def make_answers(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Answers to the first test questions, with the k best passages of a ranking or with none."""
    k = 0 if settings["closed_book"] else settings["k"]
    asked = Asked.open(inputs, "test", settings["answered"], k)
    reader = open_reader(inputs, settings)
    answers = reader.answer(list(map(reader.prompt, asked.questions, asked.passages)))
    device.write(folder, {"answers.json": answers})


def premise_cases(asked: Asked, k: int, seed: int) -> dict[str, list[Pair]]:
    """Questions of dev with passages that show what a reader can do.
    Where no gold passage of a question is known or found, it is left out of the cases that need
    one; where no kinds of facts are known, as on real text, so is the case of one kind."""
    corpus, rng, cases = asked.corpus, random.Random(seed), defaultdict[str, list[Pair]](list)
    for q, row in zip(asked.questions, asked.candidates.tolist(), strict=True):
        if not (places := corpus.gold(q, row)):
            continue
        gold, dev = corpus.passages[places[0]], corpus.questions["dev"] if q.relation else []
        rest = [p for p in map(corpus.passages.__getitem__, row[:k]) if p.id != gold.id][: k - 1]
        found = rng.sample([gold, *rest], len(rest) + 1)
        permuted = rng.sample(found, len(found))
        alike = [o for o in dev if o.relation == q.relation and o.entity != q.entity]
        others = [corpus.passages[o.gold[0]] for o in rng.sample(alike, min(len(alike), k - 1))]
        of_one_kind = rng.sample([gold, *others], len(others) + 1)
        cases["gold among the passages"].append((q, found))
        cases["the same, permuted"].append((q, permuted))
        if q.relation:
            cases["same kind of fact, other entities"].append((q, of_one_kind))
    cases["no passages"] = [(q, []) for q in asked.questions]
    return cases


def make_premises(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`exact.json`: exact match by `premise_cases` and question of dev; null where left out."""
    asked = Asked.open(inputs, "dev", settings["answered"])
    reader, exact = open_reader(inputs, settings), dict[str, list[float | None]]()
    for name, pairs in premise_cases(asked, settings["k"], settings["seed"]).items():
        answers = reader.answer([reader.prompt(*pair) for pair in pairs])
        told = zip(pairs, answers, strict=True)
        known = {q.id: exact_match(answer, q.answers) for (q, _), answer in told}
        exact[name] = [known.get(q.id) for q in asked.questions]
    device.write(folder, {"exact.json": exact})
