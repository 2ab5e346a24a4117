"""A reader of one's own judged: numbers by hand, what can be undefined, the page, the command."""

import gzip
import json
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import spacy
import torch
from scipy import stats
from spelt import pieced
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ragkit import __main__
from ragkit.attention.record import record
from ragkit.data.corpus import Passage, Question
from ragkit.data.sets import read_questions, read_tsv
from ragkit.distillation import targets
from ragkit.errors import DataError, ReaderError
from ragkit.indicators import measures
from ragkit.indicators.measures import interval
from ragkit.models.retriever import embedded_tokenizer
from ragkit.pages import judge as judging
from ragkit.pages.judge import ENOUGH, FIT, RULES, SIGNALS, UNFIT, UNSURE, read_asked

NASTY = "<script src='https://example.com/x.js'>alert(1)</script>"
SVG_NAMES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # no browser opens them
TEXTS = [
    "Orla Venn was born in Ulm. The family moved away in 1810.",
    "Old Tarholm lies on the river Lyda.",
    "Maro Elm was born in the old town of Tarholm.",
]
NOUNS = ["orla", "venn", "town", "family", "river", "maro", "elm"]
PLACES = [f"where was orla venn {verb}" for verb in ("born", "married", "buried")]


def row(question=PLACES[0], answer="Ulm", texts=TEXTS, **more):
    passages = [{"title": text.split(" ")[0], "text": text} for text in texts]
    return {"question": question, "answer": answer, "passages": passages, **more}


def lines(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), "utf8")
    return path


def judge(reader, rows, nouns, **more):
    """`judge` on these rows, through a file."""
    with TemporaryDirectory() as folder:
        path = lines(Path(folder) / "q.jsonl", rows)
        return judging.judge(reader, str(path), nouns, **more)


def llama(folder, change=lambda model: None, positions=256):
    """A tiny Llama with random weights and the embedded tokenizer, saved."""
    torch.manual_seed(0)
    tokenizer = embedded_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=positions, initializer_range=0.3,
        attention_bias=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def nouns(tmp_path_factory):
    """A pipeline that knows a few nouns by heart."""
    folder = tmp_path_factory.mktemp("nouns")
    pipeline = spacy.blank("en")
    rule = {"patterns": [[{"LOWER": {"IN": NOUNS}}]], "attrs": {"POS": "NOUN"}}
    pipeline.add_pipe("attribute_ruler").add(**rule)
    pipeline.to_disk(folder)
    return str(folder)


def test_one_question_by_hand(reader, nouns, tmp_path):
    """Attention from the recorder, then written out: lift, cosine, closest share, Spearman."""
    asked = row()
    judged = judge(reader, [asked], nouns)
    one = judging.load(reader)
    passages = [Passage("", p["title"], p["text"]) for p in asked["passages"]]
    prompt = one.prompt(Question("", asked["question"], ("Ulm",), ()), passages)
    ids, mask = one.batch([prompt])
    seen = record(one.model, ids, mask, torch.tensor([[len(prompt.ids) - 1]]))
    inside = np.array(prompt.owner) >= 0
    attention = (seen.alpha[:, 0, :, 0] * seen.norms[:, 0]).mean((0, 1)).double().numpy()[inside]
    table = one.model.get_input_embeddings().weight.detach().double().numpy()

    def words_of(ids):
        """Each token's word, and the unit vector of that: the mean of its pieces'."""
        words = pieced(one, ids)
        vectors = np.stack([table[list(word)].mean(0) for word in words])
        return words, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    tokens, units = words_of(np.array(prompt.ids)[inside].tolist())
    lift = attention / attention.mean()
    for goal, text in (("answer", "Ulm"), ("nouns", "orla venn")):
        wanted, goals = words_of(one.tokenizer(text, add_special_tokens=False).input_ids)
        exact, got = np.array([word in wanted for word in tokens]), judged.tables[goal].iloc[0]
        assert exact.any()
        # a token's repeats tie, and so do the wanted tokens themselves
        close = (units @ goals.T).max(1).round(12)
        for ending, kept in (("", np.ones(len(tokens), bool)), (" (no exact)", ~exact)):
            near = np.argsort(-close[kept], kind="stable")[: max(1, round(0.05 * kept.sum()))]
            near = close[kept] >= close[kept][near].min()
            assert got["attention" + ending] == pytest.approx(lift[kept][near].mean(), rel=1e-4)
            by_scipy = stats.spearmanr(lift[kept], close[kept]).statistic
            assert got["Spearman" + ending] == pytest.approx(by_scipy, abs=1e-6)
    owner = np.array(prompt.owner)[inside]
    scores = np.bincount(owner, attention)
    (row_of,) = judged.measured.to_dict("records")
    holds = row_of["top holds the answer"]
    assert holds == (scores.argmax() == 0)  # Ulm stands in the first passage alone
    assert row_of["last in place"] == (scores.argmax() == 2)
    assert row_of["answer: Spearman"] == judged.tables["answer"]["Spearman"][0]
    alpha = seen.alpha[:, 0, :, 0].mean((0, 1)).numpy()
    mass = dict(zip(measures.PLACES, judged.tokens.mass[0, 0], strict=True))
    assert mass["passages"] == pytest.approx(alpha[inside].sum(), abs=1e-5)
    assert mass["first token"] == pytest.approx(alpha[0], abs=1e-5)
    assert sum(mass.values()) == pytest.approx(1, abs=1e-5)
    assert judged.verdict == UNSURE
    judging.write_html(judged, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf8")
    assert "too few to tell" in page


def test_questions_do_not_touch_each_other(reader, nouns):
    lyda = row("on which river lies old tarholm", ["Lyda", "the Lyda"], TEXTS[1:] + TEXTS[:1])
    rows = [row(), lyda, row(PLACES[1], texts=TEXTS[::-1])]
    together = judge(reader, rows, nouns).measured
    alone = [judge(reader, [one], nouns).measured for one in rows]
    for name in together.columns:
        own = [one[name][0] for one in alone]
        assert together[name].tolist() == pytest.approx(own, abs=1e-4, nan_ok=True), name


def test_dprs_ctxs_and_triviaqas_answers_are_read(tmp_path):
    answers = {"value": "b", "aliases": ["b", "c"]}
    asked = {"question": " q ", "answers": answers, "ctxs": row()["passages"], "gold": [1]}
    untitled = {**row(), "passages": [{"text": "a"}] + 2 * [{"text": "b", "title": None}]}
    first, second = read_asked(lines(tmp_path / "q.jsonl", [asked, untitled]))
    assert (first[0].text, first[0].answers, first[0].gold) == ("q", ("b", "c"), (1,))
    assert [p.text for p in first[1]] == TEXTS
    assert second[1][1].title == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": " "}, "'question' is missing or empty"),
        ({"answer": []}, "no answers"),
        ({"passages": "text"}, "a list of 2 to 20"),
        ({"passages": [{"text": "one"}]}, "a list of 2 to 20"),
        ({"passages": [{"text": "one"}] * 21}, "a list of 2 to 20"),
        ({"passages": [{"text": "one"}] * 2}, "2 passages, where the first question has 3"),
        ({"passages": [{"text": "a"}, {"title": "b"}]}, "a passage: no 'text'"),
        ({"passages": [{"text": "a"}, "b"]}, "a passage: no 'text'"),
        ({"passages": [{"text": "a"}, {"text": " "}]}, "a passage has no text"),
        ({"passages": [{"text": "a", "title": float("nan")}] * 2}, "'title' is no text but nan"),
        ({"passages": [{"text": "a", "title": ["b"]}] * 2}, r"'title' is no text but \['b'\]"),
        ({"gold": [3]}, "places of passages, 0 to 2"),
        ({"gold": [True]}, "places of passages"),
    ],
)
def test_a_slip_in_the_questions_is_named_with_its_line(change, words, tmp_path):
    with pytest.raises(DataError, match=rf"q\.jsonl, line 2: .*{words}"):
        read_asked(lines(tmp_path / "q.jsonl", [row(), {**row(), **change}]))


def test_files_that_hold_no_questions(tmp_path):
    with pytest.raises(DataError, match="No file"):
        read_asked(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no questions"):
        read_asked(lines(tmp_path / "q.jsonl", []))


def number(judged, goal, name):
    return interval(judged.tables[goal][name])


def test_odd_answers_and_questions_are_counted(reader, nouns):
    odd = [("orla", "zzz"), ("venn", "u"), ("river", "?!"), ("it", "Ulm"), ("town", "\u0301")]
    rows = [row(), *(row(f"where is {what}", answer) for what, answer in odd)]
    judged = judge(reader, rows, nouns)
    assert len(judged.asked) == 4
    assert judged.counts["no token for the answer"] == 1
    assert judged.counts["only signs"] == 1
    assert judged.counts["in no passage"] == 2
    assert number(judged, "answer", "Spearman").n == 4
    assert judged.tables["nouns"]["Spearman"].isna().tolist() == [False] * 3 + [True]


def test_a_repeated_question_is_one_question(reader, nouns):
    """Forty copies would give an interval of no width; neither case nor signs make another."""
    rows = [row()] * 39 + [row(f"{PLACES[0].upper()}?"), row(PLACES[1])]
    judged = judge(reader, rows, nouns)
    assert len(judged.asked) == 2
    assert judged.counts["asked before"] == 39
    assert judged.verdict == UNSURE


def flat(model):
    """Queries are zero and values alike: every token has the same attention and contribution."""
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            part.weight.zero_()
            part.bias.fill_(0.0 if part is layer.self_attn.q_proj else 1.0)


def silent(model):
    """No token contributes anything."""
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.v_proj.bias.zero_()


@pytest.mark.parametrize("change", [flat, silent])
def test_constant_attention_is_left_out(change, nouns, tmp_path):
    judged = judge(llama(tmp_path, change), [row(), row(PLACES[1])], nouns)
    for goal in ("answer", "nouns"):
        assert number(judged, goal, "Spearman").n == 0
        assert np.isnan(number(judged, goal, "Spearman").mean)
    assert judged.verdict == UNSURE
    judging.write_html(judged, tmp_path / "page.html")
    text = re.sub(r"<[^>]*>", "", (tmp_path / "page.html").read_text("utf8")).lower()
    assert not re.search(r"\bnan\b", text.split("why")[1])


def test_constant_closeness_and_a_question_of_two_tokens_are_left_out(reader, nouns):
    for texts in (["river river river"] * 2, ["river", "town"]):
        judged = judge(reader, [row(texts=texts), row(PLACES[1], texts=TEXTS[:2])], nouns)
        assert number(judged, "answer", "Spearman").n == 1
    assert number(judged, "answer", "attention").n == 2


def test_a_space_with_another_tokenizer(reader, nouns, tmp_path):
    """The space knows the letters a to m only: tokens without any of them have no embedding."""
    known = {"[UNK]": 0, "[END]": 1} | {letter: i for i, letter in enumerate("abcdefghijklm", 2)}
    letters = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "[UNK]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=15, intermediate_size=8, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    judged = judge(reader, [row(), row(PLACES[1], "or")], nouns, other=str(tmp_path))
    assert str(tmp_path) in judged.how.values()
    assert judged.counts["vectors"] > 0
    assert number(judged, "nouns", "Spearman").n == 2
    none = judge(reader, [row(answer="zz"), row(PLACES[1])], nouns, other=str(tmp_path))
    assert number(none, "answer", "Spearman").n == 1


def test_an_encoder_decoder(nouns, tmp_path):
    """Fusion-in-decoder: its cross-attention, with all blocks' tokens."""
    tokenizer, sizes = embedded_tokenizer(), {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    special = {
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = T5Config(vocab_size=len(tokenizer), num_layers=2, dropout_rate=0.0, **sizes, **special)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judged = judge(str(tmp_path), [row(), row(PLACES[1])], nouns)
    assert number(judged, "answer", "Spearman").n == 2
    assert number(judged, "nouns", "attention").n == 2
    assert judged.tokens.mass[:, 0].sum(1) == pytest.approx(1, abs=1e-5)


def test_prompts_that_do_not_fit(nouns, tmp_path):
    short = llama(tmp_path, positions=60)
    endless = row("where was orla venn born " * 20)
    judged = judge(short, [row(), endless, row(PLACES[1])], nouns)
    assert len(judged.asked) == 2
    assert judged.counts["too long"] == 1
    assert judged.counts["cut"] >= 1
    with pytest.raises(DataError, match=r"none of the questions: 1 too long \(.* has 60"):
        judge(short, [endless], nouns)


def test_without_a_noun_finder_the_rest_is_computed(reader, nouns, caplog, tmp_path):
    judged = judge(reader, [row(question) for question in PLACES], "no_such_pipeline")
    assert set(judged.tables) == {"answer"}
    assert re.match(r"Not computed\. .*no_such_pipeline.*--nouns", judged.how["Indicator 2"])
    assert "Indicator 2 is not computed" in caplog.text
    judging.write_html(judged, tmp_path / "page.html")
    assert "Not computed" in (tmp_path / "page.html").read_text("utf8")
    outer = judge(reader, [row()], str(Path(nouns).parent))  # a package's folder holds it
    assert nouns in outer.how["Indicator 2"]


def test_a_chat_reader_and_what_the_verdict_cannot_know(reader, caplog, tmp_path):
    """An instruct model is asked by the plain prompt, or by its own: said in the log and page."""
    turns = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<reply>\n"
    caplog.set_level("INFO")
    for name, template in (("plain", None), ("chat", turns)):
        one, page = judging.load(reader), tmp_path / f"{name}.html"
        one.tokenizer.chat_template = template
        one.model.save_pretrained(tmp_path / name)
        one.tokenizer.save_pretrained(tmp_path / name)
        caplog.clear()
        judging.write_html(judge(str(tmp_path / name), [row()], "none"), page)
        assert (judging.PLAIN in caplog.text) == (name == "chat")
        assert ("The reader has a chat template" in page.read_text("utf8")) == (name == "chat")
        assert "poisoned" in page.read_text("utf8")
    caplog.clear()
    judged = judge(str(tmp_path / "chat"), [row()], "none", chat=True)
    assert judged.reader.settings.chat
    assert judging.CHAT in caplog.text
    assert judging.PLAIN not in caplog.text
    judging.write_html(judged, page)
    assert "in a turn of its own chat template" in page.read_text("utf8")
    with pytest.raises(ReaderError, match="it has none"):
        judge(str(tmp_path / "plain"), [row()], "none", chat=True)


def test_the_answer_that_most_passages_hold_counts(tmp_path):
    """Of several, as in a profile with reader.answer: found."""
    asked = read_asked(lines(tmp_path / "q.jsonl", [row(answer=["Paris", "Tarholm", "Ulm"])]))
    assert asked[0][0].answers == ("Tarholm", "Paris", "Ulm")


def numbers(values, name="x"):
    return pd.DataFrame({name: values})


@pytest.mark.parametrize(
    ("mean", "above", "below"), [(0.9, FIT, UNFIT), (0.1, UNFIT, FIT), (0.5, UNSURE, UNSURE)]
)
def test_a_rule_says_on_which_side_the_whole_interval_lies(mean, above, below):
    rng = np.random.default_rng(0)
    values = mean + rng.normal(0, 0.1, 4 * ENOUGH)
    values -= values.mean() - mean
    for side, found in (("above", above), ("below", below)):
        rule = {"foreteller": "x", "can teach": side, "cut": 0.5}
        word, value = judging.found_by(rule, numbers(values))
        assert word == found
        assert value.mean == pytest.approx(mean)
    at_the_cut = {"foreteller": "x", "can teach": "above", "cut": 0.5}
    assert judging.found_by(at_the_cut, numbers(np.full(ENOUGH, 0.5)))[0] == FIT


def test_few_questions_or_none_decide_nothing():
    rule = {"foreteller": "x", "can teach": "above", "cut": 0.5}
    few = np.where(np.arange(2 * ENOUGH) < ENOUGH - 1, 1.0, np.nan)
    assert judging.found_by(rule, numbers(few))[0] == UNSURE
    few[-1] = 1.0
    assert judging.found_by(rule, numbers(few))[0] == FIT
    assert judging.found_by(rule, numbers(np.full(9, np.nan)))[0] == UNSURE
    word, value = judging.found_by(rule, numbers(np.ones(99), "another"))  # such as nouns
    assert (word, value.n) == (UNSURE, 0)


@pytest.mark.parametrize(
    ("attention", "balanced", "verdict"),
    [
        (FIT, UNFIT, FIT),
        (UNFIT, FIT, FIT + SIGNALS["balanced"]),
        (UNSURE, FIT, FIT + SIGNALS["balanced"]),
        (UNFIT, UNFIT, UNFIT),
        (UNFIT, UNSURE, UNSURE),
    ],
)
def test_every_verdict_can_be_reached(attention, balanced, verdict):
    found = {"attention": (attention, None), "balanced": (balanced, None)}
    assert judging.verdict_of(found) == verdict


def test_the_rules_name_what_is_measured(reader, nouns):
    judged = judge(reader, [row(), row(PLACES[1])], nouns)
    assert set(judged.found) == set(SIGNALS) <= set(RULES)
    for signal in SIGNALS:
        assert RULES[signal]["foreteller"] in judged.measured
        assert RULES[signal]["can teach"] in ("above", "below")
        assert 0 <= RULES[signal]["error rate"] <= RULES[signal]["commoner"] <= 0.5


def test_both_orders_are_looked_at(reader, tmp_path):
    """By the recorder with the passages turned round; a gold passage goes before the words."""
    one, (asked,) = judging.load(reader), read_asked(lines(tmp_path / "q.jsonl", [row(gold=[2])]))
    looked, tokens = judging.look_at_all(one, [asked])
    (question, passages), scores = asked, {}
    for order, shown in (("rank", passages), ("reversed", passages[::-1])):
        prompt = one.prompt(question, shown)
        ids, mask = one.batch([prompt])
        seen = record(one.model, ids, mask, torch.tensor([[len(prompt.ids) - 1]]))
        by_token = (seen.alpha[:, 0, :, 0] * seen.norms[:, 0]).mean((0, 1)).double().numpy()
        owner = np.array(prompt.owner)
        scores[order] = np.bincount(owner[owner >= 0], by_token[owner >= 0])
        got = targets.attention_scores(looked[order], judging.READ)[0]
        assert got == pytest.approx(scores[order][:: 1 if order == "rank" else -1], rel=1e-4)
        assert looked[order]["holds"].tolist() == [[0, 0, 1]]
    assert np.bincount(tokens.owner, tokens.attention(judging.READ)) == pytest.approx(
        scores["rank"], rel=1e-4
    )


def test_the_page_says_every_verdict_in_words(reader, nouns, tmp_path):
    judged, pages = judge(reader, [row(), row(PLACES[1])], nouns), set()
    for verdict in (*(FIT + told for told in SIGNALS.values()), UNFIT, UNSURE):
        judging.write_html(replace(judged, verdict=verdict), tmp_path / "page.html")
        said, why = (tmp_path / "page.html").read_text("utf8").split("<h2>Why")
        assert f">{verdict}</span>" in said
        pages.add(said.split("</span>")[1])
        for signal in SIGNALS:
            rule = RULES[signal]
            assert f"{100 * rule['error rate']:.0f} % of {rule['readers']}" in why
            assert f"<td>{100 * rule['other world']:.0f} %</td>" in why
    assert len(pages) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.35, 0.45], ", above the line"),
        ([0.1, 0.2], ", not above the line"),
        ([0.0, 0.6], "does not decide on which side"),
        ([0.35], "too few to tell"),
    ],
)
def test_the_papers_line_stands_beside_the_verdict(values, words, reader, nouns, tmp_path):
    judged = judge(reader, [row()], nouns)
    table = pd.DataFrame({name: values * (ENOUGH // 2) for name in judged.tables["nouns"]})
    judging.write_html(replace(judged, tables={"nouns": table}), tmp_path / "page.html")
    told = " ".join((tmp_path / "page.html").read_text("utf8").split())
    assert words in told.split("This reader: ")[1].split("</p>")[0]
    assert judged.verdict == UNSURE


def test_the_page_is_escaped_and_loads_nothing(nouns, tmp_path):
    folder = tmp_path / "<b>$reader"
    folder.mkdir()
    texts = [f"{text} {NASTY} " for text in TEXTS]
    rows = [row(f"{question} {NASTY}", NASTY, texts) for question in PLACES]
    for one in rows:
        one["passages"][0]["title"] = NASTY
    judging.write_html(judge(llama(folder), rows, nouns), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf8")
    assert "<script" not in text
    assert "<b>$reader" not in text
    assert "&lt;b&gt;$reader" in text
    assert "default-src 'none'" in text
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.extend(attributes)
    parser.feed(text)
    loading = ("src", "href", "xlink:href", "action", "data", "srcset")
    assert all(value.startswith("#") for name, value in tags if name in loading)
    assert set(re.findall(r"url\(.", text)) <= {"url(#"}
    assert {value for _, value in tags if value and "://" in value} <= SVG_NAMES


# The command line


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ragkit", "judge", *map(str, arguments)])
    return __main__.main()


def test_the_command_tells_what_it_does_and_writes_the_page(
    reader, nouns, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    questions = lines(tmp_path / "q.jsonl", [row(), row(PLACES[1])])
    page = tmp_path / "page.html"
    given = (reader, questions, "--nouns", nouns, "--space", reader, "--out", page)
    assert command(monkeypatch, *given) == 0
    assert f"verdict: {UNSURE} (2 questions" in caplog.text
    signs = ("loading ", "reading  2 prompts", f"by attention {UNSURE}", f"by balanced {UNSURE}")
    for sign in signs:
        assert sign in caplog.text
    assert "Is this reader fit to teach a retriever?" in page.read_text("utf8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["READER", "none.jsonl"], "No file none.jsonl"),
        (["/no-such-folder/reader", "QUESTIONS"], "cannot be loaded"),
        (["READER", "QUESTIONS", "--out", "no-such-folder/page.html"], "to no-such-folder"),
        (["READER", "QUESTIONS", "--out", "."], "it is a folder"),
        (["READER", "QUESTIONS", "--space", "/no-such-folder/space"], "cannot be loaded"),
    ],
)
def test_a_slip_on_the_command_line_gets_a_sentence(
    arguments, words, reader, tmp_path, monkeypatch, caplog
):
    given = {"READER": reader, "QUESTIONS": lines(tmp_path / "q.jsonl", [row()])}
    assert command(monkeypatch, *(given.get(one, one) for one in arguments)) == 2
    assert words in caplog.text
    assert "Traceback" not in caplog.text


# Real text


@pytest.mark.skipif("RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA is not set")
def test_a_trained_llama_on_real_text(nouns, tmp_path):
    """The 260 k Llama on NQ questions, each with its gold passage and the next question's."""
    data = Path(os.environ["RAGKIT_REAL_DATA"])
    passages = list(read_tsv(data / "wiki/psgs_w100.sample.tsv.gz"))
    with gzip.open(data / "nq/nq-open-gold.jsonl.gz", "rt", encoding="utf8") as file:
        first = "".join(line for line, _ in zip(file, range(41), strict=False))
    (tmp_path / "nq.jsonl").write_text(first, "utf8")
    questions = read_questions(tmp_path / "nq.jsonl", passages)
    gold = [passages[q.gold[0]] for q in questions]
    gold = [{"title": one.title, "text": one.text} for one in gold]
    rows = [
        {"question": q.text, "answer": list(q.answers), "passages": gold[i : i + 2], "gold": [0]}
        for i, q in enumerate(questions[:-1])
    ]
    judged = judge(str(data / "models/stories260k"), rows, nouns)
    assert len(judged.asked) == 40
    assert number(judged, "answer", "Spearman").n == 40
    assert np.isfinite(number(judged, "nouns", "attention").mean)
    assert judged.counts["cut"] > 0
    judging.write_html(judged, tmp_path / "page.html")
    assert judged.verdict in (tmp_path / "page.html").read_text("utf8")
