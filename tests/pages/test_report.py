"""The report's parts: what is shown is escaped, named and led to."""

import json

import nbformat
import pandas as pd
import pytest
from test_reference import stand

from ragkit.experiment import claims
from ragkit.pages import html as views
from ragkit.pages import plots, report
from ragkit.profile import load_profile

NASTY = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path):
    """A finished run without stages, whose texts are hostile."""
    profile = load_profile("smoke").model_dump(mode="json")
    run = stand(tmp_path / "run", profile, ledger=None)
    ledger = claims.table(claims.decide({}, judge=False), {}).assign(
        statement=NASTY, rule=NASTY, measured=f"{NASTY}; two", why=NASTY, paper=NASTY
    )
    ledger.to_csv(run / "figures" / "09_ledger.csv", index=False)
    manifest = {
        "profile": profile, "git": NASTY, "versions": {"torch": NASTY}, "python": "3", "machine": {"cores": 2, "memory_gib": 4},
        "peak_memory_mib_of_a_notebook": 1, "seconds_of_this_call": 100.0, "trimmed_prompts": {}, "notebooks": {"04_made": NASTY},
        "stages": {"corpus/a": {"key": "k", "seconds": 2.0, "this_call": "ran"}, f"corpus/{NASTY}": {"key": "k", "seconds": 3.0, "this_call": "reused"}},
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "notebooks").mkdir()
    head = nbformat.v4.new_markdown_cell(
        "# 04\n\n**You will learn** whether *it*\nworks.\n**Minutes on `tiny`:** two."
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[head]), run / "notebooks" / "04_made.ipynb")
    figure, _ = plots.heat_map(pd.DataFrame({"1": [0.4, 0.6]}, index=["a", "b"]))
    plots.show(
        figure, f"A map. Then {NASTY}.", run / "figures", "03_map", pd.DataFrame({"a": [NASTY]})
    )
    return run


def test_every_page_is_written_and_escaped(run, tmp_path):
    index, compared = report.write(run, tmp_path / "nothing")
    pages = {path.name: path.read_text() for path in index.parent.glob("*.html")}
    assert set(pages) == {
        "index.html",
        "04_made.html",
        "gallery.html",
        "sliders.html",
        "manifest.html",
        "paper_scale.html",
    }
    for name, text in pages.items():
        assert NASTY not in text, name
        assert ("script-src" in text) == (name == "sliders.html")
    assert compared.summary in pages["index.html"]


def test_the_overview_leads_on(run, tmp_path):
    text = report.write(run, tmp_path)[0].read_text()
    assert text.count('<a href="04_made.html">Measured in notebook 04</a>') == 2  # C1, C2
    assert "Whether it works." in text
    assert "too small to judge" in text
    assert 'aria-current="page">Overview' in text


def test_the_manifest_says_what_ran_in_this_call(run, tmp_path):
    report.write(run, tmp_path)
    assert (
        "2 stages, 5 seconds to make, 1 ran in this call"
        in (run / "report" / "manifest.html").read_text()
    )


def test_a_figure_has_a_short_caption_and_its_files(run, tmp_path):
    report.write(run, tmp_path)
    text = (run / "report" / "gallery.html").read_text()
    assert "<figcaption>A map.</figcaption>" in text
    assert {path.name for path in (run / "report" / "figures").iterdir()} == {
        "03_map.csv",
        "03_map.svg",
        "03_map.png",
    }
    assert 'href="figures/03_map.csv"' in text


@pytest.mark.parametrize("verdict", claims.VERDICTS)
def test_a_card_names_its_verdict(verdict):
    table = claims.table(claims.decide({}, judge=False), {}).head(1).assign(verdict=verdict)
    assert f">{verdict}</span>" in views.ledger(table).data
