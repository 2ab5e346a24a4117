"""The sliders' page holds ragkit's own numbers, its formulas give what ragkit gives, and no text can break out of it."""

import html
import itertools
import json
import re
import shutil
import subprocess
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.distillation import targets as distill
from ragkit.distillation import teacher
from ragkit.models import vectors
from ragkit.models.retriever import Retriever, train_by_cropping
from ragkit.pages import report, sliders
from ragkit.profile import AttentionSettings, Profile

K, LAYERS, N = 4, 3, 30
NASTY = "</script><script>document.title='broken'</script><!-- & \u2028"
PROFILE = Profile.model_validate(
    {
        "name": "made",
        "k": K,
        "sets": [{"source": "world", "name": "set", "world": "almanac", "seed": 1}],
        "retriever": {"crop_steps": 1},
    }
)


def record(stage, made_from):
    (stage / "stage.json").write_text(
        json.dumps({"key": "now", "record": made_from, "seconds": 0, "files": {}})
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    passages = [
        Passage(str(i), f"{NASTY} title {i}", f"the river {i} runs through the town {NASTY}")
        for i in range(12)
    ]
    questions = [
        Question(str(i), f"which river is {i} {NASTY}", (NASTY,), (i % 12,)) for i in range(N)
    ]
    stages = folder / "stages"
    for part in (
        "corpus/set",
        "retriever/set",
        "vectors/set",
        "candidates/set",
        "teacher/set/fine-tuned",
        "teacher/set/off-the-shelf",
    ):
        (stages / part).mkdir(parents=True)
    Corpus("set", passages, dict.fromkeys(("distill", "dev", "test"), questions)).save(
        stages / "corpus/set"
    )
    retriever = train_by_cropping(passages, PROFILE.retriever, 0)
    retriever.save(stages / "retriever/set/model")
    candidates = np.stack([rng.permutation(12)[:K] for _ in range(N)])
    vectors.write_shard(stages / "vectors/set", 0, retriever.encode([p.text for p in passages]))
    save_file({"distill": candidates}, stages / "candidates/set/candidates.safetensors")
    for reader in ("fine-tuned", "off-the-shelf"):
        scores = rng.gamma(
            0.5, size=(N, len(teacher.ROWS), 2, LAYERS, len(teacher.POOLINGS), K)
        ).astype(np.float32)
        teacher.save({"attention": scores}, stages / "teacher/set" / reader)
        record(
            stages / "teacher/set" / reader,
            {"upstream": {"candidates/set": "now"}, "profile": {"k": K}},
        )
    record(stages / "candidates/set", {})
    return folder


def expected(run, reader, rows, norm, layer, pooling, temperature):
    """What ragkit gives for one choice: p_ATTN of the sampled questions, their gold marks, their retriever's distribution."""
    chosen = sliders.sample(N, 1)
    stored = teacher.load(run / "stages/teacher/set" / reader)["attention"][chosen]
    picked = stored if layer == "mean" else stored[:, :, :, layer - 1 : layer]
    settings = AttentionSettings(rows=rows, norm=norm == "on", pooling=pooling)
    standard = distill.standardise(teacher.attention_scores({"attention": picked}, settings))
    used = (
        distill.temperature_for(standard, PROFILE.distill.entropy)
        if temperature == "auto"
        else temperature
    )
    corpus = Corpus.load("set", run / "stages/corpus/set")
    candidates = sliders.load_file(run / "stages/candidates/set/candidates.safetensors")["distill"][
        chosen
    ]
    gold = distill.oracle_scores(
        candidates.tolist(), [corpus.questions["distill"][i].gold for i in chosen]
    )
    some = (gold.sum(1) > 0) & (gold.sum(1) < K)
    p = distill.softmax(standard, used)
    return p, used, float(gold[np.arange(len(p)), standard.argmax(1)][some].mean())


CHOICES = [
    ("fine-tuned", "last_prompt", "on", "mean", "sum", "auto"),
    ("off-the-shelf", "consuming", "off", 2, "mean", "auto"),
    ("off-the-shelf", "predicting", "on", 3, "sum", 0.25),
]


def array(held):
    return np.array(held["values"]).reshape(held["shape"])


def test_the_page_holds_the_stored_scores(run):
    held = sliders.data(run, PROFILE)["sets"][0]
    chosen = sliders.sample(N, 1)
    assert sorted(chosen) == list(range(N))
    for reader in held["readers"]:
        stored = teacher.load(run / "stages/teacher/set" / reader["name"])["attention"]
        assert np.allclose(array(reader["attention"]), stored[chosen], rtol=1e-4)
    assert len(held["examples"]) == sliders.EXAMPLES
    corpus = Corpus.load("set", run / "stages/corpus/set")
    retriever = Retriever.load(str(run / "stages/retriever/set/model"), PROFILE.retriever)
    for place, (example, gold, retr) in enumerate(
        zip(held["examples"], array(held["gold"]), array(held["retr"]), strict=False)
    ):
        question = corpus.questions["distill"][chosen[place]]
        assert example["question"] == question.text
        numbers = [
            corpus.passages.index(Passage(str(i), *p))
            for p in example["passages"]
            for i in range(12)
            if p[0].endswith(f" title {i}")
        ]
        assert gold.tolist() == [float(i in question.gold) for i in numbers]
        texts = [question.text, *(corpus.passages[i].text for i in numbers)]
        query, *vectors = retriever.encode(texts)
        assert np.allclose(retr, np.stack(vectors) @ query, atol=1e-3)


def by_layer(set_name):
    """Notebook 08's table with a number of its own for every choice; no Spearman under the last choice."""
    choices = itertools.product(
        ("fine-tuned",),
        ("Indicator 1", "Indicator 2"),
        teacher.ROWS,
        ("off", "on"),
        (*range(1, LAYERS + 1), "mean"),
    )
    rows = [(*choice, set_name, number / 7, -number / 11) for number, choice in enumerate(choices)]
    table = pd.DataFrame(
        rows, columns=["reader", "goal", "rows", "norm", "layer", "set", "attention", "Spearman"]
    )
    table.loc[table.index[-1], "Spearman"] = np.nan
    return table.sample(frac=1, random_state=0)  # the order of its lines means nothing


@pytest.mark.skipif(not shutil.which("node"), reason="no node to run the page's formulas")
def test_the_indicators_of_every_choice(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert all(
        reader["indicators"] == [] for reader in sliders.data(run, PROFILE)["sets"][0]["readers"]
    )
    (tmp_path / "run" / "figures").mkdir()
    table = by_layer("set")
    pd.concat([table, by_layer("another")]).to_csv(
        tmp_path / "run" / "figures" / "08_by_layer.csv", index=False
    )
    data = sliders.data(tmp_path / "run", PROFILE)
    held = {reader["name"]: reader["indicators"] for reader in data["sets"][0]["readers"]}
    assert held["off-the-shelf"] == []
    script = re.search(
        r'<script id="arithmetic">(.*?)</script>',
        sliders.body(tmp_path / "run", PROFILE),
        re.DOTALL,
    )[1]
    picked = [(2, 1, "mean"), (0, 0, 0), (1, 1, 2)]
    calls = ", ".join(
        f"indicated(r, {json.dumps(dict(zip(('rows', 'norm', 'layer'), one, strict=True)))})"
        for one in picked
    )
    said = subprocess.run(
        ["node", "-"], input=f"{script}; const r = {json.dumps({'indicators': held['fine-tuned']})}; console.log(JSON.stringify([{calls}]))",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for (row, norm, layer), found in zip(picked, json.loads(said.stdout), strict=True):
        assert len(found) == 4
        for one in found:
            place = {
                "rows": teacher.ROWS[row],
                "norm": ("off", "on")[norm],
                "layer": layer if layer == "mean" else layer + 1,
                "goal": one["goal"],
            }
            expected = table[
                np.logical_and.reduce([table[key] == value for key, value in place.items()])
            ][one["measure"]].item()
            assert one["value"] == (
                pytest.approx(expected, abs=1e-4) if np.isfinite(expected) else None
            )


def test_a_sample_is_spread_and_shrinks_for_deep_readers():
    chosen = sliders.sample(1000, 180)
    assert (len(set(chosen)), chosen.min(), chosen.max()) == (sliders.QUESTIONS, 0, 999)
    assert chosen[: sliders.EXAMPLES].max() - chosen[: sliders.EXAMPLES].min() == 999
    assert len(sliders.sample(1000, 3 * 2 * 80 * 2 * 20)) < sliders.QUESTIONS
    assert len(sliders.sample(5, 180)) == 5


def test_no_text_breaks_out_of_the_page(run):
    text = sliders.body(run, PROFILE)
    assert text.count("<script") == 3
    assert text.count("</script") == 3
    embedded = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in embedded
    assert json.loads(embedded)["sets"][0]["examples"][0]["answers"] == [NASTY]
    assert "innerHTML" not in text


def test_scores_of_other_candidates_are_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    teachers = tmp_path / "run" / "stages" / "teacher" / "set"
    record(teachers / "fine-tuned", {"upstream": {"candidates/set": "before"}, "profile": {"k": K}})
    assert [
        one["name"] for one in sliders.data(tmp_path / "run", PROFILE)["sets"][0]["readers"]
    ] == ["off-the-shelf"]
    record(
        teachers / "off-the-shelf", {"upstream": {"candidates/set": "now"}, "profile": {"k": K + 1}}
    )
    assert sliders.data(tmp_path / "run", PROFILE)["sets"] == []


def test_a_run_without_scores_gets_a_sentence(tmp_path):
    assert "holds no reader" in sliders.body(tmp_path, PROFILE)


@pytest.mark.skipif(not shutil.which("node"), reason="no node to run the page's formulas")
@pytest.mark.parametrize("choice", CHOICES)
def test_the_pages_formulas_give_what_ragkit_gives(run, choice):
    reader, rows, norm, layer, pooling, temperature = choice
    script = re.search(
        r'<script id="arithmetic">(.*?)</script>', sliders.body(run, PROFILE), re.DOTALL
    )[1]
    data = sliders.data(run, PROFILE)
    picked = {
        "rows": teacher.ROWS.index(rows),
        "norm": int(norm == "on"),
        "layer": "mean" if layer == "mean" else layer - 1,
        "pooling": teacher.POOLINGS.index(pooling),
    }
    number = [one["name"] for one in data["sets"][0]["readers"]].index(reader)
    given = f"d, d.sets[0], d.sets[0].readers[{number}], {json.dumps(picked)}, {json.dumps(temperature)}"
    call = f"const d = {json.dumps(data)}; console.log(JSON.stringify(teach({given})))"
    said = subprocess.run(
        ["node", "-"], input=script + call, capture_output=True, text=True, check=True
    )
    seen = json.loads(said.stdout)
    p, used, top = expected(run, *choice)
    assert np.allclose(seen["attn"], p, atol=1e-3)
    assert seen["temperature"] == pytest.approx(used, rel=1e-2)
    assert seen["entropy"] == pytest.approx(distill.entropy(p), abs=1e-3)
    assert seen["top"]["share"] == pytest.approx(top)
    retr = distill.softmax(array(data["sets"][0]["retr"]), data["theta"])
    assert np.allclose(seen["retr"], retr, atol=1e-6)
    assert seen["kl"] == pytest.approx(float((p * np.log(p / retr)).sum(1).mean()), rel=1e-2)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def opened(run, folder, address=""):
    """What a browser makes of the page at an address."""
    (folder / "sliders.html").write_text(
        report.page(
            "Sliders", sliders.body(run, PROFILE), [("Sliders", "sliders.html")], "sliders.html"
        ),
        "utf8",
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={folder / 'browser'}",
    ]
    page = f"file://{folder}/sliders.html{address}"
    return subprocess.run(
        [BROWSER, *flags, "--dump-dom", page],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


@pytest.mark.skipif(not BROWSER, reason="no Chromium to open the page in")
def test_the_page_opens_with_a_question_whose_gold_passage_was_found(run, tmp_path):
    held = sliders.data(run, PROFILE)["sets"][0]
    with_gold = [bool(row.any()) for row in array(held["gold"])]
    first = with_gold.index(True)
    assert first > 0, "the first question has one: this would show nothing"
    shown = opened(run, tmp_path)
    assert (
        html.unescape(re.search(r'<p id="question">(.*?)</p>', shown)[1])
        == held["examples"][first]["question"]
    )
    assert '<span class="gold">' in shown


@pytest.mark.skipif(not BROWSER, reason="no Chromium to open the page in")
@pytest.mark.parametrize("choice", CHOICES[:2])
def test_the_page_shows_it_in_a_browser(run, tmp_path, choice):
    reader, rows, norm, layer, pooling, temperature = choice
    asked = {
        "reader": reader,
        "question": 2,
        "rows": rows,
        "norm": norm,
        "layer": layer,
        "pooling": pooling,
        "temperature": temperature,
    }
    shown = opened(run, tmp_path, f"#{urlencode(asked)}")
    p, used, top = expected(run, *choice)
    bars = [float(v) for v in re.findall(r'class="bar attn">.*?<b>([\d.]+)</b>', shown)]
    assert np.allclose(bars, p[1], atol=1.5e-3)
    assert float(re.search(r'id="sum-top">([\d.]+)', shown)[1]) == pytest.approx(top, abs=1e-3)
    assert float(re.search(r"T = ([\d.e+-]+)", shown)[1]) == pytest.approx(used, rel=1e-2)
    title = re.search(r"<title>(.*?)</title>", shown)[1]
    assert html.unescape(title) == "Sliders"
