"""Publishing a run: its figures replace the old ones, its verdicts stand in the README, and nothing else there changes."""

from ragkit import report


def test_a_run_becomes_the_reference(tmp_path):
    run, figures, readme = tmp_path / "run", tmp_path / "figures", tmp_path / "README.md"
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "04_gains.svg").write_text("<svg/>")
    (run / "figures" / "09_ledger.csv").write_text(
        "claim,statement,rule,measured,verdict,why,paper\nC1,It helps.,r,almanac: 0.1,partly,w,\nC3,More.,r,,not yet measured,,\n"
    )
    (run / "manifest.json").write_text("{}")
    figures.mkdir()
    (figures / "old.svg").write_text("<svg/>")
    readme.write_text("before\n<!-- ledger -->\nstale\n<!-- /ledger -->\nafter\n")
    report.publish(run, figures, readme)
    assert {p.name for p in figures.iterdir()} == {"04_gains.svg", "09_ledger.csv", "manifest.json"}
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| C1 | It helps. | **partly** | almanac: 0.1 |" in lines
    assert "| C3 | More. | **not yet measured** |  |" in lines
    assert "stale" not in lines
    report.publish(run, figures, readme)  # again: the same page
    assert readme.read_text().splitlines() == lines
