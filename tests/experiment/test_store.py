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
from ragkit.experiment import store
from ragkit.experiment.graph import Graph, Of
from ragkit.experiment.lab import Lab
from ragkit.experiment.store import KINDS, Stage, Store, only_run, read_record
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


@pytest.fixture
def runs(tmp_path):
    """A run's folder that has no other run beside it."""
    return tmp_path / "runs" / "mine"


def stage(maker, kind="toy", **settings):
    return Stage(kind, f"{kind}/a", f"{TOY}:{maker}", settings, units={"steps": 6})


def raising(error, kind="toy"):
    """A stage whose maker leaves half a file and raises; its key is made of plain values."""
    failing = stage("half", kind)
    failing.key  # noqa: B018
    object.__setattr__(failing, "settings", {"error": error})
    return failing


def passages(*changes):
    """The passages of smoke's first set: a real stage that is cheap."""
    profile = load_profile("smoke", ["sets.0.entities=12", *changes])
    return Graph(profile).stage("passages", Of("almanac"))


def test_there_and_back_again_is_made_twice(runs):
    a, b = passages(), passages("sets.0.seed=77")
    assert a.key != b.key
    told = []
    for one in (a, b, passages(), b):
        kept = Store(runs)  # each as a process of its own
        home = kept.open(one)
        told.append(kept.status[one.name])
        assert home == runs / "stages" / "passages" / one.key
    assert told[0] == "ran: not made yet"
    assert told[1].startswith("ran: settings.set.seed ")
    assert told[1].endswith(" -> 77")
    assert told[2:] == ["reused", "reused"]
    assert len(list((runs / "stages" / "passages").iterdir())) == 2


def test_a_damaged_file_is_named_and_made_again_to_the_same_bytes(runs):
    one, again = passages(), Store(runs)
    file = Store(runs).open(one) / "passages.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\0" * 8)
    assert again.why_not(one) == "passages.arrow is damaged or missing"
    again.open(one)
    assert again.status[one.name] == "ran: passages.arrow is damaged or missing"
    assert file.read_bytes() == whole


@pytest.mark.parametrize("text", ["not json", "{}", "[]", '{"record": {}, "files": 1}'])
def test_a_damaged_record_is_found(runs, text):
    one, again = passages(), Store(runs)
    (Store(runs).open(one) / "stage.json").write_text(text)
    again.open(one)
    assert again.status[one.name] == "ran: its record is damaged"
    assert Store(runs).why_not(one) is None


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), PermissionError(errno.EACCES, "Permission denied")]
)
def test_a_failed_stage_never_counts(runs, error):
    failing = raising(error)
    with pytest.raises(type(error)):
        Store(runs).open(failing)
    assert not list((runs / "stages").glob("toy/*"))
    assert Store(runs).why_not(failing) == "not made yet"


def make_slowly(runs):
    Store(runs).open(stage("counted", steps=str(runs / "steps"), pause=0.2))


def process(runs):
    made = multiprocessing.get_context("fork").Process(target=make_slowly, args=(runs,))
    made.start()
    return made


def test_a_killed_maker_goes_on_from_what_it_left(runs):
    runs.mkdir(parents=True)
    made, steps = process(runs), runs / "steps"
    while not steps.exists() or len(steps.read_text().split()) < 2:
        time.sleep(0.02)
    os.kill(made.pid, signal.SIGKILL)
    made.join()
    assert not list((runs / "stages").glob("toy/*"))
    make_slowly(runs)
    noted = [int(step) for step in steps.read_text().split()]
    assert noted[-1] == 5
    assert noted.count(0) == 1
    (home,) = (runs / "stages" / "toy").iterdir()
    assert {path.name for path in home.iterdir()} == {"progress", "stage.json"}


def test_one_stage_is_made_by_one_process(runs):
    """A notebook opened beside a run waits for the run's stage and reuses it."""
    runs.mkdir(parents=True)
    both = [process(runs), process(runs)]
    for made in both:
        made.join()
        assert made.exitcode == 0
    assert (runs / "steps").read_text().split() == [str(step) for step in range(6)]


def test_a_run_beside_it_is_taken_over_by_links(tmp_path):
    one, other = passages(), Store(tmp_path / "two")
    first, home = Store(tmp_path / "one").open(one), other.open(one)
    assert other.status[one.name] == "reused"
    for name in ("passages.arrow", "stage.json"):
        assert (home / name).samefile(first / name)
    assert not list((tmp_path / "two" / "partial").iterdir())
    shutil.rmtree(tmp_path / "one")
    assert Store(tmp_path / "two").why_not(one) is None


def test_a_damaged_neighbour_is_not_taken_over(tmp_path):
    one, other = passages(), Store(tmp_path / "two")
    damaged = Store(tmp_path / "one").open(one) / "passages.arrow"
    damaged.write_bytes(b"damaged")
    home = other.open(one)
    assert other.status[one.name].startswith("ran: ")
    assert (home / "passages.arrow").stat().st_size > 1000
    assert damaged.read_bytes() == b"damaged"


@pytest.mark.parametrize("maker", ["arrays", "text"])
def test_a_file_that_finds_no_room(runs, maker):
    """A real limit on the size of files, met by safetensors' writer and by Python's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StoreError, match=r"No room to write stage toy/a in .*Free some space"):
            Store(runs).open(stage(maker))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((runs / "stages").glob("toy/*"))
    assert len(list(Store(runs).open(stage(maker)).iterdir())) == 2  # with room it is whole


def test_a_full_disk_is_named(runs):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StoreError, match=r"No room to write stage toy/a .*No space left"):
        Store(runs).open(raising(full))


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if "knob" in KINDS[kind]), "teacher"])
@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory", None])  # fmt: skip  # noqa: E501
def test_memory_that_runs_out_names_the_knob(runs, kind, words):
    error = MemoryError() if words is None else RuntimeError(words)
    with pytest.raises(StoreError, match=f"Stage {kind}/a: memory ran out. Lower ") as caught:
        Store(runs).open(raising(error, kind))
    assert KINDS[kind].get("knob", "reader.at_once") in str(caught.value)


def test_two_runs_at_once_are_refused(runs):
    runs.mkdir(parents=True)
    with only_run(runs), pytest.raises(StoreError, match="Another run"), only_run(runs):
        pass
    with only_run(runs):  # and it is free again
        pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be made .* Choose another --runs"):
        Store(tmp_path / "file" / "tiny")


def test_what_a_stage_says_of_itself(runs):
    one = passages()
    saved = read_record(Store(runs).open(one))
    made = saved["made"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert made["commit"] == head.stdout.strip()
    assert isinstance(made["dirty"], bool)
    assert made["versions"]["torch"].startswith("2.")
    assert made["machine"]["cores"] == os.cpu_count()
    assert saved["seconds"] >= 0
    assert saved["units"] == one.units
    assert saved["record"] == one.record
    assert set(saved["files"]) == {"passages.arrow"}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Measured on Linux only.")
def test_the_peak_memory_is_that_of_the_stage_alone(runs):
    peaks = []
    for values in (30_000_000, 1):  # 229 MiB, freed before the stage ends
        home = Store(runs).open(stage("memory", values=values))
        peaks.append(read_record(home)["peak_mib"])
    assert peaks[0] > peaks[1] + 200


def test_of_several_processes_one_makes_the_data(tmp_path, monkeypatch):
    """Two would write the passages' file at once, while the other maps it into memory."""
    run, asked = Lab("smoke", tmp_path), []
    for maker in ("data.sets.make_passages", "models.retriever.make_retriever"):
        monkeypatch.setattr(f"ragkit.{maker}", lambda *_, maker=maker: asked.append(maker))
    monkeypatch.setattr(store, "MAIN", False)
    for kind in ("passages", "retriever"):
        run.store._make(run.graph.stage(kind, Of("almanac")), {}, "not made yet")
    assert asked == ["models.retriever.make_retriever"]
