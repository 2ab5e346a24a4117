"""The choices the paper leaves open, varied: which conclusions depend on them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from ragkit.distillation import targets as distill
from ragkit.distillation.teacher import ROWS
from ragkit.experiment import evidence
from ragkit.experiment.analysis import SPACES, Analysis, Goal
from ragkit.experiment.lab import READERS
from ragkit.indicators import measures as indicators
from ragkit.indicators import metrics
from ragkit.indicators.measures import Floats
from ragkit.profile import AttentionSettings

LAYERS = ("all", "first", "middle", "last")
SHARES = (0.05, 0.1, 0.2)
SCORING = ("rows", "norm", "layers", "space", "exact")  # choices that need no new training


def spearmans(x: Floats, y: Floats) -> Floats:
    """Spearman between every column of `x` `[tokens, a]` and of `y` `[tokens, b]`: `[a, b]`, NaN where a side is constant."""
    ranks = [rankdata(side, axis=0) for side in (x, y)]
    a, b = (side - side.mean(0) for side in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a.T @ b) / np.sqrt((a**2).sum(0)[:, None] * (b**2).sum(0)[None])


def per_question(analysis: Analysis, which: str, goal: Goal) -> dict[tuple[str, ...], Floats]:
    """An indicator of each question `[questions]` under every combination of choices.

    Keys: number, rows, norm, layers, space, exact; the mean attention once for each of SHARES.
    """
    tokens = analysis.tokens(which)
    variants = [
        (rows, norm, layers) for rows in ROWS for norm in (False, True) for layers in LAYERS
    ]
    attention = np.stack(
        [
            tokens.attention(AttentionSettings(rows=rows, norm=norm, layers=layers))
            for rows, norm, layers in variants
        ],
        axis=1,
    )  # type: ignore[arg-type]
    close = np.stack([analysis.closeness(which, goal, space)[0] for space in SPACES], axis=1)
    exact = analysis.closeness(which, goal, SPACES[0])[1]
    measures = ("Spearman", *(f"attention, closest {share:.0%}" for share in SHARES))
    table = np.full((len(analysis.questions), len(measures), len(variants), len(SPACES), 2), np.nan)
    near = np.zeros((2, len(SHARES), *close.shape), dtype=bool)
    for left_out, kept in enumerate((np.ones(len(exact), dtype=bool), ~exact)):
        for (share, width), (space, column) in itertools.product(
            enumerate(SHARES), enumerate(close.T)
        ):
            near[left_out, share, kept, space] = indicators.closest(
                column[kept], tokens.question[kept], width
            )
    for number, mine in enumerate(indicators.by_question(tokens.question)):
        for left_out in (False, True):
            kept = np.flatnonzero(~exact[mine]) if left_out else np.arange(mine.stop - mine.start)
            own = close[mine][kept]
            if len(kept) < 3 or not np.isfinite(own).all():
                continue
            lifts = attention[mine][kept] / attention[mine].mean(0)
            table[number, 0, :, :, int(left_out)] = spearmans(lifts, own)
            for share, chosen in enumerate(near[int(left_out), :, mine][:, kept]):
                table[number, 1 + share, :, :, int(left_out)] = lifts.T @ chosen / chosen.sum(0)
    names = itertools.product(measures, variants, SPACES, ("with exact", "no exact"))
    values = table.reshape(len(table), -1).T
    return {
        (measure, rows, "norm" if norm else "no norm", layers, space, kept): column
        for (measure, (rows, norm, layers), space, kept), column in zip(names, values, strict=True)
    }


def specifications(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """Fine-tuned minus off-the-shelf under every combination of choices, with intervals over questions.

    Columns: measure, SCORING, mean, low, high, and each reader's own mean.
    """
    good, poor = (per_question(analysis, which, goal) for which in ("fine-tuned", "off-the-shelf"))
    gaps = [good[key] - poor[key] for key in good]
    drawn = evidence.resampled(gaps, analysis.lab.profile.evaluate.bootstrap, 0)
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    table = pd.DataFrame(list(good), columns=["measure", *SCORING])
    means = {"mean": np.nanmean(gaps, axis=1), "low": low, "high": high}
    return table.assign(
        **means,
        **{
            which: np.nanmean(list(values.values()), axis=1)
            for which, values in (("fine-tuned", good), ("off-the-shelf", poor))
        },
    )


def by_layer(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """Both regimes' indicator under every row type, norm and single layer, and under the mean of all layers, in the profile's space and share.

    Columns: reader, rows, norm (`off`, `on`), layer (from 1, or `mean`), attention, Spearman: means over questions.
    """
    settings, rows = analysis.lab.profile.indicators, []
    for which in READERS:
        tokens, close = analysis.tokens(which), analysis.closeness(which, goal, settings.space)[0]
        for (row, row_type), (norm, said) in itertools.product(
            enumerate(ROWS), enumerate(("off", "on"))
        ):
            layers = tokens.contribution[:, row, norm].astype(np.float64)
            for layer, attention in [*enumerate(layers.T, 1), ("mean", layers.mean(1))]:
                table = indicators.indicator(
                    attention,
                    close,
                    tokens.question,
                    np.zeros(len(close), dtype=bool),
                    settings.share,
                )
                means = {measure: table[measure].mean() for measure in evidence.COMPARED}
                rows.append(
                    {"reader": which, "rows": row_type, "norm": said, "layer": layer, **means}
                )
    return pd.DataFrame(rows)


def verdict(low: Floats | pd.Series, high: Floats | pd.Series) -> NDArray[np.str_]:
    """'higher', 'lower' or 'unclear' for each interval."""
    return np.where(
        np.asarray(low) > 0, "higher", np.where(np.asarray(high) < 0, "lower", "unclear")
    )


def hinges(table: pd.DataFrame, choices: tuple[str, ...]) -> pd.DataFrame:
    """For each choice: the share of specifications that say 'higher' under each option, and the range of these shares, widest first."""
    said = pd.Series(verdict(table["low"], table["high"]) == "higher", index=table.index)
    rows = []
    for choice in choices:
        shares = said.groupby(table[choice]).mean()
        rows.append(
            {
                "choice": choice,
                "range": float(shares.max() - shares.min()),
                "shares": ", ".join(f"{option} {share:.0%}" for option, share in shares.items()),
            }
        )
    return pd.DataFrame(rows).sort_values("range", ascending=False, ignore_index=True)


def trained(analysis: Analysis) -> pd.DataFrame:
    """Step 2 under each of the profile's variations and as it is, first seed: gain in HR@5 of both regimes, and how good the targets are.

    Columns: variation, reader, mean, low, high, top is gold.
    """
    lab, name = analysis.lab, analysis.set_name
    asked, candidates = lab.asked(name)
    gold = distill.oracle_scores(candidates.tolist(), lab.corpus(name).golds(asked, candidates)) > 0
    some = gold.any(1) & ~gold.all(1)
    rows = []
    for variation in ("as it is", *lab.profile.choices.variations):
        other = lab if variation == "as it is" else lab.varied(variation, name)
        for which in READERS:
            ranking = other.distilled(name, f"{which} attention", lab.profile.distill.seeds[0])[0]
            gains = analysis.gain_of(ranking)
            gain = metrics.paired_gain(
                gains, np.zeros(len(gains)), resamples=lab.profile.evaluate.bootstrap
            )
            best = other.scores(name, f"{which} attention").argmax(1)
            right = float(gold[np.arange(len(gold)), best][some].mean())
            rows.append(
                {
                    "variation": variation,
                    "reader": which,
                    "mean": gain.mean,
                    "low": gain.low,
                    "high": gain.high,
                    "top is gold": right,
                }
            )
    return pd.DataFrame(rows)
