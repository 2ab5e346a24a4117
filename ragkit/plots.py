"""One seaborn theme, one function a figure; alt text is computed from the data."""

from __future__ import annotations

import html
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind")


def use_theme() -> None:
    """The look of every figure: colour-blind safe, legible on a phone."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={"figure.dpi": 110, "svg.fonttype": "none", "savefig.bbox": "tight"})


def show(figure: Figure, alt: str, folder: Path, name: str, table: pd.DataFrame) -> HTML:
    """Writes SVG, PNG and the CSV twin to `folder`, and gives the SVG with its alt text for the notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg")
    figure.savefig(folder / f"{name}.png", dpi=150)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(alt, "utf8")
    svg = (folder / f"{name}.svg").read_text("utf8")
    plt.close(figure)
    label = html.escape(alt, quote=True)
    return HTML(f'<figure role="img" aria-label="{label}" style="margin:0;max-width:100%;overflow-x:auto">{svg[svg.index("<svg") :]}</figure>')


def gains(table: pd.DataFrame) -> tuple[Figure, str]:
    """Gain in HR@5 of each target over the initial retriever, a panel a set.

    `table` has columns set, system, mean, low, high.
    """
    sets = list(table["set"].unique())
    figure, axes = plt.subplots(1, len(sets), figsize=(5.5 * len(sets), 3.8), sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], sets, strict=True):
        part = table[table["set"] == name].iloc[::-1]
        colours = [PALETTE[0] if "attention" in s else PALETTE[1] if "perplexity" in s else "0.45" for s in part["system"]]
        for y, (row, colour) in enumerate(zip(part.itertuples(), colours, strict=True)):
            axis.plot([row.low, row.high], [y, y], color=colour, lw=2)
            axis.plot(row.mean, y, "o", color=colour)
        axis.set_yticks(range(len(part)), part["system"])
        axis.axvline(0, color="0.2", lw=1)
        axis.set(title=name, xlabel="gain in HR@5 over the initial retriever")
    best = table.loc[table["mean"].idxmax()]
    lines = [f"{r.set}, {r.system}: {r.mean:+.3f} from {r.low:+.3f} to {r.high:+.3f}" for r in table.itertuples(index=False)]
    alt = f"Gain in HR@5 with 95 percent intervals. Largest: {best['system']} on {best['set']}. " + "; ".join(lines) + "."
    return figure, alt


def curves(table: pd.DataFrame, measure: str, label: str) -> tuple[Figure, str]:
    """A measure along the epochs of Step 2, a panel a set; columns set, system, seed, epoch and the measure."""
    sets = list(table["set"].unique())
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], sets, strict=True):
        part = table[table["set"] == name]
        sns.lineplot(
            part,
            x="epoch",
            y=measure,
            hue="system",
            style="system",
            markers=True,
            dashes=False,
            errorbar=("pi", 100),
            ax=axis,
            legend=axis is axes[0][-1],
        )
        axis.set(title=name, xlabel="epoch of Step 2", ylabel=label, xticks=sorted(part["epoch"].unique()))
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    last = table[table["epoch"] == table["epoch"].max()].groupby(["set", "system"])[measure].mean()
    ends = "; ".join(f"{name}, {system}: {value:.3f}" for (name, system), value in last.items())
    return figure, f"{label} along the epochs of Step 2, mean and range over seeds. At the end: {ends}."


def heat_map(scores: pd.DataFrame) -> tuple[Figure, str]:
    """Attention of each passage by layer: rows are passages, columns layers, values the share of the layer's attention."""
    figure, axis = plt.subplots(figsize=(1.2 * scores.shape[1] + 2.5, 0.5 * scores.shape[0] + 1.2))
    sns.heatmap(scores, annot=True, fmt=".2f", cmap="cividis", cbar_kws={"label": "share of attention"}, ax=axis)
    axis.set(xlabel="layer", ylabel="passage")
    top = scores.mean(axis=1)
    return figure, f"Heat map of attention by passage and layer. On average passage {top.idxmax()} gets most ({top.max():.2f})."


def attention_cost(table: pd.DataFrame) -> tuple[Figure, str]:
    """Seconds and memory of a plain forward pass, ours and eager attention against tokens, a column a kind of reader.

    `table` is the bench's: columns kind, tokens, way, seconds, MB. Both axes are logarithmic.
    """
    kinds = list(table["kind"].unique())
    figure, axes = plt.subplots(2, len(kinds), figsize=(4.6 * len(kinds), 6.4), sharex="col", sharey="row", squeeze=False)
    for row, (measure, label) in enumerate((("seconds", "seconds"), ("MB", "peak MB beyond the model"))):
        for axis, kind in zip(axes[row], kinds, strict=True):
            part = table[table["kind"] == kind]
            for way, colour, style in (("fused", PALETTE[0], "-"), ("ours", PALETTE[1], "--"), ("eager", PALETTE[3], "-.")):
                line = part[part["way"] == way]
                axis.plot(line["tokens"], line[measure], style, marker="o", color=colour, label=way)
            axis.set(xscale="log", yscale="log", title=kind if row == 0 else "", xlabel="tokens" if row else "", ylabel=label if axis is axes[row][0] else "")
            axis.set_xticks(sorted(part["tokens"].unique()), [f"{t:,}" for t in sorted(part["tokens"].unique())])
            axis.minorticks_off()
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    lines = [f"{r.kind}, {r.tokens} tokens, {r.way}: {r.seconds:.2f} s, {r.MB:.0f} MB" for r in table.itertuples(index=False)]
    return figure, "Seconds and peak memory of one forward pass against its length. " + "; ".join(lines) + "."


def deciles(table: pd.DataFrame) -> tuple[Figure, str]:
    """Lift of each tenth of the passage tokens by closeness, a panel a set and goal, a line a reader.

    `table` has columns set, goal, reader, tenth (1 farthest, 10 closest), mean, low, high.
    """
    panels = list(table[["set", "goal"]].drop_duplicates().itertuples(index=False))
    figure, axes = plt.subplots(len(panels), 1, figsize=(6.2, 2.9 * len(panels)), sharex=True, squeeze=False)
    for axis, (set_name, goal) in zip(axes[:, 0], panels, strict=True):
        part = table[(table["set"] == set_name) & (table["goal"] == goal)]
        for number, (reader, line) in enumerate(part.groupby("reader", sort=False)):
            axis.fill_between(line["tenth"], line["low"], line["high"], color=PALETTE[number], alpha=0.2, lw=0)
            axis.plot(line["tenth"], line["mean"], marker="os^D"[number % 4], color=PALETTE[number], label=reader)
        axis.axhline(1, color="0.3", lw=1, ls=":")
        axis.set(title=f"{set_name}: closeness to the {goal}", ylabel="lift (1 = average)", xticks=range(1, 11))
    axes[-1, 0].set_xlabel("tenth of the passage tokens, 10 = closest")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    ends = table[table["tenth"] == 10]
    lines = [f"{r.set}, {r.goal}, {r.reader}: {r.mean:.2f} from {r.low:.2f} to {r.high:.2f}" for r in ends.itertuples(index=False)]
    return figure, "Lift of passage tokens by tenth of closeness, with 95 percent intervals. In the closest tenth: " + "; ".join(lines) + "."


def dots(table: pd.DataFrame, row: str, label: str, line: float) -> tuple[Figure, str]:
    """Means with intervals as dots, a panel a set, a row for each value of `row`, a colour a reader; a vertical line at `line`.

    `table` has columns set, reader, `row`, mean, low, high.
    """
    sets, rows, readers = (list(table[column].unique()) for column in ("set", row, "reader"))
    figure, axes = plt.subplots(len(sets), 1, figsize=(6.2, len(sets) * (0.36 * len(rows) + 1.2)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], sets, strict=True):
        for number, reader in enumerate(readers):
            part = table[(table["set"] == name) & (table["reader"] == reader)].set_index(row).reindex(rows)
            places = [len(rows) - 1 - i + 0.14 * ((len(readers) - 1) / 2 - number) for i in range(len(rows))]
            axis.hlines(places, part["low"], part["high"], color=PALETTE[number], lw=2)
            axis.plot(part["mean"], places, "os^D"[number % 4], color=PALETTE[number], label=reader, ms=5)
        axis.set_yticks(range(len(rows)), rows[::-1])
        axis.axvline(line, color="0.3", lw=1, ls=":")
        axis.set_title(name)
    axes[-1, 0].set_xlabel(label)
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.tight_layout()
    told = [f"{r['set']}, {r['reader']}, {r[row]}: {r['mean']:.2f}" for _, r in table.iterrows()]
    return figure, f"{label}, means with 95 percent intervals. " + "; ".join(told) + "."


def followings(table: pd.DataFrame, measure: str, line: float | None = None) -> tuple[Figure, str]:
    """An indicator of every reader against the gain in HR@5 that it teaches, a panel a set; a dashed line at a threshold.

    `table` has columns set, reader, value, gain, low, high (of the gain) and signal.
    """
    sets, signals = list(table["set"].unique()), list(table["signal"].unique())
    figure, axes = plt.subplots(len(sets), 1, figsize=(6.2, 4.2 * len(sets)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], sets, strict=True):
        for number, signal in enumerate(signals):
            part = table[(table["set"] == name) & (table["signal"] == signal)]
            axis.errorbar(
                part["value"], part["gain"], yerr=[part["gain"] - part["low"], part["high"] - part["gain"]], fmt="os"[number % 2],
                color=PALETTE[number], lw=1.2, label=signal,
            )  # fmt: skip
        for point in part.itertuples():
            axis.annotate(point.reader, (point.value, axis.get_ylim()[0]), rotation=90, fontsize=8, color="0.35", ha="center", va="bottom")
        axis.axhline(0, color="0.3", lw=1, ls=":")
        if line is not None:
            axis.axvline(line, color="0.3", lw=1, ls="--")
        axis.set(title=name, ylabel="gain in HR@5")
    axes[-1, 0].set_xlabel(measure)
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    told = [f"{r.set}, {r.reader}, {r.signal}: {r.value:.2f}, gain {r.gain:+.3f}" for r in table.itertuples(index=False)]
    return figure, f"{measure} of each reader against the gain in HR@5 of the retriever it taught. " + "; ".join(told) + "."


def specification(table: pd.DataFrame, choices: list[str], label: str) -> tuple[Figure, str]:
    """A specification curve: every combination of choices, sorted by its result, and below it which choice each one took.

    `table` has columns mean, low, high, and one a choice; `choices` names them.
    """
    ordered = table.sort_values("mean").reset_index(drop=True)
    options = [(choice, value) for choice in choices for value in ordered[choice].drop_duplicates()]
    figure, (top, below) = plt.subplots(2, 1, figsize=(6.2, 3 + 0.24 * len(options)), sharex=True, height_ratios=[3, 0.24 * len(options)])
    sign = [PALETTE[0] if low > 0 else PALETTE[3] if high < 0 else "0.6" for low, high in zip(ordered["low"], ordered["high"], strict=True)]
    top.vlines(ordered.index, ordered["low"], ordered["high"], color=sign, lw=1)
    top.scatter(ordered.index, ordered["mean"], c=sign, s=8, zorder=3)
    top.axhline(0, color="0.2", lw=1)
    top.set_ylabel(label)
    for place, (choice, value) in enumerate(options):
        taken = ordered.index[ordered[choice] == value]
        below.plot(taken, [len(options) - 1 - place] * len(taken), "|", color="0.25", ms=5)
    below.set_yticks(range(len(options)), [f"{choice}: {value}" for choice, value in options][::-1], fontsize=8)
    below.set_xlabel("specifications, sorted")
    below.grid(visible=False)
    figure.tight_layout()
    above, under = int((ordered["low"] > 0).sum()), int((ordered["high"] < 0).sum())
    told = f"{above} lie clearly above zero, {under} clearly below, {len(ordered) - above - under} neither."
    return figure, f"Specification curve of {len(ordered)} combinations of choices: {label}. {told}"
