"""The store: reused when nothing changed, made anew with a reason, never half-written."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from ragkit.errors import StoreError
from ragkit.experiment.graph import Graph, Of
from ragkit.experiment.store import KNOBS, Stage, Store, only_run, read_record
from ragkit.profile import load_profile

TOY = "ragkit.data.toy"  # what lies in the data room starts no device


def counted(folder, inputs, settings):
    """Counts to six in a file, one step at a time, as a training with checkpoints does."""
    progress, steps = folder / "progress", settings["steps"]
    for step in range(int(progress.read_text()) if progress.exists() else 0, 6):
        (folder / "new").write_text(str(step + 1))
        (folder / "new").replace(progress)
        with open(steps, "a") as noted:
            noted.write(f"{step} ")
        time.sleep(settings.get("pause", 0))


def half(folder, inputs, settings):
    (folder / "half.txt").write_text("half")
    raise settings["error"]


def arrays(folder, inputs, settings):
    save_file({"x": np.zeros(2_000_000, dtype=np.float32)}, folder / "x.safetensors")


def text(folder, inputs, settings):
    (folder / "x.txt").write_text("x" * 8_000_000)


def memory(folder, inputs, settings):
    assert np.ones(settings["values"]).sum() == settings["values"]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The makers above as a module of the data room."""
    module = types.ModuleType(TOY)
    vars(module).update({one.__name__: one for one in (counted, half, arrays, text, memory)})
    monkeypatch.setitem(sys.modules, TOY, module)


def stage(maker, kind="toy", **settings):
    return Stage(kind, f"{kind}/a", f"{TOY}:{maker}", settings, units={"steps": 6})


def passages(*changes):
    """The passages of smoke's first set: a real stage that is cheap."""
    return Graph(load_profile("smoke", ["sets.0.entities=12", *changes])).stage(
        "passages", Of("almanac")
    )


def test_there_and_back_again_is_made_twice(tmp_path):
    a, b = passages(), passages("sets.0.seed=77")
    assert a.key != b.key
    told = []
    for one in (a, b, passages(), b):
        kept = Store(tmp_path)  # each as a process of its own
        home = kept.open(one)
        told.append(kept.status[one.name])
        assert home == tmp_path / "stages" / "passages" / one.key
    assert told[0] == "ran: not made yet"
    assert told[1].startswith("ran: settings.set.seed ")
    assert told[1].endswith(" -> 77")
    assert told[2:] == ["reused", "reused"]
    assert len(list((tmp_path / "stages" / "passages").iterdir())) == 2


def test_a_damaged_file_is_named_and_made_again_to_the_same_bytes(tmp_path):
    one = passages()
    file = Store(tmp_path).open(one) / "passages.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\0" * 8)
    again = Store(tmp_path)
    assert again.why_not(one) == "passages.arrow is damaged or missing"
    again.open(one)
    assert again.status[one.name] == "ran: passages.arrow is damaged or missing"
    assert file.read_bytes() == whole


@pytest.mark.parametrize("text", ["not json", "{}", "[]", '{"record": {}, "files": 1}'])
def test_a_damaged_record_is_found(tmp_path, text):
    one = passages()
    (Store(tmp_path).open(one) / "stage.json").write_text(text)
    kept = Store(tmp_path)
    kept.open(one)
    assert kept.status[one.name] == "ran: its record is damaged"
    assert Store(tmp_path).why_not(one) is None


def test_a_failed_stage_never_counts(tmp_path):
    for error in (KeyboardInterrupt(), PermissionError(errno.EACCES, "Permission denied")):
        failing = Stage("toy", "toy/a", f"{TOY}:half", {"error": "any"})
        failing.record  # noqa: B018  # the key is made of plain values
        object.__setattr__(failing, "settings", {"error": error})
        with pytest.raises(type(error)):
            Store(tmp_path).open(failing)
        assert not list((tmp_path / "stages").glob("toy/*"))
        assert Store(tmp_path).why_not(failing) == "not made yet"


def make_slowly(runs):
    Store(runs).open(stage("counted", steps=str(runs / "steps"), pause=0.2))


def process(runs):
    made = multiprocessing.get_context("fork").Process(target=make_slowly, args=(runs,))
    made.start()
    return made


def test_a_killed_maker_goes_on_from_what_it_left(tmp_path):
    made, steps = process(tmp_path), tmp_path / "steps"
    while not steps.exists() or len(steps.read_text().split()) < 2:
        time.sleep(0.02)
    os.kill(made.pid, signal.SIGKILL)
    made.join()
    assert not list((tmp_path / "stages").glob("toy/*"))
    make_slowly(tmp_path)
    noted = [int(step) for step in steps.read_text().split()]
    assert noted[-1] == 5
    assert noted.count(0) == 1
    (home,) = (tmp_path / "stages" / "toy").iterdir()
    assert {path.name for path in home.iterdir()} == {"progress", "stage.json"}


def test_one_stage_is_made_by_one_process(tmp_path):
    """A notebook opened beside a run waits for the run's stage and reuses it."""
    both = [process(tmp_path), process(tmp_path)]
    for made in both:
        made.join()
        assert made.exitcode == 0
    assert (tmp_path / "steps").read_text().split() == [str(step) for step in range(6)]


def test_a_run_beside_it_is_taken_over_by_links(tmp_path):
    one = passages()
    first = Store(tmp_path / "one").open(one)
    other = Store(tmp_path / "two")
    home = other.open(one)
    assert other.status[one.name] == "reused"
    for name in ("passages.arrow", "stage.json"):
        assert (home / name).samefile(first / name)
    shutil.rmtree(tmp_path / "one")
    assert Store(tmp_path / "two").why_not(one) is None


def test_a_damaged_neighbour_is_not_taken_over(tmp_path):
    one = passages()
    (Store(tmp_path / "one").open(one) / "passages.arrow").write_bytes(b"damaged")
    other = Store(tmp_path / "two")
    home = other.open(one)
    assert other.status[one.name].startswith("ran: ")
    assert (home / "passages.arrow").stat().st_size > 1000
    assert (tmp_path / "one" / "stages" / one.place / "passages.arrow").read_bytes() == b"damaged"


@pytest.mark.parametrize("maker", ["arrays", "text"])
def test_a_file_that_finds_no_room(tmp_path, maker):
    """A real limit on the size of files, met by safetensors' writer and by Python's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StoreError, match=r"No room to write stage toy/a in .*Free some space"):
            Store(tmp_path).open(stage(maker))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "stages").glob("toy/*"))
    assert len(list(Store(tmp_path).open(stage(maker)).iterdir())) == 2  # with room it is whole


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can mount a tiny disk.")
def test_a_really_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("Mounting is not allowed here; the test above meets a full disk without it.")
    try:
        with pytest.raises(StoreError, match="No space left on device"):
            Store(tmp_path).open(stage("arrays"))
        assert not list((tmp_path / "stages").glob("toy/*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("kind", [*KNOBS, "teacher"])
@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory", None])  # fmt: skip  # noqa: E501
def test_memory_that_runs_out_names_the_knob(tmp_path, kind, words):
    failing = stage("half", kind, error=kind)
    failing.record  # noqa: B018
    error = MemoryError() if words is None else RuntimeError(words)
    object.__setattr__(failing, "settings", {"error": error})
    with pytest.raises(StoreError, match=f"Stage {kind}/a: memory ran out. Lower ") as caught:
        Store(tmp_path).open(failing)
    assert KNOBS.get(kind, "reader.at_once") in str(caught.value)


def test_two_runs_at_once_are_refused(tmp_path):
    with only_run(tmp_path), pytest.raises(StoreError, match="Another run"), only_run(tmp_path):
        pass
    with only_run(tmp_path):  # and it is free again
        pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Choose another with --runs"):
        Store(tmp_path / "file" / "tiny")


def test_what_a_stage_says_of_itself(tmp_path):
    one = passages()
    saved = read_record(Store(tmp_path).open(one))
    made = saved["made"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert made["commit"] == head.stdout.strip()
    assert isinstance(made["dirty"], bool)
    assert made["versions"]["torch"].startswith("2.")
    assert made["machine"]["cores"] == os.cpu_count()
    assert saved["seconds"] > 0
    assert saved["units"] == one.units
    assert saved["record"] == one.record
    assert set(saved["files"]) == {"passages.arrow"}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Measured on Linux only.")
def test_the_peak_memory_is_that_of_the_stage_alone(tmp_path):
    peaks = []
    for values in (30_000_000, 1):  # 229 MiB, freed before the stage ends
        home = Store(tmp_path).open(stage("memory", values=values))
        peaks.append(read_record(home)["peak_mib"])
    assert peaks[0] > peaks[1] + 200
