"""What a result depends on: code, libraries, models' files; and where and when it was made. Code is
every module of the package that a maker or notebook reaches, each by its syntax tree, comments and
docstrings apart. Asset files count through the calls `asset("name")` in those modules."""

import ast
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import psutil

from ragkit.data.files import contents, file_hash
from ragkit.settings import ASSETS, EMBEDDED

PACKAGE = Path(__file__).parent.parent
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "sentence-transformers", "accelerate", "numpy"),
    *("scipy", "faiss-cpu", "bm25s", "spacy", "datasets"),
)


def used(tree: ast.AST, package: str) -> Iterator[str]:
    """The names that a syntax tree in `package` imports, and its asset files as `assets/name`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (one.name for one in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = resolve_name("." * level + (module or ""), package)
                yield from (f"{start}.{one.name}" for one in names)  # a module, or a name in one
            case ast.Call(
                ast.Name("asset") | ast.Attribute(attr="asset"), [ast.Constant(str(name))]
            ):
                files = [ASSETS / name, *(ASSETS / name).rglob("*")]
                yield from (str(one.relative_to(PACKAGE)) for one in files if one.is_file())


@cache
def reached(name: str) -> tuple[str, list[str]]:
    """The fingerprint of a module or asset of the package ('' if it is none), and the names that it
    leads to. A name in a module leads to the module, and that to the packages above it."""
    if name.startswith("assets/"):
        return file_hash(PACKAGE / name)[:16], []
    above, place = name.rpartition(".")[0], PACKAGE.parent.joinpath(*name.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if name.split(".")[0] != PACKAGE.name or not file.is_file():
        return "", [above]
    tree = ast.parse(file.read_text("utf8"))
    further = [above, *used(tree, name if place.is_dir() else above)]
    for node in ast.walk(tree):  # comments are already gone: now docstrings and other bare texts
        if isinstance(body := getattr(node, "body", None), list):
            texts = [one for one in body if isinstance(one, ast.Expr)]
            texts = [one for one in texts if isinstance(one.value, ast.Constant)]
            body[:] = [one for one in body if one not in texts]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], further


@cache
def closure(source: str) -> dict[str, str]:
    """Fingerprints of the modules and assets that a source text reaches, by name, sorted."""
    found: dict[str, str] = {}
    waiting = list(used(ast.parse(source), ""))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name], further = reached(name)
            waiting += further
    return {name: code for name, code in sorted(found.items()) if code}


@cache
def versions() -> dict[str, str]:
    """The installed versions of Python and LIBRARIES, on which results depend."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def model_files(name: str) -> dict[str, str]:
    """The files that make a local model what it is, by hash, no model card; empty for a hub name.
    An embedded reader's not by `asset()`: every stage that loads it has these in its settings."""
    found = contents(str(EMBEDDED.get(name, name)))
    kinds = (".safetensors", ".json", ".gguf")
    return {Path(file).name: code for file, code in found.items() if file.endswith(kinds)}


def finder_state(model: str) -> dict[str, str]:
    """What a noun finder from outside is, by version or hashes; empty where there is none."""
    is_package = model.isidentifier() and find_spec(model)
    return contents(model) or ({model: metadata.version(model)} if is_package else {})


def peak_memory() -> int | None:
    """This process's peak memory (MiB) since it was last asked for; None without /proc."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    told = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.is_file() else "")
    with suppress(OSError):  # where the peak may not be reset it is that of the whole process
        reset.write_text("5")
    return int(told[1]) // 1024 if told else None


def git(*command: str) -> str:
    """What git says of the checkout; nothing where there is no git, or no checkout."""
    with suppress(OSError):
        said = subprocess.run(["git", *command], cwd=PACKAGE.parent, capture_output=True, text=True)
        return said.stdout
    return ""


@cache
def commit() -> dict[str, Any]:
    """The checkout's commit, and whether package or notebooks differ from it."""
    told = git("status", "--porcelain=v2", "--branch", "--", PACKAGE.name, "notebooks")
    if found := re.match(r"# branch\.oid (\w+)", told):
        return {"commit": found[1], "dirty": bool(re.search("^[^#]", told, re.MULTILINE))}
    return {"commit": "not a git checkout"}


def changed_at(path: Path) -> str:
    """The commit of a file's last change, its date, if it differs now; `unknown` without git."""
    found = git("log", "-1", "--format=%h, %cs", "--", str(path)).strip()
    differs = ", and changed since" if git("status", "--porcelain", "--", str(path)) else ""
    return f"{found}{differs}" if found else "unknown"


def provenance() -> dict[str, Any]:
    """Where and by what something is made now."""
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    machine = {"cores": os.cpu_count(), "memory_gib": memory, "processor": platform.machine()}
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**commit(), "versions": versions(), "machine": machine, "when": when}
