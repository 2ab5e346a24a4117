"""What notebooks 05 to 11 look at: tokens, closeness, and indicators beside retrieval gains."""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.data.corpus import hits
from ragkit.data.speech import Tagged, parts_of_speech
from ragkit.distillation.targets import UNTAUGHT
from ragkit.errors import NounsError
from ragkit.experiment.lab import Lab
from ragkit.experiment.wanted import TAUGHT_BY
from ragkit.indicators import measures
from ragkit.indicators.measures import Bools, Cut, Floats, Interval, Tokens
from ragkit.settings import WorldSet

COMPARED = ("attention", "Spearman closest")  # the two numbers of an indicator, as in the figure
DIFFERENCE = " minus ".join(TAUGHT_BY)
Goal = Literal["answer", "nouns"]  # what closeness is measured to: Indicator 1, Indicator 2


class Analysis:
    """The token tables of one set, and what is computed from them; the stages are the lab's."""

    def __init__(self, lab: Lab, set_name: str) -> None:
        self.lab, self.set_name = lab, set_name
        self.questions = lab.corpus(set_name).questions["test"][: lab.profile.indicators.questions]
        self.found = lab.found(set_name, "test")[: len(self.questions)]
        for name in ("runs", "tokens", "closeness", "indicator", "hit_gains", "groups"):
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

    def tokens(self, which: str, target: str = "", titles: bool = False) -> Tokens:
        """The passage tokens as a reader saw them, with those of the `titles` or without: of the
        initial passages, or of those that the retriever of a target finds."""
        tokens = Tokens.load(self.opened("tokens", which, target))
        return tokens if titles else tokens.texts

    def closeness(
        self, which: str, goal: Goal, space: str, target: str = "", titles: bool = False
    ) -> tuple[Floats, Bools]:
        """Closeness of a reader's `tokens` to the goal `[tokens]` in one of `measures.SPACES` or
        CONTROLS, and which are the goal's own. NounsError, DataError where there is none."""
        if goal == "nouns":
            self.lab.noun_spans(self.set_name, "test")  # says why, where there are none
        found = measures.load_closeness(self.opened("closeness", which, target), goal, space)
        kept = titles | ~self.tokens(which, target, True).title
        return found[0][kept], found[1][kept]

    def indicator(
        self, which: str, goal: Goal, space: str | None = None, target: str = ""
    ) -> pd.DataFrame:
        """A reader's indicator, a row a question (`measures.indicator`); in the profile's space."""
        settings, tokens = self.lab.profile.indicators, self.tokens(which, target)
        close, exact = self.closeness(which, goal, space or settings.space, target)
        attention = tokens.attention(self.lab.profile.attention)
        return measures.indicator(attention, close, tokens.question, exact, settings.share)

    def by_word(self, which: str, cut: Cut, titles: bool = False) -> list[str]:
        """`measures.by_word` of a reader's `tokens`; 'unknown' where a token's place is that."""
        labels = measures.by_word(self.tokens(which, titles=titles), self.found, cut)
        return [label or "unknown" for label in labels]

    def speech(self) -> Callable[[str], list[Tagged]]:
        """What cuts this set's texts into tagged words: the worlds' own, or spaCy's; NounsError."""
        if isinstance(self.lab.sets[self.set_name], WorldSet):
            return parts_of_speech
        from ragkit.indicators.nouns import load_nouns  # it loads spaCy and torch, for real text

        pipeline = load_nouns(self.lab.profile.nouns)
        return lambda text: [(w.idx, w.idx + len(w), w.pos_) for w in pipeline(text)]

    def hits(self, ranking: NDArray[np.int64] | None = None, k: int = 5) -> Floats:
        """HR@k of each test question by a ranking `[questions]`; default: the initial one."""
        rows = self.lab.candidates(self.set_name)["test"] if ranking is None else ranking
        corpus = self.lab.corpus(self.set_name)
        return hits(rows.tolist(), corpus.golds(corpus.questions["test"], rows), k)

    def gold_found(self) -> Bools:
        """Whether the k passages of each question looked at hold a gold one `[questions]`."""
        return self.hits(k=self.lab.profile.k)[: len(self.questions)] > 0

    def hit_gains(self, target: str) -> Floats:
        """Gain in HR@5 of each test question by a target `[seeds, questions]`."""
        seeds = self.lab.graph.seeds(target)
        rankings = [self.lab.distilled(self.set_name, target, seed)[0] for seed in seeds]
        return np.stack([self.hits(ranking) for ranking in rankings]) - self.hits()

    def groups(self, part: str = "test") -> NDArray[np.str_]:
        """What each question of a part is resampled with: its entity, or on real text its id."""
        return np.array([q.entity or q.id for q in self.lab.corpus(self.set_name).questions[part]])

    def mean_of(self, values: Floats, part: str = "test") -> Interval:
        """Mean of values of the first questions of a part (`[questions]`, or of several seeds
        `[seeds, questions]`), NaN left out, with an interval over their groups and the seeds."""
        groups = self.groups(part)[: values.shape[-1]]
        return measures.interval(values, groups, self.lab.profile.evaluate.bootstrap)

    def followings(self, goal: Goal) -> pd.DataFrame:
        """How well an indicator orders the readers of all runs of Step 1 by the gain that each
        teaches: columns measure (COMPARED), signal (TAUGHT_BY, DIFFERENCE), readers, trainings,
        correlation (of ranks), low, high, value (its Interval). Trainings are drawn, for readers of
        one are no independent sample; the untaught ones are one more to draw, but no training."""
        seen, rows = dict[tuple[str, str], Analysis](), []
        for seed, run in self.runs().items():
            for which in self.lab.readers():
                seen.setdefault((which, "" if which in UNTAUGHT else str(seed)), run)
        names, training = np.unique([of for _, of in seen], return_inverse=True)
        drawn = measures.drawn(len(names), self.lab.profile.evaluate.bootstrap).astype(int)
        times = np.vstack([np.ones(len(seen), int), drawn[:, training]])  # first all as they are
        places = np.indices(times.shape).reshape(2, -1)
        draw, reader = (np.repeat(one, times.ravel()) for one in places)
        for measure in COMPARED:
            means = [run.indicator(w, goal)[measure].mean() for (w, _), run in seen.items()]
            values, found = np.round(means, 12), {}  # rounding errors break no tie
            for signal in TAUGHT_BY:
                gains = [run.hit_gains(f"{w} {signal}").mean() for (w, _), run in seen.items()]
                given = values[reader], np.round(gains, 12)[reader], draw
                found[signal] = measures.spearman(*given, len(times))
            found[DIFFERENCE] = found[TAUGHT_BY[0]] - found[TAUGHT_BY[1]]
            for signal, (mean, *cloud) in found.items():
                value = measures.percentiles(np.array(cloud), float(mean), len(seen))
                row = {"measure": measure, "signal": signal, "readers": len(seen)}
                row |= {"trainings": len({*names} - {""}), "correlation": value.mean}
                rows.append(row | {"low": value.low, "high": value.high, "value": value})
        return pd.DataFrame(rows)


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
