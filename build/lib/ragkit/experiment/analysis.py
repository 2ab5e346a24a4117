"""What notebooks 05 to 08 look at: tokens of every reader, closeness in every space, indicators beside retrieval gains."""

from __future__ import annotations

from ragkit.errors import IndicatorError, NounsError

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.indicators import measures as indicators
from ragkit.indicators import metrics
from ragkit.data import speech
from ragkit.data.questions import Question
from ragkit.indicators.measures import Floats, Tokens
from ragkit.experiment.lab import READERS, Lab
from ragkit.data.passages import Passage
from ragkit.models.reader import Reader
from ragkit.experiment.store import write_arrays

TAUGHT_BY = ("attention", "perplexity")  # the signals that every reader teaches by
BESIDE = ("LOOP", "EMDR2")  # and those that only the two regimes' readers do
Goal = Literal["answer", "nouns"]  # what closeness is measured to: Indicator 1, Indicator 2
INDICATORS: dict[Goal, str] = {"answer": "Indicator 1", "nouns": "Indicator 2"}
SPACES = ("input", "own", "retriever", "contextual")  # where closeness can be measured
CONTROLS = ("permuted", "overlap")  # the input space with its vectors dealt out anew; 1 for the wanted tokens and 0 for others


def make_tokens(reader: Reader, questions: list[Question], found: list[list[Passage]], folder: Path) -> None:
    tokens = indicators.look_at_tokens(reader, questions, found)
    write_arrays(folder / "tokens.safetensors", vars(tokens))


def make_contextual(reader: Reader, questions: list[Question], found: list[list[Passage]], nouns: list[list[tuple[int, int]]], folder: Path) -> None:
    to_answer, to_nouns = indicators.contextual_closeness(reader, questions, found, nouns)
    write_arrays(folder / "closeness.safetensors", {"answer": to_answer, "nouns": to_nouns})


class Analysis:
    """The token tables of one set, and what is computed from them; the stages are the lab's."""

    def __init__(self, lab: Lab, set_name: str) -> None:
        self.lab, self.set_name = lab, set_name
        self.questions = lab.corpus(set_name).questions["test"][: lab.profile.indicators.questions]
        self.found = lab.found(set_name, "test")[: len(self.questions)]
        self.tokens = cache(self._tokens)
        self.closeness = cache(self._closeness)
        self.indicator = cache(self._indicator)
        self.hit_gains = cache(self._hit_gains)
        self.runs = cache(self._runs)
        self.reader = cache(lambda which: lab.reader(set_name, which))

    def _runs(self) -> dict[int, Analysis]:
        """This analysis and its like for the readers of every other run of Step 1, by seed."""
        first, *others = self.lab.profile.step1_seeds
        return {first: self} | {seed: Analysis(self.lab.again(seed, self.set_name), self.set_name) for seed in others}

    def gold_found(self) -> NDArray[np.bool_]:
        """Whether the candidates hold a gold passage `[questions]`."""
        ranking = self.lab.candidates(self.set_name)["test"][: len(self.questions)]
        return metrics.hits(ranking.tolist(), self.lab.corpus(self.set_name).golds(self.questions, ranking), self.lab.profile.k) > 0

    def record(self, which: str) -> dict[str, Any]:
        return {"reader": self.lab.reader_record(), "which": which, "questions": len(self.questions), "k": self.lab.profile.k}

    def _tokens(self, which: str) -> Tokens:
        record = {**self.record(which), "style": self.lab.style(self.set_name, which)}
        folder = self.lab.open(
            f"tokens/{self.set_name}/{which.replace(' ', '-')}", lambda f: make_tokens(self.reader(which), self.questions, self.found, f), record,
            self.lab.upstream_of(self.set_name, which), [make_tokens],
        )  # fmt: skip
        return Tokens(**load_file(folder / "tokens.safetensors"))

    def nouns(self) -> list[list[tuple[int, int]]]:
        """Character spans of each question's nouns. Raises NounsError if no noun finder is at hand."""
        return self.lab.noun_spans(self.set_name, "test")[: len(self.questions)]

    def _closeness(self, which: str, goal: Goal, space: str) -> tuple[Floats, NDArray[np.bool_]]:
        """Closeness of a reader's passage tokens to the goal `[tokens]`, and which of them are one of the goal's own tokens."""
        tokens, reader = self.tokens(which), self.reader(which)
        if goal == "answer":
            wanted = indicators.answer_ids(reader, self.questions)
        else:
            pairs = zip(self.questions, self.nouns(), strict=True)
            wanted = [[token for token, inside in indicators.within_spans(reader, q.text, spans) if inside] for q, spans in pairs]
        places = indicators.by_question(tokens.question)
        exact = np.concatenate([np.isin(tokens.ids[mine], ids) for mine, ids in zip(places, wanted, strict=True)])
        if space == "overlap":
            return exact.astype(np.float64), exact
        if space == "contextual":
            close = self.contextual(goal)
            if len(close) != len(exact):
                raise IndicatorError(f"{which} sees other passage tokens than the off-the-shelf reader; choose another indicators.space.")
            return close, exact
        frozen, table = self.space(which, space)
        vectors = indicators.embeddings(reader.tokenizer, tokens.ids, table, frozen)
        goals = [indicators.embeddings(reader.tokenizer, np.array(ids, dtype=np.int64), table, frozen) for ids in wanted]
        return np.concatenate([indicators.closeness(vectors[mine], one) for mine, one in zip(places, goals, strict=True)]), exact

    def space(self, which: str, space: str) -> tuple[Any, Any]:
        """A space's tokenizer and its embedding table."""
        if space == "retriever":
            retriever = self.lab.retriever(self.set_name)
            return retriever.tokenizer, retriever.model.get_input_embeddings().weight  # type: ignore[operator]
        reader = self.reader(which if space == "own" else "off-the-shelf")
        table = reader.model.get_input_embeddings().weight
        if space == "permuted":
            table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(self.lab.profile.seed))]
        return reader.tokenizer, table

    def contextual(self, goal: Goal) -> Floats:
        """Closeness in the off-the-shelf reader's last hidden states `[tokens]`, asked with the question prompt."""
        try:
            nouns = self.nouns()
        except NounsError:
            if goal == "nouns":
                raise
            nouns = [[] for _ in self.questions]
        record = {**self.record("off-the-shelf"), "nouns": nouns}

        def make(folder: Path) -> None:
            reader = Reader.load(self.lab.profile.reader.model, self.lab.profile.reader)
            if reader.model.config.is_encoder_decoder:
                raise IndicatorError("The contextual space needs a decoder-only reader; choose another indicators.space.")
            make_contextual(reader, self.questions, self.found, nouns, folder)

        folder = self.lab.open(f"contextual/{self.set_name}", make, record, [f"candidates/{self.set_name}"], [make_contextual])
        return load_file(folder / "closeness.safetensors")[goal].astype(np.float64)

    def _indicator(self, which: str, goal: Goal, space: str | None = None) -> pd.DataFrame:
        """Indicator 1 (`answer`) or 2 (`nouns`) of a reader, a row a question (see `indicators.indicator`), in the profile's space or another."""
        profile, tokens = self.lab.profile, self.tokens(which)
        close, exact = self.closeness(which, goal, space or profile.indicators.space)
        return indicators.indicator(tokens.attention(profile.attention), close, tokens.question, exact, profile.indicators.share)

    def speech(self, which: str) -> list[str]:
        """Gold part of speech of the word that each passage token belongs to `[tokens]`; for embedded worlds only."""
        tokens, reader, found = self.tokens(which), self.reader(which), []
        for number, passages in enumerate(self.found):
            for place, passage in enumerate(passages):
                ids = tokens.ids[(tokens.question == number) & (tokens.owner == place)]
                words = speech.parts_of_speech(passage.text)
                ends = np.array([end for _, end, _ in words])
                found += [words[i][2] for i in np.searchsorted(ends, indicators.last_characters(reader, passage.text, ids), side="right")]
        return found

    def targets(self) -> list[str]:
        """Every target that Step 2 is run for in notebooks 06 and 07."""
        return [f"{which} {signal}" for signal in TAUGHT_BY for which in self.lab.readers()] + [f"{which} {signal}" for signal in BESIDE for which in READERS]

    def _hit_gains(self, target: str) -> Floats:
        """Gain in HR@5 over the initial retriever of each test question under each seed `[seeds, questions]`."""
        return np.stack([self.gain_of(self.lab.distilled(self.set_name, target, seed)[0]) for seed in self.lab.profile.distill.seeds])

    def gain_of(self, ranking: NDArray[np.int64]) -> Floats:
        """Gain in HR@5 of a test ranking over the initial retriever `[questions]`."""
        corpus = self.lab.corpus(self.set_name)
        rankings = (ranking, self.lab.candidates(self.set_name)["test"])
        after, before = (metrics.hits(found.tolist(), corpus.golds(corpus.questions["test"], found), 5) for found in rankings)
        return after - before


def computed(sets: Mapping[str, Analysis]) -> dict[Goal, str]:
    """The indicators, by their goals, that every set can have; says why where Indicator 2 is not among them."""
    try:
        for analysis in sets.values():
            analysis.nouns()
    except NounsError as error:
        sys.stdout.write(f"Indicator 2 is not computed: {error}\n")
        return {"answer": INDICATORS["answer"]}
    return INDICATORS
