"""What notebooks 05 to 09 look at: tokens, closeness, and indicators beside retrieval gains."""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.data.questions import hits
from ragkit.data.speech import Tagged
from ragkit.errors import NounsError
from ragkit.experiment.lab import Lab
from ragkit.indicators import measures, metrics
from ragkit.indicators.measures import Floats, Tokens
from ragkit.indicators.metrics import Interval

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

    def _runs(self) -> dict[int, "Analysis"]:
        """This analysis and its like for the readers of every other run of Step 1, by seed."""
        first, *others = self.lab.profile.step1_seeds
        return {first: self} | {
            seed: Analysis(self.lab.again(seed), self.set_name) for seed in others
        }

    def nouns(self) -> list[list[tuple[int, int]]]:
        """Character spans of each question's nouns; NounsError if no noun finder is at hand."""
        return self.lab.noun_spans(self.set_name, "test")[: len(self.questions)]

    def _tokens(self, which: str) -> Tokens:
        return Tokens.load(self.lab.open("tokens", self.set_name, which))

    def _closeness(self, which: str, goal: Goal, space: str) -> tuple[Floats, NDArray[np.bool_]]:
        """Closeness of a reader's tokens to the goal `[tokens]`, and which are the goal's own.

        In one of `measures.SPACES` or CONTROLS; NounsError, IndicatorError where there is none.
        """
        if goal == "nouns":
            self.nouns()  # says why, where there are none
        folder = self.lab.open("closeness", self.set_name, which)
        return measures.load_closeness(folder, goal, space)

    def _indicator(self, which: str, goal: Goal, space: str | None = None) -> pd.DataFrame:
        """A reader's indicator, a row a question (`measures.indicator`); in the profile's space."""
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

    def gold_found(self) -> NDArray[np.bool_]:
        """Whether the k passages hold a gold one `[questions]`."""
        ranking = self.lab.candidates(self.set_name)["test"][: len(self.questions)]
        return self._hits(ranking, self.lab.profile.k) > 0

    def gain_of(self, ranking: NDArray[np.int64]) -> Floats:
        """Gain in HR@5 of a test ranking over the initial retriever `[questions]`."""
        return self._hits(ranking, 5) - self._hits(self.lab.candidates(self.set_name)["test"], 5)

    def _hits(self, ranking: NDArray[np.int64], k: int) -> Floats:
        corpus = self.lab.corpus(self.set_name)
        golds = corpus.golds(corpus.questions["test"][: len(ranking)], ranking)
        return hits(ranking.tolist(), golds, k)

    def _hit_gains(self, target: str) -> Floats:
        """Gain in HR@5 of each test question by a target `[seeds, questions]`."""
        seeds = self.lab.profile.distill.seeds
        rankings = [self.lab.distilled(self.set_name, target, seed)[0] for seed in seeds]
        return np.stack([self.gain_of(ranking) for ranking in rankings])

    def mean_of(self, values: Floats) -> Interval:
        """Mean of the values that are numbers, with an interval over questions."""
        resamples = self.lab.profile.evaluate.bootstrap
        return metrics.interval(values[np.isfinite(values)], resamples=resamples)

    def mean_gain(self, gains: Floats) -> Interval:
        """Mean of gains `[seeds, questions]` or `[questions]`, with an interval over both."""
        resamples = self.lab.profile.evaluate.bootstrap
        return metrics.paired_gain(gains, np.zeros(gains.shape[-1]), resamples=resamples)


def computed(sets: Mapping[str, Analysis]) -> dict[Goal, str]:
    """The indicators that every set can have, by goal; says why where Indicator 2 is missing."""
    try:
        for analysis in sets.values():
            analysis.nouns()
    except NounsError as error:
        sys.stdout.write(f"Indicator 2 is not computed: {error}\n")
        return {"answer": INDICATORS["answer"]}
    return INDICATORS
