"""What notebooks 05 to 09 look at: tokens, closeness, and indicators beside retrieval gains."""

import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.data.corpus import hits
from ragkit.data.speech import Tagged
from ragkit.distillation.targets import READERS
from ragkit.errors import NounsError
from ragkit.experiment.graph import TAUGHT_BY
from ragkit.experiment.lab import Lab
from ragkit.indicators import measures
from ragkit.indicators.measures import Floats, Interval, Tokens

COMPARED = ("attention", "Spearman")  # the two numbers of an indicator, as the paper names them
DIFFERENCE = " minus ".join(TAUGHT_BY)
Goal = Literal["answer", "nouns"]  # what closeness is measured to: Indicator 1, Indicator 2


class Analysis:
    """The token tables of one set, and what is computed from them; the stages are the lab's."""

    def __init__(self, lab: Lab, set_name: str) -> None:
        self.lab, self.set_name = lab, set_name
        self.questions = lab.corpus(set_name).questions["test"][: lab.profile.indicators.questions]
        self.found = lab.found(set_name, "test")[: len(self.questions)]
        for name in ("runs", "tokens", "closeness", "indicator", "hit_gains"):
            setattr(self, name, cache(getattr(self, name)))  # each is computed once

    def runs(self) -> dict[int, "Analysis"]:
        """This analysis and its like for the readers of every other run of Step 1, by seed."""
        first, *others = self.lab.profile.step1_seeds
        labs = {seed: self.lab.with_graph(self.lab.graph.again(seed)) for seed in others}
        return {first: self, **{s: Analysis(lab, self.set_name) for s, lab in labs.items()}}

    def opened(self, kind: str, which: str, target: str) -> Path:
        """A stage of a reader's tokens, with the passages that a target's retriever finds."""
        of = self.lab.graph.system(self.set_name, which, target)
        return self.lab.open_stage(self.lab.graph.stage(kind, of))

    def tokens(self, which: str, target: str = "") -> Tokens:
        """The passage tokens as a reader saw them: of the initial passages, or of those that the
        retriever of a target finds."""
        return Tokens.load(self.opened("tokens", which, target))

    def closeness(
        self, which: str, goal: Goal, space: str, target: str = ""
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Closeness of a reader's tokens to the goal `[tokens]` in one of `measures.SPACES` or
        CONTROLS, and which are the goal's own. NounsError, DataError where there is none."""
        if goal == "nouns":
            self.lab.noun_spans(self.set_name, "test")  # says why, where there are none
        return measures.load_closeness(self.opened("closeness", which, target), goal, space)

    def indicator(
        self, which: str, goal: Goal, space: str | None = None, target: str = ""
    ) -> pd.DataFrame:
        """A reader's indicator, a row a question (`measures.indicator`); in the profile's space."""
        settings, tokens = self.lab.profile.indicators, self.tokens(which, target)
        close, exact = self.closeness(which, goal, space or settings.space, target)
        attention = tokens.attention(self.lab.profile.attention)
        return measures.indicator(attention, close, tokens.question, exact, settings.share)

    def by_word(self, which: str, cut: Callable[[str], list[Tagged]]) -> list[str]:
        """The label of the word that each passage token ends in, or 'unknown' `[tokens]`; `cut`
        gives start, end and label of every word of a passage's text, in order."""
        tokens, labels = self.tokens(which), []
        words = [[cut(passage.text) for passage in passages] for passages in self.found]
        for place, owner, end in zip(tokens.question, tokens.owner, tokens.ends, strict=True):
            there = words[place][owner]
            number = bisect_right(there, end, key=itemgetter(1))
            labels.append(there[number][2] if end >= 0 else "unknown")
        return labels

    def hits(self, ranking: NDArray[np.int64] | None = None, k: int = 5) -> Floats:
        """HR@k of each test question by a ranking `[questions]`; default: the initial one."""
        rows = self.lab.candidates(self.set_name)["test"] if ranking is None else ranking
        corpus = self.lab.corpus(self.set_name)
        return hits(rows.tolist(), corpus.golds(corpus.questions["test"], rows), k)

    def gold_found(self) -> NDArray[np.bool_]:
        """Whether the k passages of each question looked at hold a gold one `[questions]`."""
        return self.hits(k=self.lab.profile.k)[: len(self.questions)] > 0

    def hit_gains(self, target: str) -> Floats:
        """Gain in HR@5 of each test question by a target `[seeds, questions]`."""
        seeds = self.lab.graph.seeds(target)
        rankings = [self.lab.distilled(self.set_name, target, seed)[0] for seed in seeds]
        return np.stack([self.hits(ranking) for ranking in rankings]) - self.hits()

    def mean_of(self, values: Floats) -> Interval:
        """Mean of the values that are numbers, with an interval over questions."""
        resamples = self.lab.profile.evaluate.bootstrap
        return measures.interval(values[np.isfinite(values)], resamples=resamples)

    def mean_gain(self, gains: Floats) -> Interval:
        """Mean of gains `[seeds, questions]` or `[questions]`, with an interval over both."""
        resamples = self.lab.profile.evaluate.bootstrap
        return measures.paired_gain(gains, np.zeros(gains.shape[-1]), resamples=resamples)

    def differences(self, goal: Goal, space: str | None = None) -> dict[str, Interval]:
        """Fine-tuned minus off-the-shelf, paired by question: both numbers of an indicator."""
        poor, good = (self.indicator(which, goal, space) for which in READERS)
        return {name: self.mean_of((good[name] - poor[name]).to_numpy()) for name in COMPARED}

    def followings(self, goal: Goal) -> pd.DataFrame:
        """How well an indicator orders the readers by the gain that each teaches (questions of both
        resampled independently): columns measure (COMPARED), signal (TAUGHT_BY, DIFFERENCE),
        correlation (of ranks), low, high, readers."""
        readers, resamples = self.lab.readers(), self.lab.profile.evaluate.bootstrap
        draw, rows = np.repeat(np.arange(1 + resamples), len(readers)), []

        def means(values: list[Floats], seed: int) -> Floats:  # the means, then the resampled ones
            given = np.array(values)
            found = np.vstack([np.nanmean(given, axis=1), resampled(given, resamples, seed)])
            return found.round(12).ravel()  # rounding errors, which hang on threads, break no ties

        for measure in COMPARED:
            values = means([self.indicator(w, goal)[measure].to_numpy() for w in readers], 0)
            found = {}
            for signal in TAUGHT_BY:
                gains = means([self.hit_gains(f"{w} {signal}").mean(0) for w in readers], 1)
                found[signal] = measures.spearman(values, gains, draw, 1 + resamples)
            found[DIFFERENCE] = found[TAUGHT_BY[0]] - found[TAUGHT_BY[1]]
            for signal, (value, *cloud) in found.items():
                low, high = pd.Series(cloud).quantile([0.025, 0.975])  # of those that are numbers
                rows.append((measure, signal, value, low, high, len(readers)))
        columns = ["measure", "signal", "correlation", "low", "high", "readers"]
        return pd.DataFrame(rows, columns=columns)


def resampled(values: Floats, resamples: int, seed: int) -> Floats:
    """Bootstrap means `[resamples, rows]` of `values` `[rows, questions]`, NaN left out; the same
    questions are drawn for all rows."""
    n, there = values.shape[1], np.isfinite(values)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    with np.errstate(invalid="ignore"):
        return (drawn @ np.where(there, values, 0).T) / (drawn @ there.T)


def computed(sets: Mapping[str, Analysis]) -> dict[Goal, str]:
    """The indicators that every set can have, by goal; says why where Indicator 2 is missing."""
    found: dict[Goal, str] = {"answer": "Indicator 1", "nouns": "Indicator 2"}
    try:
        for name, analysis in sets.items():
            analysis.lab.noun_spans(name, "test")
    except NounsError as error:
        sys.stdout.write(f"Indicator 2 is not computed: {error}\n")
        del found["nouns"]
    return found
