"""The code that a result depends on: every module of the package that its maker reaches.

A module counts by its syntax tree without docstrings and comments, so rewording a comment makes
nothing anew. Asset files count through the calls `asset("name")` in those modules.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ragkit.data.files import file_hash
from ragkit.settings import ASSETS

PACKAGE = Path(__file__).parent.parent


def module_file(module: str) -> Path | None:
    """The source file of a module of the package, without importing it; None if there is none."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if module.split(".")[0] == PACKAGE.name and file.is_file():
            return file
    return None


def without_docstrings(tree: ast.AST) -> str:
    """A syntax tree as text; comments are already gone, docstrings are taken out."""
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """The package's modules that a syntax tree imports; `package` is where relative names start."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            names = [".".join(parts), *(".".join([*parts, one.name]) for one in node.names)]
        else:
            continue
        yield from (name for name in names if module_file(name))


def assets_named(tree: ast.AST) -> Iterator[str]:
    """The files below `assets/` that a syntax tree opens through `asset("name")`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        name = called.id if isinstance(called, ast.Name) else called
        argument = node.args[0]
        if name == "asset" and isinstance(argument, ast.Constant):
            place = ASSETS / str(argument.value)
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            yield from (str(file.relative_to(ASSETS)) for file in files if file.is_file())


def closure(source: str, package: str = "") -> dict[str, str]:
    """Fingerprints of the modules and assets that a source text reaches, by name, sorted."""
    found: dict[str, str] = {}
    waiting = list(imported(tree := ast.parse(source), package))
    found |= {f"assets/{name}": file_hash(ASSETS / name)[:16] for name in assets_named(tree)}
    while waiting:
        name = waiting.pop()
        if name not in found:
            code, further, assets = _module(name)
            found |= {name: code} | assets
            waiting += further
    return dict(sorted(found.items()))


@cache
def closure_of(module: str) -> dict[str, str]:
    """`closure` of a module of the package, itself included."""
    return closure(f"import {module}")


@cache
def _module(name: str) -> tuple[str, list[str], dict[str, str]]:
    """A module's own fingerprint, the modules that it imports, and its assets' fingerprints."""
    file = module_file(name)
    assert file is not None
    tree = ast.parse(file.read_text("utf8"))
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    further = list(imported(tree, package))
    parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
    assets = {f"assets/{one}": file_hash(ASSETS / one)[:16] for one in assets_named(tree)}
    code = hashlib.sha256(without_docstrings(tree).encode()).hexdigest()[:16]
    return code, [*further, *parents], assets
