"""One seaborn theme, one function a figure, which gives it with its alt text; `show` keeps both.
Every figure is one column of panels, WIDTH inches wide: legible on a phone of 360 pixels."""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ragkit.pages import html
from ragkit.settings import asset

PALETTE, MARKERS = sns.color_palette("colorblind"), ["o", "s", "^", "D"]
WIDTH = 5.6
Look = dict[str, Any]  # options of matplotlib's and seaborn's functions
RULE: Look = {"color": "0.3", "lw": 1, "ls": ":"}  # a line that says where nothing happens
WITHIN: Look = {"y": "value", "estimator": "median", "errorbar": ("pi", 100)}  # see `bounds`


def use_theme() -> None:
    """The look of every figure: colour-blind safe, legible on a phone."""
    sns.set_theme(style="whitegrid", palette="colorblind")
    plt.style.use(asset("figures.mplstyle"))


def column(heights: list[float], sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels of these heights (inches), one below the other."""
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes: Any = figure.subplots(len(heights), height_ratios=heights, sharex=sharex, squeeze=False)
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
    """Mean, low and high as three rows of `value`, whose median and range seaborn draws WITHIN."""
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
    best = table.iloc[table["mean"].fillna(float("-inf")).argmax()]  # of few questions all are NaN
    said = f"{label}, by {row}, means with 95 percent intervals. "
    said += f"Largest: {best[row]} on {best['set']}."
    form = f"{{set}}, {{reader}}, {{{row}}}: {{mean:.3f}} from {{low:.3f}} to {{high:.3f}}"
    return figure, told(said, table, form)


def followings(table: pd.DataFrame, measure: str, line: float | None = None) -> tuple[Figure, str]:
    """An indicator of every reader against the gain in HR@5 that it teaches; `line`: a threshold.
    Columns set or panel, reader (the checkpoints of Step 1 are joined in their order), value, gain,
    low, high (of the gain), signal: told by colour, or if it is one only, the kind of reader."""
    panel = "panel" if "panel" in table else "set"
    kind = table["reader"].str.replace(r"step \d+", "on the way (joined)", regex=True)
    kind = table["signal"] if table["signal"].nunique() > 1 else kind
    drawn = table.assign(kind=kind)
    colours = dict(zip(kind.unique(), PALETTE, strict=False))
    look: Look = {"x": "value", "y": "gain", "hue": "kind", "style": "kind", "s": 60}
    look |= {"palette": colours, "markers": dict(zip(colours, [*MARKERS, "v", "P"], strict=False))}
    figure = panels(sns.scatterplot, drawn, 2.4, 2, (measure, "gain in HR@5"), zorder=3, **look)
    for axis, (_, part) in zip(figure.axes, drawn.groupby(panel, sort=False), strict=True):
        axis.vlines(part["value"], part["low"], part["high"], part["kind"].map(colours), lw=1.2)
        for _, path in part[~part["reader"].str.endswith("cloze")].groupby("signal"):
            axis.plot(path["value"], path["gain"], color="0.6", lw=1)
        axis.axhline(0, **RULE)
        if line is not None:
            axis.axvline(line, **RULE | {"ls": "--"})
    said = f"{measure} of each reader against the gain in HR@5 of the retriever it taught."
    form = f"{{{panel}}}, {{reader}}, {{signal}}: {{value:.2f}}, gain {{gain:+.3f}}"
    return figure, told(said, table, form)
