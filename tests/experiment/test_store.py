"""Stages: reused when nothing changed, made anew with a reason, never half-written."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from ragkit.errors import StoreError
from ragkit.experiment import store
from ragkit.experiment.store import Store


def work(folder):
    (folder / "result.txt").write_text("done")


def other_work(folder):
    """The same place, other code."""
    (folder / "result.txt").write_text("other")


def test_a_stage_is_made_once(tmp_path):
    made = []
    runs = Store(tmp_path)

    def make(folder):
        made.append(1)
        work(folder)

    for _ in range(2):
        runs.stage("a", make, {"x": 1}, {}, [work])
    assert made == [1]
    assert runs.status["a"] == "reused"


@pytest.mark.parametrize(
    ("settings", "upstream", "code", "reason"),
    [
        ({"x": 2}, {"b": "k"}, [work], "profile.x 1 -> 2"),
        ({"x": 1}, {"b": "other"}, [work], "b was made anew"),
        ({"x": 1}, {"b": "k"}, [other_work], "code of"),
    ],
)
def test_a_change_is_named(tmp_path, settings, upstream, code, reason):
    runs = Store(tmp_path)
    runs.stage("a", work, {"x": 1}, {"b": "k"}, [work])
    runs.stage("a", work, settings, upstream, code)
    assert reason in runs.status["a"]


def test_a_damaged_file_is_found_and_made_anew(tmp_path):
    runs = Store(tmp_path)
    home = runs.stage("a", work, {}, {}, [work])
    (home / "result.txt").write_text("damaged")
    runs.stage("a", work, {}, {}, [work])
    assert "result.txt is damaged" in runs.status["a"]
    assert (home / "result.txt").read_text() == "done"


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="The peak of a stage alone is measured on Linux only.",
)
def test_the_peak_memory_of_each_stage(tmp_path):
    def wasteful(folder):
        assert np.ones(30_000_000).sum() == 30_000_000  # 229 MiB, freed before the stage ends
        work(folder)

    runs = Store(tmp_path)
    runs.stage("large", wasteful, {}, {}, [work])
    runs.stage("small", work, {}, {}, [work])
    peaks = {name: saved["peak_mib"] for name, saved in runs.records().items()}
    assert peaks["large"] > peaks["small"] + 200


def test_a_failed_stage_does_not_count(tmp_path):
    runs = Store(tmp_path)

    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="stage a"):
        runs.stage("a", fail, {}, {}, [work])
    assert not (tmp_path / "stages" / "a").exists()
    runs.stage("a", work, {}, {}, [work])
    assert runs.status["a"] == "ran: not made yet"


@pytest.mark.parametrize("text", ["not json", "{}", "[]", '{"record": {}, "files": 1}'])
def test_a_damaged_record_is_found_and_the_stage_made_anew(tmp_path, text):
    runs = Store(tmp_path)
    home = runs.stage("a", work, {}, {}, [work])
    (home / "stage.json").write_text(text)
    runs.stage("a", work, {}, {}, [work])
    assert runs.status["a"].startswith("ran: ")
    runs.stage("a", work, {}, {}, [work])
    assert runs.status["a"] == "reused"


def test_what_an_outdated_kill_left_behind_is_cleared(tmp_path):
    runs = Store(tmp_path)

    def dies(folder):
        (folder / "checkpoint").write_text("much")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.stage("a", dies, {"x": 1}, {}, [work])
    runs.stage("a-b", work, {}, {}, [work])  # a stage whose name begins alike leaves it alone
    assert len(list((tmp_path / "partial").glob("a-*/checkpoint"))) == 1
    runs.stage("a", work, {"x": 2}, {}, [work])
    assert not list((tmp_path / "partial").glob("a-*/*"))


def slow_stage(folder):
    """Counts to six in a file, one step at a time, as a training with checkpoints would."""
    progress = folder / "progress"
    for step in range(int(progress.read_text()) if progress.exists() else 0, 6):
        (folder / "new").write_text(str(step + 1))
        (folder / "new").replace(progress)
        with open(folder.parent.parent / "steps", "a") as steps:
            steps.write(f"{step} ")
        time.sleep(0.2)


def run_slow(path):
    Store(path).stage("slow", slow_stage, {}, {}, [slow_stage])


def test_a_killed_stage_goes_on_from_its_checkpoint(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_slow, args=(tmp_path,))
    process.start()
    while not (tmp_path / "steps").exists() or len((tmp_path / "steps").read_text().split()) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "stages" / "slow").exists()
    run_slow(tmp_path)
    steps = [int(s) for s in (tmp_path / "steps").read_text().split()]
    assert steps[-1] == 5
    assert steps.count(0) == 1
    assert (tmp_path / "stages" / "slow" / "progress").read_text() == "6"


def test_two_runs_at_once_are_refused(tmp_path):
    with (
        Store(tmp_path).only_run(),
        pytest.raises(StoreError, match="Another run"),
        Store(tmp_path).only_run(),
    ):
        pass


def test_one_stage_is_made_by_one_process(tmp_path):
    """A notebook opened beside a run waits for the run's stage and reuses it."""
    processes = [
        multiprocessing.get_context("spawn").Process(target=run_slow, args=(tmp_path,))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "steps").read_text().split() == [str(i) for i in range(6)]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Choose another with --runs"):
        Store(tmp_path / "file" / "tiny")


def test_an_input_is_hashed_again_when_it_changes(tmp_path):
    source = tmp_path / "p.tsv"
    source.write_text("one")
    first = store.input_hash(source)
    assert first == store.input_hash(source) == store.file_hash(source)
    source.write_text("other")
    assert store.input_hash(source) == store.file_hash(source) != first


def test_docstrings_and_comments_do_not_count():
    import ast

    one = ast.parse('def f():\n    """One."""\n    return 1  # why\n')
    two = ast.parse('def f():\n    """Two."""\n    return 1\n')
    three = ast.parse("def f():\n    return 2\n")
    assert store.without_docstrings(one) == store.without_docstrings(two)
    assert store.without_docstrings(one) != store.without_docstrings(three)


def test_code_is_followed_through_calls():
    from ragkit.experiment import stages
    from ragkit.experiment.lab import Lab

    found = store.code_of([stages.make_distilled, Lab.loss])
    assert {"ragkit.distill.train", "ragkit.distill.kl_loss"} <= set(found)
    assert "ragkit.metrics.hits" in found


def test_code_is_followed_through_an_import_inside_a_function():
    from ragkit.models.reader import Reader

    assert "ragkit.fid.FidReader" in store.code_of([Reader])
