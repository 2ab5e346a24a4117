"""The choices the paper leaves open, varied: which conclusions depend on them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ragkit.distillation.targets import READERS
from ragkit.experiment.analysis import Analysis, Goal
from ragkit.experiment.evidence import COMPARED, rank_correlation, resampled
from ragkit.experiment.tables import top_is_gold
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Floats
from ragkit.indicators.metrics import paired_gain
from ragkit.settings import LAYERS, ROWS, AttentionSettings

SHARES = (0.05, 0.1, 0.2)
MEASURES = ("Spearman", *(f"attention, closest {share:.0%}" for share in SHARES))
SCORING = ("rows", "norm", "layers", "space", "exact")  # choices that need no new training
VARIANTS = tuple(itertools.product(ROWS, (False, True), LAYERS))  # rows, norm, layers


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
    n, columns = len(analysis.questions), []
    for space in SPACES:
        close, exact = analysis.closeness(which, goal, space)
        for kept in (np.isfinite(close), np.isfinite(close) & ~exact):
            columns.append(of_questions(lifts[kept], close[kept], tokens.question[kept], n))
    shape = len(SPACES), 2, len(MEASURES), len(VARIANTS), n
    values = np.reshape(columns, shape).transpose(2, 3, 0, 1, 4).reshape(-1, n)
    keys = itertools.product(MEASURES, VARIANTS, SPACES, ("with exact", "no exact"))
    found: dict[tuple[str, ...], Floats] = {}
    for (measure, (rows, norm, layers), space, told), column in zip(keys, values, strict=True):
        found[measure, rows, "norm" if norm else "no norm", layers, space, told] = column
    return found


def of_questions(lifts: Floats, close: Floats, question: NDArray[np.int64], n: int) -> Floats:
    """MEASURES of each of n questions `[measures, variants, n]`.

    From the lift `[tokens, variants]` and closeness `[tokens]` of the tokens that count; NaN for a
    question with fewer than three.
    """
    table = np.full((len(MEASURES), lifts.shape[1], n), np.nan)
    near = [measures.closest(close, question, share) for share in SHARES]
    for number, mine in enumerate(measures.by_question(question, n)):
        if mine.stop - mine.start >= 3:
            table[0, :, number] = rank_correlation(lifts[mine].T, close[mine][None])
            for place, chosen in enumerate(near, 1):
                table[place, :, number] = lifts[mine][chosen[mine]].mean(0)
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
    """Both regimes' indicator in every layer: means over questions.

    Columns: reader, rows, norm (`off`, `on`), layer (from 1, or `mean`), attention, Spearman.
    """
    settings, made = analysis.lab.profile.indicators, []
    for which in READERS:
        tokens, close = analysis.tokens(which), analysis.closeness(which, goal, settings.space)[0]
        none_exact = np.zeros(len(close), dtype=bool)
        for rows, norm in itertools.product(ROWS, ("off", "on")):
            chosen = tokens.contribution[:, ROWS.index(rows), int(norm == "on")]
            layers = chosen.astype(np.float64)
            for layer, weights in [*enumerate(layers.T, 1), ("mean", layers.mean(1))]:
                given = weights, close, tokens.question, none_exact, settings.share
                means = measures.indicator(*given)[list(COMPARED)].mean()
                made.append({"reader": which, "rows": rows, "norm": norm, "layer": layer, **means})
    return pd.DataFrame(made)


def hinges(table: pd.DataFrame, choices: tuple[str, ...]) -> pd.DataFrame:
    """The share of specifications that say 'higher' under each option of each choice.

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

    Columns: variation, reader, mean, low, high (gain in HR@5), top is gold (see `top_is_gold`).
    """
    lab, name, rows = analysis.lab, analysis.set_name, []
    for variation in ("as it is", *lab.profile.choices.variations):
        other = lab if variation == "as it is" else lab.varied(variation)
        for which in READERS:
            target, seed = f"{which} attention", lab.profile.distill.seeds[0]
            gains = analysis.gain_of(other.distilled(name, target, seed)[0])
            resamples = lab.profile.evaluate.bootstrap
            gain = paired_gain(gains, np.zeros(len(gains)), resamples=resamples)
            right = top_is_gold(lab, name, other.scores(name, target))
            interval = {"mean": gain.mean, "low": gain.low, "high": gain.high}
            row = {"variation": variation, "reader": which, **interval}
            rows.append({**row, "top is gold": right})
    return pd.DataFrame(rows)
