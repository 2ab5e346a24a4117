"""One seaborn theme, one function a figure; alt text is computed from the data.

Every figure is one column of panels, WIDTH inches wide, so that its text stays legible where a
phone shows it 360 pixels wide. A figure's function gives it with its alt text; `show` keeps both.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ragkit.pages import html

PALETTE, MARKERS = sns.color_palette("colorblind"), "os^D"
WIDTH = 5.6
LABEL_MOVES = 300  # of names of points: a count, no seconds, so that a busy machine draws the same
KINDS = {"attention": "Blues", "perplexity": "Oranges", "control": "Greys"}  # of targets
LOGGED = ("loss", "answer lift", "nouns lift", "answer Spearman", "nouns Spearman")  # by Step 1
VERDICTS = {"working": PALETTE[0], "not working": PALETTE[3], "too early to tell": "0.55"}


def use_theme() -> None:
    """The look of every figure: colour-blind safe, legible on a phone."""
    rc = dict.fromkeys(("font.size", "axes.labelsize", "legend.fontsize"), 12)
    rc |= {"axes.titlesize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12, "figure.dpi": 110}
    words = {"axes.titleweight": "bold", "axes.titlelocation": "left", "savefig.bbox": "tight"}
    files = {"svg.fonttype": "none", "svg.hashsalt": "ragkit"}  # text as text, the same ids always
    sns.set_theme(style="whitegrid", palette="colorblind", rc={**rc, **words, **files})


def column(heights: list[float], sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels of these heights (inches), one below the other."""
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), height_ratios=heights, sharex=sharex, squeeze=False)
    return figure, list(axes[:, 0])


def panels(table: pd.DataFrame, by: list[str], height: float, xlabel: str) -> tuple[Figure, Any]:
    """A panel for each value of the columns `by`: its axis, the value, and its rows."""
    parts = list(table.groupby(by, sort=False))
    figure, axes = column([height] * len(parts))
    for axis, (value, _) in zip(axes, parts, strict=True):
        axis.set_title(value[0])
    axes[-1].set_xlabel(xlabel)
    return figure, [(axis, *part) for axis, part in zip(axes, parts, strict=True)]


def entries(axis: Axes, width: int = 28) -> dict[str, Any]:
    """What a legend says of `axis`: each label once, in lines of so many letters."""
    names = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    return {"handles": list(names.values()), "labels": [fill(name, width) for name in names]}


def legend(figure: Figure, ncols: int) -> None:
    """The legend of the first panel, above all panels."""
    shown = entries(figure.axes[0], 56 // ncols)
    figure.legend(**shown, loc="outside upper center", ncols=ncols, frameon=False)


def told(table: pd.DataFrame, form: str) -> str:
    """The rows of a table in words; `form` names its columns in braces."""
    return "; ".join(form.format(**row) for row in table.to_dict("records")) + "."


def show(figure: Figure, alt: str, folder: Path, name: str, table: pd.DataFrame) -> HTML:
    """Writes SVG, PNG, alt text and the CSV twin to `folder`; the figure for the notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(folder / f"{name}.svg", metadata=unsaid)
    figure.savefig(folder / f"{name}.png", dpi=150)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(alt, "utf8")
    plt.close(figure)
    return HTML(html.figure((folder / f"{name}.svg").read_text("utf8"), alt))


def kind(system: str) -> str:
    """What a system learns from: `attention`, `perplexity` or `control`."""
    return next((name for name in KINDS if name in system), "control")


def gains(table: pd.DataFrame) -> tuple[Figure, str]:
    """Gain in HR@5 of each target, a panel a set; columns set, system, mean, low, high."""
    kinds = table.assign(reader=table["system"].map(kind))
    figure, _ = dots(kinds, "system", "gain in HR@5 over the initial retriever", 0)
    best = table.loc[table["mean"].idxmax()]
    lines = told(table, "{set}, {system}: {mean:+.3f} from {low:+.3f} to {high:+.3f}")
    said = f"Largest: {best['system']} on {best['set']}. {lines}"
    return figure, f"Gain in HR@5 over the initial retriever, with 95 % intervals. {said}"


def curves(table: pd.DataFrame, measure: str, label: str) -> tuple[Figure, str]:
    """A measure along the epochs of Step 2, its mean and range over seeds, a panel a set.

    `table` has columns set, system, seed, epoch and the measure.
    """
    systems = list(table["system"].unique())
    colours: dict[str, Any] = {}
    for name, shades in KINDS.items():
        alike = [s for s in systems if kind(s) == name]
        colours.update(zip(alike, sns.color_palette(shades, len(alike) + 2)[2:], strict=True))
    look: dict[str, Any] = {"palette": colours, "style_order": systems}
    look |= {"hue": "system", "style": "system", "markers": True, "dashes": False, "ms": 8}
    figure, parts = panels(table, ["set"], 3.3, "epoch of Step 2")
    for axis, _, part in parts:
        sns.lineplot(part, x="epoch", y=measure, errorbar=("pi", 100), ax=axis, **look)
        axis.get_legend().set_visible(False)
        axis.set(ylabel=label, xticks=sorted(part["epoch"].unique()))
    legend(figure, 2)
    last = table[table["epoch"] == table["epoch"].max()]
    ends = last.groupby(["set", "system"])[measure].mean().rename("value").reset_index()
    said = f"{label} along the epochs of Step 2, mean and range over seeds. At the end: "
    return figure, said + told(ends, "{set}, {system}: {value:.3f}")


def heat_map(scores: pd.DataFrame) -> tuple[Figure, str]:
    """Attention of each passage (rows) by layer (columns): its share of the layer's attention."""
    figure, (axis,) = column([0.55 * scores.shape[0] + 1.6])
    named = scores.set_axis([fill(str(row), 18) for row in scores.index])
    look = {"cmap": sns.blend_palette(["#ffffff", "#6baed6"], as_cmap=True)}  # under black digits
    look["cbar_kws"] = {"label": "share of attention", "orientation": "horizontal"}
    look |= {"annot": scores.shape[1] <= 6, "fmt": ".2f", "annot_kws": {"color": "black"}}
    sns.heatmap(named, ax=axis, **look)
    axis.set(xlabel="layer", ylabel="passage")
    axis.tick_params(axis="y", rotation=0)
    top = scores.mean(axis=1)
    said = f"On average passage {top.idxmax()} gets most ({top.max():.2f})."
    return figure, f"Heat map of attention by passage and layer. {said}"


def attention_cost(table: pd.DataFrame) -> tuple[Figure, str]:
    """Seconds and memory of a plain forward pass, ours and eager attention, by tokens.

    `table` is the bench's: columns kind (of reader), tokens, way, seconds, MB.
    """
    names = {"seconds": "seconds", "MB": "peak MB"}
    long = table.melt(["kind", "tokens", "way"], list(names), "measure")
    long["panel"] = long["kind"] + ": " + long["measure"].map(names)
    looks = {"fused": (PALETTE[0], "-o"), "ours": (PALETTE[1], "--s"), "eager": (PALETTE[3], "-.D")}
    figure, parts = panels(long, ["panel"], 2.1, "tokens")
    for axis, _, part in parts:
        for way, (colour, look) in looks.items():
            line = part[part["way"] == way]
            axis.plot(line["tokens"], line["value"], look, color=colour, label=way)
        axis.set(xscale="log", yscale="log")
        lengths = sorted(part["tokens"].unique())
        axis.set_xticks(lengths, [f"{t:,}" for t in lengths])
        axis.minorticks_off()
    legend(figure, 3)
    lines = told(table, "{kind}, {tokens} tokens, {way}: {seconds:.2f} s, {MB:.0f} MB")
    said = "Seconds and peak memory beyond the model of one forward pass against its length."
    return figure, f"{said} {lines}"


def deciles(table: pd.DataFrame) -> tuple[Figure, str]:
    """Lift by closeness; columns set, goal, reader, tenth (10 is closest), mean, low, high."""
    under = "tenth of the passage tokens, 10 = closest"
    figure, parts = panels(table, ["set", "goal"], 2.6, under)
    for axis, (name, goal), part in parts:
        for number, (reader, line) in enumerate(part.groupby("reader", sort=False)):
            colour, marker = PALETTE[number], MARKERS[number % 4]
            axis.fill_between(line["tenth"], line["low"], line["high"], color=colour, alpha=0.2)
            axis.plot(line["tenth"], line["mean"], color=colour, marker=marker, label=reader)
        axis.axhline(1, color="0.3", lw=1, ls=":")
        axis.set(title=f"{name}: closeness to the {goal}", xticks=range(1, 11))
        axis.set_ylabel("lift (1 = average)")
    legend(figure, 1)
    closest = table[table["tenth"] == 10]
    lines = told(closest, "{set}, {goal}, {reader}: {mean:.2f} from {low:.2f} to {high:.2f}")
    said = "Lift of passage tokens by tenth of closeness, with 95 percent intervals."
    return figure, f"{said} In the closest tenth: {lines}"


def dots(table: pd.DataFrame, row: str, label: str, line: float) -> tuple[Figure, str]:
    """Means with intervals as dots, a panel a set, a colour a reader; a vertical line at `line`.

    `table` has columns set, reader, `row`, mean, low, high; each value of `row` has its row.
    """
    rows, readers = (list(table[name].unique()) for name in (row, "reader"))
    figure, parts = panels(table, ["set"], 0.44 * len(rows) + 0.6, label)
    for axis, _, mine in parts:
        apart = 0.14 if len(mine) > len(rows) else 0  # in one row
        for number, reader in enumerate(readers):
            part = mine[mine["reader"] == reader].set_index(row).reindex(rows)
            shift = apart * ((len(readers) - 1) / 2 - number)
            places = [shift - place for place in range(len(rows))]
            colour = "0.45" if reader == "control" else PALETTE[number]
            axis.hlines(places, part["low"], part["high"], color=colour, lw=2)
            look = {"marker": MARKERS[number % 4], "ms": 6, "ls": "", "label": reader}
            axis.plot(part["mean"], places, color=colour, **look)
        axis.set_yticks(range(0, -len(rows), -1), [fill(str(one), 25) for one in rows])
        axis.axvline(line, color="0.3", lw=1, ls=":")
    legend(figure, 3 if len(readers) in (3, 5, 6) else 2)
    lines = told(table, f"{{set}}, {{reader}}, {{{row}}}: {{mean:.2f}}")
    return figure, f"{label}, by {row}, means with 95 percent intervals. {lines}"


def followings(table: pd.DataFrame, measure: str, line: float | None = None) -> tuple[Figure, str]:
    """An indicator of every reader against the gain in HR@5 that it teaches; `line`: a threshold.

    `table` has columns set, reader, value, gain, low, high (of the gain) and signal.
    """
    numbers = "(a number: a reader after so many steps of Step 1)"
    figure, parts = panels(table, ["set"], 4.0, f"{measure}\n{numbers}")
    named = []
    for axis, _, mine in parts:
        for number, (signal, part) in enumerate(mine.groupby("signal", sort=False)):
            look = {"fmt": MARKERS[number], "color": PALETTE[number], "lw": 1.2, "label": signal}
            reach = [part["gain"] - part["low"], part["high"] - part["gain"]]
            axis.errorbar(part["value"], part["gain"], yerr=reach, **look)
        first = mine[mine["signal"] == table["signal"].iloc[0]].itertuples()
        texts = [axis.text(p.value, p.gain, p.reader.removeprefix("step "), size=10) for p in first]
        named.append(texts)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.margins(x=0.2)
        axis.axhline(0, color="0.3", lw=1, ls=":")
        if line is not None:
            axis.axvline(line, color="0.3", lw=1, ls="--")
        axis.set_ylabel("gain in HR@5")
    if table["signal"].nunique() > 1:
        legend(figure, 2)
    leader = {"arrowstyle": "-", "color": "0.7", "lw": 0.8}
    for (axis, _, mine), texts in zip(parts, named, strict=True):
        points = {"x": mine["value"].to_numpy(), "y": mine["gain"].to_numpy(), "ax": axis}
        adjust_text(texts, **points, expand=(1.15, 1.5), iter_lim=LABEL_MOVES, arrowprops=leader)
    lines = told(table, "{set}, {reader}, {signal}: {value:.2f}, gain {gain:+.3f}")
    said = f"{measure} of each reader against the gain in HR@5 of the retriever it taught."
    return figure, f"{said} {lines}"


def specification(table: pd.DataFrame, choices: list[str], label: str) -> tuple[Figure, str]:
    """Every combination of choices, sorted by its result, with the option that it took of each.

    `table` has columns mean, low, high, and those of `choices`.
    """
    ordered = table.sort_values("mean").reset_index(drop=True)
    options = [(choice, value) for choice in choices for value in ordered[choice].drop_duplicates()]
    figure, (top, below) = column([3.0, 0.26 * len(options)])
    above, under = ordered["low"] > 0, ordered["high"] < 0
    sign = np.select([above, under], [PALETTE.as_hex()[0], PALETTE.as_hex()[3]], "#999999")
    top.vlines(ordered.index, ordered["low"], ordered["high"], color=sign, lw=1)
    top.scatter(ordered.index, ordered["mean"], c=sign, s=8, zorder=3)
    top.axhline(0, color="0.2", lw=1)
    top.set_ylabel(label)
    for place, (choice, value) in enumerate(options):
        taken = ordered.index[ordered[choice] == value]
        below.plot(taken, [-place] * len(taken), "|", color="0.25", ms=5)
    below.set_yticks(range(0, -len(options), -1), [f"{choice}: {v}" for choice, v in options])
    below.tick_params(axis="y", labelsize=10)
    below.set_xlabel("specifications, sorted")
    below.grid(visible=False)
    counts = f"{above.sum()} lie clearly above zero, {under.sum()} clearly below"
    said = f"{counts}, {len(ordered) - above.sum() - under.sum()} neither."
    return figure, f"Specification curve of {len(ordered)} combinations of choices: {label}. {said}"


def trainings(step1: pd.DataFrame, step2: pd.DataFrame, label: str) -> tuple[Figure, str]:
    """The logs of trainings, finished or not; either may be empty.

    `step1` has columns set, step, and those of LOGGED that were measured. `step2` has set,
    training, epoch, gain (of `label` since the start) and verdict (what the monitor says of it).
    """
    known = [name for name in LOGGED if name in step1 and step1[name].notna().any()]
    measures = list(dict.fromkeys(name.split()[-1] for name in known))
    figure, axes = column([2.6] * (len(measures) + step2["set"].nunique()), sharex=False)
    for axis, measure in zip(axes, measures, strict=False):
        for number, (set_name, part) in enumerate(step1.groupby("set", sort=False)):
            for name in [one for one in known if one.endswith(measure)]:
                line, said = part.dropna(subset=[name]), f"{set_name} {name.removesuffix(measure)}"
                look = "--s" if "nouns" in name else "-o" if "answer" in name else "-"
                axis.plot(line["step"], line[name], look, ms=5, color=PALETTE[number], label=said)
        if measure != "loss":
            axis.axhline(float(measure == "lift"), color="0.3", lw=1, ls=":")
        axis.set(title=f"Step 1: {measure}", xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.legend(fontsize=10, ncols=2)
    below = axes[len(measures) :]
    for axis, (set_name, mine) in zip(below, step2.groupby("set", sort=False), strict=True):
        for (_, word), part in mine.groupby(["training", "verdict"], sort=False):
            axis.plot(part["epoch"], part["gain"], "o-", ms=4, color=VERDICTS[word], label=word)
        axis.axhline(0, color="0.3", lw=1, ls=":")
        axis.set(title=f"Step 2, {set_name}: {label}, from its start", xlabel="epoch")
        axis.legend(**entries(axis), fontsize=10)
    newest = step1.groupby("set", sort=False).last().reset_index()  # the last known of each column
    lines = told(newest, "{set}: " + ", ".join(f"{name} {{{name}:.2f}}" for name in known))
    counts = step2.groupby("training")["verdict"].first().value_counts()
    words = ", ".join(f"{count} {word}" for word, count in counts.items()) or "none yet"
    said = f"The logs of {len(newest)} trainings of Step 1 and {counts.sum()} of Step 2."
    return figure, f"{said} Last numbers of Step 1: {lines} Step 2: {words}."
