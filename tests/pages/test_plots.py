"""Figures show the numbers of their tables, and their alt text tells them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ragkit.pages import plots


@pytest.fixture
def table():
    """Two sets, two readers, three rows; means with intervals that are not symmetric."""
    names = [(s, r, w) for s in ("one", "two") for r in ("weak", "good") for w in ("a", "b", "c")]
    made = pd.DataFrame(names, columns=["set", "reader", "way"])
    made["mean"] = np.arange(12) / 10
    return made.assign(low=made["mean"] - 0.01, high=made["mean"] + 0.05)


def drawn(axis, across):
    """The numbers at which an axis has points and ends of lines, along one direction."""
    lines = [line.get_data()[0 if across == "x" else 1] for line in axis.lines]
    return {round(float(value), 6) for line in lines for value in line}


def test_dots_lie_on_the_means_and_reach_over_the_intervals(table):
    figure, alt = plots.dots(table, "way", "gain", 0)
    for axis, (name, part) in zip(figure.axes, table.groupby("set"), strict=True):
        assert axis.get_title(plt.rcParams["axes.titlelocation"]) == name
        wanted = part[["mean", "low", "high"]].to_numpy().round(6).ravel()
        assert set(wanted) <= drawn(axis, "x")
        assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b", "c"]
    assert "Largest: c on two." in alt
    assert "two, good, c: 1.100 from 1.090 to 1.150" in alt
    plt.close(figure)


def test_lines_of_tenths_follow_the_means_in_their_intervals(table):
    tenths = table.assign(goal="answer", tenth=table["way"].map({"a": 8, "b": 9, "c": 10}))
    figure, alt = plots.deciles(tenths)
    for axis, (_, part) in zip(figure.axes, tenths.groupby("set"), strict=True):
        assert set(part["mean"].round(6)) <= drawn(axis, "y")
        edges = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in axis.collections])
        for bound in part[["low", "high"]].to_numpy().ravel():
            assert np.isclose(edges, bound).any()
    assert "two, answer, good: 1.10 from 1.09 to 1.15" in alt
    plt.close(figure)


def test_points_that_share_a_value_stay_apart():
    rows = [("one", "weak", 0.5, 0.1), ("one", "good", 0.5, 0.3), ("one", "step 5", 0.2, 0.0)]
    table = pd.DataFrame(rows, columns=["set", "reader", "value", "gain"]).assign(
        signal="attention"
    )
    table = table.assign(low=table["gain"] - 0.1, high=table["gain"] + 0.1)
    figure, _ = plots.followings(table, "Spearman", 0.3)
    (axis,) = figure.axes
    points = axis.collections[0].get_offsets()
    assert sorted(map(tuple, points.round(6).tolist())) == [(0.2, 0.0), (0.5, 0.1), (0.5, 0.3)]
    assert {text.get_text() for text in axis.texts} >= {"weak", "good", "5"}
    plt.close(figure)


def test_a_heat_map_writes_its_shares_and_stars_what_is_marked():
    index, columns = pd.Index(["one", "two"], name="layer"), pd.Index([1, 2, 3], name="head")
    shares = pd.DataFrame([[0.1, 0.2, 0.3], [0.45, 0.5, 0.6]], index, columns)
    marked = np.array([[False, False, True], [True, False, False]])
    figure, alt = plots.heat_map(shares, "share of attention", marked)
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.texts] == ["0.10", "0.20", "0.30*", "0.45*", "0.50", "0.60"]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("layer", "head")
    assert alt.endswith("by layer and head. Highest: layer two, head 3 (0.60).")
    plt.close(figure)
    wide = pd.DataFrame(np.ones((1, 9)), pd.Index(["one"], name="layer"))
    figure, _ = plots.heat_map(wide, "share", np.arange(9)[None] == 4)
    assert [t.get_text() for t in figure.axes[0].texts] == [""] * 4 + ["*"] + [""] * 4
    plt.close(figure)
