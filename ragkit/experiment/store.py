"""Stages remembered on disk by what they were made from, and why one must be made.

A finished stage lies in `<run>/stages/<kind>/<key>` and is never changed. Its key is made of all
that its result depends on, so going back to an earlier setting finds the earlier result. Beside
the result lies `stage.json`: the record behind the key, the hashes of the files, and where, when
and by what it was made (commit, versions, machine, seconds, peak memory, work).
"""

import functools
import hashlib
import importlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from ragkit.data.files import file_hash, room_on_disk, write_whole
from ragkit.errors import StoreError
from ragkit.experiment.closure import closure_of
from ragkit.experiment.provenance import memory_from_now, provenance, versions
from ragkit.settings import FREE, MachineSettings

log = logging.getLogger(__name__)
KNOBS = {
    "retriever": "retriever.crop_batch",
    "vectors": "retriever.at_once (texts in one pass) or retriever.passage_tokens",
    "index": "index.shard or index.trained_on",
    "step1": "reader.at_once (prompts in one pass), set reader.gradient_checkpointing to true, or "
    "train adapters only with reader.lora_rank",
    "step2": "distill.batch, or set distill.side to 'query'",
}  # what to turn where memory runs out
RECORD = "stage.json"
SHARED = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun started several processes as one
MAIN = os.environ.get("RANK", "0") == "0"


def without_free(settings: Any) -> Any:
    """Settings without those that change no result (`settings.FREE`), as plain JSON values."""
    if isinstance(settings, Mapping):
        return {name: without_free(one) for name, one in settings.items() if name not in FREE}
    if isinstance(settings, list | tuple):
        return [without_free(one) for one in settings]
    return settings


@dataclass(frozen=True, eq=False)
class Stage:
    """One node of the experiment.

    `maker` is `module:function`, called as `function(folder, inputs, settings)` with the folders of
    the inputs by their roles. `settings` are JSON values; `machine` (device, threads) is part of
    the key too. `units` say how much work it is, for the plan and the throughput, and change no
    key.
    """

    kind: str
    name: str
    maker: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "maker": self.maker,
            "settings": json.loads(json.dumps(without_free(self.settings))),
            "inputs": {role: [one.name, one.key] for role, one in self.inputs.items()},
            "code": closure_of(self.maker.partition(":")[0]),
            "versions": versions(),
            "machine": without_free(self.machine),
        }

    @functools.cached_property
    def key(self) -> str:
        """The record's fingerprint; names of inputs are for people and do not count."""
        inputs = {role: key for role, (_, key) in self.record["inputs"].items()}
        text = json.dumps(self.record | {"inputs": inputs}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def place(self) -> Path:
        """Where it lies below `stages/`."""
        return Path(self.kind, self.key)


def agreed(value: Any) -> Any:
    """The main process's value, in every process of a run."""
    if not SHARED:
        return value
    return importlib.import_module("ragkit.models.device").agreed(value)


@contextmanager
def room_in_memory(stage: Stage) -> Iterator[None]:
    """Turns memory that ran out inside into a sentence that names the setting that helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch's own errors are RuntimeErrors, that of its CPU allocator has no class
        words = ("out of memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(w in str(error).lower() for w in words):
            raise
        knob = KNOBS.get(stage.kind, "reader.at_once (prompts in one pass)")
        raise StoreError(
            f"Stage {stage.name}: memory ran out. Lower {knob} in the profile; "
            "what was finished is kept."
        ) from error


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below a stage's folder but its record."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): file_hash(p) for p in files if p.name != RECORD}


def read_record(home: Path) -> dict[str, Any] | None:
    """What a finished stage says of itself; None if there is none, or a damaged one."""
    try:
        saved = json.loads((home / RECORD).read_text("utf8"))
        return saved if {"name", "record", "files", "made"} <= saved.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


@contextmanager
def only_run(run: Path) -> Iterator[None]:
    """Holds a run's folder; a second run in it is refused with a sentence."""
    lock = filelock.FileLock(run / "run.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(f"Another run is working in {run}. Wait for it to end.") from None
    try:
        yield
    finally:
        lock.release()


class Store:
    """The stages of one run folder; those of the runs beside it are taken over by hard links."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sound: dict[str, Path] = {}  # by key: checked, or made, by this process
        self.status: dict[str, str] = {}  # by name: 'reused', or 'ran: ' and the reason
        try:
            for part in ("stages", "partial"):
                (folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{error.strerror}: {error.filename}"
            raise StoreError(f"{folder} cannot be made ({why}). Choose another --runs.") from None

    def home(self, stage: Stage) -> Path:
        return self.folder / "stages" / stage.place

    def open(self, stage: Stage) -> Path:
        """The folder of a stage; what is missing of it and of its inputs is made."""
        if stage.key not in self.sound:
            reason = agreed(self.why_not(stage) if MAIN else None)
            if reason is not None:
                for one in stage.inputs.values():
                    self.open(one)
                with self.alone(stage) if MAIN else nullcontext():
                    if agreed(self.why_not(stage) if MAIN else None) is not None:
                        self._make(stage, reason)
            self.sound[stage.key] = self.home(stage)
            self.status.setdefault(stage.name, "reused")
        return self.sound[stage.key]

    def why_not(self, stage: Stage) -> str | None:
        """Why a stage must be made; None if it need not be."""
        home = self.home(stage)
        self._take_over(stage)
        saved = read_record(home)
        if saved is None:
            return "its record is damaged" if (home / RECORD).exists() else self._news(stage)
        for name, digest in saved["files"].items():
            if not (home / name).is_file() or file_hash(home / name) != digest:
                return f"{name} is damaged or missing"
        return None

    def _take_over(self, stage: Stage) -> None:
        """Links a stage that another profile's run beside this one has made."""
        home = self.home(stage)
        if home.exists() or not MAIN:
            return
        for other in sorted(self.folder.parent.glob(f"*/stages/{stage.place}/{RECORD}")):
            aside = self.folder / "partial" / f"{stage.kind}-{stage.key}.{os.getpid()}.link"
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):  # another process was faster, or there is no room for copies
                shutil.copytree(other.parent, aside, copy_function=link)
                home.parent.mkdir(parents=True, exist_ok=True)
                aside.rename(home)
            shutil.rmtree(aside, ignore_errors=True)
            return

    def _news(self, stage: Stage) -> str:
        """The first thing that is new against the newest stage of the same name."""
        kept = []
        for home in (self.folder / "stages" / stage.kind).glob("*"):
            saved = read_record(home)
            if saved is not None and saved["name"] == stage.name:
                kept.append((saved["made"]["when"], saved["record"]))
        newest = max(kept, key=lambda one: str(one[0]), default=None)
        return "not made yet" if newest is None else difference(newest[1], stage.record)

    def _make(self, stage: Stage, reason: str) -> None:
        """Runs the maker aside and renames its folder into place in one step."""
        partial = self.folder / "partial" / f"{stage.kind}-{stage.key}"
        if MAIN:
            log.info("running  %s (%s)", stage.name, reason)
            shutil.rmtree(self.home(stage), ignore_errors=True)  # damaged
            partial.mkdir(exist_ok=True)
            (partial / "name.txt").write_text(stage.name, "utf8")
        agreed(None)
        module, _, function = stage.maker.partition(":")
        started, peak = time.monotonic(), memory_from_now()
        with room_on_disk(self.folder, f"stage {stage.name}"), room_in_memory(stage):
            if stage.machine and not module.startswith("ragkit.data"):  # that needs no torch
                device = importlib.import_module("ragkit.models.device")
                device.start(MachineSettings(**stage.machine["machine"]), stage.machine["threads"])
            maker = getattr(importlib.import_module(module), function)
            maker(partial, {r: self.open(one) for r, one in stage.inputs.items()}, stage.settings)
            seconds = round(time.monotonic() - started, 2)
            if MAIN:
                (partial / "name.txt").unlink()
                self.finish(partial, stage, {"seconds": seconds, "peak_mib": peak()})
        agreed(None)
        self.status[stage.name] = f"ran: {reason}"
        if MAIN:
            log.info("done     %s in %.1f s", stage.name, seconds)

    def finish(self, partial: Path, stage: Stage, cost: Mapping[str, Any]) -> None:
        """Writes a stage's record and moves its folder into place."""
        saved = {
            "name": stage.name,
            "kind": stage.kind,
            "record": stage.record,
            **cost,
            "units": dict(stage.units),
            "made": provenance(),
            "files": contents(partial),
        }
        write_whole(partial / RECORD, json.dumps(saved, indent=1))
        home = self.home(stage)
        home.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(home)

    @contextmanager
    def alone(self, stage: Stage) -> Iterator[None]:
        """Holds one stage, so that a notebook opened beside a run waits for it."""
        lock = filelock.FileLock(self.folder / "partial" / f"{stage.kind}-{stage.key}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting  %s is being made by another process", stage.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def link(source: str, copy: str) -> str:
    """A second name for a file that is never changed; a copy where the disk knows no links."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)
    return copy


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    """The first thing in which two records differ, for people."""
    for key in [*old, *(k for k in new if k not in old)]:
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if path == "inputs.":
            return f"{(now or was or [key])[0]} was made anew"
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            return difference(was, now, f"{path}{key}.")
        if path == "code.":
            return f"{key} changed"
        return f"{path}{key} {was} -> {now}"
    return "unknown"
