"""From what was measured to the ledger: for each claim and set a verdict, and the numbers."""

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ragkit.distillation.targets import READERS
from ragkit.errors import NounsError
from ragkit.experiment import claims, tables
from ragkit.experiment.analysis import Analysis, Goal
from ragkit.experiment.claims import Gain, Part, together
from ragkit.experiment.stages import TAUGHT_BY
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Floats
from ragkit.indicators.metrics import Interval

COMPARED = ("attention", "Spearman")  # the two numbers of an indicator, as the paper names them
LINE = 0.3  # the paper's threshold for Indicator 2
DIFFERENCE = " minus ".join(TAUGHT_BY)
ENOUGH_READERS = 8  # below that a rank correlation over readers says nothing


def regime_gains(analysis: Analysis) -> dict[str, dict[str, Gain]]:
    """Gains in HR@5, EM and F1 of both regimes over the initial retriever, read by one reader."""
    gains: dict[str, dict[str, Gain]] = {}
    for regime in READERS:
        target = f"{regime} attention"
        found = {"HR@5": analysis.hit_gains(target)}
        answers = tables.answer_rows(analysis.lab, analysis.set_name, [target])
        read = answers[answers["reader"] == regime].set_index(["system", "seed", "question"])
        for measure in ("EM", "F1"):
            values = read[measure].unstack()
            found[measure] = values.loc[target].to_numpy() - values.loc["initial"].to_numpy()
        gains[regime] = {m: Gain(analysis.mean_gain(one), len(one)) for m, one in found.items()}
    return gains


def gains_improve(analysis: Analysis) -> Part:
    """C1 on one set."""
    good = regime_gains(analysis)["fine-tuned"]
    told = ", ".join(f"{measure} {gain.value}" for measure, gain in good.items())
    return Part(together([claims.improves(gain) for gain in good.values()]), told)


def gains_fail(analysis: Analysis) -> Part:
    """C2 on one set."""
    poor, good = (gains["HR@5"] for gains in regime_gains(analysis).values())
    return Part(claims.fails(poor, good), f"HR@5 {poor.value} against {good.value}")


def most_attention(analysis: Analysis, goal: Goal) -> Part:
    """C3 (answer) or C4 (nouns): the closest tenth's lift, and its lead over the highest other."""
    profile, tokens = analysis.lab.profile, analysis.tokens("fine-tuned")
    close, _ = analysis.closeness("fine-tuned", goal, profile.indicators.space)
    lifts = measures.deciles(tokens.attention(profile.attention), close, tokens.question)
    lifts = lifts[analysis.gold_found()]
    if np.isnan(lifts).all(0).any():  # as where no gold passage was retrieved for any question
        few = f"{len(lifts)} questions whose gold passage was retrieved"
        return Part("undecided", f"{few}: too few to fill every tenth")
    other = int(np.nanargmax(np.nanmean(lifts[:, :-1], axis=0)))
    top = analysis.mean_of(lifts[:, -1])
    lead = analysis.mean_of(lifts[:, -1] - lifts[:, other])
    told = f"lift of the closest tenth {top}, lead over the next {lead}"
    return Part(claims.most(top, lead), told)


def differences(analysis: Analysis, goal: Goal, space: str) -> dict[str, Interval]:
    """Fine-tuned minus off-the-shelf, paired by question, of both numbers of an indicator."""
    poor, good = (analysis.indicator(which, goal, space) for which in READERS)
    return {name: analysis.mean_of((good[name] - poor[name]).to_numpy()) for name in COMPARED}


def gain_difference(analysis: Analysis) -> Interval:
    """HR@5 of the retriever that the fine-tuned reader taught minus the off-the-shelf one's."""
    poor, good = (analysis.hit_gains(f"{which} attention") for which in READERS)
    return analysis.mean_gain(good - poor)


def higher_when_it_works(analysis: Analysis, goal: Goal, space: str) -> tuple[list[str], str]:
    """The verdicts on both numbers of an indicator, and what was measured."""
    gap, found = gain_difference(analysis), differences(analysis, goal, space)
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    verdicts = [claims.higher_when_it_works(value, gap) for value in found.values()]
    return verdicts, f"fine-tuned minus off-the-shelf: HR@5 gain {gap}, {told}"


def indicator_one(analysis: Analysis) -> Part:
    """C5 on one set."""
    space = analysis.lab.profile.indicators.space
    verdicts, told = higher_when_it_works(analysis, "answer", space)
    return Part(together(verdicts), told)


def indicator_two(analysis: Analysis) -> Part:
    """C6 on one set: 'not comparable' if the verdict depends on the space of closeness."""
    found = {}
    for space in SPACES:
        verdicts, told = higher_when_it_works(analysis, "nouns", space)
        tables_of = [analysis.indicator(which, "nouns", space) for which in READERS]
        poor, good = (analysis.mean_of(one["Spearman"].to_numpy()) for one in tables_of)
        told += f", Spearman of the {READERS[0]} reader {poor}"
        told += f", Spearman of the {READERS[1]} reader {good}"
        line = claims.divided_by(LINE, poor, good, gain_difference(analysis))
        found[space] = Part(together([*verdicts, line]), told)
    own = found[analysis.lab.profile.indicators.space]
    everywhere = all(part.verdict == own.verdict for part in found.values())
    by_space = ", ".join(f"{space} {part.verdict}" for space, part in found.items())
    verdict = own.verdict if everywhere else "not comparable"
    return Part(verdict, f"{own.measured} (by space: {by_space})")


def rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman over the last axis of `[..., readers]`; NaN where one side is constant."""
    a, b = (rankdata(side, axis=-1) for side in (x, y))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def resampled(values: ArrayLike, resamples: int, seed: int) -> Floats:
    """Bootstrap means `[resamples, readers]` of `values` `[readers, questions]`, without NaN.

    The same questions are drawn for all readers.
    """
    table = np.asarray(values)
    n = table.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    there = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        return (drawn @ np.where(there, table, 0).T) / (drawn @ there.T)


def followings(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """How well an indicator orders the readers by the gain that each teaches: rank correlation.

    Columns: measure, signal (attention, perplexity, and their difference), correlation, low, high,
    readers. Resampled are the questions of the indicator and, independently, those of the gain.
    """
    readers, resamples = analysis.lab.readers(), analysis.lab.profile.evaluate.bootstrap

    def means(values: Sequence[Floats], seed: int) -> Floats:  # the means, then the resampled ones
        found = np.vstack([np.nanmean(values, axis=1), resampled(values, resamples, seed)])
        return found.round(12)  # rounding errors, which hang on the threads, must not break ties

    rows = []
    for measure in COMPARED:
        indicators = [analysis.indicator(which, goal)[measure].to_numpy() for which in readers]
        found = {}
        for signal in TAUGHT_BY:
            gains = [analysis.hit_gains(f"{which} {signal}").mean(0) for which in readers]
            found[signal] = rank_correlation(means(indicators, 0), means(gains, 1))
        found[DIFFERENCE] = found[TAUGHT_BY[0]] - found[TAUGHT_BY[1]]
        for signal, (value, *cloud) in found.items():
            low, high = pd.Series(cloud).quantile([0.025, 0.975])  # of those that are numbers
            rows.append((measure, signal, value, low, high, len(readers)))
    columns = ["measure", "signal", "correlation", "low", "high", "readers"]
    return pd.DataFrame(rows, columns=columns)


def less_informative(analysis: Analysis) -> Part:
    """C7 on one set, over both indicators and both of their numbers."""
    verdicts, notes = [], []
    for goal in get_args(Goal):
        table = followings(analysis, goal)
        for row in table[table["signal"] == DIFFERENCE].itertuples():
            value = Interval(row.correlation, row.low, row.high, row.readers)
            enough = row.readers >= ENOUGH_READERS
            verdicts.append(claims.above(value) if enough else "undecided")
            notes.append(f"{goal} {row.measure} {value}")
    return Part(together(verdicts), f"correlation with the gain, {DIFFERENCE}: {', '.join(notes)}")


JUDGES: dict[str, Callable[[Analysis], Part]] = {
    "C1": gains_improve,
    "C2": gains_fail,
    "C3": lambda analysis: most_attention(analysis, "answer"),
    "C4": lambda analysis: most_attention(analysis, "nouns"),
    "C5": indicator_one,
    "C6": indicator_two,
    "C7": less_informative,
}


def part(analysis: Analysis, claim: str) -> Part:
    """One of JUDGES' claims on one set, over every run of Step 1; see `claims.together`.

    Without a noun finder C4, C6, C7 are 'not yet measured'. What is seen in a reader (C3 to C7) is
    at most 'partly' of a single run.
    """
    try:
        runs = {seed: JUDGES[claim](run) for seed, run in analysis.runs().items()}
    except NounsError as error:
        return Part("not yet measured", f"not computed: {error}")
    verdict = together([one.verdict for one in runs.values()])
    if claim not in ("C1", "C2"):
        verdict = claims.at_most_partly(verdict, len(runs))
    told = [f"Step 1 with seed {seed}: {one.measured}" for seed, one in runs.items()]
    return Part(verdict, " | ".join(told) if len(runs) > 1 else runs[next(iter(runs))].measured)


def leave_one_out(values: Floats, works: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of readers told rightly by LINE, and by the best threshold found on the others.

    An indicator's `values` `[readers]`, and whether distillation `works`; of equal ones the middle.
    """
    right = []
    for out in range(len(values)):
        rest, known = np.delete(values, out), np.delete(works, out)
        edges = np.sort(rest)
        thresholds = np.concatenate([[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
        scores = ((rest > thresholds[:, None]) == known).mean(1)
        best = np.flatnonzero(scores == scores.max())
        right.append((values[out] > thresholds[best[len(best) // 2]]) == works[out])
    return float(((values > LINE) == works).mean()), float(np.mean(right))
