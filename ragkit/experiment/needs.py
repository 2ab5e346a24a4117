"""What a stage needs by arithmetic: operations, memory, disk, downloads; nothing is measured."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ragkit.errors import ProfileError
from ragkit.experiment.store import Stage
from ragkit.profile import Profile
from ragkit.settings import ASSETS, HubSet, HubTable, asset

BASE = 0.8e9  # bytes of a process that has loaded torch and transformers
PASSAGE, QUESTION, ANSWER = 150, 20, 16  # tokens of 100 words of Wikipedia; asked; written
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A model's size: its weights, layers and hidden size."""

    weights: float
    layers: int
    hidden: int


@cache
def hub() -> dict[str, Any]:
    """How large things on the hub are, and GPUs: `assets/hub_sizes.yaml`."""
    return yaml.safe_load(asset("hub_sizes.yaml").read_text("utf8"))


@cache
def shape_of(model: str) -> Shape:
    """A reader's or retriever's shape from its configuration, without its weights.

    Raises ProfileError for a model that is neither here nor in `assets/hub_sizes.yaml`.
    """
    from accelerate import init_empty_weights  # only who plans waits for torch
    from transformers import AutoConfig, AutoModel

    folder = ASSETS / "reader" if model == "embedded" else Path(model)
    if folder.is_dir():
        config = AutoConfig.from_pretrained(folder)
    elif model in hub()["models"]:
        config = AutoConfig.for_model(**hub()["models"][model]["config"])
    else:
        raise ProfileError(
            f"The size of {model!r} is not known here. Fetch it, or give its folder."
        )
    with init_empty_weights():
        weights = sum(one.numel() for one in AutoModel.from_config(config).parameters())
    return Shape(float(weights), config.num_hidden_layers, config.hidden_size)


def shapes(profile: Profile) -> tuple[Shape, Shape]:
    """The reader's and the retriever's shape."""
    model = profile.retriever.model
    retriever = Shape(1e6, 2, 128) if model == "embedded" else shape_of(model)
    return shape_of(profile.reader.model), retriever


def prompt_tokens(profile: Profile) -> int:
    return min(profile.reader.context, profile.k * PASSAGE + QUESTION)


def units(stage: Stage) -> float:
    """A stage's units of work."""
    return float(sum(stage.units.values()))


def operations(stage: Stage, profile: Profile) -> float:
    """Floating-point operations: two for each weight and token read, six where it learns."""
    reader, retriever = shapes(profile)
    read = 2 * reader.weights * prompt_tokens(profile)
    answer = read + 2 * reader.weights * ANSWER
    a_unit = {
        "step1": (4 if profile.reader.gradient_checkpointing else 3) * read,
        "teacher": 2 * read,  # the prompt, and each passage alone
        "loop": (profile.k - 1) * read,
        "vectors": 2 * retriever.weights * PASSAGE,
        "candidates": 2 * retriever.weights * QUESTION,
        "step2": 6 * retriever.weights * QUESTION,
        **dict.fromkeys(("tokens", "contextual", "probe"), read),
        **dict.fromkeys(("style", "premises", "answers"), answer),
    }
    return units(stage) * a_unit.get(stage.kind, 0.0)


def memory(stage: Stage, profile: Profile) -> float:
    """Peak bytes, by what a stage must hold at once."""
    reader, retriever = shapes(profile)
    states = 4.0 * profile.reader.at_once * prompt_tokens(profile) * reader.hidden  # of one layer
    if stage.kind == "step1":
        kept = 3 if profile.reader.gradient_checkpointing else 16  # states kept of each layer
        moments = 12 * trained_share(profile)
        return BASE + reader.weights * (4 + moments) + states * reader.layers * kept
    if stage.kind in ("vectors", "retriever", "step2"):
        texts = 64.0 * profile.retriever.at_once * PASSAGE * retriever.hidden
        return BASE + 16 * retriever.weights + texts + 4.0 * profile.index.shard * retriever.hidden
    if stage.kind == "index":
        return BASE + 4.0 * profile.index.trained_on * retriever.hidden
    return BASE + reader.weights * WIDTH[profile.reader.dtype] + 16 * states


def disk(stage: Stage, profile: Profile) -> tuple[float, float]:
    """Bytes that a stage leaves, and bytes that it needs besides while it is made."""
    reader, retriever = shapes(profile)
    if stage.kind == "step1":  # each reader kept; a checkpoint beside the one that it replaces
        kept = 1 + len(profile.reader.kept_steps)
        return 4 * reader.weights * kept, 24 * reader.weights * trained_share(profile)
    a_passage = {
        "passages": 700,
        "vectors": retriever.hidden * WIDTH[profile.index.dtype],
        "index": 0 if profile.index.factory == "Flat" else 80,
    }
    stays = units(stage) * a_passage.get(stage.kind, 0)
    return stays or 2e5, stays if stage.kind == "index" else 0.0


def trained_share(profile: Profile) -> float:
    """Of the reader's weights, those that Step 1 trains."""
    return 0.02 if profile.reader.lora_rank else 1.0


def downloads(profile: Profile) -> dict[str, float]:
    """What is fetched from the hub, in GB (NaN: not known here)."""
    models = (profile.reader.model, profile.retriever.model)
    found = {model: hub()["models"].get(model, {}).get("gb", math.nan) for model in models}
    for one in profile.sets:
        if isinstance(one, HubSet):
            found[one.questions.dataset] = table_gb(one.questions, {one.train, one.heldout})
            if isinstance(one.passages, HubTable):
                found[one.passages.dataset] = table_gb(one.passages, {one.passage_split})
    here = [what for what in found if what == "embedded" or Path(what).exists()]
    return {what: gb for what, gb in found.items() if what not in here}


def table_gb(table: HubTable, splits: set[str]) -> float:
    """GB of a table's splits; NaN if they are not known here."""
    known = hub()["tables"]
    sizes = known.get(f"{table.dataset}: {table.config}") or known.get(table.dataset) or {"gb": {}}
    each = [sizes["gb"].get(split, math.nan) for split in splits]
    return sizes["gb"].get("all", sum(each))
