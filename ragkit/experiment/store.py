"""Stages remembered on disk: what was made, from what, and whether it can be used again."""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import importlib
import inspect
import json
import logging
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ragkit.errors import StoreError
from ragkit.models import device as fleet

log = logging.getLogger(__name__)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGE, PIECES, PIECE = 2**28, 64, 2**20  # bytes, number, bytes: see `file_hash`
KNOBS = {
    "retriever": "retriever.crop_batch",
    "vectors": "retriever.at_once (texts in one pass) or retriever.passage_tokens",
    "index": "index.shard, index.trained_on or index.code_bytes",
    "step1": "reader.at_once (prompts in one pass), set reader.gradient_checkpointing or, with several processes, reader.shard to true, "
    "or train adapters only with reader.lora_rank",
    "step2": "distill.batch, or set distill.side to 'query'",
}  # what to turn where memory runs out
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "faiss-cpu")


@contextmanager
def room_on_disk(folder: Path, doing: str) -> Iterator[None]:
    """Turns a full disk (or quota) met inside into a sentence; whatever was half-written stands aside and does not count."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes through Rust, which hands the number on in words only
        number = (
            error.errno
            if isinstance(error, OSError)
            else next((n for n in NO_ROOM if f"(os error {n})" in str(error)), None)
        )
        if number not in NO_ROOM:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise StoreError(
            f"No room to write {doing} in {folder} ({os.strerror(number)}; {free:.0f} MiB free on its disk). "
            "Free some space or choose another place with --runs, then give the same command: what was finished is kept."
        ) from error


@contextmanager
def room_in_memory(stage: str) -> Iterator[None]:
    """Turns memory that ran out inside into a sentence that names the stage and the setting that helps."""
    try:
        yield
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # torch's own error is a RuntimeError; so is what its CPU allocator raises
        if not isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) and "can't allocate memory" not in str(error):
            raise
        where = (
            torch.cuda.get_device_name()
            if isinstance(error, torch.OutOfMemoryError)
            else "this machine"
        )
        help = KNOBS.get(stage.split("/")[0], "reader.at_once (prompts in one pass)")
        raise StoreError(
            f"Stage {stage}: the memory of {where} ran out. Lower {help} in the profile; what was finished is kept."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file aside and renames it: the old file or the new one, never half of one."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, "utf8")
    aside.replace(path)


def linked(source: str | Path, copy: str | Path) -> None:
    """A second name for a file of a stage, which is never changed in place; a copy where the disk knows no links."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)


def link_stage(made: Path, folder: Path) -> None:
    """Fills a stage's folder with the files of another stage, which hold just what it would make."""
    for file in sorted(made.iterdir()) if fleet.is_main() else []:
        copy = folder / file.name
        if not file.name.startswith("stage.json") and not copy.exists():
            linked(file, copy)


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a stage, written by the main process."""
    if fleet.is_main():
        path.write_text(json.dumps(value, ensure_ascii=False), "utf8")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file of a stage, written by the main process."""
    if fleet.is_main():
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)


def memory_from_now() -> Callable[[], int | None]:
    """A function that says how much memory (MiB) this process has used at most since this call; None where there is no /proc to ask."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    with suppress(OSError):  # where the peak may not be reset it is that of the whole process
        reset.write_text("5")

    def peak() -> int | None:
        lines = status.read_text().splitlines() if status.is_file() else []
        return next(
            (int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None
        )

    return peak


def without_docstrings(tree: ast.AST) -> str:
    """The tree as text; comments are already gone, docstrings are taken out."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def code_of(makers: list[Any]) -> dict[str, str]:
    """A fingerprint of each function and class of the package that `makers` reach, themselves included."""
    found: dict[str, str] = {}
    waiting = list(makers)
    while waiting:
        thing = inspect.unwrap(waiting.pop())
        name = f"{thing.__module__}.{thing.__qualname__}"
        if name in found:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        found[name] = hashlib.sha256(without_docstrings(tree).encode()).hexdigest()[:16]
        scope = vars(inspect.getmodule(thing))
        for node in ast.walk(tree):
            targets: list[Any] = []
            if isinstance(node, ast.Name):
                targets = [scope.get(node.id)]
                if isinstance(targets[0], int | float | str | tuple) and node.id.isupper():
                    found[f"{thing.__module__}.{node.id}"] = repr(targets[0])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = scope.get(node.value.id)
                targets = [getattr(owner, node.attr, None)] if isinstance(owner, ModuleType) else []
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "ragkit."
            ):  # inside a function
                module = importlib.import_module(str(node.module))
                targets = [getattr(module, one.name) for one in node.names]
            for target in targets:
                if (
                    inspect.isfunction(inspect.unwrap(target)) or inspect.isclass(target)
                ) and target.__module__.startswith("ragkit"):
                    waiting.append(target)
    return dict(sorted(found.items()))


@functools.cache
def _code_seen(makers: tuple[Any, ...]) -> dict[str, str]:
    """`code_of`, once a process: a notebook opens hundreds of stages by the same few functions."""
    return code_of(list(makers))


def file_hash(path: Path) -> str:
    """The SHA-256 of a file; of one above LARGE bytes that of its size and of PIECES pieces spread over it, for it is read at every opening."""
    with open(path, "rb") as file:
        if (size := path.stat().st_size) <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(PIECES):
            file.seek((size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
        return digest.hexdigest()


def input_hash(path: Path) -> str:
    """The hash of a file that a run reads; large ones are read once as long as size and time stay the same."""
    status = path.stat()
    return _hash_seen(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_seen(path: Path, size: int, time_ns: int) -> str:
    return file_hash(path)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below a stage's folder."""
    return {
        str(p.relative_to(folder)): file_hash(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith("stage.json")
    }


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """The first thing in which two stage records differ, for people."""
    for key in [*old, *(k for k in new if k not in old)]:
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            return difference(was, now, f"{path}{key}.")
        if path.startswith("code."):
            return f"code of {key} changed"
        if path.startswith("upstream."):
            return f"{key} was made anew"
        return f"{path}{key} {was} -> {now}"
    return "unknown"


class Store:
    """The stages of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.status: dict[str, str] = {}
        for part in ("stages", "partial"):
            try:
                (folder / part).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"The run folder {folder} cannot be made ({error.strerror}: {error.filename}). Choose another with --runs."
                ) from None

    @contextmanager
    def only_run(self) -> Iterator[None]:
        """Holds the folder; a second run in it is refused with a sentence instead of a mixed-up result."""
        lock = filelock.FileLock(self.folder / "run.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise StoreError(
                f"Another run is working in {self.folder}. Wait for it, or use another profile name."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def stage(
        self,
        name: str,
        make: Callable[[Path], None],
        settings: dict[str, Any],
        upstream: dict[str, str],
        code: list[Any],
    ) -> Path:
        """The folder of a finished stage, made by `make(folder)` unless one with the same key is there.

        `settings` are JSON values, `upstream` maps stage names to keys, `code` lists the functions that do the work.
        While it is made the folder stands under `partial/` with its key in its name: a killed stage goes on there from
        its own checkpoints, and a finished one is renamed into place in one step.
        """
        record = {
            "profile": json.loads(json.dumps(settings)),
            "upstream": upstream,
            "code": _code_seen(tuple(code)),
            "libraries": {lib: metadata.version(lib) for lib in LIBRARIES}
            | {"threads": torch.get_num_threads(), "device": fleet.device().type},
        }
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:20]
        home = self.folder / "stages" / name
        flat = name.replace("/", "-")
        reason = fleet.agreed(self.why_not(home, record) if fleet.is_main() else None)
        if reason is None:
            log.info("reused   %s", name)
            self.status[name] = "reused"
            return home
        with self.alone(flat, name) if fleet.is_main() else nullcontext():
            if (
                fleet.agreed(self.why_not(home, record) if fleet.is_main() else None) is None
            ):  # another run has made it meanwhile
                self.status[name] = "reused"
                return home
            partial = self.folder / "partial" / f"{flat}-{key}"
            started, peak = time.monotonic(), memory_from_now()
            if fleet.is_main():
                log.info("running  %s (%s)", name, reason)
                for older in set(partial.parent.glob(f"{flat}-{'[0-9a-f]' * len(key)}")) - {
                    partial
                }:  # killed, and never to be gone on with
                    shutil.rmtree(older)
                partial.mkdir(exist_ok=True)
            fleet.wait()
            with room_on_disk(self.folder, f"stage {name}"), room_in_memory(name), fleet.counting():
                make(partial)
                seconds = round(time.monotonic() - started, 2)
                work = {what: round(amount, 2) for what, amount in fleet.counted().items()}
                if fleet.is_main():
                    saved = {
                        "key": key,
                        "record": record,
                        "seconds": seconds,
                        "peak_mib": peak(),
                        "work": work,
                        "files": contents(partial),
                    }
                    write_whole(partial / "stage.json", json.dumps(saved, indent=1))
                    if home.exists():
                        shutil.rmtree(home)
                    home.parent.mkdir(parents=True, exist_ok=True)
                    partial.rename(home)
            fleet.wait()
        self.seconds[name], self.status[name] = seconds, f"ran: {reason}"
        if fleet.is_main():
            log.info("done     %s in %.1f s", name, seconds)
        return home

    @contextmanager
    def alone(self, flat: str, name: str) -> Iterator[None]:
        """Holds one stage, so that a notebook opened beside a run waits for it instead of writing into the same folder."""
        lock = filelock.FileLock(self.folder / "partial" / f"{flat}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting  %s is being made by another process", name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def key(self, name: str) -> str:
        """The key of a stage that is in place."""
        return json.loads((self.folder / "stages" / name / "stage.json").read_text("utf8"))["key"]

    def records(self) -> dict[str, dict[str, Any]]:
        """What each finished stage says of itself; a damaged record counts as none."""
        found = {}
        for file in sorted((self.folder / "stages").rglob("stage.json")):
            try:
                saved = json.loads(file.read_text("utf8"))
                parts = {part: saved[part] for part in ("key", "record", "seconds", "files")}
                found[str(file.parent.relative_to(self.folder / "stages"))] = parts | {
                    "peak_mib": saved.get("peak_mib"),
                    "work": saved.get("work", {}),
                }
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def sound(self) -> dict[str, str]:
        """The keys of all stages whose files are whole."""
        home = self.folder / "stages"
        return {
            name: saved["key"]
            for name, saved in self.records().items()
            if self.why_not(home / name, saved["record"]) is None
        }

    @staticmethod
    def why_not(home: Path, record: dict[str, Any]) -> str | None:
        """Why a stage must be made (None: it need not be)."""
        if not (home / "stage.json").is_file():
            return "not made yet"
        try:
            saved = json.loads((home / "stage.json").read_text("utf8"))
            was, files = saved["record"], saved["files"]
        except (ValueError, KeyError, TypeError):
            return "its record is damaged"
        if was != record:
            return difference(was, record)
        damaged = [
            name
            for name, digest in files.items()
            if not (home / name).is_file() or file_hash(home / name) != digest
        ]
        return f"{damaged[0]} is damaged or missing" if damaged else None
