"""What notebooks 05 to 08 look at: tokens, closeness, and indicators beside retrieval gains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.data.questions import hits
from ragkit.data.speech import Tagged, parts_of_speech
from ragkit.errors import NounsError
from ragkit.experiment.lab import Lab
from ragkit.indicators import measures
from ragkit.indicators.measures import Floats, Tokens

Goal = Literal["answer", "nouns"]  # what closeness is measured to: Indicator 1, Indicator 2
INDICATORS: dict[Goal, str] = {"answer": "Indicator 1", "nouns": "Indicator 2"}


class Analysis:
    """The token tables of one set, and what is computed from them; the stages are the lab's."""

    def __init__(self, lab: Lab, set_name: str) -> None:
        self.lab, self.set_name = lab, set_name
        self.questions = lab.corpus(set_name).questions["test"][: lab.profile.indicators.questions]
        self.found = lab.found(set_name, "test")[: len(self.questions)]
        self.runs = cache(self._runs)
        self.tokens = cache(self._tokens)
        self.closeness = cache(self._closeness)
        self.indicator = cache(self._indicator)
        self.hit_gains = cache(self._hit_gains)

    def _runs(self) -> dict[int, Analysis]:
        """This analysis and its like for the readers of every other run of Step 1, by seed."""
        first, *others = self.lab.profile.step1_seeds
        further = {seed: Analysis(self.lab.again(seed), self.set_name) for seed in others}
        return {first: self, **further}

    def gold_found(self) -> NDArray[np.bool_]:
        """Whether the candidates hold a gold passage `[questions]`."""
        ranking = self.lab.candidates(self.set_name)["test"][: len(self.questions)]
        golds = self.lab.corpus(self.set_name).golds(self.questions, ranking)
        return hits(ranking.tolist(), golds, self.lab.profile.k) > 0

    def _tokens(self, which: str) -> Tokens:
        return Tokens.load(self.lab.open("tokens", self.set_name, which))

    def nouns(self) -> list[list[tuple[int, int]]]:
        """Character spans of each question's nouns; NounsError if no noun finder is at hand."""
        return self.lab.noun_spans(self.set_name, "test")[: len(self.questions)]

    def _closeness(self, which: str, goal: Goal, space: str) -> tuple[Floats, NDArray[np.bool_]]:
        """Closeness of a reader's tokens to the goal `[tokens]`, and which are the goal's own.

        In one of `measures.SPACES` or CONTROLS; NounsError, IndicatorError where there is none.
        """
        if goal == "nouns":
            self.nouns()  # says why, where there are none
        folder = self.lab.open("closeness", self.set_name, which)
        return measures.load_closeness(folder, goal, space)

    def _indicator(self, which: str, goal: Goal, space: str | None = None) -> pd.DataFrame:
        """Indicator 1 (`answer`) or 2 (`nouns`) of a reader, a row a question.

        In the profile's space or another; columns as in `measures.indicator`.
        """
        settings, tokens = self.lab.profile.indicators, self.tokens(which)
        close, exact = self.closeness(which, goal, space or settings.space)
        attention = tokens.attention(self.lab.profile.attention)
        return measures.indicator(attention, close, tokens.question, exact, settings.share)

    def by_word(self, which: str, cut: Callable[[str], list[Tagged]]) -> list[str]:
        """What `cut` says of the word that each passage token belongs to, or 'unknown' `[tokens]`.

        `cut` gives the start, end and label of every word of a passage's text, in order.
        """
        tokens, labels = self.tokens(which), []
        places = measures.by_question(tokens.question, len(self.found))
        for mine, passages in zip(places, self.found, strict=True):
            for place, passage in enumerate(passages):
                last = tokens.ends[mine][tokens.owner[mine] == place]
                words = cut(passage.text)
                numbers = np.searchsorted([end for _, end, _ in words], last, side="right")
                for number, known in zip(numbers, last >= 0, strict=True):
                    labels.append(words[number][2] if known else "unknown")
        return labels

    def speech(self, which: str) -> list[str]:
        """Gold part of speech of each passage token's word `[tokens]`; in embedded worlds only."""
        return self.by_word(which, parts_of_speech)

    def _hit_gains(self, target: str) -> Floats:
        """Gain in HR@5 over the initial retriever of each test question `[seeds, questions]`."""
        seeds = self.lab.profile.distill.seeds
        rankings = [self.lab.distilled(self.set_name, target, seed)[0] for seed in seeds]
        return np.stack([self.gain_of(ranking) for ranking in rankings])

    def gain_of(self, ranking: NDArray[np.int64]) -> Floats:
        """Gain in HR@5 of a test ranking over the initial retriever `[questions]`."""
        corpus, initial = self.lab.corpus(self.set_name), self.lab.candidates(self.set_name)["test"]
        asked = corpus.questions["test"]
        after, before = (
            hits(found.tolist(), corpus.golds(asked, found), 5) for found in (ranking, initial)
        )
        return after - before


def computed(sets: Mapping[str, Analysis]) -> dict[Goal, str]:
    """The indicators that every set can have, by goal; says why where Indicator 2 is missing."""
    try:
        for analysis in sets.values():
            analysis.nouns()
    except NounsError as error:
        sys.stdout.write(f"Indicator 2 is not computed: {error}\n")
        return {"answer": INDICATORS["answer"]}
    return INDICATORS
