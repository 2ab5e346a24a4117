"""The choices the paper leaves open, varied: which conclusions depend on them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from ragkit.distillation.targets import READERS
from ragkit.experiment.analysis import Analysis, Goal
from ragkit.experiment.evidence import COMPARED, resampled
from ragkit.experiment.tables import top_is_gold
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Floats
from ragkit.indicators.metrics import paired_gain
from ragkit.settings import LAYERS, ROWS, AttentionSettings

SHARES = (0.05, 0.1, 0.2)
MEASURES = ("Spearman", *(f"attention, closest {share:.0%}" for share in SHARES))
SCORING = ("rows", "norm", "layers", "space", "exact")  # choices that need no new training
VARIANTS = tuple(itertools.product(ROWS, (False, True), LAYERS))  # rows, norm, layers


def spearmans(x: Floats, y: Floats) -> Floats:
    """Spearman between every column of `x` `[tokens, a]` and of `y` `[tokens, b]`: `[a, b]`.

    NaN where a side is constant.
    """
    a, b = (rankdata(side, axis=0) for side in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a.T @ b) / np.sqrt((a**2).sum(0)[:, None] * (b**2).sum(0)[None])


def per_question(analysis: Analysis, which: str, goal: Goal) -> dict[tuple[str, ...], Floats]:
    """An indicator of each question `[questions]` under every combination of choices.

    Keys: one of MEASURES, rows, norm, layers, space, exact.
    """
    tokens = analysis.tokens(which)
    attention = []
    for rows, norm, layers in VARIANTS:
        settings = AttentionSettings(rows=rows, norm=norm, layers=layers)
        attention.append(tokens.attention(settings))
    lifts = np.stack(attention, axis=1)
    for mine in measures.by_question(tokens.question):
        lifts[mine] /= lifts[mine].mean(0)
    close = np.stack([analysis.closeness(which, goal, space)[0] for space in SPACES], axis=1)
    exact = analysis.closeness(which, goal, SPACES[0])[1]
    tables = []
    for kept in (np.ones(len(exact), dtype=bool), ~exact):
        given = lifts[kept], close[kept], tokens.question[kept]
        tables.append(of_questions(*given, len(analysis.questions)))
    columns = np.stack(tables, axis=-1).reshape(len(analysis.questions), -1).T
    keys = itertools.product(MEASURES, VARIANTS, SPACES, ("with exact", "no exact"))
    found = {}
    for (measure, (rows, norm, layers), space, told), column in zip(keys, columns, strict=True):
        found[measure, rows, "norm" if norm else "no norm", layers, space, told] = column
    return found


def of_questions(lifts: Floats, close: Floats, question: NDArray[np.int64], n: int) -> Floats:
    """MEASURES of each of n questions `[n, measures, variants, spaces]`.

    From every token's lift `[tokens, variants]` and closeness `[tokens, spaces]`; NaN for a
    question of fewer than three tokens.
    """
    table = np.full((n, len(MEASURES), lifts.shape[1], close.shape[1]), np.nan)
    near = np.empty((len(SHARES), *close.shape), dtype=bool)
    for (place, share), (space, column) in itertools.product(enumerate(SHARES), enumerate(close.T)):
        near[place, :, space] = measures.closest(column, question, share)
    for number, mine in enumerate(measures.by_question(question)):
        if mine.stop - mine.start < 3 or not np.isfinite(close[mine]).all():
            continue
        table[number, 0] = spearmans(lifts[mine], close[mine])
        for place, chosen in enumerate(near[:, mine]):
            table[number, 1 + place] = lifts[mine].T @ chosen / chosen.sum(0)
    return table


def specifications(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """Fine-tuned minus off-the-shelf under every combination of choices, with intervals.

    Columns: measure, SCORING, mean, low, high, and each reader's own mean over questions.
    """
    good, poor = (per_question(analysis, which, goal) for which in ("fine-tuned", "off-the-shelf"))
    gaps = [good[key] - poor[key] for key in good]
    drawn = resampled(gaps, analysis.lab.profile.evaluate.bootstrap, 0)
    table = pd.DataFrame(list(good), columns=["measure", *SCORING])
    table["mean"] = np.nanmean(gaps, axis=1)
    table["low"], table["high"] = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    table["fine-tuned"] = np.nanmean(list(good.values()), axis=1)
    table["off-the-shelf"] = np.nanmean([poor[key] for key in good], axis=1)
    return table


def by_layer(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """Both regimes' indicator under every row type, norm and single layer, and their mean.

    In the profile's space and share. Columns: reader, rows, norm (`off`, `on`), layer (from 1, or
    `mean`), attention, Spearman: means over questions.
    """
    settings, made = analysis.lab.profile.indicators, []
    for which in READERS:
        tokens, close = analysis.tokens(which), analysis.closeness(which, goal, settings.space)[0]
        none_exact = np.zeros(len(close), dtype=bool)
        for (row, rows), (norm, said) in itertools.product(
            enumerate(ROWS), enumerate(("off", "on"))
        ):
            layers = tokens.contribution[:, row, norm].astype(np.float64)
            for layer, attention in [*enumerate(layers.T, 1), ("mean", layers.mean(1))]:
                table = measures.indicator(
                    attention, close, tokens.question, none_exact, settings.share
                )
                means = {measure: table[measure].mean() for measure in COMPARED}
                made.append({"reader": which, "rows": rows, "norm": said, "layer": layer, **means})
    return pd.DataFrame(made)


def hinges(table: pd.DataFrame, choices: tuple[str, ...]) -> pd.DataFrame:
    """For each choice the share of specifications that say 'higher' under each of its options.

    Columns: choice, range (of these shares), shares; widest range first.
    """
    said, rows = table["low"] > 0, []
    for choice in choices:
        shares = said.groupby(table[choice]).mean()
        told = ", ".join(f"{option} {share:.0%}" for option, share in shares.items())
        rows.append({"choice": choice, "range": shares.max() - shares.min(), "shares": told})
    return pd.DataFrame(rows).sort_values("range", ascending=False, ignore_index=True)


def trained(analysis: Analysis) -> pd.DataFrame:
    """Step 2 under each of the profile's variations and as it is, first seed, for both regimes.

    Columns: variation, reader, mean, low, high (of the gain in HR@5), top is gold (how good the
    target is, among questions with gold passages and others).
    """
    lab, name = analysis.lab, analysis.set_name
    rows = []
    for variation in ("as it is", *lab.profile.choices.variations):
        other = lab if variation == "as it is" else lab.varied(variation)
        for which in READERS:
            target, seed = f"{which} attention", lab.profile.distill.seeds[0]
            gains = analysis.gain_of(other.distilled(name, target, seed)[0])
            resamples = lab.profile.evaluate.bootstrap
            gain = paired_gain(gains, np.zeros(len(gains)), resamples=resamples)
            row = {"variation": variation, "reader": which}
            row |= {"mean": gain.mean, "low": gain.low, "high": gain.high}
            rows.append({**row, "top is gold": top_is_gold(lab, name, other.scores(name, target))})
    return pd.DataFrame(rows)
