"""Stages remembered on disk by what they were made from, and why one must be made. A finished stage
lies in `<run>/stages/<kind>/<key>` and is never changed. The key is made of all that the result
depends on: going back to an earlier setting finds the earlier result. Beside it lies `stage.json`:
the record behind the key, hashes of the files, cost and provenance."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import filelock
import yaml

from ragkit.data.files import file_hash, room_on_disk, write_whole
from ragkit.errors import StoreError
from ragkit.experiment.provenance import closure, peak_memory, provenance, versions
from ragkit.settings import FREE, asset

log = logging.getLogger(__name__)
KINDS: dict[str, dict[str, str]] = yaml.safe_load(asset("kinds.yaml").read_text("utf8"))
RECORD = "stage.json"
SHARED = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun started several processes as one
MAIN = os.environ.get("RANK", "0") == "0"


def fingerprint(value: Any) -> str:
    """A short hash of JSON values; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def without_free(settings: Any) -> Any:
    """Settings as plain JSON values, without those that change no result (`settings.FREE`)."""
    return json.loads(
        json.dumps(settings),
        object_pairs_hook=lambda pairs: {name: one for name, one in pairs if name not in FREE},
    )


@dataclass(frozen=True, eq=False)
class Stage:
    """One node of the experiment. `maker` is `module:function`, called as `function(folder, inputs,
    settings)` with the folders of the inputs by role; `settings` are JSON values. `machine`
    (device, threads) is part of the key, `units`, how much work it is, are not."""

    kind: str
    name: str
    maker: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def record(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "maker": self.maker,
            "settings": without_free(self.settings),
            "inputs": {role: [one.name, one.key] for role, one in self.inputs.items()},
            "code": closure(f"import {self.maker.partition(':')[0]}"),
            "versions": versions(),
            "machine": dict(self.machine),
        }

    @cached_property
    def key(self) -> str:
        """The record's fingerprint; names of inputs are for people and do not count."""
        return fingerprint(self.record | {"inputs": {r: one.key for r, one in self.inputs.items()}})


def agreed(value: Any) -> Any:
    """The main process's value, in every process of a run."""
    return import_module("ragkit.models.device").agreed(value) if SHARED else value


@contextmanager
def room_in_memory(stage: Stage) -> Iterator[None]:
    """Turns memory that ran out inside into a sentence that names the setting that helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = "(?i)out of memory|can't allocate memory"  # torch raises plain RuntimeErrors too
        if not (isinstance(error, MemoryError) or re.search(words, str(error))):
            raise
        knob = KINDS.get(stage.kind, {}).get("knob", "reader.at_once (prompts in one pass)")
        why = f"memory ran out. Lower {knob} in the profile; what was finished is kept."
        raise StoreError(f"Stage {stage.name}: {why}") from error


def read_record(home: Path) -> dict[str, Any] | None:
    """What a finished stage says of itself; None if there is none, or a damaged one."""
    with suppress(OSError, ValueError, AttributeError):
        saved = json.loads((home / RECORD).read_text("utf8"))
        return saved if {"name", "record", "files", "made"} <= saved.keys() else None
    return None


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder aside, which takes a folder's place when all is in it."""
    aside = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def only_run(run: Path) -> AbstractContextManager[Any]:
    """Holds a run's folder; a second run in it is refused with a sentence."""
    try:
        return filelock.FileLock(run / "run.lock").acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(f"Another run is working in {run}. Wait for it to end.") from None


class Store:
    """The stages of one run folder; those of the runs beside it are taken over by hard links."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sound: set[str] = set()  # keys: checked, or made, by this process
        self.status: dict[str, str] = {}  # by name: 'reused', or 'ran: ' and the reason
        try:
            (folder / "partial").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be made ({error}). Choose another --runs.") from None

    def home(self, stage: Stage) -> Path:
        """Where a stage lies, or will lie."""
        return self.folder / "stages" / stage.kind / stage.key

    def open(self, stage: Stage) -> Path:
        """The folder of a stage; what is missing of it and of its inputs is made."""
        if stage.key not in self.sound:
            reason = self.agreed_reason(stage)
            if reason is not None:
                inputs = {role: self.open(one) for role, one in stage.inputs.items()}
                with self.alone(stage) if MAIN else nullcontext():
                    if self.agreed_reason(stage) is not None:
                        self._make(stage, inputs, reason)
            self.sound.add(stage.key)
            self.status.setdefault(stage.name, "reused")
        return self.home(stage)

    def agreed_reason(self, stage: Stage) -> str | None:
        """`why_not`, as the main process sees it, in every process of a run."""
        return agreed(self.why_not(stage) if MAIN else None)

    def why_not(self, stage: Stage) -> str | None:
        """Why a stage must be made; None if it need not be."""
        home = self.home(stage)
        if not home.exists():
            self._take_over(stage, home)
        if saved := read_record(home):
            for name, digest in saved["files"].items():
                if not (home / name).is_file() or file_hash(home / name) != digest:
                    return f"{name} is damaged or missing"
            return None
        if (home / RECORD).exists():
            return "its record is damaged"
        beside = filter(None, map(read_record, home.parent.glob("*")))
        others = [one for one in beside if one["name"] == stage.name]
        if not others:
            return "not made yet"
        newest = max(others, key=lambda one: one["made"]["when"])
        return difference(newest["record"], stage.record)

    def _take_over(self, stage: Stage, home: Path) -> None:
        """Links the files of a stage that another profile's run beside this one has made."""
        for record in self.folder.parent.glob(f"*/stages/{stage.kind}/{stage.key}/{RECORD}"):
            home.parent.mkdir(parents=True, exist_ok=True)
            # another process may be faster; a disk that knows no links gets its stage made
            with suppress(OSError), TemporaryDirectory(dir=self.folder / "partial") as aside:
                whole = shutil.copytree(record.parent, Path(aside, "whole"), copy_function=os.link)
                whole.rename(home)
            return

    def _make(self, stage: Stage, inputs: Mapping[str, Path], reason: str) -> None:
        """Runs the maker aside, and keeps what it made."""
        partial, started = self.folder / "partial" / f"{stage.kind}-{stage.key}", time.monotonic()
        if MAIN:
            log.info("running  %s (%s)", stage.name, reason)
            partial.mkdir(exist_ok=True)
        agreed(None)
        module, _, function = stage.maker.partition(":")
        peak_memory()  # counts from here on
        with room_on_disk(self.folder, f"stage {stage.name}"), room_in_memory(stage):
            data = module.startswith("ragkit.data")  # it needs no torch, and one process
            if stage.machine and not data:
                import_module("ragkit.models.device").start(**stage.machine)
            if MAIN or not data:  # two would write one file, while the other maps it
                getattr(import_module(module), function)(partial, inputs, stage.settings)
            if MAIN:
                self._keep(stage, partial, round(time.monotonic() - started, 2))
        agreed(None)
        self.status[stage.name] = f"ran: {reason}"

    def _keep(self, stage: Stage, partial: Path, seconds: float) -> None:
        """Writes the record of what was made aside, and renames its folder into place."""
        files = [one for one in partial.rglob("*") if one.is_file() and one.name != RECORD]
        saved = {
            "name": stage.name,
            "kind": stage.kind,
            "record": stage.record,
            "units": dict(stage.units),
            "seconds": seconds,
            "peak_mib": peak_memory(),
            "made": provenance(),
            "files": {str(one.relative_to(partial)): file_hash(one) for one in sorted(files)},
        }
        write_whole(partial / RECORD, json.dumps(saved, indent=1))
        home = self.home(stage)
        shutil.rmtree(home, ignore_errors=True)  # damaged
        home.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(home)
        log.info("done     %s in %.1f s", stage.name, seconds)

    def alone(self, stage: Stage) -> AbstractContextManager[Any]:
        """Holds one stage, so that a notebook opened beside a run waits for it."""
        lock = filelock.FileLock(self.folder / "partial" / f"{stage.kind}-{stage.key}.lock")
        try:
            return lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting  %s is being made by another process", stage.name)
            return lock.acquire()


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    """The first thing in which two records differ, for people."""
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        if was != now:
            if path == "inputs.":
                return f"{(now or was or [key])[0]} was made anew"
            if isinstance(was, Mapping) and isinstance(now, Mapping):
                return difference(was, now, f"{path}{key}.")
            return f"{key} changed" if path.endswith("code.") else f"{path}{key} {was} -> {now}"
    return "unknown"
