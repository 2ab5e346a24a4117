"""Where, when and by what a result was made: what each stage and notebook says of itself."""

import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ragkit.experiment.closure import PACKAGE

LIBRARIES = (
    "torch", "transformers", "tokenizers", "sentence-transformers", "accelerate", "numpy", "scipy",
    "faiss-cpu", "bm25s", "spacy", "datasets",
)  # fmt: skip


@functools.cache
def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """The installed versions of libraries that results depend on, and Python's."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def memory_from_now() -> Callable[[], int | None]:
    """A function that gives this process's peak memory (MiB) since now; None without /proc."""
    status = Path("/proc/self/status")
    with suppress(OSError):  # where the peak may not be reset it is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int | None:
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) // 1024 for line in lines if "VmHWM" in line), None)

    return peak


@functools.cache
def commit() -> dict[str, Any]:
    """The checkout's commit, and whether the package differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *words]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=False
            ).stdout.strip()
        except OSError:  # no git here
            return ""

    found = git("rev-parse", "HEAD")
    dirty = bool(git("status", "--porcelain", "--", PACKAGE.name, "notebooks"))
    return {"commit": found, "dirty": dirty} if found else {"commit": "not a git checkout"}


def provenance() -> dict[str, Any]:
    """Where and by what something is made now."""
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    machine = {"cores": os.cpu_count(), "memory_gib": memory, "processor": platform.machine()}
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**commit(), "versions": versions(), "machine": machine, "when": when}
