"""One seaborn theme, one function a figure; alt text is computed from the data.

Every figure is one column of panels, WIDTH inches wide, so that its text stays legible where a
phone shows it 360 pixels wide. A figure's function gives it with its alt text; `show` keeps both.
"""

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
from numpy.typing import NDArray

from ragkit.pages import html
from ragkit.settings import asset

PALETTE, MARKERS = sns.color_palette("colorblind"), ["o", "s", "^", "D"]
WIDTH = 5.6
LABEL_MOVES = 300  # of names of points: a count, no seconds, so that a busy machine draws the same
Look = dict[str, Any]  # options of matplotlib's and seaborn's functions
RULE: Look = {"color": "0.3", "lw": 1, "ls": ":"}  # a line that says where nothing happens
WITHIN: Look = {"y": "value", "estimator": "median", "errorbar": ("pi", 100)}  # see `bounds`
LEADER: Look = {"arrowstyle": "-", "color": "0.7", "lw": 0.8}  # from a name to its point


def use_theme() -> None:
    """The look of every figure: colour-blind safe, legible on a phone."""
    sns.set_theme(style="whitegrid", palette="colorblind")
    plt.style.use(asset("figures.mplstyle"))


def column(heights: list[float], sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels of these heights (inches), one below the other."""
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), height_ratios=heights, sharex=sharex, squeeze=False)
    return figure, list(axes[:, 0])


def panels(
    draw: Any, table: pd.DataFrame, height: float, ncols: int, labels: tuple[str, str], **look: Any
) -> Figure:
    """What `draw` (of seaborn) makes of each `panel`, or else set, under one legend."""
    parts = list(table.groupby("panel" if "panel" in table else "set", sort=False))
    figure, axes = column([height] * len(parts))
    for axis, (name, part) in zip(axes, parts, strict=True):
        draw(part, ax=axis, **look)
        axis.set(title=name, xlabel=labels[0], ylabel=labels[1])
    plt.setp([axis.get_legend() for axis in axes], visible=False)
    handles, names = axes[0].get_legend_handles_labels()
    if len(names) > 1:
        names = [fill(name, 56 // ncols) for name in names]
        figure.legend(handles, names, loc="outside upper center", ncols=ncols, frameon=False)
    return figure


def bounds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, low and high as three rows of `value`, for seaborn to draw WITHIN them: their median is
    the mean, their range the interval."""
    numbers = ["mean", "low", "high"]
    return table.melt(table.columns.difference(numbers, sort=False), numbers, "bound")


def told(said: str, table: pd.DataFrame, form: str) -> str:
    """An alt text: a sentence, and the rows of a table in words; `form` names its columns."""
    return f"{said} {'; '.join(form.format(**row) for row in table.to_dict('records'))}."


def show(figure: Figure, alt: str, folder: Path, name: str, table: pd.DataFrame) -> HTML:
    """Writes SVG, PNG, alt text and the CSV twin to `folder`; the figure for the notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(folder / f"{name}.svg", metadata=unsaid)
    figure.savefig(folder / f"{name}.png", dpi=150)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(alt, "utf8")
    plt.close(figure)
    return HTML(html.figure(folder / f"{name}.svg"))


def curves(table: pd.DataFrame, measure: str, label: str) -> tuple[Figure, str]:
    """A measure along the epochs of Step 2, its mean and range over seeds, a panel a set; columns
    set, system, seed, epoch and the measure."""
    systems = table["system"].unique()
    shades = sns.color_palette("cubehelix", len(systems) + 2)[: len(systems)]  # told apart in grey
    look: Look = {"x": "epoch", "y": measure, "errorbar": ("pi", 100), "markers": True, "ms": 8}
    look |= {"hue": "system", "style": "system", "palette": shades, "dashes": False}
    figure = panels(sns.lineplot, table, 3.3, 2, ("epoch of Step 2", label), **look)
    plt.setp(figure.axes, xticks=table["epoch"].unique())
    last = table[table["epoch"] == table["epoch"].max()]
    ends = last.groupby(["set", "system"])[measure].mean().rename("value").reset_index()
    said = f"{label} along the epochs of Step 2, mean and range over seeds. At the end:"
    return figure, told(said, ends, "{set}, {system}: {value:.3f}")


def heat_map(
    shares: pd.DataFrame, label: str, marked: NDArray[np.bool_] | None = None
) -> tuple[Figure, str]:
    """Shares by row and column, whose names are those of the table's axes; those `marked` `[rows,
    columns]` get a star."""
    rows, columns = shares.index.name, shares.columns.name
    figure, (axis,) = column([0.4 * shares.shape[0] + 1.6])
    named = shares.set_axis([fill(str(row), 18) for row in shares.index])
    stars = np.where(np.zeros(shares.shape, bool) if marked is None else marked, "*", "")
    digits = shares.map("{:.2f}".format) if shares.shape[1] <= 8 else shares.map("".format)
    blues = sns.blend_palette(["#ffffff", "#6baed6"], as_cmap=True)  # under black digits
    look: Look = {"cbar_kws": {"label": label, "orientation": "horizontal"}}
    look |= {"annot": digits + stars, "fmt": "", "annot_kws": {"color": "black"}}
    sns.heatmap(named, ax=axis, cmap=blues, **look)
    axis.set(xlabel=columns, ylabel=rows)
    axis.tick_params(axis="y", rotation=0)
    row, place = shares.stack().idxmax()
    said = f"Highest: {rows} {row}, {columns} {place} ({shares.loc[row, place]:.2f})."
    return figure, f"Heat map of the {label}, by {rows} and {columns}. {said}"


def deciles(table: pd.DataFrame) -> tuple[Figure, str]:
    """Lift by closeness; columns set, goal, reader, tenth (10 is closest), mean, low, high."""
    long = bounds(table.assign(panel=table["set"] + ": closeness to the " + table["goal"]))
    look: Look = {"x": "tenth", "hue": "reader", "style": "reader", "markers": True, **WITHIN}
    labels = ("tenth of the passage tokens, 10 = closest", "lift (1 = average)")
    figure = panels(sns.lineplot, long, 2.6, 1, labels, dashes=False, **look)
    plt.setp(figure.axes, xticks=range(1, 11))
    for axis in figure.axes:
        axis.axhline(1, **RULE)
    said = "Lift of passage tokens by tenth of closeness, with 95 percent intervals. The closest:"
    form = "{set}, {goal}, {reader}: {mean:.2f} from {low:.2f} to {high:.2f}"
    return figure, told(said, table[table["tenth"] == 10], form)


def dots(table: pd.DataFrame, row: str, label: str, line: float) -> tuple[Figure, str]:
    """Means with intervals as dots, a panel a set, a colour a reader; a vertical line at `line`.
    Columns set, reader, `row`, mean, low, high; each value of `row` has its row."""
    readers = list(table["reader"].unique())
    drawn = table.assign(row=[fill(str(one), 25) for one in table[row]])
    alone = not table.duplicated(["set", row]).any()  # in their rows: none must be moved aside
    colours = ["0.45" if one == "control" else PALETTE[i] for i, one in enumerate(readers)]
    look: Look = {**WITHIN, "x": "value", "y": "row", "order": drawn["row"].unique(), "ls": "none"}
    look |= {"hue": "reader", "hue_order": readers, "palette": colours, "markers": MARKERS * 2}
    look |= {"dodge": not alone and 0.14 * (len(readers) - 1), "ms": 6, "err_kws": {"lw": 2}}
    three = len(readers) in (3, 5, 6) and max(map(len, readers)) < 15  # else too wide for a phone
    height, ncols = 0.44 * drawn["row"].nunique() + 0.6, 3 if three else 2
    figure = panels(sns.pointplot, bounds(drawn), height, ncols, (label, ""), **look)
    for axis in figure.axes:
        axis.axvline(line, **RULE)
    best = table.loc[table["mean"].idxmax()]
    largest = f"Largest: {best[row]} on {best['set']}."
    said = f"{label}, by {row}, means with 95 percent intervals. {largest}"
    form = f"{{set}}, {{reader}}, {{{row}}}: {{mean:.3f}} from {{low:.3f}} to {{high:.3f}}"
    return figure, told(said, table, form)


def followings(table: pd.DataFrame, measure: str, line: float | None = None) -> tuple[Figure, str]:
    """An indicator of every reader against the gain in HR@5 that it teaches; `line`: a threshold.
    Columns set, reader (its name stands at the points of the first signal), value, gain, low, high
    (of the gain) and signal."""
    signals = table["signal"].unique()
    colours, signs = (dict(zip(signals, some, strict=False)) for some in (PALETTE, MARKERS))
    look: Look = {"x": "value", "y": "gain", "hue": "signal", "style": "signal", "s": 50}
    labels = (f"{measure}\n(a number: a reader after so many steps of Step 1)", "gain in HR@5")
    look |= {"palette": colours, "markers": signs}
    figure = panels(sns.scatterplot, table, 4.0, 2, labels, **look)
    parts = [part for _, part in table.groupby("set", sort=False)]
    for axis, part in zip(figure.axes, parts, strict=True):
        axis.vlines(part["value"], part["low"], part["high"], part["signal"].map(colours), lw=1.2)
        for point in part[part["signal"] == signals[0]].itertuples():
            axis.text(point.value, point.gain, point.reader.removeprefix("step "), size=10)
        axis.margins(x=0.2)
        axis.axhline(0, **RULE)
        if line is not None:
            axis.axvline(line, **RULE | {"ls": "--"})
    for axis, part in zip(figure.axes, parts, strict=True):
        x, y = part["value"].to_numpy(), part["gain"].to_numpy()
        look = {"expand": (1.15, 1.5), "iter_lim": LABEL_MOVES, "arrowprops": LEADER}
        adjust_text(list(axis.texts), x, y, ax=axis, **look)
    said = f"{measure} of each reader against the gain in HR@5 of the retriever it taught."
    return figure, told(said, table, "{set}, {reader}, {signal}: {value:.2f}, gain {gain:+.3f}")


def specification(table: pd.DataFrame, choices: list[str], label: str) -> tuple[Figure, str]:
    """Every combination of choices, sorted by its result, with the option that it took of each;
    columns mean, low, high, and those of `choices`."""
    ordered = table.sort_values("mean").reset_index(drop=True)
    taken = ordered[choices].melt(var_name="choice", ignore_index=False)
    options = taken["choice"] + ": " + taken["value"].astype(str)
    figure, (top, below) = column([3.0, 0.26 * options.nunique()])
    above, under = ordered["low"] > 0, ordered["high"] < 0
    colour = np.select([above, under], [PALETTE.as_hex()[0], PALETTE.as_hex()[3]], "#999999")
    top.vlines(ordered.index, ordered["low"], ordered["high"], color=colour, lw=1)
    top.scatter(ordered.index, ordered["mean"], c=colour, s=8, zorder=3)
    top.axhline(0, color="0.2", lw=1)
    top.set_ylabel(label)
    sns.scatterplot(x=taken.index, y=options, ax=below, color="0.25", marker="|", linewidth=1)
    below.tick_params(axis="y", labelsize=10)
    below.set(xlabel="specifications, sorted", ylabel="")
    below.grid(visible=False)
    said = f"Specification curve of {len(ordered)} combinations of choices: {label}."
    counts = f"{above.sum()} lie clearly above zero, {under.sum()} clearly below"
    return figure, f"{said} {counts}, {len(ordered) - above.sum() - under.sum()} neither."
