"""One seaborn theme, one function a figure; alt text is computed from the data.

Every figure is one column of panels, WIDTH inches wide, so that its text stays legible where a phone shows it 360 pixels wide.
"""

from __future__ import annotations

import html
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

PALETTE = sns.color_palette("colorblind")
WIDTH = 5.6
LABEL_MOVES = 300  # of names of points, away from each other and from the points
# Colour, marker and shades of each kind of target.
KINDS = {"attention": (PALETTE[0], "o", "Blues"), "perplexity": (PALETTE[1], "s", "Oranges"), "control": ("0.45", "D", "Greys")}


def use_theme() -> None:
    """The look of every figure: colour-blind safe, legible on a phone."""
    sizes = {"font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "xtick.labelsize": 12, "ytick.labelsize": 12, "legend.fontsize": 12}
    rc = {"figure.dpi": 110, "svg.fonttype": "none", "savefig.bbox": "tight", "axes.titleweight": "bold", "axes.titlelocation": "left", **sizes}
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=rc)


def column(heights: list[float], sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels of these heights (inches), one below the other."""
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(WIDTH, sum(heights)), height_ratios=heights, sharex=sharex, squeeze=False, layout="constrained"
    )  # fmt: skip
    return figure, list(axes[:, 0])


def caption(alt: str) -> str:
    """The line shown below a figure: the first sentence of its alt text."""
    first, dot, _ = alt.partition(". ")
    return first[:1].upper() + first[1:] + dot.strip()


def figure_html(svg: str, alt: str, extra: str = "") -> str:
    """A figure with its caption; the whole alt text is its label, and stands in words behind a fold with `extra` (HTML)."""
    drawing = svg[svg.index("<svg") :].replace("<svg", '<svg style="max-width:100%;height:auto"', 1)
    words = f"<details><summary>Described in words</summary><p>{html.escape(alt)}</p>{extra}</details>"
    return (
        f'<figure style="margin:0;max-width:36rem"><div role="img" aria-label="{html.escape(alt, quote=True)}" style="background:#fff;color:#111">'
        f"{drawing}</div>"
        f"<figcaption>{html.escape(caption(alt))}</figcaption>{words}</figure>"
    )


def show(figure: Figure, alt: str, folder: Path, name: str, table: pd.DataFrame) -> HTML:
    """Writes SVG, PNG, alt text and the CSV twin to `folder`, and gives the figure for the notebook.

    The first sentence of `alt` becomes the caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg")
    figure.savefig(folder / f"{name}.png", dpi=150)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(alt, "utf8")
    plt.close(figure)
    return HTML(figure_html((folder / f"{name}.svg").read_text("utf8"), alt))


def kind(system: str) -> str:
    """The kind of target that a system learns from, for its colour: `attention`, `perplexity` or `control`."""
    return next((k for k in KINDS if k in system), "control")


def shades(systems: list[str]) -> dict[str, tuple[float, float, float]]:
    """A colour for each system: shades of the colour of its kind."""
    found: dict[str, tuple[float, float, float]] = {}
    for name, (_, _, palette) in KINDS.items():
        alike = [s for s in systems if kind(s) == name]
        found |= dict(zip(alike, sns.color_palette(palette, len(alike) + 2)[2:], strict=True))
    return found


def gains(table: pd.DataFrame) -> tuple[Figure, str]:
    """Gain in HR@5 of each target over the initial retriever, a panel a set.

    `table` has columns set, system, mean, low, high.
    """
    sets = list(table["set"].unique())
    figure, axes = column([0.46 * (table["set"] == name).sum() + 0.5 for name in sets])
    for axis, name in zip(axes, sets, strict=True):
        part = table[table["set"] == name].iloc[::-1]
        for y, row in enumerate(part.itertuples()):
            colour, marker, _ = KINDS[kind(row.system)]
            axis.plot([row.low, row.high], [y, y], color=colour, lw=2.5)
            axis.plot(row.mean, y, marker, color=colour, ms=7, label=kind(row.system))
        axis.set_yticks(range(len(part)), [fill(s, 25) for s in part["system"]])
        axis.axvline(0, color="0.2", lw=1)
        axis.set(title=name)
    axes[-1].set_xlabel("gain in HR@5 over the initial retriever")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend([handles[k] for k in KINDS if k in handles], [k for k in KINDS if k in handles], loc="outside upper center", ncols=3, frameon=False)
    best = table.loc[table["mean"].idxmax()]
    lines = [f"{r.set}, {r.system}: {r.mean:+.3f} from {r.low:+.3f} to {r.high:+.3f}" for r in table.itertuples(index=False)]
    alt = f"Gain in HR@5 over the initial retriever, with 95 % intervals. Largest: {best['system']} on {best['set']}. " + "; ".join(lines) + "."
    return figure, alt


def curves(table: pd.DataFrame, measure: str, label: str) -> tuple[Figure, str]:
    """A measure along the epochs of Step 2, a panel a set; columns set, system, seed, epoch and the measure."""
    sets, systems = list(table["set"].unique()), list(table["system"].unique())
    figure, axes = column([3.3] * len(sets))
    for axis, name in zip(axes, sets, strict=True):
        part = table[table["set"] == name]
        sns.lineplot(
            part,
            x="epoch",
            y=measure,
            hue="system",
            palette=shades(systems),
            style="system",
            style_order=systems,
            markers=True,
            dashes=False,
            markersize=8,
            markeredgewidth=0.5,
            errorbar=("pi", 100),
            ax=axis,
        )
        handles, names = axis.get_legend_handles_labels()
        axis.legend().remove()
        axis.set(title=name, xlabel="", ylabel=label, xticks=sorted(part["epoch"].unique()))
    axes[-1].set_xlabel("epoch of Step 2")
    figure.legend(handles, [fill(n, 24) for n in names], loc="outside lower center", ncols=2, frameon=False, handlelength=1.5, columnspacing=1)
    last = table[table["epoch"] == table["epoch"].max()].groupby(["set", "system"])[measure].mean()
    ends = "; ".join(f"{name}, {system}: {value:.3f}" for (name, system), value in last.items())
    return figure, f"{label} along the epochs of Step 2, mean and range over seeds. At the end: {ends}."


def heat_map(scores: pd.DataFrame) -> tuple[Figure, str]:
    """Attention of each passage by layer: rows are passages, columns layers, values the share of the layer's attention."""
    figure, (axis,) = column([0.55 * scores.shape[0] + 1.6])
    named = scores.set_axis([fill(str(row), 18) for row in scores.index])
    sns.heatmap(
        named, annot=scores.shape[1] <= 6, fmt=".2f", cmap="cividis", ax=axis, cbar_kws={"label": "share of attention", "orientation": "horizontal"}
    )  # fmt: skip
    axis.set(xlabel="layer", ylabel="passage")
    axis.tick_params(axis="y", rotation=0)
    top = scores.mean(axis=1)
    return figure, f"Heat map of attention by passage and layer. On average passage {top.idxmax()} gets most ({top.max():.2f})."


def attention_cost(table: pd.DataFrame) -> tuple[Figure, str]:
    """Seconds and memory of a plain forward pass, ours and eager attention against tokens, a panel a measure and kind of reader.

    `table` is the bench's: columns kind, tokens, way, seconds, MB. Both axes are logarithmic.
    """
    panels = [(measure, label, name) for measure, label in (("seconds", "seconds"), ("MB", "peak MB")) for name in table["kind"].unique()]
    figure, axes = column([2.1] * len(panels))
    for axis, (measure, label, name) in zip(axes, panels, strict=True):
        part = table[table["kind"] == name]
        for way, colour, style, marker in (("fused", PALETTE[0], "-", "o"), ("ours", PALETTE[1], "--", "s"), ("eager", PALETTE[3], "-.", "D")):
            line = part[part["way"] == way]
            axis.plot(line["tokens"], line[measure], style, marker=marker, color=colour, label=way)
        axis.set(xscale="log", yscale="log", title=f"{name}: {label}")
        axis.set_xticks(sorted(part["tokens"].unique()), [f"{t:,}" for t in sorted(part["tokens"].unique())])
        axis.minorticks_off()
    axes[-1].set_xlabel("tokens")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    lines = [f"{r.kind}, {r.tokens} tokens, {r.way}: {r.seconds:.2f} s, {r.MB:.0f} MB" for r in table.itertuples(index=False)]
    return figure, "Seconds and peak memory beyond the model of one forward pass against its length. " + "; ".join(lines) + "."


def deciles(table: pd.DataFrame) -> tuple[Figure, str]:
    """Lift of each tenth of the passage tokens by closeness, a panel a set and goal, a line a reader.

    `table` has columns set, goal, reader, tenth (1 farthest, 10 closest), mean, low, high.
    """
    panels = list(table[["set", "goal"]].drop_duplicates().itertuples(index=False))
    figure, axes = column([2.6] * len(panels))
    for axis, (set_name, goal) in zip(axes, panels, strict=True):
        part = table[(table["set"] == set_name) & (table["goal"] == goal)]
        for number, (reader, line) in enumerate(part.groupby("reader", sort=False)):
            axis.fill_between(line["tenth"], line["low"], line["high"], color=PALETTE[number], alpha=0.2, lw=0)
            axis.plot(line["tenth"], line["mean"], marker="os^D"[number % 4], color=PALETTE[number], label=reader)
        axis.axhline(1, color="0.3", lw=1, ls=":")
        axis.set(title=f"{set_name}: closeness to the {goal}", ylabel="lift (1 = average)", xticks=range(1, 11))
    axes[-1].set_xlabel("tenth of the passage tokens, 10 = closest")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=1, frameon=False)
    ends = table[table["tenth"] == 10]
    lines = [f"{r.set}, {r.goal}, {r.reader}: {r.mean:.2f} from {r.low:.2f} to {r.high:.2f}" for r in ends.itertuples(index=False)]
    return figure, "Lift of passage tokens by tenth of closeness, with 95 percent intervals. In the closest tenth: " + "; ".join(lines) + "."


def dots(table: pd.DataFrame, row: str, label: str, line: float) -> tuple[Figure, str]:
    """Means with intervals as dots, a panel a set, a row for each value of `row`, a colour a reader; a vertical line at `line`.

    `table` has columns set, reader, `row`, mean, low, high.
    """
    sets, rows, readers = (list(table[column].unique()) for column in ("set", row, "reader"))
    figure, axes = column([0.42 * len(rows) + 0.6] * len(sets))
    for axis, name in zip(axes, sets, strict=True):
        for number, reader in enumerate(readers):
            part = table[(table["set"] == name) & (table["reader"] == reader)].set_index(row).reindex(rows)
            places = [len(rows) - 1 - i + 0.14 * ((len(readers) - 1) / 2 - number) for i in range(len(rows))]
            axis.hlines(places, part["low"], part["high"], color=PALETTE[number], lw=2)
            axis.plot(part["mean"], places, "os^D"[number % 4], color=PALETTE[number], label=reader, ms=5)
        axis.set_yticks(range(len(rows)), rows[::-1])
        axis.axvline(line, color="0.3", lw=1, ls=":")
        axis.set_title(name)
    axes[-1].set_xlabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2 if len(readers) < 5 else 3, frameon=False)
    told = [f"{r['set']}, {r['reader']}, {r[row]}: {r['mean']:.2f}" for _, r in table.iterrows()]
    return figure, f"{label}, means with 95 percent intervals. " + "; ".join(told) + "."


def followings(table: pd.DataFrame, measure: str, line: float | None = None) -> tuple[Figure, str]:
    """An indicator of every reader against the gain in HR@5 that it teaches, a panel a set; a dashed line at a threshold.

    `table` has columns set, reader, value, gain, low, high (of the gain) and signal.
    """
    sets, signals = list(table["set"].unique()), list(table["signal"].unique())
    figure, axes = column([4.0] * len(sets))
    names: dict[Axes, list[Text]] = {}
    for axis, name in zip(axes, sets, strict=True):
        for number, signal in enumerate(signals):
            part = table[(table["set"] == name) & (table["signal"] == signal)]
            axis.errorbar(
                part["value"], part["gain"], yerr=[part["gain"] - part["low"], part["high"] - part["gain"]], fmt="os"[number % 2],
                color=PALETTE[number], lw=1.2, label=signal,
            )  # fmt: skip
            if number == 0:
                names[axis] = [axis.text(p.value, p.gain, p.reader.removeprefix("step "), fontsize=9.5, color="0.25") for p in part.itertuples()]
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.margins(x=0.2)
        axis.axhline(0, color="0.3", lw=1, ls=":")
        if line is not None:
            axis.axvline(line, color="0.3", lw=1, ls="--")
        axis.set(title=name, ylabel="gain in HR@5")
    axes[-1].set_xlabel(f"{measure}\n(a number: a reader after so many steps of Step 1)")
    if len(signals) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(signals), frameon=False)
    for axis, texts in names.items():  # a number of iterations, not of seconds: a busy machine draws the same figure
        points = table[table["set"] == axis.get_title()]
        where = {"x": points["value"].to_numpy(), "y": points["gain"].to_numpy()}
        starts = [text.get_position() for text in texts]
        adjust_text(texts, **where, ax=axis, expand=(1.15, 1.5), iter_lim=LABEL_MOVES)
        for text, (x, y) in zip(texts, starts, strict=True):
            axis.plot((x, text.get_position()[0]), (y, text.get_position()[1]), color="0.7", lw=0.8, zorder=1, scalex=False, scaley=False)
    told = [f"{r.set}, {r.reader}, {r.signal}: {r.value:.2f}, gain {r.gain:+.3f}" for r in table.itertuples(index=False)]
    return figure, f"{measure} of each reader against the gain in HR@5 of the retriever it taught. " + "; ".join(told) + "."


def specification(table: pd.DataFrame, choices: list[str], label: str) -> tuple[Figure, str]:
    """A specification curve: every combination of choices, sorted by its result, and below it which choice each one took.

    `table` has columns mean, low, high, and one a choice; `choices` names them.
    """
    ordered = table.sort_values("mean").reset_index(drop=True)
    options = [(choice, value) for choice in choices for value in ordered[choice].drop_duplicates()]
    figure, (top, below) = column([3.0, 0.26 * len(options)])
    sign = [PALETTE[0] if low > 0 else PALETTE[3] if high < 0 else "0.6" for low, high in zip(ordered["low"], ordered["high"], strict=True)]
    top.vlines(ordered.index, ordered["low"], ordered["high"], color=sign, lw=1)
    top.scatter(ordered.index, ordered["mean"], c=sign, s=8, zorder=3)
    top.axhline(0, color="0.2", lw=1)
    top.set_ylabel(label)
    for place, (choice, value) in enumerate(options):
        taken = ordered.index[ordered[choice] == value]
        below.plot(taken, [len(options) - 1 - place] * len(taken), "|", color="0.25", ms=5)
    below.set_yticks(range(len(options)), [f"{choice}: {value}" for choice, value in options][::-1], fontsize=10)
    below.set_xlabel("specifications, sorted")
    below.grid(visible=False)
    above, under = int((ordered["low"] > 0).sum()), int((ordered["high"] < 0).sum())
    told = f"{above} lie clearly above zero, {under} clearly below, {len(ordered) - above - under} neither."
    return figure, f"Specification curve of {len(ordered)} combinations of choices: {label}. {told}"


def trainings(step1: pd.DataFrame, step2: pd.DataFrame, label: str) -> tuple[Figure, str]:
    """The logs of trainings, finished or not: Step 1's loss and indicators, a colour a set, and Step 2's `label` against its start, a panel a set.

    `step1` has columns set, step, loss and what `training_log.Probe` measures; `step2` has set, training, epoch, gain and verdict: a line each
    training, coloured by what the monitor says of it now. Either may be empty.
    """
    panels = {"loss": ["loss"], "lift (1 = average token)": ["answer lift", "nouns lift"], "Spearman": ["answer Spearman", "nouns Spearman"]}
    panels = {title: [n for n in names if n in step1 and step1[n].notna().any()] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    sets = list(step2["set"].unique())
    figure, axes = column([2.6] * (len(panels) + len(sets)), sharex=False)
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for number, (set_name, part) in enumerate(step1.groupby("set", sort=False)):
            for name in names:
                line, (style, marker) = part.dropna(subset=[name]), {"loss": ("-", ""), "answer": ("-", "o"), "nouns": ("--", "s")}[name.split()[0]]
                goal = {"loss": "", "answer": ", answer", "nouns": ", nouns"}[name.split()[0]]
                axis.plot(line["step"], line[name], style, marker=marker, color=PALETTE[number], ms=5, label=f"{set_name}{goal}")
        if title != "loss":
            axis.axhline(float(title != "Spearman"), color="0.3", lw=1, ls=":")
        axis.set(title=f"Step 1: {title}", xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.legend(fontsize=10, ncols=2)
    looks = {"working": (PALETTE[0], "o"), "not working": (PALETTE[3], "s"), "too early to tell": ("0.55", "D")}
    for axis, set_name in zip(axes[len(panels) :], sets, strict=True):
        for (_, word), part in step2[step2["set"] == set_name].groupby(["training", "verdict"], sort=False):
            colour, marker = looks[word]
            axis.plot(part["epoch"], part["gain"], marker=marker, color=colour, lw=1.2, ms=4, label=word)
        axis.axhline(0, color="0.3", lw=1, ls=":")
        axis.set(title=f"Step 2, {set_name}: {label}, from its start", xlabel="epoch")
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(handles.values(), handles.keys(), fontsize=10)
    newest = step1.groupby("set", sort=False).last()  # of each column the last number that is known
    lines = [f"{name}: " + ", ".join(f"{n} {row[n]:.2f}" for names in panels.values() for n in names) for name, row in newest.iterrows()]
    counts = step2.groupby("training")["verdict"].first().value_counts()
    told = ", ".join(f"{count} {word}" for word, count in counts.items()) or "none yet"
    return figure, f"The logs of {len(newest)} trainings of Step 1 and {counts.sum()} of Step 2. Last numbers of Step 1: {'; '.join(lines)}. Step 2: {told}."
