"""Figures show the numbers of their tables, and their alt text tells them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cells import defined

from ragkit.distillation.targets import READERS
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
    twice = pd.concat([part for _, part in table.groupby("set")]).set_index(np.arange(12) % 6)
    assert plots.dots(twice, "way", "gain", 0)[1] == alt  # an index need not be unique
    assert "two, good, c: 1.100 from 1.090 to 1.150" in alt
    plt.close(figure)


def test_lines_by_closeness_follow_the_means_in_their_intervals(table):
    names = {"weak": f"{READERS[0]}, gold retrieved", "good": f"{READERS[1]}, not retrieved"}
    given = table.assign(goal="answer", percent=table["way"].map({"a": 90, "b": 95, "c": 100}))
    given["reader"] = given["reader"].map(names)
    figure, alt = defined("05_token_analysis", "figure").by_closeness(given)
    for axis, (_, part) in zip(figure.axes, given.groupby("set"), strict=True):
        assert set(part["mean"].round(6)) <= drawn(axis, "y")
        edges = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in axis.collections])
        for bound in part[["low", "high"]].to_numpy().ravel():
            assert np.isclose(edges, bound).any()
    assert "two, answer, fine-tuned, not retrieved: 1.10 from 1.09 to 1.15" in alt
    plt.close(figure)


def test_points_that_share_a_value_stay_apart_and_checkpoints_are_joined():
    readers = ("weak", "weak cloze", "step 5", "step 9", "good")
    table = pd.DataFrame({"set": "one", "reader": readers, "value": [0.5, 0.5, 0.2, 0.3, 0.4]})
    table = table.assign(gain=[0.1, 0.3, 0.0, -0.1, 0.2], signal="attention")
    table = table.assign(low=table["gain"] - 0.1, high=table["gain"] + 0.1)
    figure, alt = plots.followings(table, "Spearman", 0.3)
    (axis,) = figure.axes
    points = sorted(map(tuple, axis.collections[0].get_offsets().round(6).tolist()))
    assert points == sorted(table[["value", "gain"]].itertuples(index=False, name=None))
    path = max((line.get_xydata() for line in axis.lines), key=len)
    assert path.round(6).tolist() == [[0.5, 0.1], [0.2, 0.0], [0.3, -0.1], [0.4, 0.2]]
    assert "one, weak cloze, attention: 0.50, gain +0.300" in alt
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["weak", "weak cloze", "on the way (joined)", "good"]
    plt.close(figure)


def test_histograms_have_the_shares_at_their_bins_and_the_means_over_them():
    row = {"source": "paper", "reader": READERS[0], "system": "weak first", "mean": 0.25}
    bins = {"low": [0.0, 0.5], "high": [0.5, 1.0], "share": [0.75, 0.25]}
    table = pd.DataFrame({**row, "time": "before distillation", **bins})
    later = {"system": "weak later", "time": "after distillation", "mean": 0.75}
    table = pd.concat([table, table.assign(**later).iloc[1:].assign(share=1.0)])
    other = pd.DataFrame({**row, **later, "reader": READERS[1], "system": "good later", **bins})
    histograms = defined("06_indicators", "figure").histograms
    figure, alt = histograms(pd.concat([table, other.assign(source="here")]), "rho")
    places = ("weak paper", "weak here", "good paper", "good here")
    axes = dict(zip(places, figure.axes, strict=True))
    first, _, then, _ = (patch.get_data() for patch in axes["weak paper"].patches)
    assert first.values.tolist() == [0.75, 0.25]
    assert then.values.tolist() == [0.0, 1.0]  # a bin that is not in the table holds no question
    assert then.edges.tolist() == [0.0, 0.5, 1.0]
    assert drawn(axes["weak paper"], "x") == {0.25, 0.75}
    side = plt.rcParams["axes.titlelocation"]
    titles = [axis.get_title(side) for axis in axes.values()]
    assert titles == ["paper\n0.25 → 0.75", "here\nnot run", "not run", "0.75"]
    assert alt.endswith("paper, weak later: 0.75; here, good later: 0.75.")
    plt.close(figure)


def test_a_heat_map_writes_its_shares_and_stars_what_is_marked():
    index, columns = pd.Index(["one", "two"], name="layer"), pd.Index([1, 2, 3], name="head")
    shares = pd.DataFrame([[0.1, 0.2, 0.3], [0.45, 0.5, 0.6]], index, columns)
    marked = np.array([[False, False, True], [True, False, False]])
    heat_map = defined("03_attention_scores", "figure").heat_map
    figure, alt = heat_map(shares, "share of attention", marked)
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.texts] == ["0.10", "0.20", "0.30*", "0.45*", "0.50", "0.60"]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("layer", "head")
    assert alt.endswith("by layer and head. Highest: layer two, head 3 (0.60).")
    plt.close(figure)
    wide = pd.DataFrame(np.ones((1, 9)), pd.Index(["one"], name="layer"))
    figure, _ = heat_map(wide, "share", np.arange(9)[None] == 4)
    assert [t.get_text() for t in figure.axes[0].texts] == [""] * 4 + ["*"] + [""] * 4
    plt.close(figure)
