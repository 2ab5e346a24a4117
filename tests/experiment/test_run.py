"""A run: stages made by a pool of processes, faults as sentences, and the command line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ragkit import __main__
from ragkit.errors import DataError, ProfileError, RagkitError
from ragkit.experiment import run, store
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.store import Store
from ragkit.experiment.wanted import stages as stages_of
from ragkit.models import device
from ragkit.profile import load_profile

ROOT = Path(__file__).parent.parent.parent
WORLD = "{{source: world, name: {0}, world: almanac, seed: {1}, entities: 24, distill: 20, dev: 4, test: 4}}"  # noqa: E501
BROKEN = "{source: files, name: broken, passages: bad.tsv, questions: q.jsonl, distill: 1, dev: 1, test: 1}"  # noqa: E501
HELD = """
from ragkit.experiment import run
from ragkit.experiment.lab import Lab
from ragkit.experiment.wanted import stages as stages_of
run.workers_of = lambda lab: 2
lab = Lab({0!r}, {1!r})
run.make_all(lab, [one for one in stages_of(lab.graph) if one.kind in ("passages", "questions")])
"""
WORK = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ragkit.experiment.run import stoppable
def work():
    kernel = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(kernel.pid, flush=True)
    kernel.wait()
try:
    stoppable(work)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.fixture(autouse=True)
def two_workers(monkeypatch):
    monkeypatch.setattr(run, "workers_of", lambda lab: 2)


def profile(folder, *sets):
    """A profile's file; by default four small worlds."""
    made = sets or [WORLD.format(name, seed) for seed, name in enumerate("abcd", start=20)]
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\njudge: false\nsets: [{', '.join(made)}]\n")
    return str(path)


def data_of(lab):
    """The stages that only read data: cheap, and without torch."""
    return [one for one in stages_of(lab.graph) if one.kind in ("passages", "questions")]


def named(lab, name):
    return next(one for one in stages_of(lab.graph) if one.name == name)


def workers(process=None):
    """The pool's processes below a process."""
    below = (process or psutil.Process()).children(recursive=True)
    return [one for one in below if "spawn_main" in " ".join(one.cmdline())]


def python(*arguments, **more):
    """A process of this interpreter and package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return psutil.Popen([sys.executable, *arguments], env=environment, **more)


def until(true, seconds=240):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_inputs_are_made_before_what_is_made_of_them(tmp_path, capfd):
    lab = Lab(profile(tmp_path), tmp_path / "runs")
    stages = data_of(lab)
    run.make_all(lab, stages)
    assert lab.status == {one.name: "ran: not made yet" for one in stages}
    said = capfd.readouterr().err
    for name in "abcd":
        assert (
            0 <= said.index(f"done     passages/{name}") < said.index(f"running  questions/{name}")
        )
    again = Lab(profile(tmp_path), tmp_path / "runs")
    run.make_all(again, data_of(again))
    assert set(again.status.values()) == {"reused"}
    assert not workers()


def test_an_error_in_one_stage_ends_all_with_its_sentence(tmp_path):
    (tmp_path / "bad.tsv").write_text("id\ttext\ttitle\n1\tone\tA\n2\tonly two columns\n")
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": ["one"]}\n' * 3)
    lab = Lab(profile(tmp_path, WORLD.format("a", 20), BROKEN), tmp_path / "runs")
    beside = subprocess.Popen(["sleep", "600"])
    try:
        with lab.store.alone(named(lab, "passages/a")), pytest.raises(DataError, match=r"bad\.tsv"):
            run.make_all(lab, data_of(lab))
        assert not workers()
        assert beside.poll() is None  # a process that is not the pool's is left alone
    finally:
        beside.kill()
        beside.wait()


def test_a_killed_worker_gives_a_sentence_and_the_run_goes_on(tmp_path):
    lab = Lab(profile(tmp_path, WORLD.format("a", 20), WORLD.format("b", 21)), tmp_path / "runs")
    finished, held = (named(lab, f"passages/{name}") for name in "ab")

    def kill():
        until(lambda: lab.store.home(finished).exists())
        workers()[0].kill()

    killer = threading.Thread(target=kill)
    with lab.store.alone(held):  # its worker waits
        killer.start()
        with pytest.raises(RagkitError, match=r"was killed, most likely .* goes on from"):
            run.make_all(lab, data_of(lab))
    killer.join()
    assert not workers()
    again = Lab(str(tmp_path / "mine.yaml"), tmp_path / "runs")
    run.make_all(again, data_of(again))
    assert again.status["passages/a"] == "reused"
    assert again.status["passages/b"] == "ran: not made yet"


def test_a_killed_run_leaves_no_process_behind(tmp_path):
    mine, runs = profile(tmp_path), tmp_path / "runs"
    lab = Lab(mine, runs)
    finished = named(lab, "passages/b")
    with lab.store.alone(named(lab, "passages/a")):
        process = python("-c", HELD.format(mine, str(runs)), stderr=subprocess.DEVNULL)
        until(lambda: process.poll() is not None or lab.store.home(finished).exists())
        left = workers(process)
        assert left
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_set_gives_a_run_a_folder_of_its_own(tmp_path):
    mine = profile(tmp_path, WORLD.format("a", 20))
    finished = Lab(mine, tmp_path / "runs")
    finished.corpus("a")
    before = contents(finished.folder)
    changed = changed_profile(mine, ["sets.0.seed=21", "k=3"])
    other = Lab(changed, tmp_path / "runs")
    other.corpus("a")
    assert other.folder.name == changed.name
    assert changed.name.startswith("mine-")
    assert contents(finished.folder) == before
    assert changed_profile(mine, ["k=3", "sets.0.seed=21"]).name == changed.name
    assert changed_profile(mine, ["k=4"]).name != changed.name
    assert changed_profile(mine, []).name == "mine"


@pytest.mark.parametrize("name", ["course", "bench"])
def test_a_profile_named_as_another_folder_is_refused(tmp_path, name):
    path = Path(profile(tmp_path))
    path.write_text(path.read_text().replace("name: mine", f"name: {name}"))
    with pytest.raises(ProfileError, match=f"cannot be named '{name}'"):
        Lab(str(path), tmp_path / "runs")


def test_tidy_keeps_what_the_profile_reaches(tmp_path):
    old = Lab(profile(tmp_path, WORLD.format("a", 20)), tmp_path / "runs")
    old.corpus("a")
    lab = Lab(profile(tmp_path, WORLD.format("a", 21)), tmp_path / "runs")
    lab.corpus("a")
    assert len(list(lab.folder.glob("stages/*/*"))) == 4
    assert run.tidy(lab, ROOT / "notebooks") == 2
    kept = {lab.store.home(named(lab, f"{kind}/a")) for kind in ("passages", "questions")}
    assert set(lab.folder.glob("stages/*/*")) == kept
    assert not list((lab.folder / "partial").iterdir())
    assert Store(lab.folder).why_not(named(lab, "questions/a")) is None


# on a busy machine the kernel may be there before `start` has come back
SLOW = """
import threading, time
start = threading.Thread.start
threading.Thread.start = lambda thread: (start(thread), time.sleep(2))
"""


@pytest.mark.parametrize("before", ["", SLOW])
def test_ctrl_c_ends_kernels_and_goes_on(before):
    process = python("-c", before + WORK, stdout=subprocess.PIPE, text=True)
    kernel = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert not psutil.pid_exists(kernel)


# The command line


def command(monkeypatch, *arguments):
    """The exit code of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["ragkit", *arguments])
    return __main__.main()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "--profile", "tinny"], "Did you mean 'tiny'"),
        (["plan", "--profile", "tiny", "--set", "k=99"], "less than or equal to 20"),
        (["report", "--profile", "smoke"], "python -m ragkit reproduce --profile smoke"),
        (["reference", "--profile", "smoke"], "no finished run"),
        (["course", "--profile", "smoke"], "no finished run"),
    ],
)
def test_what_the_user_can_mend_is_said_in_a_sentence(
    tmp_path, monkeypatch, caplog, arguments, words
):
    assert command(monkeypatch, *arguments, "--runs", str(tmp_path)) == 2
    assert words in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", ["plan", "reproduce", "report", "tidy"])
def test_a_file_where_the_runs_should_be(tmp_path, monkeypatch, caplog, name):
    (tmp_path / "runs").write_text("a file")
    assert command(monkeypatch, name, "--runs", str(tmp_path / "runs")) == 2
    assert "cannot be made" in caplog.text
    assert "--runs" in caplog.text


def test_a_second_run_is_refused_and_ctrl_c_ends_the_first_with_a_sentence(
    tmp_path, monkeypatch, caplog
):
    mine, log, runs = profile(tmp_path), tmp_path / "log", tmp_path / "runs"
    arguments, lab = ["reproduce", "--profile", mine, "--runs", str(runs)], Lab(mine, runs)

    def hear_ctrl_c():  # a shell's background job starts deaf to it, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with lab.store.alone(named(lab, "passages/a")), open(log, "w") as out:
        process = python("-m", "ragkit", *arguments, stdout=out, stderr=out, preexec_fn=hear_ctrl_c)
        try:
            until(lambda: "running  " in log.read_text() or "waiting  " in log.read_text())
            assert command(monkeypatch, *arguments) == 2
            assert "Another run is working in" in caplog.text
            left = workers(process)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            if process.is_running():
                process.kill()
        assert not psutil.wait_procs(left, timeout=60)[1]
    said = log.read_text()
    assert "Traceback" not in said
    assert said.rstrip().endswith("the same command goes on from there.")
    assert load_profile(str(lab.folder / "profile.yaml")) == lab.profile
    assert not (lab.folder / "manifest.json").exists()


def test_processes_that_work_as_one_join_before_they_ask_what_is_there(monkeypatch):
    """Else each sees a run of its own: found by the first whole run of two processes."""
    calls = []
    monkeypatch.setattr(store, "SHARED", True)
    monkeypatch.setattr(store, "MAIN", False)
    monkeypatch.setattr(device, "start", lambda *given: calls.append(given))
    monkeypatch.setattr(run, "make_all", lambda lab, stages: calls.append("stages"))
    lab = SimpleNamespace(profile=load_profile("smoke"), graph=None)
    monkeypatch.setattr(run, "stages_of", lambda graph: [])
    assert run.reproduce(lab, Path()) == {}
    assert calls == [("cpu", 1), "stages"]
