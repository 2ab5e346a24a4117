"""The log beside a training and the early verdict: torn lines, kills, results untouched, the rule, following a run."""

import logging
import math
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from test_distill import Table
from transformers import FalconForCausalLM

from ragkit.data.questions import Passage, Question
from ragkit.data.vocabulary import build_tokenizer
from ragkit.distillation import log as training_log
from ragkit.distillation import targets as distill
from ragkit.distillation.log import FILE, Log, Probe, Step1Log, Step2Log, read
from ragkit.distillation.monitor import (
    NOT_WORKING,
    TOO_EARLY,
    WORKING,
    first_verdict,
    follow,
    verdict,
)
from ragkit.errors import MonitorError, ReaderError
from ragkit.experiment.store import Store
from ragkit.indicators import measures as indicators
from ragkit.models import reader
from ragkit.models.pretrain import reader_config
from ragkit.models.reader import Reader
from ragkit.profile import AttentionSettings, DistillSettings, ReaderSettings

PLACES = ("ulm", "old", "port")
QUESTIONS = [Question(place, "where was orla venn born", (place,), (0,)) for place in PLACES]
FOUND = [
    [
        Passage("0", "Orla Venn", f"Orla Venn was born in {place}."),
        Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
    ]
    for place in PLACES
]
NOUNS = [[(10, 14), (15, 19)]] * 3


def one_reader(**settings):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = reader_config(tokenizer)
    config._attn_implementation, config.hidden_dropout = (
        "sdpa",
        0.1,
    )  # a training that draws: what draws beside it would show
    return Reader(
        FalconForCausalLM(config),
        tokenizer,
        ReaderSettings(**{"steps": 12, "batch": 2, "checkpoints": 1, **settings}),
    )


def draw(rng):
    number = rng.randrange(3)
    return QUESTIONS[number], FOUND[number]


def probe_of(one, nouns=NOUNS):
    return Probe(one, QUESTIONS, FOUND, nouns, AttentionSettings(), 0.1)


def places(folder, unit):
    return [row[unit] for row in read(folder / FILE)]


def test_a_torn_last_line_is_skipped(tmp_path):
    (tmp_path / FILE).write_bytes(
        b'{"step": 1, "seconds": 2.0}\n{"step": 2, "seconds": 4.5}\n{"step": 3, "lo\xc3'
    )
    assert places(tmp_path, "step") == [1, 2]
    one = Log(tmp_path, "Step 1", "step", 4)
    one.reach(2, 1.5)
    one.reach(3, 1.0)
    one.add(loss=1.0)
    assert places(tmp_path, "step") == [1, 2, 3]
    assert (tmp_path / FILE).read_text().endswith("}\n")


def step2(folder, logged=True, slow=0.0, epochs=30):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    table, target = Table(6), torch.softmax(torch.arange(18.0).reshape(6, 3) % 5, -1)
    chosen = DistillSettings(epochs=epochs, batch=2, rate=0.01, retriever_temperature=0.5)

    def watch(_):
        time.sleep(slow)
        return {"hr": float(table.vectors.detach().sum())}

    parts = (
        table,
        [str(i) for i in range(6)],
        lambda _, c: torch.eye(3).expand(len(c), 3, 3),
        lambda c, scores: distill.kl_loss(target[c], scores, 0.5),
    )
    with Step2Log(folder, "Step 2", epochs, 3, 0.01, {"answer lift": 1.5}) as report:
        return distill.train(*parts, chosen, 0, folder, watch, *([report] if logged else []))


def step2_in_a_process(folder):
    torch.set_num_threads(1)
    step2(folder, slow=0.01)


def test_a_training_killed_again_and_again_leaves_every_place_once(tmp_path):
    step2(tmp_path / "whole")
    whole = [(row["epoch"], row["hr"], row.get("loss")) for row in read(tmp_path / "whole" / FILE)]
    context, rng, file = (
        multiprocessing.get_context("forkserver"),
        random.Random(0),
        tmp_path / "cut" / FILE,
    )
    context.set_forkserver_preload(
        ["ragkit.monitor", "ragkit.distill", "ragkit.pretrain"]
    )  # so that a child need not import it all again
    for kill in range(5):
        child = context.Process(target=step2_in_a_process, args=(tmp_path / "cut",))
        child.start()
        wanted = len(read(file)) + rng.randint(1, 5)
        while kill < 4 and len(read(file)) < wanted:
            assert child.is_alive()
            time.sleep(0.001)
        if kill < 4:
            time.sleep(rng.uniform(0, 0.02))  # anywhere between two looks, or while it writes
            child.kill()
        child.join()
        seen = places(tmp_path / "cut", "epoch")
        assert seen == sorted(set(seen))
    assert child.exitcode == 0
    rows = read(file)
    assert [(row["epoch"], row["hr"], row.get("loss")) for row in rows] == whole
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert rows[0]["answer lift"] == 1.5


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHECKPOINT_EVERY", 5)
    (tmp_path / "whole").mkdir()
    one = one_reader()
    whole = reader.fine_tune(
        one,
        draw,
        tmp_path / "whole",
        0,
        Step1Log(tmp_path / "whole", "Step 1", one.settings, lambda _: one, probe_of(one)),
    )
    calls = []

    def dies(rng):
        calls.append(1)
        if len(calls) > 2 * 8:
            raise KeyboardInterrupt
        return draw(rng)

    (tmp_path / "cut").mkdir()
    one = one_reader()
    with pytest.raises(KeyboardInterrupt):
        reader.fine_tune(
            one,
            dies,
            tmp_path / "cut",
            0,
            Step1Log(tmp_path / "cut", "Step 1", one.settings, lambda _: one, probe_of(one)),
        )
    assert places(tmp_path / "cut", "step") == list(range(9))
    one = one_reader()
    again = Step1Log(tmp_path / "cut", "Step 1", one.settings, lambda _: one, probe_of(one))
    again.reach(5, 1.0)
    assert places(tmp_path / "cut", "step") == list(range(6))
    one = one_reader()
    assert (
        reader.fine_tune(
            one,
            draw,
            tmp_path / "cut",
            0,
            Step1Log(tmp_path / "cut", "Step 1", one.settings, lambda _: one, probe_of(one)),
        )
        == whole
    )
    measured = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "left")}
            for row in read(tmp_path / name / FILE)
        ]
        for name in ("whole", "cut")
    ]
    assert measured[0] == measured[1]
    assert [row["step"] for row in measured[0] if "answer lift" in row] == [0, 6, 12]
    assert np.allclose([row["loss"] for row in measured[0][1:]], whole)


def test_a_training_ends_the_same_with_and_without_a_log(tmp_path):
    ends = []
    for logged in (False, True):
        one = one_reader()
        report = (
            [Step1Log(tmp_path, "Step 1", one.settings, lambda _, one=one: one, probe_of(one))]
            if logged
            else []
        )
        (tmp_path / str(logged)).mkdir()
        losses = reader.fine_tune(one, draw, tmp_path / str(logged), 0, *report)
        ends.append((losses, torch.get_rng_state(), list(one.model.parameters())))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][2], ends[1][2], strict=True))
    assert str(step2(tmp_path / "with")) == str(step2(tmp_path / "without", logged=False))


def test_a_probe_measures_what_the_indicators_say_and_leaves_the_reader_as_it_was():
    one = one_reader()
    probe = probe_of(one)
    one.model.train()
    state = torch.get_rng_state()
    measured = probe(one)
    assert one.model.training
    assert torch.equal(state, torch.get_rng_state())
    one.model.eval()
    tokens = indicators.look_at_tokens(one, QUESTIONS, FOUND)
    table = one.model.get_input_embeddings().weight
    for goal, wanted in (("answer", PLACES), ("nouns", ("orla venn",) * 3)):
        ids = [
            one.tokenizer(" " + words, add_special_tokens=False)["input_ids"] for words in wanted
        ]
        vectors = indicators.embeddings(one.tokenizer, tokens.ids, table, one.tokenizer)
        goals = [
            indicators.embeddings(one.tokenizer, np.array(each), table, one.tokenizer)
            for each in ids
        ]
        close = np.concatenate(
            [
                indicators.closeness(vectors[mine], g)
                for mine, g in zip(indicators.by_question(tokens.question), goals, strict=True)
            ]
        )
        by_hand = indicators.indicator(
            tokens.attention(AttentionSettings()),
            close,
            tokens.question,
            np.zeros(len(close), dtype=bool),
            0.1,
        )
        assert measured[f"{goal} lift"] == pytest.approx(by_hand["attention"].mean())
        assert measured[f"{goal} Spearman"] == pytest.approx(by_hand["Spearman"].mean())
    assert set(probe_of(one, nouns=None)(one)) == {"answer lift", "answer Spearman"}


def test_closeness_stays_that_of_the_reader_a_probe_was_made_of():
    one = one_reader()
    probe, before = probe_of(one), probe_of(one).closeness["answer"]
    with torch.no_grad():
        one.model.get_input_embeddings().weight.normal_()
    assert np.array_equal(probe.closeness["answer"], before)
    assert not np.array_equal(probe_of(one).closeness["answer"], before)


def test_progress_is_a_line_a_minute_at_most(tmp_path, caplog, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock[0])
    one = Log(tmp_path, "Step 1 almanac", "step", 800)
    with caplog.at_level(logging.INFO):
        for step in range(481):
            one.reach(step, 0.614)
            clock[0] += 0.25
    assert [record.message for record in caplog.records][
        -1
    ] == "Step 1 almanac: 480 of 800 steps, loss 0.614, 2 min left"
    assert len(caplog.records) == 2


def test_a_loss_that_is_not_a_number_stands_in_the_log_until_the_training_is_gone_on_with(tmp_path):
    one = one_reader()
    with torch.no_grad():
        one.model.transformer.ln_f.weight.fill_(float("nan"))
    with (
        pytest.raises(ReaderError),
        Step1Log(tmp_path, "Step 1", one.settings, lambda _: one, lambda _: {}) as report,
    ):
        reader.fine_tune(one, draw, tmp_path, 0, report)
    word, reason = verdict(read(tmp_path / FILE))
    assert word == NOT_WORKING
    assert "not a number at step 0" in reason
    Log(tmp_path, "Step 1", "step", 12).reach(0, 1.0)
    assert not any("stopped" in row for row in read(tmp_path / FILE))


def looks(hr, losses, **teacher):
    rows = [
        {"epoch": n / 2, "hr": value, "loss": loss}
        for n, (value, loss) in enumerate(zip(hr, [math.nan, *losses], strict=True))
    ]
    return [rows[0] | teacher, *rows[1:]]


FALLING = [0.6, 0.5, 0.4, 0.3]


@pytest.mark.parametrize(
    ("rows", "word", "taken", "reason"),
    [
        (looks([0.5, 0.6, 0.7, 0.7, 0.7], FALLING), WORKING, 2, "+0.200 and +0.200"),
        (
            looks([0.5, 0.5, 0.4, 0.4, 0.3], FALLING),
            NOT_WORKING,
            2,
            "does not lead to the gold passages",
        ),
        (
            looks([0.5, 0.49, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.4]),
            NOT_WORKING,
            2,
            "not clearly fallen",
        ),
        (
            looks([0.5, 0.505, 0.505, 0.505, 0.505], [0.4, 0.4, 0.4, 0.4]),
            NOT_WORKING,
            2,
            "nothing moves",
        ),
        (looks([0.5, 0.505, 0.505, 0.505, 0.505], FALLING), TOO_EARLY, 4, "+0.005"),
        (looks([0.5, 0.6, 0.4, 0.6, 0.6], FALLING), WORKING, 4, "+0.100"),
        (looks([0.5, 0.6], [0.6]), TOO_EARLY, 1, "1 of 2 looks"),
        (looks([0.5, 0.6, 0.6], [0.6, math.nan]), NOT_WORKING, 2, "not a number at epoch 1"),
        (looks([0.5], [], **{"answer lift": 0.9, "nouns lift": 1.0}), NOT_WORKING, 0, "1.00 times"),
        (looks([0.5], [], **{"answer lift": 0.9, "nouns lift": 1.2}), TOO_EARLY, 0, "0 of 2 looks"),
    ],
)
def test_verdicts_of_step_2(rows, word, taken, reason):
    assert verdict(rows)[0] == word
    assert reason in verdict(rows)[1]
    assert first_verdict(rows) == (word, taken)


def test_what_hr_says_outweighs_the_teachers_attention():
    rows = looks([0.5, 0.6, 0.7], [0.6, 0.5], **{"answer lift": 0.5})
    assert first_verdict(rows) == (NOT_WORKING, 0)
    assert verdict(rows)[0] == WORKING


def steps(losses, lifts):
    """A log of Step 1 with a row each 10 steps; `lifts` by row."""
    return [
        {
            "step": 10 * n,
            **({"loss": loss} if n else {}),
            **({"answer lift": lifts[n]} if n in lifts else {}),
        }
        for n, loss in enumerate([0, *losses])
    ]


@pytest.mark.parametrize(
    ("rows", "word", "reason"),
    [
        (steps([3, 2, 1.5, 1], {0: 0.9, 2: 1.2, 4: 1.5}), WORKING, "1.20 and 1.50"),
        (
            steps([3, 2, 1.5, 1], {0: 1.1, 2: 0.9, 4: 1.0}),
            NOT_WORKING,
            "no more attention than the average token",
        ),
        (steps([3, 2, 1.5, 1], {0: 0.9, 2: 0.9, 4: 1.5}), TOO_EARLY, "0.90 and 1.50"),
        (steps([3, 2], {0: 0.9, 2: 1.5}), TOO_EARLY, "1 of 2 kept steps"),
        (steps([3.0] * 10, {0: 0.9, 2: 1.2, 4: 1.5}), NOT_WORKING, "not clearly fallen"),
        (steps([3, 2, math.nan], {0: 0.9}), NOT_WORKING, "not a number at step 30"),
        ([], TOO_EARLY, "nothing"),
    ],
)
def test_verdicts_of_step_1(rows, word, reason):
    assert verdict(rows)[0] == word
    assert reason in verdict(rows)[1]


def test_following_a_run_while_it_goes_on(tmp_path):
    store, seen = Store(tmp_path), []
    with pytest.raises(MonitorError, match="make reproduce"):
        follow(tmp_path)

    def make(loss):
        def made(folder):
            one = Log(folder, "Step 1", "step", 2)
            one.reach(0, math.nan)
            one.add()
            seen.append(follow(tmp_path))
            one.reach(2, loss)
            one.add(loss=loss)

        return made

    store.stage("step1/my-set", make(1.0), {}, {}, [follow])
    assert seen[0][["training", "state", "step"]].values.tolist() == [
        ["step1-my-set", "unfinished", 0]
    ]
    assert seen[0]["hr"].isna().all()
    table = follow(tmp_path)
    assert set(table["state"]) == {"finished"}
    assert table["step"].tolist() == [0, 2]
    store.stage("step2/my-set/oracle-0", make(1.0), {}, {}, [follow])
    store.stage("step1/my-set", make(0.5), {"rate": 1}, {}, [follow])
    during = seen[2].set_index("training")["state"]
    assert during["step1-my-set"] == "unfinished"
    assert set(during["step2-my-set-oracle-0"]) == {"finished"}
    assert follow(tmp_path).groupby("training")["loss"].last().to_dict() == {
        "step1-my-set": 0.5,
        "step2-my-set-oracle-0": 1.0,
    }


def test_the_verdict_of_a_followed_training_is_that_of_its_file(tmp_path):
    (tmp_path / "stages").mkdir()
    step2(tmp_path / "stages" / "step2")
    rows = read(tmp_path / "stages" / "step2" / FILE)
    assert len(rows) > 10
    assert [verdict(rows[:count]) for count in range(1, len(rows))] == [
        verdict(follow(tmp_path).to_dict("records")[:count]) for count in range(1, len(rows))
    ]
