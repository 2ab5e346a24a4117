"""The sliders' page holds ragkit's own numbers, its formulas give ragkit's, no text breaks out."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
from cells import defined

from ragkit.data.corpus import Passage, Question
from ragkit.distillation import targets
from ragkit.pages.html import page as whole_page
from ragkit.profile import load_profile
from ragkit.settings import POOLINGS, ROWS, AttentionSettings

K, LAYERS, HEADS, N = 4, 3, 2, 30
EXAMPLES = 12  # shown on the page
NASTY = "</script><script>document.title='broken'</script><!-- & \u2028"
CHOICES = [  # reader, rows, norm, layer, pooling, temperature
    ("fine-tuned", "last_prompt", "on", "mean", "sum", "auto"),
    ("off-the-shelf", "consuming", "off", 2, "mean", "auto"),
    ("off-the-shelf", "predicting", "on", 3, "sum", 0.25),
]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="no node to run the formulas")
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium to open the page in")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """What the page asks of a lab, made of hostile texts and random scores."""
    rng = np.random.default_rng(0)
    passages = [Passage(str(i), f"{NASTY} title {i}", f"the river {i} {NASTY}") for i in range(12)]
    asked = [Question(str(i), f"which {i} {NASTY}", (NASTY,), (i % 12,)) for i in range(N)]
    candidates = np.stack([rng.permutation(12)[:K] for _ in range(N)])
    shape, vectors = (N, len(ROWS), 2, LAYERS, HEADS, K), rng.normal(size=(12, 8))
    looks = {}
    for name in ("off-the-shelf", "fine-tuned"):
        attention = rng.gamma(0.5, size=shape).astype(np.float32)
        looks[name] = {"attention": attention, "tokens": rng.integers(0, 9, (N, K))}
    queries = {question.text: rng.normal(size=8) for question in asked}

    def golds(questions, found):
        return [question.gold for question in questions]

    held = SimpleNamespace(
        profile=load_profile("smoke", [f"k={K}"]),
        sets={"set": None},
        figures=tmp_path_factory.mktemp("figures"),
        readers=lambda: list(looks),
        look=lambda name, which: looks[which],
        asked=lambda name: (asked, candidates),
        corpus=lambda name: SimpleNamespace(passages=passages, golds=golds),
        open=lambda kind, name: Path(kind),
        encode=lambda texts: np.stack([queries[text] for text in texts]),
        vectors=SimpleNamespace(take=lambda places: vectors[places]),
    )
    return held


def written_by(lab, **names):
    """What notebook 03 defines for the page, with this lab and its models."""
    models = SimpleNamespace(
        retriever=lambda lab, name: SimpleNamespace(encode=lab.encode),
        vectors=lambda lab, name: lab.vectors,
    )
    made = defined("03_attention_scores", "sliders", lab=lab)
    vars(made)["of_set"].__globals__.update(models=models, lab=lab, **names)
    return made


def body(lab):
    return written_by(lab).sliders()


def data(lab, **names):
    made = written_by(lab, **names)
    held = re.search(r'id="data">(.*?)</script>', made.sliders(), re.DOTALL)[1]
    return json.loads(held)


def expected(lab, reader, rows, norm, layer, pooling, temperature):
    """What ragkit gives for a choice: p_ATTN, its temperature, how often its top is gold."""
    stored = dict(lab.look("set", reader))
    if layer != "mean":
        stored["attention"] = stored["attention"][:, :, :, layer - 1 : layer]
    settings = AttentionSettings(rows=rows, norm=norm == "on", pooling=pooling)
    standard = targets.standardise(targets.attention_scores(stored, settings))
    if temperature == "auto":
        temperature = targets.temperature_for(standard, lab.profile.distill.entropy)
    asked, candidates = lab.asked("set")
    gold = targets.oracle_scores(candidates.tolist(), [one.gold for one in asked])
    some = (gold.sum(1) > 0) & (gold.sum(1) < K)
    p = targets.softmax(standard, temperature)
    return p, temperature, gold[np.arange(len(p)), standard.argmax(1)][some].mean()


def test_the_page_holds_the_stored_scores(lab):
    held = data(lab)["sets"][0]
    asked, candidates = lab.asked("set")
    for reader in held["readers"]:
        stored = lab.look("set", reader["name"])
        sums, tokens = stored["attention"].mean(4), stored["tokens"]
        held_sums, held_means = np.moveaxis(np.array(reader["attention"]), 4, 0)
        assert np.allclose(held_sums, sums, rtol=1e-4)
        means = sums / np.maximum(tokens, 1)[:, None, None, None]
        assert np.allclose(held_means, means, rtol=1e-3, atol=1e-4)
    assert len(held["examples"]) == EXAMPLES
    gold, retr = np.array(held["gold"]), np.array(held["retr"])
    for place, example in enumerate(held["examples"]):
        question, found = asked[place], candidates[place]
        assert example["question"] == question.text
        assert [title for title, _ in example["passages"]] == [f"{NASTY} title {i}" for i in found]
        assert gold[place].tolist() == [float(i in question.gold) for i in found]
        query = lab.encode([question.text])[0]
        assert np.allclose(retr[place], lab.vectors.take(found) @ query, rtol=1e-4)


def test_fewer_questions_of_deep_readers(lab):
    one = 3 * 2 * LAYERS * len(POOLINGS) * K  # numbers of a question
    for numbers, n in ((20 * one, 20), (13 * one - 1, EXAMPLES), (one, EXAMPLES)):
        held = data(lab, NUMBERS=numbers)["sets"][0]
        shown = (held["gold"], held["retr"], *(one["attention"] for one in held["readers"]))
        assert {len(values) for values in shown} == {n}
        assert held["of"] == N


def test_no_text_breaks_out_of_the_page(lab):
    text = body(lab)
    assert text.count("<script") == text.count("</script") == 3
    embedded = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in embedded
    assert json.loads(embedded)["sets"][0]["examples"][0]["answers"] == [NASTY]
    assert "innerHTML" not in text


def said_by_the_page(lab, call):
    """What the page's own formulas give for a call; its data is `d`."""
    script = re.search(r'<script id="arithmetic">(.*?)</script>', body(lab), re.DOTALL)[1]
    whole = f"{script}; const d = {json.dumps(data(lab))}; console.log(JSON.stringify({call}))"
    done = subprocess.run(["node", "-"], input=whole, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize("choice", CHOICES)
def test_the_pages_formulas_give_what_ragkit_gives(lab, choice):
    reader, rows, norm, layer, pooling, temperature = choice
    place = {"rows": ROWS.index(rows), "norm": int(norm == "on")}
    place |= {"layer": layer if layer == "mean" else layer - 1, "pooling": POOLINGS.index(pooling)}
    which = f"d.sets[0].readers[{lab.readers().index(reader)}]"
    call = f"teach(d, d.sets[0], {which}, {json.dumps(place)}, {json.dumps(temperature)})"
    seen = said_by_the_page(lab, call)
    p, used, top = expected(lab, *choice)
    assert np.allclose(seen["attn"], p, atol=1e-3)
    assert seen["temperature"] == pytest.approx(used, rel=1e-2)
    assert seen["entropy"] == pytest.approx(targets.entropy(p), abs=1e-3)
    assert seen["top"]["share"] == pytest.approx(top)
    held = data(lab)
    retr = targets.softmax(np.array(held["sets"][0]["retr"]), held["theta"])
    assert np.allclose(seen["retr"], retr, atol=1e-6)
    assert seen["kl"] == pytest.approx(float((p * np.log(p / retr)).sum(1).mean()), rel=1e-2)


def opened(lab, folder, address=""):
    """What a browser makes of the page at an address."""
    page = whole_page("Sliders", body(lab), [("Sliders", "sliders.html")], "sliders.html")
    (folder / "sliders.html").write_text(page, "utf8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    address = f"file://{folder}/sliders.html{address}"
    command = [BROWSER, *flags, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@needs_browser
def test_the_page_opens_with_a_question_whose_gold_passage_was_found(lab, tmp_path):
    held = data(lab)["sets"][0]
    first = np.array(held["gold"]).any(1).tolist().index(True)
    shown = opened(lab, tmp_path)
    question = re.search(r'<p id="question">(.*?)</p>', shown)[1]
    assert html.unescape(question) == held["examples"][first]["question"]
    assert '<span class="gold">' in shown


@needs_browser
@pytest.mark.parametrize("choice", CHOICES[:2])
def test_the_page_shows_it_in_a_browser(lab, tmp_path, choice):
    names = ("reader", "rows", "norm", "layer", "pooling", "temperature")
    asked = dict(zip(names, choice, strict=True)) | {"question": 2}
    shown = opened(lab, tmp_path, f"#{urlencode(asked)}")
    p, used, top = expected(lab, *choice)
    bars = [float(v) for v in re.findall(r'class="bar attn">.*?<b>([\d.]+)</b>', shown)]
    assert np.allclose(bars, p[1], atol=1.5e-3)
    assert float(re.search(r'id="sum-top">([\d.]+)', shown)[1]) == pytest.approx(top, abs=1e-3)
    assert float(re.search(r"T = ([\d.e+-]+)", shown)[1]) == pytest.approx(used, rel=1e-2)
    assert html.unescape(re.search(r"<title>(.*?)</title>", shown)[1]) == "Sliders"
