"""The choices the paper leaves open, varied: which conclusions depend on them."""

from itertools import product

import numpy as np
import pandas as pd
import yaml

from ragkit.distillation.targets import READERS
from ragkit.experiment.analysis import Analysis, Goal
from ragkit.experiment.tables import top_is_gold
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Floats
from ragkit.settings import LAYERS, ROWS, AttentionSettings, asset

SHARES = (0.05, 0.1, 0.2)
NUMBERS = ("attention", "Spearman")  # within the closest share
MEASURES = ("Spearman, all", *(f"{number}, closest {s:.0%}" for s in SHARES for number in NUMBERS))
SCORING = ("rows", "norm", "layers", "space", "exact")  # choices that need no new training
VARIANTS = list(product(ROWS, ("no norm", "norm"), LAYERS))
KEYS = list(product(MEASURES, VARIANTS, SPACES, ("with exact", "no exact")))


def per_question(analysis: Analysis, which: str, goal: Goal) -> Floats:
    """An indicator of each question by every measure and choice `[KEYS, questions]`."""
    tokens, n = analysis.tokens(which), len(analysis.questions)
    lifts, found = [], []
    for rows, norm, layers in VARIANTS:
        settings = AttentionSettings(rows=rows, norm=norm == "norm", layers=layers)
        lifts.append(measures.lift(tokens.attention(settings), tokens.question))
    for space in SPACES:
        close, exact = analysis.closeness(which, goal, space)
        for kept in (np.isfinite(close), np.isfinite(close) & ~exact):
            question = tokens.question[kept]
            near = [measures.closest(close[kept], question, share) for share in SHARES]
            for lift in (one[kept] for one in lifts):
                found.append(measures.spearman(lift, close[kept], question, n))
                for one in near:
                    found.append(measures.means(lift[one], question[one], n))
                    found.append(measures.spearman(lift[one], close[kept][one], question[one], n))
    shape = (len(SPACES), 2, len(VARIANTS), len(MEASURES), n)
    return np.reshape(found, shape).transpose(3, 2, 0, 1, 4).reshape(len(KEYS), n)


def specifications(analysis: Analysis, goal: Goal) -> pd.DataFrame:
    """Fine-tuned minus off-the-shelf under every combination of choices: columns measure, SCORING,
    mean, low, high, and each reader's own mean over questions."""
    good, poor = (per_question(analysis, which, goal) for which in READERS[::-1])
    groups = analysis.groups()[: good.shape[1]]
    drawn = measures.draws(good - poor, groups, analysis.lab.profile.evaluate.bootstrap)
    names = [(measure, *variant, *others) for measure, variant, *others in KEYS]
    table = pd.DataFrame(names, columns=["measure", *SCORING])
    table["mean"] = np.nanmean(good - poor, axis=1)
    table["low"], table["high"] = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    table["fine-tuned"], table["off-the-shelf"] = (np.nanmean(one, axis=1) for one in (good, poor))
    return table


def hinges(table: pd.DataFrame, choices: tuple[str, ...]) -> pd.DataFrame:
    """The share of specifications that say 'higher' under each option of each choice: columns
    choice, range (of these shares), shares; widest range first."""
    rows = []
    for choice in choices:
        shares = (table["low"] > 0).groupby(table[choice]).mean()
        told = ", ".join(f"{option} {share:.0%}" for option, share in shares.items())
        rows.append({"choice": choice, "range": shares.max() - shares.min(), "shares": told})
    return pd.DataFrame(rows).sort_values("range", ascending=False, ignore_index=True)


def trained(analysis: Analysis) -> pd.DataFrame:
    """Step 2 as it is and under each of the profile's variations, first seed, both regimes: columns
    variation, reader, mean, low, high (gain in HR@5), top is gold (see `top_is_gold`)."""
    lab, name, rows = analysis.lab, analysis.set_name, []
    variations = lab.profile.variations
    labs = {"as it is": lab} | {v: lab.with_graph(lab.graph.varied(v)) for v in variations}
    for (variation, other), which in product(labs.items(), READERS):
        target, seed = f"{which} attention", lab.profile.distill.seeds[0]
        gains = analysis.hits(other.distilled(name, target, seed)[0]) - analysis.hits()
        gain = analysis.mean_of(gains)
        right = top_is_gold(lab, name, other.scores(name, target))
        rows.append((variation, which, gain.mean, gain.low, gain.high, right))
    columns = ["variation", "reader", "mean", "low", "high", "top is gold"]
    return pd.DataFrame(rows, columns=columns)


def deviations(trained: pd.DataFrame) -> pd.DataFrame:
    """What is known of the paper's choices, what is taken here, and how far the gains in HR@5 of
    both regimes move under the choice's variations (`trained` of every set): columns choice, paper,
    here, moves."""
    rows = yaml.safe_load(asset("deviations.yaml").read_text("utf8"))
    wide = trained.pivot(index="variation", columns=["set", "reader"], values="mean")
    moved = wide - wide.loc["as it is"]
    for row in rows:
        names, told = row.pop("varied", []), []
        for name in (name for name in names if name in moved.index):
            by_reader = moved.loc[name].groupby("reader", sort=False)
            ranges = [f"{which} {x.min():+.3f} to {x.max():+.3f}" for which, x in by_reader]
            told.append(f"{name}: {', '.join(ranges)}")
        row["moves"] = "; ".join(told) or ("not run here" if names else "not varied")
    return pd.DataFrame(rows)
