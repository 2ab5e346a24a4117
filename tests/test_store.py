"""Stages: reused when nothing changed, made anew with a reason, never half-written."""

import multiprocessing
import os
import signal
import time

import pytest

from ragkit import store
from ragkit.store import Store, StoreError


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


def test_a_failed_stage_does_not_count(tmp_path):
    runs = Store(tmp_path)

    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.stage("a", fail, {}, {}, [work])
    assert not (tmp_path / "stages" / "a").exists()
    runs.stage("a", work, {}, {}, [work])
    assert runs.status["a"] == "ran: not made yet"


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
    with Store(tmp_path).only_run(), pytest.raises(StoreError, match="Another run"), Store(tmp_path).only_run():
        pass


def test_docstrings_and_comments_do_not_count():
    import ast

    one = ast.parse('def f():\n    """One."""\n    return 1  # why\n')
    two = ast.parse('def f():\n    """Two."""\n    return 1\n')
    three = ast.parse("def f():\n    return 2\n")
    assert store.without_docstrings(one) == store.without_docstrings(two)
    assert store.without_docstrings(one) != store.without_docstrings(three)


def test_code_is_followed_through_calls():
    from ragkit import lab

    found = store.code_of([lab.make_distilled])
    assert "ragkit.distill.kl_loss" in found
    assert "ragkit.metrics.hits" in found
