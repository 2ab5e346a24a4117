"""What a run reads from outside its folder: models' files, a noun finder, the size of its sets."""

import gzip
import importlib.util
import itertools
from collections import Counter
from functools import cache
from importlib import metadata
from pathlib import Path

from ragkit.data.files import input_hash
from ragkit.data.worlds import relations, spec
from ragkit.settings import QuestionSet, WorldSet, asset

POOL = 50  # passages of a question's pool on the hub, about: for the plan only


def model_files(name: str) -> dict[str, str]:
    """The files that make a local model what it is, by hash; empty for a hub name."""
    folder = asset("reader") if name == "embedded" else Path(name)
    kinds = ("*.safetensors", "*.json", "*.gguf")
    files = [folder] if folder.is_file() else [f for kind in kinds for f in folder.rglob(kind)]
    return {file.name: input_hash(file) for file in sorted(files)}


def finder_state(model: str) -> dict[str, str]:
    """What a noun finder is, by version or hashes; empty where there is none."""
    if model == "embedded":
        return {"embedded": "trained here"}
    if Path(model).is_dir():
        files = sorted(path for path in Path(model).rglob("*") if path.is_file())
        return {str(file.relative_to(model)): input_hash(file) for file in files}
    found = model.isidentifier() and importlib.util.find_spec(model)
    return {model: metadata.version(model)} if found else {}


@cache
def lines_of(path: Path) -> int:
    """Rows of a TSV of passages, without its header; 0 if it is not there."""
    if not path.is_file():
        return 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        return sum(1 for _ in file) - 1


def passage_count(settings: QuestionSet) -> int:
    """How many passages a set has, or about how many, before it is read."""
    if isinstance(settings, WorldSet):
        kinds = list(spec()["worlds"][settings.world]["entities"])
        facts = Counter(kind for kind, _ in relations(settings.world))
        turns = itertools.islice(itertools.cycle(kinds), settings.entities)  # one by one
        return settings.wordings_per_fact * sum(facts[kind] for kind in turns)
    if isinstance(settings.passages, str):
        return lines_of(Path(settings.passages))
    if settings.passages is None:
        return POOL * (settings.distill + settings.dev + settings.test)
    return settings.passages.rows.get(settings.passage_split, 0)
