"""The report's parts: what is shown is escaped, named and led to."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat import v4
from test_reference import made, manifest_of, stage, stand

from ragkit.pages import html, plots, report
from ragkit.profile import load_profile

NASTY = "<script>alert(1)</script>"
CARD = {"claim": "C1", "statement": NASTY, "rule": NASTY, "measured": f"{NASTY}; two"}
DOTS = pd.DataFrame({"set": "s", "reader": "r", "way": ["a", "b"], "mean": [0.4, 0.6]})
DOTS = DOTS.assign(low=0.3, high=0.7)
CARD |= {"verdict": "not comparable", "why": NASTY, "paper": NASTY}
AWAY = re.compile(r"""(?:src|href|srcset|action)\s*=\s*["']?\s*(?:\w+:)?//|url\(\s*["']?\w*:?//""")


@pytest.fixture
def lab(tmp_path):
    """A finished run whose texts are hostile."""
    profile = load_profile("smoke")
    run = stand(tmp_path / "run", profile.model_dump(mode="json"))
    figures = run / "figures"
    pd.DataFrame([CARD]).to_csv(figures / "09_ledger.csv", index=False)
    stages = {"passages/a": stage("ran: new"), f"passages/{NASTY}": stage(made=made(NASTY, True))}
    notebooks = {"04_made": stage(NASTY, seconds=1.0, units={})}
    own = {"stages": stages, "notebooks": notebooks}
    manifest = manifest_of(profile.model_dump(mode="json"), **own)
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "notebooks").mkdir()
    head = v4.new_markdown_cell("# 04\n\n<details><summary>Hint</summary>h</details>")
    figure, _ = plots.dots(DOTS, "way", "share", 0)
    shown = plots.show(figure, f"A map. Then {NASTY}.", figures, "03_map", pd.DataFrame([CARD]))
    outputs = [v4.new_output("display_data", data={"text/html": shown.data})]
    code = v4.new_code_cell("### BEGIN SOLUTION\n1\n### END SOLUTION", outputs=outputs)
    nbformat.write(v4.new_notebook(cells=[head, code]), run / "notebooks" / "04_made.ipynb")
    (figures / report.SLIDERS).write_text("<script>ours()</script>")
    return SimpleNamespace(profile=profile, base="smoke", folder=run, figures=figures, sets={})


@pytest.fixture
def pages(lab, tmp_path):
    index, _ = report.write(lab, tmp_path / "nothing")
    return {path.name: path.read_text() for path in index.parent.glob("*.html")}


def test_every_page_is_written_and_escaped(pages):
    made = {"index", "04_made", "sliders", "manifest", "paper_scale", "words"}
    assert set(pages) == {f"{name}.html" for name in made}
    for name, text in pages.items():
        assert NASTY not in text, name
        assert ("script-src" in text) == ("<script" in text) == (name == "sliders.html")
        assert not AWAY.search(text), name
        assert "base-uri 'none'; form-action 'none'" in text
        assert 'name="viewport"' in text


def test_the_overview_leads_on(pages):
    text = pages["index.html"]
    assert text.count('<a href="04_made.html">Measured in notebook 04</a>') == 1
    assert "too small to judge" in text
    assert "There is no reference" in text
    assert 'aria-current="page">Overview' in text


def test_the_manifest_says_what_ran_and_what_made_it(pages):
    text = pages["manifest.html"]
    assert "2 stages, 4 seconds to make, 1 ran in this call; 5 passages a second" in text
    assert "0123456789abcdef (2), &lt;script&gt;" in text
    assert "1 were made by code with changes that the commit does not hold." in text
    assert '<th scope="row">torch</th><td>2 (2)</td>' in text


def test_a_figure_has_a_short_caption(pages):
    assert "<figcaption>A map.</figcaption>" in pages["04_made.html"]


def test_solutions_and_hints_are_folded(pages):
    assert pages["04_made.html"].count("<details><summary>Solution</summary>") == 1
    assert "<details><summary>Hint</summary>h</details>" in pages["04_made.html"]


@pytest.mark.parametrize(
    "data",
    [
        {"text/plain": "<b>x</b>"},
        {"text/markdown": "<b>x</b>"},
        {"text/html": "<p onclick='x()'>x</p>"},
        {"text/html": "<img src='http://x/x.png'><link href='//x'><a href='https://x'>x</a>"},
        {"text/html": "<a href='java&#10;script:x()'>x</a><svg><script>x()</script></svg>"},
        {"text/html": "<div style='background:url(//x);position:fixed'>x</div><base href='x'>"},
        {"text/markdown": "![x](http://x/x.png) [x](javascript:x)"},
    ],
)
def test_no_output_runs_or_loads_anything(data):
    shown = report.output_html(v4.new_output("display_data", data=data))
    banned = ("<b>", "onclick", "<link", "<base", "<script", "href=", "src=", "url(", "fixed")
    assert not [word for word in banned if word in shown]


def test_plain_output_is_text():
    shown = report.output_html(v4.new_output("stream", text=f"{NASTY}\x1b[31mred"))
    assert shown == "<pre>&lt;script&gt;alert(1)&lt;/script&gt;red</pre>"


def test_what_our_own_code_draws_is_kept(tmp_path):
    figure, _ = plots.dots(DOTS, "way", "share", 0)
    shown = plots.show(figure, "A map.", tmp_path, "map", pd.DataFrame()).data
    svg, cleaned = (tmp_path / "map.svg").read_text(), html.clean(shown)
    for mark in ("<path", "<use", "<text", "viewBox", "clip-path", "data:image/png"):
        assert cleaned.count(mark) == svg.count(mark), mark
    table = html.table(pd.DataFrame({"<b>": ["<i>", None], "x": [1.23456, 2]})).data
    assert "&lt;b&gt;" in table
    assert "&lt;i&gt;" in table
    assert "1.235" in table
    assert report.output_html(v4.new_output("display_data", data={"text/html": table})) == table
    marked = html.marked_tokens(["<s>", "a", "##b"], [1, 0.5, 0.2], [-1, 0, 0], ["<b>t"]).data
    assert "<b>t" not in marked
    assert "</span><span" in marked  # `b` is joined to `a`
    assert "rgba(0,90,160,1.00)" in marked  # what is no passage's does not count
    assert "rgba(0,90,160,1.00)" in html.clean(marked)


@pytest.mark.parametrize("verdict", ["reproduced", "partly", "mixed", "not yet measured"])
def test_a_card_names_its_verdict(verdict):
    told = "almanac: a 0.10 [-0.20, 0.40] contradicted (planted 0.30 [0.20, 0.36] holds) | b | c"
    shown = html.ledger(pd.DataFrame([CARD | {"verdict": verdict, "measured": told}])).data
    assert f">{verdict}</span>" in shown
    assert re.search("<li>a 0.10 .*2 more runs of Step 1.*<li>b</li><li>c</li>", shown, re.DOTALL)
    found = r'<line x1="(\S+)" x2="(\S+)" y1="0" y2="0" style="stroke:(\S+);.*cx="(\S+)"'
    (low, high, colour, mean), (*_, other, _) = re.findall(found, shown)
    assert [*map(float, (low, high, mean))] == pytest.approx([-50, 100, 25])  # its claim's scale
    assert (colour, other) == ("#b42318", "#1a7f37")  # of what is said of each
    assert low in html.clean(shown)


def test_the_pages_load_no_models():
    modules = ", ".join(f"ragkit.pages.{name}" for name in ("plots", "report"))
    check = "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; {check}"], check=True)
