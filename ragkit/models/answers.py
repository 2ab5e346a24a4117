"""Answers of readers as stages: how an untaught one is asked best, the test questions, and the
premises on dev.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ragkit.data.files import write_json
from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.data.text import exact_match
from ragkit.models import device
from ragkit.models.fid import fitted, load_reader, open_reader
from ragkit.models.reader import Reader, note_trimmed
from ragkit.settings import ReaderSettings


def ranking_of(folder: Path, part: str) -> list[list[int]]:
    """The places of a part's passages, a row a question, as a stage of candidates or of Step 2
    ranked them.
    """
    files = [folder / f"{name}.safetensors" for name in ("ranking", "candidates")]
    return load_file(next(file for file in files if file.is_file()))[part].tolist()


def answered(
    reader: Reader, questions: Sequence[Question], found: Sequence[Sequence[Passage]]
) -> tuple[list[str], int]:
    """The reader's answers, and how many of its prompts were too long."""
    prompts = [reader.prompt(q, passages) for q, passages in zip(questions, found, strict=True)]
    return reader.answer(prompts), sum(p.trimmed > 0 for p in prompts)


def mean_exact_match(answers: Sequence[str], questions: Sequence[Question]) -> float:
    scores = [exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)]
    return float(np.mean(scores))


def make_style(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """How the off-the-shelf reader is asked: as it answers better on dev; the weaker prompt as it
    answers worse.

    It is tried with the question and, where there are clozes, with those.
    """
    chosen, k = ReaderSettings(**settings["reader"]), settings["k"]
    corpus = Corpus.load("", inputs["passages"], inputs["questions"])
    questions = corpus.questions["dev"][: settings["answered"]]
    rows = ranking_of(inputs["candidates"], "dev")[: len(questions)]
    found = [[corpus.passages[i] for i in row[:k]] for row in rows]
    scores, trimmed = {}, 0
    for style in ("question", "cloze") if settings["clozes"] else ("question",):
        reader = fitted(load_reader(chosen.model, chosen, style), inputs)
        answers, cut = answered(reader, questions, found)
        scores[style] = mean_exact_match(answers, questions)
        trimmed += cut
    note_trimmed(trimmed, len(scores) * len(questions), folder)
    best_first = sorted(scores, key=lambda style: -scores[style])  # of a tie, the question
    if device.is_main():
        styles = {"off-the-shelf": best_first[0], "weaker prompt": best_first[-1]}
        write_json(folder / "style.json", styles | {"EM": scores})


def make_answers(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """A reader's answers to the first test questions, with the k best passages of a ranking or with
    none.
    """
    corpus = Corpus.load("", inputs["passages"], inputs["questions"])
    questions = corpus.questions["test"][: settings["answered"]]
    k = 0 if settings["closed_book"] else settings["k"]
    rows = ranking_of(inputs["ranking"], "test")[: len(questions)]
    found = [[corpus.passages[i] for i in row[:k]] for row in rows]
    answers, trimmed = answered(open_reader(inputs, settings), questions, found)
    note_trimmed(trimmed, len(questions), folder)
    if device.is_main():
        write_json(folder / "answers.json", answers)


Case = tuple[list[Question], list[list[Passage]]]


def premise_cases(
    corpus: Corpus, ranking: Sequence[Sequence[int]], answered: int, k: int, seed: int
) -> dict[str, Case]:
    """Questions of dev with passages that show what a reader can do.

    Where no gold passage of a question is known or found, it is left out of the cases that need
    one; where no kinds of facts are known, as on real text, so is the case of one kind.
    """
    dev = corpus.questions["dev"]
    rng = random.Random(seed)
    names = ("gold among the passages", "the same, permuted", "same kind of fact, other entities")
    cases: dict[str, Case] = {name: ([], []) for name in names}
    for q, row in zip(dev[:answered], ranking, strict=False):
        if not (places := corpus.gold(q, list(row))):
            continue
        gold = corpus.passages[places[0]]
        found = [corpus.passages[i] for i in row[:k]]
        rest = [p for p in found if p.id != gold.id][: k - 1]
        with_gold = rng.sample([gold, *rest], len(rest) + 1)
        given = [with_gold, rng.sample(with_gold, len(with_gold))]
        others = [
            corpus.passages[o.gold[0]]
            for o in dev
            if q.relation and o.relation == q.relation and o.entity != q.entity
        ]
        chosen = rng.sample(others, min(len(others), k - 1))
        given.append(rng.sample([gold, *chosen], len(chosen) + 1))
        for name, passages in zip(names if q.relation else names[:2], given, strict=False):
            cases[name][0].append(q)
            cases[name][1].append(passages)
    cases["no passages"] = (dev[:answered], [[] for _ in dev[:answered]])
    return {name: case for name, case in cases.items() if case[0]}


def make_premises(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """A reader's answers, and their exact match, in every one of `premise_cases`."""
    corpus = Corpus.load("", inputs["passages"], inputs["questions"])
    rows = ranking_of(inputs["candidates"], "dev")
    cases = premise_cases(corpus, rows, settings["answered"], settings["k"], settings["seed"])
    reader = open_reader(inputs, settings)
    answers, exact, trimmed = {}, {}, 0
    for name, (questions, found) in cases.items():
        answers[name], cut = answered(reader, questions, found)
        exact[name] = mean_exact_match(answers[name], questions)
        trimmed += cut
    note_trimmed(trimmed, sum(len(case[0]) for case in cases.values()), folder)
    if device.is_main():
        write_json(folder / "answers.json", answers)
        write_json(folder / "exact.json", exact)
