"""Sets are made side by side: what goes wrong in one process is told as one sentence, and none is left behind."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ragkit.experiment.workers import make_sets

from ragkit.errors import RagkitError

ROOT = Path(__file__).parent.parent
BROKEN = "  - {source: files, name: broken, passages: nowhere.tsv, questions: nowhere.jsonl}\n"
WORLD = "  - {source: world, name: almanac, world: almanac, seed: 11, entities: 40, distill: 60, dev: 40, test: 40}\n"


def test_an_error_in_one_set_ends_all_with_its_sentence(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"name: mine\njudge: false\nsets:\n{BROKEN}{WORLD}")
    with pytest.raises(RagkitError, match=r"No file .*nowhere\.tsv"):
        make_sets(str(profile), tmp_path / "runs", ["broken", "almanac"])
    assert not multiprocessing.active_children()


def test_a_killed_run_leaves_no_process_behind(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"name: mine\njudge: false\nsets:\n{WORLD}")
    script = tmp_path / "run.py"
    call = f"make_sets({str(profile)!r}, Path({str(tmp_path)!r}), ['almanac'])"
    script.write_text(
        f"from pathlib import Path\nfrom ragkit.workers import make_sets\nif __name__ == '__main__':\n    {call}\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        stderr=subprocess.DEVNULL,
    )
    made = tmp_path / "mine" / "stages" / "corpus" / "almanac"
    deadline = time.monotonic() + 120
    while not made.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
