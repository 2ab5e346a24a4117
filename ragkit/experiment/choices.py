"""The choices the paper leaves open, varied: which conclusions depend on them."""

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
from ragkit.settings import LAYERS, ROWS, AttentionSettings

SHARES = (0.05, 0.1, 0.2)
MEASURES = ("Spearman", *(f"attention, closest {share:.0%}" for share in SHARES))
SCORING = ("rows", "norm", "layers", "space", "exact")  # choices that need no new training
EXACT = ("with exact", "no exact")
KEYS = list(itertools.product(MEASURES, ROWS, ("no norm", "norm"), LAYERS, SPACES, EXACT))


def per_question(analysis: Analysis, which: str, goal: Goal) -> Floats:
    """An indicator of each question by every measure and choice `[KEYS, questions]`."""
    tokens, n = analysis.tokens(which), len(analysis.questions)
    variants = []
    for rows, norm, layers in itertools.product(ROWS, (False, True), LAYERS):
        variants.append(tokens.attention(AttentionSettings(rows=rows, norm=norm, layers=layers)))
    lifts = np.stack(variants, axis=1)
    for mine in measures.by_question(tokens.question):
        lifts[mine] /= lifts[mine].mean(0)
    parts = []
    for space in SPACES:
        close, exact = analysis.closeness(which, goal, space)
        for kept in (np.isfinite(close), np.isfinite(close) & ~exact):
            parts.append(of_questions(lifts[kept], close[kept], tokens.question[kept], n))
    found = np.reshape(parts, (len(SPACES), 2, len(MEASURES), len(variants), n))
    return found.transpose(2, 3, 0, 1, 4).reshape(len(KEYS), n)


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
    good, poor = (per_question(analysis, which, goal) for which in READERS[::-1])
    drawn = resampled(good - poor, analysis.lab.profile.evaluate.bootstrap, 0)
    table = pd.DataFrame(KEYS, columns=["measure", *SCORING])
    table["mean"] = np.nanmean(good - poor, axis=1)
    table["low"], table["high"] = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    table["fine-tuned"] = np.nanmean(good, axis=1)
    table["off-the-shelf"] = np.nanmean(poor, axis=1)
    return table


def by_layer(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """Both regimes' indicator in every layer: means over questions.

    Columns: reader, rows, norm (`off`, `on`), layer (from 1, or `mean`), attention, Spearman.
    """
    settings, made = analysis.lab.profile.indicators, []
    for which in READERS:
        tokens = analysis.tokens(which)
        close, exact = analysis.closeness(which, goal, settings.space)
        for (row, rows), (on, norm) in itertools.product(enumerate(ROWS), enumerate(("off", "on"))):
            layers = tokens.contribution[:, row, on].astype(np.float64)
            for layer, weights in [*enumerate(layers.T, 1), ("mean", layers.mean(1))]:
                given = weights, close, tokens.question, exact, settings.share
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
    labs = {one: lab.varied(one) for one in lab.profile.choices.variations}
    for (variation, other), which in itertools.product({"as it is": lab, **labs}.items(), READERS):
        target, seed = f"{which} attention", lab.profile.distill.seeds[0]
        gain = analysis.mean_gain(analysis.gain_of(other.distilled(name, target, seed)[0]))
        right = top_is_gold(lab, name, other.scores(name, target))
        rows.append((variation, which, gain.mean, gain.low, gain.high, right))
    columns = ["variation", "reader", "mean", "low", "high", "top is gold"]
    return pd.DataFrame(rows, columns=columns)
