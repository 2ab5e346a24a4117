"""Bad input and faults: each ends in a sentence, nothing half-written counts, and a rerun ends as if nothing had happened."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from ragkit.experiment.retrieval import SEARCH
from safetensors.numpy import save_file

from ragkit import __main__
from ragkit.attention.record import AttentionError
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.distillation import teacher
from ragkit.errors import NotebookError, RagkitError, SearchError, StoreError
from ragkit.experiment.lab import Lab
from ragkit.experiment.store import Store, file_hash
from ragkit.models import checkpoint, reader
from ragkit.models.reader import Reader
from ragkit.pages import report
from ragkit.settings import ReaderSettings

ROOT = Path(__file__).parent.parent
PROFILE = """
name: faults
judge: false
k: 2
sets: [{source: world, name: almanac, world: almanac, seed: 5, entities: 24, distill: 40, dev: 4, test: 4}]
retriever: {crop_steps: 5, crop_batch: 8}
reader: {steps: 110, batch: 1}
distill: {seeds: [0], epochs: 40, batch: 4}
"""


def sentence(ended, *words):
    """The command ended with code 2 and a message that holds these words, and no traceback."""
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    for word in words:
        assert word in ended.stderr


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "--profile", "nonsense"], ["No profile 'nonsense'", "smoke, tiny"]),
        (
            ["report", "--profile", "smoke", "--runs", "nowhere"],
            ["no finished run", "python -m ragkit reproduce --profile smoke"],
        ),
        (["reproduse"], ["invalid choice"]),
    ],
)
def test_an_odd_command_gets_a_sentence(arguments, words):
    sentence(
        subprocess.run(
            [sys.executable, "-m", "ragkit", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ),
        *words,
    )


def command(monkeypatch, *arguments):
    """The exit code of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["ragkit", *arguments])
    return __main__.main()


def test_a_file_where_the_run_folder_should_be(tmp_path, monkeypatch, caplog):
    (tmp_path / "runs").write_text("a file")
    assert (
        command(monkeypatch, "reproduce", "--profile", "smoke", "--runs", str(tmp_path / "runs"))
        == 2
    )
    assert "cannot be made" in caplog.text
    assert "--runs" in caplog.text


# Notebooks


def notebook(folder, *cells, parameters="PROFILE = 'tiny'\nRUNS = '..'"):
    made = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    made.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    path = folder / "05_toy.ipynb"
    nbformat.write(made, path)
    return path


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (
            "from ragkit.profile import ProfileError\nraise ProfileError('mine.yaml: k: too large')",
            ["cell 4: mine.yaml: k: too large"],
        ),
        (
            "# a look at it\nvalues = []\nvalues[3]",
            ["cell 4 ('# a look at it')", "IndexError: list index out of range", "traceback: "],
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            ["its Python process was killed", "memory"],
        ),
    ],
)
def test_a_failing_notebook_is_named_with_its_cell(tmp_path, monkeypatch, cell, words):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = notebook(tmp_path, "x = 1", cell)
    with pytest.raises(NotebookError) as caught:
        __main__.execute(source, tmp_path / "out.ipynb", {"PROFILE": "tiny", "RUNS": ".."})
    assert str(caught.value).startswith("Notebook 05_toy.ipynb")
    for word in words:
        assert word in str(caught.value)


def test_every_error_of_the_package_is_known_as_its_own():
    assert {
        "RagkitError",
        "DataError",
        "ClaimError",
        "StoreError",
        "CheckpointError",
    } <= __main__.own_errors()
    assert "ValueError" not in __main__.own_errors()


def test_an_unknown_notebook_parameter_is_an_error(tmp_path):
    source = notebook(tmp_path, parameters="PROFILE = 'tiny'")
    with pytest.raises(NotebookError, match=r"05_toy\.ipynb does not know the parameter RUNS"):
        __main__.check_parameters(source, {"PROFILE": "tiny", "RUNS": ".."})


def test_an_executed_notebook_counts_only_with_its_stages(tmp_path):
    done, stamp = tmp_path / "a.ipynb", tmp_path / "a.json"
    done.write_text("{}")
    record = {"source": "x"}
    stamp.write_text(
        json.dumps({"record": record, "hash": file_hash(done), "stages": {"corpus/a": "k1"}})
    )
    assert __main__.is_reusable(done, stamp, record, {"corpus/a": "k1", "other": "k"})
    assert not __main__.is_reusable(done, stamp, record, {"corpus/a": "k2"})
    assert not __main__.is_reusable(done, stamp, record, {})
    assert not __main__.is_reusable(done, stamp, {"source": "y"}, {"corpus/a": "k1"})
    done.write_text("{ }")
    assert not __main__.is_reusable(done, stamp, record, {"corpus/a": "k1"})
    stamp.write_text("half of a st")
    assert not __main__.is_reusable(done, stamp, record, {})


# Models


def test_a_missing_model_folder():
    with pytest.raises(
        RagkitError, match=r"'/no/such/model' cannot be loaded.*Give a local folder"
    ):
        Reader.load("/no/such/model", ReaderSettings())


def test_a_hub_name_without_network(monkeypatch):
    def unreachable(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(
        RagkitError,
        match=r"'some-lab/some-reader' cannot be loaded.*no network.*Give a local folder",
    ):
        Reader.load("some-lab/some-reader", ReaderSettings())


def embedded_copy(folder):
    shutil.copytree(reader.embedded_reader(), folder, dirs_exist_ok=True)
    return folder


def test_a_damaged_embedded_reader_is_found(tmp_path, monkeypatch):
    folder = embedded_copy(tmp_path / "reader")
    monkeypatch.setattr(reader, "embedded_reader", lambda: folder)
    assert Reader.load("embedded", ReaderSettings()).model.config.alibi
    weights = folder / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-100] ^= 1  # one bit: it still loads
    weights.write_bytes(whole)
    with pytest.raises(RagkitError, match=r"model\.safetensors.*damaged.*git checkout"):
        Reader.load("embedded", ReaderSettings())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_model_folder_is_named(tmp_path, damage):
    weights = embedded_copy(tmp_path / "mine") / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RagkitError, match="mine' cannot be loaded"):
        Reader.load(str(tmp_path / "mine"), ReaderSettings())


def test_a_context_larger_than_the_models_positions_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = embedded_copy(tmp_path / "gpt2")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    GPT2LMHeadModel(
        GPT2Config(vocab_size=3000, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    with pytest.raises(RagkitError, match=r"64 positions.*reader\.context"):
        Reader.load(str(folder), ReaderSettings(context=65))
    assert Reader.load(str(folder), ReaderSettings(context=64)).settings.context == 64


# Numbers that are none


def test_attention_that_is_not_a_number_is_refused():
    one = Reader.load("embedded", ReaderSettings())
    with torch.no_grad():
        next(
            p for name, p in one.model.named_parameters() if "query_key_value.weight" in name
        ).fill_(float("nan"))
    question = Question("q", "where was orla venn born", ("Ulm",), (0,))
    with pytest.raises(AttentionError, match="not a number"):
        teacher.look(
            one,
            [question],
            [
                [
                    Passage("0", "Orla Venn", "Orla Venn was born in Ulm."),
                    Passage("1", "T", "Another text."),
                ]
            ],
        )


# Prompts longer than the context


def test_trimmed_prompts_are_counted_and_reported(tmp_path):
    lab = Lab(
        small_profile(tmp_path, reader="{steps: 2, batch: 2, context: 80}"), tmp_path / "runs"
    )
    scores = lab.teacher("almanac", "off-the-shelf")
    lab.reader("almanac", "fine-tuned")
    cut = int((scores["trimmed"] > 0).sum())
    assert cut > 0
    manifest = __main__.collect_manifest(lab, {}, 0.0, 0.0)
    assert manifest["trimmed_prompts"]["teacher/almanac/off-the-shelf"] == {
        "trimmed": cut,
        "prompts": 40,
    }
    assert "step1/almanac" in manifest["trimmed_prompts"]
    shown = report.trimmed_html(manifest["trimmed_prompts"])
    assert f"teacher/almanac/off-the-shelf: {cut} of 40" in shown
    assert report.trimmed_html({}) == ""


# Search


def test_k_larger_than_the_corpus_is_refused_before_any_model_is_loaded(tmp_path):
    (tmp_path / "p.tsv").write_text("id\ttext\ttitle\n1\tone\tA\n2\ttwo\tB\n")
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": ["one"]}\n' * 3)
    (tmp_path / "few.yaml").write_text(
        "name: few\nk: 3\nsets: [{source: files, name: few, passages: p.tsv, questions: q.jsonl, distill: 1, dev: 1, test: 1}]\nretriever: {model: missing}\n"
    )
    with pytest.raises(SearchError, match=r"k = 3 .* holds 2\. Lower k"):
        Lab(str(tmp_path / "few.yaml"), tmp_path / "runs").candidates("few")


def test_an_edited_data_file_is_read_again(tmp_path):
    (tmp_path / "p.tsv").write_text("id\ttext\ttitle\n1\tone\tA\n2\ttwo\tB\n")
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": ["one"]}\n' * 3)
    (tmp_path / "few.yaml").write_text(
        "name: few\nk: 2\nsets: [{source: files, name: few, passages: p.tsv, questions: q.jsonl, distill: 1, dev: 1, test: 1}]\n"
    )
    first = Lab(str(tmp_path / "few.yaml"), tmp_path / "runs")
    assert first.corpus("few").passages[1].text == "two"
    before = first.inputs()
    (tmp_path / "p.tsv").write_text("id\ttext\ttitle\n1\tone\tA\n2\tchanged\tB\n")
    again = Lab(str(tmp_path / "few.yaml"), tmp_path / "runs")
    assert again.corpus("few").passages[1].text == "changed"
    assert again.inputs() != before


# Kills: the real stages, killed after a checkpoint


def small_profile(folder, **sections):
    text = PROFILE
    for section, values in sections.items():
        text = "\n".join(
            f"{section}: {values}" if line.startswith(f"{section}:") else line
            for line in text.splitlines()
        )
    (folder / "faults.yaml").write_text(text)
    return str(folder / "faults.yaml")


def step_1(profile, runs):
    Lab(profile, runs).reader("almanac", "fine-tuned")


def step_2(profile, runs):
    Lab(profile, runs).distilled("almanac", "oracle", 0)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A profile and a run folder that holds what Step 1 and Step 2 build on."""
    folder = tmp_path_factory.mktemp("faults")
    profile = small_profile(folder)
    Lab(profile, folder / "runs").candidates("almanac")
    return profile, folder / "runs"


@pytest.mark.parametrize(
    ("work", "stage", "results"),
    [
        (step_1, "step1/almanac", ["model.safetensors", "losses.json"]),
        (step_2, "step2/almanac/oracle-0", ["ranking.safetensors", "curve.json"]),
    ],
)
def test_kill_9_after_a_checkpoint(tmp_path, caplog, upstream, work, stage, results):
    profile, runs = upstream
    for copy in ("whole", "cut"):
        shutil.copytree(runs, tmp_path / copy)
    work(profile, tmp_path / "whole")

    process = multiprocessing.get_context("spawn").Process(
        target=work, args=(profile, tmp_path / "cut")
    )
    process.start()
    partial = tmp_path / "cut" / "faults" / "partial"
    while not list(partial.glob(f"*/{checkpoint.FILE}")):
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "cut" / "faults" / "stages" / stage).exists()

    with caplog.at_level("INFO"):
        work(profile, tmp_path / "cut")
    assert "going on from the checkpoint" in caplog.text
    for name in results:
        one, two = (
            (tmp_path / copy / "faults" / "stages" / stage / name).read_bytes()
            for copy in ("whole", "cut")
        )
        assert one == two, name
    assert not list((tmp_path / "cut" / "faults" / "stages" / stage).glob("checkpoint*"))


def test_a_corrupted_stage_file_is_found_and_made_again(tmp_path, upstream):
    profile, runs = upstream
    shutil.copytree(runs, tmp_path / "runs")
    lab = Lab(profile, tmp_path / "runs")
    vectors = (
        tmp_path
        / "runs"
        / "faults"
        / "stages"
        / "candidates"
        / "almanac"
        / "candidates.safetensors"
    )
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-8] + b"\0" * 8)
    before = {f"{kind}/almanac" for kind in SEARCH}
    assert set(lab.store.sound()) == before - {"candidates/almanac"}
    lab.candidates("almanac")
    assert (
        lab.store.status["candidates/almanac"]
        == "ran: candidates.safetensors is damaged or missing"
    )
    assert vectors.read_bytes() == whole
    assert set(lab.store.sound()) == before


# A full disk


def write_a_lot(folder):
    save_file({"x": np.zeros(2_000_000, dtype=np.float32)}, folder / "x.safetensors")


def write_much_text(folder):
    (folder / "x.txt").write_text("x" * 8_000_000)


@pytest.mark.parametrize("work", [write_a_lot, write_much_text])
def test_a_file_that_finds_no_room(tmp_path, work):
    """A real limit on the size of files, met by safetensors' writer and by Python's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StoreError, match="Free some space") as caught:
            Store(tmp_path).stage("big", work, {}, {}, [work])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"No room to write stage big in {tmp_path}" in str(caught.value)
    assert not (tmp_path / "stages" / "big").exists()
    home = Store(tmp_path).stage("big", work, {}, {}, [work])  # with room again it is made whole
    assert len(list(home.iterdir())) == 2


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can mount a tiny disk; the test above needs no root"
)
def test_a_really_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(
            "mounting is not allowed here (a container without that right); the test above meets a full disk without it"
        )
    try:
        with pytest.raises(StoreError, match="No space left on device"):
            Store(tmp_path).stage("big", write_a_lot, {}, {}, [write_a_lot])
        assert not (tmp_path / "stages" / "big").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_another_os_error_is_not_called_a_full_disk(tmp_path):
    def denied(folder):
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        Store(tmp_path).stage("a", denied, {}, {}, [write_a_lot])


# HTML in data


def test_html_in_output_is_escaped_in_the_report():
    output = nbformat.v4.new_output("stream", text="<script>alert(1)</script>")
    assert "<script>" not in report.output_html(output)
    frame = nbformat.v4.new_output("execute_result", data={"text/plain": "<b>x</b>"})
    assert "<b>" not in report.output_html(frame)


# Ctrl-C and two runs at once, on the real command


def until(process, log, words, seconds=600):
    """Waits until the command has said these words."""
    end = time.monotonic() + seconds
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)


def hear_ctrl_c():
    """A shell's background job starts deaf to SIGINT, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_second_run_is_refused_and_ctrl_c_ends_the_first_with_a_sentence(
    tmp_path, monkeypatch, caplog
):
    log, arguments = tmp_path / "log", ["reproduce", "--profile", "smoke", "--runs", str(tmp_path)]
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ragkit", *arguments],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            preexec_fn=hear_ctrl_c,
        )
    try:
        until(process, log, "done     notebook 00")
        assert command(monkeypatch, *arguments) == 2
        assert "Another run is working in" in caplog.text
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.rstrip().endswith(
        "Stopped. What was finished is kept; the same command goes on from there."
    )
    assert (tmp_path / "smoke" / "notebooks" / "00_start_here.ipynb").is_file()
    assert not (tmp_path / "smoke" / "manifest.json").exists()
