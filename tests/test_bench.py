"""The bench's own machinery, on small readers: its numbers are not looked at, its shape is."""

import json
from pathlib import Path

import pytest
from benchmarks import attention as bench

from ragkit.attention.cost import Shape, recorded_bytes
from ragkit.pages import plots


@pytest.fixture
def tiny(monkeypatch, capsys):
    for kind, kv_heads in (("falcon", 4), ("llama", 2)):
        monkeypatch.setitem(bench.SHAPES, kind, Shape(2, 4, 8, kv_heads, 2 * 32 * 128))

    def here(kind, tokens, ways, repeats):
        bench.measure(kind, tokens, ways, repeats)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(
        bench.torch, "set_num_threads", lambda count: None
    )  # here it would outlive the test
    peak = bench.peak
    monkeypatch.setattr(
        bench, "peak", lambda *given: max(1, peak(*given))
    )  # so small a pass may need no new page
    monkeypatch.setattr(bench, "apart", here)
    monkeypatch.setattr(bench, "EAGER_UP_TO", 128)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Peak memory is measured on Linux only."
)
def test_a_bench_makes_a_table_and_a_figure_and_goes_on_where_it_stopped(
    tiny, tmp_path, monkeypatch
):
    bench.table_of(["falcon"], [64], 1, tmp_path)
    measured = []
    apart = bench.apart
    monkeypatch.setattr(
        bench,
        "apart",
        lambda kind, tokens, *rest: measured.append((kind, tokens)) or apart(kind, tokens, *rest),
    )
    table = bench.table_of(["falcon", "llama"], [64, 256], 1, tmp_path)
    assert set(measured) == {("llama", 64), ("falcon", 256), ("llama", 256)}
    ways = {64: ("fused", "ours", "eager"), 256: ("fused", "ours")}
    expected = [
        (kind, tokens, way)
        for kind in ("falcon", "llama")
        for tokens in ways
        for way in ways[tokens]
    ]
    assert [tuple(row) for row in table[["kind", "tokens", "way"]].to_numpy()] == expected
    assert (table["seconds"] > 0).all()
    assert (table.loc[table["way"] == "fused", ["time ratio", "memory ratio"]] == 1).all(None)
    last = table[(table["kind"] == "llama") & (table["tokens"] == 256)].set_index("way")
    assert last.loc["ours", "modelled MB"] == pytest.approx(
        last.loc["fused", "MB"] + recorded_bytes(bench.SHAPES["llama"], 256, bench.ROWS) / 1e6,
        abs=0.1,
    )
    figure, alt = plots.attention_cost(table)
    assert "llama, 256 tokens, ours" in alt
    assert len(figure.axes) == 4
