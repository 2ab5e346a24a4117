"""Step 1: it learns, goes on after a kill with the same result, and fits into less memory."""

import itertools
import json
import random
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ragkit.data.corpus import PARTS, PASSAGES, Passage, Question, write_passages
from ragkit.data.files import write_jsonl
from ragkit.data.worlds import build_world
from ragkit.errors import DataError, ReaderError
from ragkit.models import step1
from ragkit.models.fid import load_reader
from ragkit.models.reader import Reader
from ragkit.models.step1 import SAME_KIND_SHARE, Example, fine_tune
from ragkit.settings import ReaderSettings, WorldSet

OTHER = Passage("1", "Port Tarn", "Port Tarn lies by the sea. Orla Venn never saw it.")
LINEAR = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")


def draw(rng):
    name = rng.choice(["Orla Venn", "Ben Rill", "Ada Mott"])
    town = rng.choice(["Ulm", "Tarn", "Port Vell"])
    passages = [Passage("0", name, f"{name} was born in {town}."), OTHER]
    return Question("q", f"where was {name} born", (town,), (0,)), passages


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def taught(folder, **settings):
    """The losses of a few steps of Step 1."""
    folder.mkdir()
    chosen = ReaderSettings(steps=6, batch=4, checkpoints=1, **settings)
    fine_tune(load_reader("embedded", chosen, to_train=True), draw, folder, 0)
    return [row["loss"] for row in log(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "step1"
    return taught(folder), folder


@pytest.mark.parametrize(
    "settings", [{"at_once": 1}, {"at_once": 3}, {"gradient_checkpointing": True}]
)
def test_less_memory_changes_no_result(tmp_path, plain, settings):
    losses = taught(tmp_path / "step1", **settings)
    assert np.allclose(losses, plain[0], rtol=1e-3)
    folders = (plain[1], tmp_path / "step1")
    one, two = (load_file(folder / "fine-tuned/model.safetensors") for folder in folders)
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_half_precision_learns_much_the_same_and_keeps_float32_weights(tmp_path, plain):
    losses = taught(tmp_path / "step1", dtype="bfloat16")
    assert np.allclose(losses, plain[0], rtol=0.05)
    assert losses != plain[0]
    weights = load_file(tmp_path / "step1/fine-tuned/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    scoring = load_reader(tmp_path / "step1/fine-tuned", ReaderSettings(dtype="bfloat16"))
    assert next(scoring.model.parameters()).dtype == torch.bfloat16


def test_adapters_move_the_linear_layers_only_and_are_merged(tmp_path, plain):
    losses = taught(tmp_path / "step1", lora_rank=4)
    assert losses[-1] < losses[0]
    rates = [[row["rate"] for row in log(folder)] for folder in (tmp_path / "step1", plain[1])]
    assert rates[0] == pytest.approx([10 * rate for rate in rates[1]])  # adapters' own
    before = dict(load_reader("embedded", ReaderSettings()).model.named_parameters())
    for kept in (tmp_path / "step1/fine-tuned", tmp_path / "step1/step-3"):
        model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()  # a plain model again: no adapter is left in it
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved
        assert all(name.endswith(LINEAR) for name in moved)
        change = next(after[name] - before[name] for name in sorted(moved))
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 4


def test_a_killed_training_ends_with_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(step1, "MOST", 4)  # a ninth of this training is less
    settings = ReaderSettings(steps=10, batch=2, checkpoints=1)

    def start():
        return load_reader("embedded", settings, to_train=True)

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    fine_tune(start(), draw, tmp_path / "whole", 0)
    one, calls, losses_of = start(), itertools.count(1), Reader.losses

    def dies(self, prompts):
        if next(calls) > 9:
            raise KeyboardInterrupt
        return losses_of(self, prompts)

    monkeypatch.setattr(Reader, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(one, draw, tmp_path / "cut", 0)
    monkeypatch.setattr(Reader, "losses", losses_of)
    kept = tmp_path / "cut" / "checkpoint-8"
    files = {"pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.name for path in kept.iterdir()} >= files | {"trainer_state.json"}
    torch.manual_seed(99)
    (tmp_path / "cut" / "checkpoint-9").mkdir()  # one that a kill left half written
    fine_tune(start(), draw, tmp_path / "cut", 0)
    assert not list((tmp_path / "cut").glob("checkpoint-*"))
    for kept in ("step-5", "fine-tuned"):
        files = (tmp_path / name / kept / "model.safetensors" for name in ("whole", "cut"))
        one, two = map(load_file, files)
        assert all(torch.equal(one[name], two[name]) for name in one)
    rows = log(tmp_path / "cut")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows] == [row["loss"] for row in log(tmp_path / "whole")]
    assert all(row["left"] >= 0 for row in rows)
    assert [a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows)] == [True] * 9


def test_a_row_of_the_log_is_the_mean_since_the_row_before(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(step1, "ROWS", 3)
    losses = taught(tmp_path / "step1")
    assert [row["step"] for row in log(tmp_path / "step1")] == [2, 3, 4, 6]
    parts = np.split(plain[0], [2, 3, 4])
    assert losses == [float(np.mean(part)) for part in parts]


def test_a_loss_that_is_not_a_number_stops(tmp_path):
    one = load_reader("embedded", ReaderSettings(steps=3, batch=2), to_train=True)
    with torch.no_grad():
        one.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ReaderError, match=r"Lower reader\.rate"):
        fine_tune(one, draw, tmp_path, 0)


@pytest.mark.parametrize(("answer", "taken"), [("first", "nowhere"), ("found", "ulm")])
def test_the_answer_taught_is_the_one_that_the_settings_name(tmp_path, answer, taken):
    chosen = ReaderSettings(steps=1, batch=1, checkpoints=0, answer=answer)
    one, asked = load_reader("embedded", chosen, to_train=True), []
    question = Question("q", "where was Ada born", ("Nowhere", "Ulm"), ())
    losses_of = one.losses
    one.losses = lambda prompts: losses_of(asked.extend(prompts) or prompts)
    shown = [OTHER, Passage("0", "Ada", "Ada was born in Ulm.")]
    fine_tune(one, lambda rng: (question, shown), tmp_path, 0)
    (prompt,) = asked
    assert one.tokenizer.decode(prompt.ids[prompt.answer_start : -1]).strip() == taken


def test_a_gold_passage_is_put_among_those_found_as_often_as_asked():
    gold, other = Passage("0", "A", "gold"), Passage("1", "B", "other")
    question = Question("q", "who", ("x",), (0,))
    for share, expected in ((0.0, 0), (0.5, 0.5), (1.0, 1)):
        example = Example(question, [other, other], [gold], [])
        drawn = [example.draw(share, random.Random(i))[1] for i in range(400)]
        assert np.mean([gold in passages for passages in drawn]) == pytest.approx(expected, abs=0.1)


def test_answers_and_passages_of_another_question_come_in_their_shares():
    """And where none are asked for, the draws are those of before: no random number is spent."""
    each = [Passage(str(i), "A", str(i)) for i in range(40)]
    examples = [
        Example(Question(str(i), "who", (str(i),), (i,)), [each[i]], [each[i]], [])
        for i in range(40)
    ]

    def share_wrong(**settings):
        chosen = ReaderSettings(gold_share=0.0, **settings)
        rng = random.Random(0)
        pairs = [step1.drawn(examples, chosen, rng) for _ in range(2000)]
        answers = np.mean([q.answers != (q.id,) for q, _ in pairs])
        return answers, np.mean([found[0].id != q.id for q, found in pairs])

    assert share_wrong() == (0, 0)
    assert share_wrong(label_noise=0.5) == pytest.approx((0.5 * 39 / 40, 0), abs=0.04)
    assert share_wrong(wrong_passages=1.0) == pytest.approx((0, 39 / 40), abs=0.03)
    rngs = random.Random(7), random.Random(7)
    plain = step1.drawn(examples, ReaderSettings(), rngs[0])
    assert plain == rngs[1].choice(examples).draw(0.8, rngs[1])
    assert rngs[0].random() == rngs[1].random()


def test_passages_of_one_kind_of_fact_are_shown_together():
    passages = [Passage(str(i), "A", str(i)) for i in range(9)]
    question = Question("q", "who", ("x",), (0,))
    example = Example(question, passages[5:8], passages[:1], passages[1:5])
    drawn = [example.draw(0.0, random.Random(i))[1] for i in range(400)]
    alike = [passages[0] in some and set(some) <= set(passages[:5]) for some in drawn]
    assert np.mean(alike) == pytest.approx(SAME_KIND_SHARE, abs=0.1)
    assert all(len(some) == 3 for some, same in zip(drawn, alike, strict=True) if same)


def test_training_worlds_share_no_name_with_the_measured_ones():
    sizes = {"entities": 24, "distill": 20, "dev": 4, "test": 4}
    given = {"source": "world", "name": "a", "world": "almanac"}
    measured, training = (
        build_world(WorldSet(**given | own), reserved=reserved)
        for own, reserved in ((sizes | {"seed": 5}, True), (step1.WORLD | {"seed": 1}, False))
    )
    assert not {p.title for p in measured.passages} & {p.title for p in training.passages}


def test_on_real_text_it_learns_from_no_question_that_it_then_teaches(tmp_path, monkeypatch):
    passages = [Passage(str(i), "T", f"text {i}") for i in range(6)]
    write_passages(tmp_path / PASSAGES, passages)
    for part in PARTS:
        rows = [asdict(Question(str(i), f"who {i}", ("a",), (i,))) for i in range(6)]
        write_jsonl(tmp_path / f"{part}.jsonl", rows)
    save_file({"distill": np.arange(12).reshape(6, 2) % 6}, tmp_path / "candidates.safetensors")
    inputs = dict.fromkeys(("passages", "questions", "candidates"), tmp_path)
    seen = []
    stub = SimpleNamespace(settings=ReaderSettings())
    monkeypatch.setattr(step1, "open_reader", lambda *given, **how: stub)
    monkeypatch.setattr(step1, "fine_tune", lambda reader, draw, folder, seed: seen.append(draw))
    settings = {"set": {"source": "files", "name": "nq"}, "k": 2, "seed": 0, "questions": 4}
    settings |= {"retriever": {}, "reader": {"gold_share": 0.0}}
    step1.make_step1(tmp_path, inputs, settings)
    pairs = [seen[0](random.Random(i)) for i in range(40)]
    assert {question.id for question, _ in pairs} == {"4", "5"}
    of_5 = next(found for question, found in pairs if question.id == "5")
    assert {one.id for one in of_5} == {"4", "5"}  # its own candidates
    with pytest.raises(DataError, match=r"set nq: .* Make its distill greater .* \(6\)"):
        step1.make_step1(tmp_path, inputs, settings | {"questions": 6})
