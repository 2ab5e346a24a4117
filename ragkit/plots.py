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
