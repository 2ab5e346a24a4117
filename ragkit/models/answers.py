"""Answers of readers as stages: how an untaught one is asked best, test questions, premises."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragkit.data.files import write_json
from ragkit.data.questions import Asked, Pair
from ragkit.data.text import exact_match
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.reader import Reader


def answered(reader: Reader, pairs: Sequence[Pair]) -> tuple[list[str], float, int]:
    """The reader's answers, their mean exact match, and how many prompts were too long."""
    prompts = [reader.prompt(question, found) for question, found in pairs]
    answers, golds = reader.answer(prompts), [question.answers for question, _ in pairs]
    exact = float(np.mean(list(map(exact_match, answers, golds))))
    return answers, exact, sum(p.trimmed > 0 for p in prompts)


def write(folder: Path, trimmed: int, prompts: int, **made: Any) -> None:
    """Writes what a stage made, a JSON file each, and how many of its prompts were too long."""
    if device.is_main():
        for name, value in {**made, "trimmed": {"trimmed": trimmed, "prompts": prompts}}.items():
            write_json(folder / f"{name}.json", value)


def make_style(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """How the off-the-shelf reader is asked, by question or (where there are any) cloze: as it
    answers better on dev; the weaker prompt as it answers worse."""
    pairs = Asked.open(inputs, "dev", settings["answered"], settings["k"]).pairs
    reader, scores, trimmed = open_reader(inputs, settings), dict[str, float](), 0
    for style in ("question", "cloze") if settings["clozes"] else ("question",):
        reader.style = style
        _, scores[style], cut = answered(reader, pairs)
        trimmed += cut
    best_first = sorted(scores, key=lambda style: -scores[style])  # of a tie, the question
    styles = {"off-the-shelf": best_first[0], "weaker prompt": best_first[-1], "EM": scores}
    write(folder, trimmed, len(scores) * len(pairs), style=styles)


def make_answers(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Answers to the first test questions, with the k best passages of a ranking or with none."""
    k = 0 if settings["closed_book"] else settings["k"]
    pairs = Asked.open(inputs, "test", settings["answered"], k).pairs
    answers, _, trimmed = answered(open_reader(inputs, settings), pairs)
    write(folder, trimmed, len(pairs), answers=answers)


def premise_cases(asked: Asked, k: int, seed: int) -> dict[str, list[Pair]]:
    """Questions of dev with passages that show what a reader can do.
    Where no gold passage of a question is known or found, it is left out of the cases that need
    one; where no kinds of facts are known, as on real text, so is the case of one kind."""
    corpus, rng = asked.corpus, random.Random(seed)
    names = ("gold among the passages", "the same, permuted", "same kind of fact, other entities")
    cases: dict[str, list[Pair]] = {name: [] for name in names}
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
        cases[names[0]].append((q, found))
        cases[names[1]].append((q, permuted))
        cases[names[2]] += [(q, of_one_kind)] if q.relation else []
    cases["no passages"] = [(q, []) for q in asked.questions]
    return {name: pairs for name, pairs in cases.items() if pairs}


def make_premises(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """A reader's exact match in every one of `premise_cases`."""
    asked = Asked.open(inputs, "dev", settings["answered"])
    cases = premise_cases(asked, settings["k"], settings["seed"])
    reader = open_reader(inputs, settings)
    made = {name: answered(reader, pairs) for name, pairs in cases.items()}
    trimmed, prompts = sum(cut for _, _, cut in made.values()), sum(map(len, cases.values()))
    write(folder, trimmed, prompts, exact={name: exact for name, (_, exact, _) in made.items()})
