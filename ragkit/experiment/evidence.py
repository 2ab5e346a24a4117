"""From what was measured to the ledger: for each claim and set a verdict, and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from ragkit.distillation.targets import READERS
from ragkit.errors import NounsError
from ragkit.experiment import claims, tables
from ragkit.experiment.analysis import Analysis, Goal
from ragkit.experiment.claims import Gain, Part
from ragkit.experiment.lab import Lab
from ragkit.experiment.stages import TAUGHT_BY
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Floats
from ragkit.indicators.metrics import Interval, interval, paired_gain

COMPARED = ("attention", "Spearman")  # the two numbers of an indicator, as the paper names them
LINE = 0.3  # the paper's threshold for Indicator 2
DIFFERENCE = " minus ".join(TAUGHT_BY)
ENOUGH_READERS = 8  # below that a rank correlation over readers says nothing


def over_runs(judge: Callable[..., Part]) -> Callable[..., Part]:
    """A verdict made one on every run of Step 1; of a single run it is at most 'partly'."""

    @wraps(judge)
    def judged(analysis: Analysis, *args: Any) -> Part:
        runs = {seed: judge(run, *args) for seed, run in analysis.runs().items()}
        part = claims.over_runs(runs)
        return Part(claims.at_most_partly(part.verdict, len(runs)), part.measured)

    return judged


def regime_gains(lab: Lab, set_name: str) -> dict[str, dict[str, Gain]]:
    """Gains in HR@5, EM and F1 of both regimes over the initial retriever, read by one reader."""
    targets = [f"{regime} attention" for regime in READERS]
    retrieval = tables.per_question(lab, set_name, targets)
    answers = tables.answer_rows(lab, set_name, targets)
    gains: dict[str, dict[str, Gain]] = {}
    for regime, target in zip(READERS, targets, strict=True):
        gains[regime] = {}
        read = answers[answers["reader"] == regime]
        for measure, frame in (("HR@5", retrieval), ("EM", read), ("F1", read)):
            before = frame[frame["system"] == "initial"][measure].to_numpy()
            distilled = frame[frame["system"] == target]
            after = distilled.pivot(index="seed", columns="question", values=measure).to_numpy()
            gain = paired_gain(after, before, resamples=lab.profile.evaluate.bootstrap)
            gains[regime][measure] = Gain(gain, len(after))
    return gains


def gains_improve(gains: dict[str, dict[str, Gain]]) -> Part:
    """C1 on one set, from `regime_gains`."""
    good = gains["fine-tuned"]
    told = ", ".join(f"{measure} {gain.value}" for measure, gain in good.items())
    return Part(claims.together([claims.improves(gain) for gain in good.values()]), told)


def gains_fail(gains: dict[str, dict[str, Gain]]) -> Part:
    """C2 on one set, from `regime_gains`."""
    good, poor = gains["fine-tuned"]["HR@5"], gains["off-the-shelf"]["HR@5"]
    return Part(claims.fails(poor, good), f"HR@5 {poor.value} against {good.value}")


def mean_of(analysis: Analysis, values: Floats) -> Interval:
    """Mean of the values that are numbers, with an interval over questions."""
    resamples = analysis.lab.profile.evaluate.bootstrap
    return interval(values[np.isfinite(values)], resamples=resamples)


@over_runs
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
    top = mean_of(analysis, lifts[:, -1])
    lead = mean_of(analysis, lifts[:, -1] - lifts[:, other])
    told = f"lift of the closest tenth {top}, lead over the next {lead}"
    return Part(claims.most(top, lead), told)


def differences(analysis: Analysis, goal: Goal, space: str) -> dict[str, Interval]:
    """Fine-tuned minus off-the-shelf, paired by question, of both numbers of an indicator."""
    poor, good = (analysis.indicator(which, goal, space) for which in READERS)
    return {name: mean_of(analysis, (good[name] - poor[name]).to_numpy()) for name in COMPARED}


def gain_difference(analysis: Analysis) -> Interval:
    """HR@5 of the retriever that the fine-tuned reader taught minus the off-the-shelf one's."""
    poor, good = (analysis.hit_gains(f"{which} attention") for which in READERS)
    resamples = analysis.lab.profile.evaluate.bootstrap
    return paired_gain(good - poor, np.zeros(good.shape[1]), resamples=resamples)


@over_runs
def indicator_one(analysis: Analysis) -> Part:
    """C5 on one set."""
    gap = gain_difference(analysis)
    found = differences(analysis, "answer", analysis.lab.profile.indicators.space)
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    verdicts = [claims.higher_when_it_works(value, gap) for value in found.values()]
    told = f"fine-tuned minus off-the-shelf: HR@5 gain {gap}, {told}"
    return Part(claims.together(verdicts), told)


@over_runs
def indicator_two(analysis: Analysis) -> Part:
    """C6 on one set: 'not comparable' if the verdict depends on the space of closeness."""
    own, gap = analysis.lab.profile.indicators.space, gain_difference(analysis)
    verdicts, notes = {}, []
    for space in SPACES:
        found = differences(analysis, "nouns", space)
        tables_of = {which: analysis.indicator(which, "nouns", space) for which in READERS}
        means = {w: mean_of(analysis, t["Spearman"].to_numpy()) for w, t in tables_of.items()}
        parts = [claims.higher_when_it_works(value, gap) for value in found.values()]
        verdicts[space] = claims.together([*parts, claims.divided_by(LINE, means, gap)])
        if space == own:
            notes = [f"{name} {value}" for name, value in found.items()]
            notes += [f"Spearman of the {which} reader {value}" for which, value in means.items()]
    verdict = verdicts[own] if len(set(verdicts.values())) == 1 else "not comparable"
    told = ", ".join(f"{space} {word}" for space, word in verdicts.items())
    return Part(
        verdict,
        f"fine-tuned minus off-the-shelf: HR@5 gain {gap}, {', '.join(notes)} (by space: {told})",
    )


def rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman over the last axis of `[..., readers]`; NaN where one side is constant."""
    a, b = (rankdata(side, axis=-1) for side in (x, y))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def resampled(values: list[Floats], resamples: int, seed: int) -> Floats:
    """Bootstrap means `[resamples, readers]` of each reader's values `[questions]`, without NaN.

    The same questions are drawn for all readers.
    """
    table = np.stack(values)
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
    indicators = [analysis.indicator(which, goal) for which in readers]
    rows = []
    for measure in COMPARED:
        values = [table[measure].to_numpy() for table in indicators]
        means, drawn = np.array([np.nanmean(v) for v in values]), resampled(values, resamples, 0)
        found = {}  # of each signal the correlation, and those of the resamples
        for signal in TAUGHT_BY:
            gains = [analysis.hit_gains(f"{which} {signal}").mean(0) for which in readers]
            value = rank_correlation(means, np.array([gain.mean() for gain in gains]))
            found[signal] = value, rank_correlation(drawn, resampled(gains, resamples, 1))
        found[DIFFERENCE] = tuple(a - b for a, b in zip(*found.values(), strict=True))
        for signal, (value, cloud) in found.items():
            row = {"measure": measure, "signal": signal, "correlation": float(value)}
            kept = cloud[np.isfinite(cloud)]
            low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (np.nan, np.nan)
            rows.append({**row, "low": float(low), "high": float(high), "readers": len(readers)})
    return pd.DataFrame(rows)


@over_runs
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
    told = f"correlation with the gain, {DIFFERENCE}: {', '.join(notes)}"
    return Part(claims.together(verdicts), told)


def leave_one_out(values: Floats, works: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of readers told rightly by LINE, and by the best threshold found on the others.

    An indicator's `values` `[readers]`, and whether distillation `works`; of equal ones the middle.
    """
    right = []
    for out in range(len(values)):
        rest = np.arange(len(values)) != out
        edges = np.sort(values[rest])
        thresholds = np.concatenate([[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
        scores = ((values[rest] > thresholds[:, None]) == works[rest]).mean(1)
        best = np.flatnonzero(scores == scores.max())
        right.append((values[out] > thresholds[best[len(best) // 2]]) == works[out])
    return float(((values > LINE) == works).mean()), float(np.mean(right))


def parts(analysis: Analysis) -> dict[str, Part]:
    """Every claim's part on one set; without a noun finder C4, C6, C7 are 'not yet measured'."""
    runs = analysis.runs().items()
    gains = {seed: regime_gains(run.lab, run.set_name) for seed, run in runs}
    made = {
        "C1": claims.over_runs({seed: gains_improve(found) for seed, found in gains.items()}),
        "C2": claims.over_runs({seed: gains_fail(found) for seed, found in gains.items()}),
        "C3": most_attention(analysis, "answer"),
        "C5": indicator_one(analysis),
    }
    try:
        analysis.nouns()
    except NounsError as error:
        missing = Part("not yet measured", f"not computed: {error}")
        return made | dict.fromkeys(("C4", "C6", "C7"), missing)
    return made | {
        "C4": most_attention(analysis, "nouns"),
        "C6": indicator_two(analysis),
        "C7": less_informative(analysis),
    }
