"""The bench's own machinery, on small readers: its numbers are not looked at, its shape is."""

import json
from pathlib import Path

import pandas as pd
import pytest
from benchmarks import attention as bench

from ragkit.experiment.provenance import closure
from ragkit.settings import asset

LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Peak memory is measured on Linux only."
)


@LINUX
def test_a_bench_makes_a_table_and_goes_on_where_it_stopped(monkeypatch, capsys, tmp_path):
    measured, peak = [], bench.peak

    def here(kind, tokens, ways, repeats):
        measured.append((kind, tokens))
        bench.measure(kind, tokens, ways, repeats)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for kind in ("falcon", "llama"):
        monkeypatch.setitem(bench.SIZES, kind, {**bench.SIZES[kind], **small})
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda n: None)  # it would outlive the test
    # so small a pass may need no new page
    monkeypatch.setattr(bench, "peak", lambda *given: max(1, peak(*given)))
    monkeypatch.setattr(bench, "apart", here)
    monkeypatch.setattr(bench, "EAGER_UP_TO", 128)
    bench.table_of(["falcon"], [64], 1, tmp_path)
    measured.clear()
    table = bench.table_of(["falcon", "llama"], [64, 256], 1, tmp_path)
    assert set(measured) == {("llama", 64), ("falcon", 256), ("llama", 256)}
    expected = []
    for kind in ("falcon", "llama"):
        for tokens, ways in ((64, ("fused", "ours", "eager")), (256, ("fused", "ours"))):
            expected += [(kind, tokens, way) for way in ways]
    assert [tuple(row) for row in table[["kind", "tokens", "way"]].to_numpy()] == expected
    assert (table["seconds"] > 0).all()
    assert (table.loc[table["way"] == "fused", ["time ratio", "memory ratio"]] == 1).all(None)
    assert list(table) == list(pd.read_csv(asset("bench.csv")))


def test_another_bench_reruns_the_notebook_that_shows_it():
    path = Path(__file__).parent.parent / "notebooks/A2_attention_cost.ipynb"
    notebook = json.loads(path.read_text("utf8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "assets/bench.csv" in closure("\n".join(cells))
