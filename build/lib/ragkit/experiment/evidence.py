"""From what was measured to the parts of the ledger: for each claim and set a verdict by its rule, and the numbers behind it."""

from __future__ import annotations

from ragkit.errors import NounsError

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from ragkit.experiment import claims
from ragkit.indicators import measures as indicators
from ragkit.experiment import tables as measured
from ragkit.indicators import metrics
from ragkit.experiment.analysis import SPACES, Analysis, Goal
from ragkit.experiment.claims import Gain, Part
from ragkit.indicators.measures import Floats
from ragkit.experiment.lab import READERS, Lab
from ragkit.indicators.metrics import Interval

P = ParamSpec("P")
COMPARED = ("attention", "Spearman")  # the two numbers of an indicator, as the paper names them
LINE = 0.3  # the paper's threshold for Indicator 2
ENOUGH_READERS = 8  # below that a rank correlation over readers says nothing


def over_runs(judge: Callable[Concatenate[Analysis, P], Part]) -> Callable[Concatenate[Analysis, P], Part]:
    """A verdict on one fine-tuned reader made one on every run of Step 1; of a single run it is at most 'partly'."""

    @wraps(judge)
    def judged(analysis: Analysis, *args: P.args, **kwargs: P.kwargs) -> Part:
        part = claims.over_runs({seed: judge(run, *args, **kwargs) for seed, run in analysis.runs().items()})
        return Part(claims.at_most_partly(part.verdict, len(analysis.runs())), part.measured)

    return judged


def regime_gains(lab: Lab, set_name: str) -> dict[str, dict[str, Gain]]:
    """Gains in HR@5, EM and F1 of both regimes over the initial retriever read by the same reader."""
    targets = [f"{regime} attention" for regime in READERS]
    retrieval, answers = measured.per_question(lab, set_name, targets), measured.answer_rows(lab, set_name, targets)
    gains: dict[str, dict[str, Gain]] = {}
    for regime in READERS:
        read = answers[answers["reader"] == regime]
        gains[regime] = {}
        for measure, frame in (("HR@5", retrieval), ("EM", read), ("F1", read)):
            before = frame[frame["system"] == "initial"][measure].to_numpy()
            after = frame[frame["system"] == f"{regime} attention"].pivot(index="seed", columns="question", values=measure).to_numpy()
            gains[regime][measure] = Gain(metrics.paired_gain(after, before, resamples=lab.profile.evaluate.bootstrap), len(after))
    return gains


def distillation(gains: dict[str, dict[str, Gain]]) -> dict[str, Part]:
    """C1 and C2 on one set, from `regime_gains`."""
    good, poor = gains["fine-tuned"], gains["off-the-shelf"]
    c1 = claims.together([claims.improves(good[measure]) for measure in good])
    measured = ", ".join(f"{measure} {gain.value}" for measure, gain in good.items())
    c2 = claims.fails(poor["HR@5"], good["HR@5"])
    return {"C1": Part(c1, measured), "C2": Part(c2, f"HR@5 {poor['HR@5'].value} against {good['HR@5'].value}")}


def lead_of_closest(table: Floats, resamples: int) -> tuple[Interval, Interval]:
    """From lifts by tenth `[questions, 10]`: the lift of the closest tenth, and its lead over the highest other, paired by question."""
    other = int(np.nanargmax(np.nanmean(table[:, :-1], axis=0)))
    lead = table[:, -1] - table[:, other]
    return tuple(metrics.interval(values[np.isfinite(values)], resamples=resamples) for values in (table[:, -1], lead))  # type: ignore[return-value]


@over_runs
def most_attention(analysis: Analysis, goal: Goal) -> Part:
    """C3 (answer) or C4 (nouns) on one set: the fine-tuned reader, questions whose gold passage was retrieved."""
    profile = analysis.lab.profile
    tokens, close = analysis.tokens("fine-tuned"), analysis.closeness("fine-tuned", goal, profile.indicators.space)[0]
    table = indicators.deciles(tokens.attention(profile.attention), close, tokens.question)[analysis.gold_found()]
    if np.isnan(table).all(0).any():  # as where no gold passage was retrieved for any question
        return Part("undecided", f"{len(table)} questions whose gold passage was retrieved: too few to fill every tenth")
    top, lead = lead_of_closest(table, profile.evaluate.bootstrap)
    return Part(claims.most(top, lead), f"lift of the closest tenth {top}, lead over the next {lead}")


def differences(analysis: Analysis, goal: Goal, space: str) -> dict[str, Interval]:
    """Fine-tuned minus off-the-shelf, paired by question, of both numbers of an indicator."""
    good, poor = (analysis.indicator(which, goal, space) for which in ("fine-tuned", "off-the-shelf"))
    made = {}
    for measure in COMPARED:
        gaps = (good[measure] - poor[measure]).dropna().to_numpy()
        made[measure] = metrics.interval(gaps, resamples=analysis.lab.profile.evaluate.bootstrap)
    return made


def gain_difference(analysis: Analysis) -> Interval:
    """HR@5 of the retriever that the fine-tuned reader taught minus that which the off-the-shelf reader taught."""
    good, poor = (analysis.hit_gains(f"{which} attention") for which in ("fine-tuned", "off-the-shelf"))
    return metrics.paired_gain(good - poor, np.zeros(good.shape[1]), resamples=analysis.lab.profile.evaluate.bootstrap)


@over_runs
def indicator_one(analysis: Analysis) -> Part:
    """C5 on one set."""
    gap, found = gain_difference(analysis), differences(analysis, "answer", analysis.lab.profile.indicators.space)
    verdict = claims.together([claims.higher_when_it_works(value, gap) for value in found.values()])
    return Part(verdict, f"fine-tuned minus off-the-shelf: HR@5 gain {gap}, " + ", ".join(f"{name} {value}" for name, value in found.items()))


@over_runs
def indicator_two(analysis: Analysis) -> Part:
    """C6 on one set: 'not comparable' if the verdict depends on the space in which closeness is measured."""
    lab, gap = analysis.lab, gain_difference(analysis)
    verdicts, notes = {}, []
    for space in SPACES:
        found = differences(analysis, "nouns", space)
        rho = {which: analysis.indicator(which, "nouns", space)["Spearman"].dropna().to_numpy() for which in READERS}
        means = {which: metrics.interval(values, resamples=lab.profile.evaluate.bootstrap) for which, values in rho.items()}
        parts = [claims.higher_when_it_works(value, gap) for value in found.values()] + [claims.divided_by(LINE, means, gap)]
        verdicts[space] = claims.together(parts)
        if space == lab.profile.indicators.space:
            notes = [f"{name} {value}" for name, value in found.items()] + [f"Spearman of the {which} reader {value}" for which, value in means.items()]
    verdict = verdicts[lab.profile.indicators.space] if len(set(verdicts.values())) == 1 else "not comparable"
    told = ", ".join(f"{space} {verdict}" for space, verdict in verdicts.items())
    return Part(verdict, f"fine-tuned minus off-the-shelf: HR@5 gain {gap}, {', '.join(notes)} (by space: {told})")


def rank_correlation(x: Floats, y: Floats) -> Floats:
    """Spearman over the last axis of `[..., readers]`; NaN where one side is constant."""
    ranks = [rankdata(side, axis=-1) for side in (x, y)]
    a, b = (side - side.mean(-1, keepdims=True) for side in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def resampled(values: list[NDArray[np.float64]], resamples: int, seed: int) -> Floats:
    """Bootstrap means over questions `[resamples, readers]` of each reader's values `[questions]`, the same questions for all; NaN is left out."""
    table = np.stack(values)
    drawn = np.random.default_rng(seed).multinomial(table.shape[1], np.full(table.shape[1], 1 / table.shape[1]), size=resamples)
    there = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        return (drawn @ np.where(there, table, 0).T) / (drawn @ there.T)


def followings(analysis: Analysis, goal: Goal, signals: tuple[str, str] = ("attention", "perplexity")) -> pd.DataFrame:
    """How well an indicator orders the readers by the gain that each teaches: rank correlation over readers, with intervals.

    A row a measure and signal, and a row ' minus ' for the difference between the signals. Resampled are the questions of
    the indicator and, independently, those of the gain.
    """
    readers, resamples = analysis.lab.readers(), analysis.lab.profile.evaluate.bootstrap
    tables = [analysis.indicator(which, goal) for which in readers]
    gains = {signal: [analysis.hit_gains(f"{which} {signal}").mean(0) for which in readers] for signal in signals}
    rows = []
    for measure in COMPARED:
        values = [table[measure].to_numpy() for table in tables]
        means, drawn = np.array([np.nanmean(v) for v in values]), resampled(values, resamples, 0)
        point, cloud = {}, {}
        for signal in signals:
            point[signal] = rank_correlation(means, np.array([gain.mean() for gain in gains[signal]]))
            cloud[signal] = rank_correlation(drawn, resampled(gains[signal], resamples, 1))
        name = " minus ".join(signals)
        point[name], cloud[name] = point[signals[0]] - point[signals[1]], cloud[signals[0]] - cloud[signals[1]]
        for signal, value in point.items():
            kept = cloud[signal][np.isfinite(cloud[signal])]
            low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (float("nan"), float("nan"))
            rows.append({"measure": measure, "signal": signal, "correlation": float(value), "low": float(low), "high": float(high), "readers": len(readers)})
    return pd.DataFrame(rows)


@over_runs
def less_informative(analysis: Analysis) -> Part:
    """C7 on one set, over both indicators and both of their numbers."""
    verdicts, notes = [], []
    for goal in ("answer", "nouns"):
        table = followings(analysis, goal)  # type: ignore[arg-type]
        for row in table[table["signal"].str.contains(" minus ")].itertuples():
            value = Interval(row.correlation, row.low, row.high, row.readers)
            verdicts.append(claims.above_zero(value) if row.readers >= ENOUGH_READERS else "undecided")
            notes.append(f"{goal} {row.measure} {value}")
    return Part(claims.together(verdicts), f"correlation with the gain, attention minus perplexity: {', '.join(notes)}")


def leave_one_out(values: Floats, works: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of readers told rightly by the line `LINE`, and by the best threshold found on the other readers.

    `values` `[readers]` is an indicator, `works` whether the reader's distillation gained. Ties between thresholds: the middle one.
    """
    printed = float(((values > LINE) == works).mean())
    right = []
    for out in range(len(values)):
        rest = np.arange(len(values)) != out
        edges = np.sort(values[rest])
        thresholds = np.concatenate([[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
        scores = ((values[rest][None] > thresholds[:, None]) == works[rest][None]).mean(1)
        best = np.flatnonzero(scores == scores.max())
        right.append((values[out] > thresholds[best[len(best) // 2]]) == works[out])
    return printed, float(np.mean(right))


def parts(analysis: Analysis) -> dict[str, Part]:
    """Every claim's part on one set; those that need the question's nouns are 'not yet measured' where no noun finder is at hand."""
    runs = {seed: distillation(regime_gains(run.lab, run.set_name)) for seed, run in analysis.runs().items()}
    made = {claim: claims.over_runs({seed: found[claim] for seed, found in runs.items()}) for claim in ("C1", "C2")}
    made |= {"C3": most_attention(analysis, "answer"), "C5": indicator_one(analysis)}
    try:
        analysis.nouns()
    except NounsError as error:
        return made | dict.fromkeys(("C4", "C6", "C7"), Part("not yet measured", f"not computed: {error}"))
    return made | {"C4": most_attention(analysis, "nouns"), "C6": indicator_two(analysis), "C7": less_informative(analysis)}
