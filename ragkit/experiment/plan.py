"""What a run would fetch, need and take, before it is begun: the graph, walked without making it.
Seconds are units of work times rates, as earlier runs with the same models recorded them here. Else
two small runs are timed, or for a large reader, or data that are not here yet, it is arithmetic: a
stage's operations over those of a second in one layer of the reader."""

import shutil
import tempfile
from collections import Counter
from datetime import timedelta
from functools import cache
from pathlib import Path
from timeit import repeat
from typing import Any

import numpy as np
import pandas as pd
import psutil
import yaml
from jinja2 import Template
from scipy.optimize import nnls

from ragkit.errors import ProfileError
from ragkit.experiment.lab import Lab
from ragkit.experiment.run import workers_of
from ragkit.experiment.store import KINDS, Stage, read_record
from ragkit.experiment.wanted import stages as stages_of
from ragkit.profile import Profile
from ragkit.settings import EMBEDDED, HubSet, HubTable, WorldSet, asset

BASE = 0.8e9  # bytes of a process that has loaded torch and transformers
PASSAGE, QUESTION, ANSWER = 150, 20, 16  # tokens of 100 words of Wikipedia; asked; written
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
GPU, SHARE_OF_PEAK = "A100, 80 GB", 0.3  # of its operations a second, reached on such models
LARGE, TIMED = 1e7, 512  # weights of a reader that is timed alone; on so many tokens
NOTEBOOKS = 45.0  # seconds of a run's notebooks, most of them their kernels' start
HUB = yaml.safe_load(asset("hub_sizes.yaml").read_text("utf8"))  # how large things are there
COLUMNS = ("name", "kind", "units", "operations", "memory", "stays", "passing")


@cache
def shape_of(model: str) -> tuple[float, Any]:
    """A model's number of weights, and configuration; ProfileError if neither here nor known."""
    from accelerate import init_empty_weights  # only who plans waits for torch
    from transformers import AutoConfig, AutoModel

    folder = Path(EMBEDDED.get(model, model))
    if folder.is_dir():
        config = AutoConfig.from_pretrained(folder)
    elif folder.is_file():
        config = AutoConfig.from_pretrained(folder.parent, gguf_file=folder.name)
    elif model in HUB["models"]:
        config = AutoConfig.for_model(**HUB["models"][model]["config"])
    else:
        raise ProfileError(f"The size of {model!r} is not known here. Name a folder that holds it.")
    with init_empty_weights():
        weights = sum(one.numel() for one in AutoModel.from_config(config).parameters())
    return float(weights), config


def operations_a_second(profile: Profile) -> float:
    """What a process makes here: timed on a layer of the reader; on a GPU a share of its peak."""
    import torch
    from transformers import AutoModel

    if profile.device == "cuda":
        return SHARE_OF_PEAK * 1e12 * HUB["gpus"][GPU]["tflops"]
    weights, config = shape_of(profile.reader.model)
    one = config.__class__.from_dict(config.to_dict() | {"num_hidden_layers": 1})
    layer = AutoModel.from_config(one, dtype=getattr(torch, profile.reader.dtype))
    layer.eval().requires_grad_(False)
    prompt = torch.zeros(1, TIMED, dtype=torch.long)
    torch.set_num_threads(profile.threads)
    seconds = min(repeat(lambda: layer(prompt), number=1, repeat=5))
    return 2 * weights * TIMED / (seconds * config.num_hidden_layers)


def needs(stage: Stage, profile: Profile) -> dict[str, Any]:
    """A stage's COLUMNS by arithmetic: units of work, floating-point operations, peak bytes of
    memory, and bytes on disk that stay, or lie there in passing besides."""
    settings, own, kind = profile.reader, profile.retriever, stage.kind
    (weights, config), encoder, width = shape_of(settings.model), 1e6, 128
    if own.model != "embedded":
        encoder, width = shape_of(own.model)[0], shape_of(own.model)[1].hidden_size
    units = float(sum(stage.units.values()))
    tokens = min(settings.context, profile.k * PASSAGE + QUESTION)
    lean, trained = settings.gradient_checkpointing, 0.02 if settings.lora_rank else 1.0
    read = 2 * weights * tokens  # a prompt: two operations for each weight and token
    answer, asked = read + 2 * weights * ANSWER, 2 * encoder * QUESTION
    operations = dict.fromkeys(("tokens", "contextual", "alone", "teacher", "heads"), read)
    operations |= {"premises": answer, "answers": answer, "loop": (profile.k - 1) * read}
    operations |= {"vectors": 2 * encoder * PASSAGE, "candidates": asked, "step2": 3 * asked}
    crops = 2 * own.crop_batch * 0.4 * PASSAGE  # tokens: of 20 to 60 percent of the passages
    operations |= {"step1": (4 if lean else 3) * read, "retriever": 6 * encoder * crops}
    kept = {"passages": 700, "vectors": width * WIDTH[profile.index.dtype]}
    stays = units * (kept | {"index": 80 * (profile.index.factory != "Flat")}).get(kind, 0)
    passing = stays if kind == "index" else 0.0
    states = 4.0 * settings.at_once * tokens * config.hidden_size  # of one layer
    memory = weights * WIDTH[settings.dtype] + 16 * states
    if kind == "step1":  # each reader kept; a checkpoint beside the one that it replaces
        states *= config.num_hidden_layers * (3 if lean else 16)
        memory = weights * (4 + 12 * trained) + states
        stays = 4 * weights * (1 + len(settings.kept_steps))
        passing = 24 * weights * trained
    elif kind in ("vectors", "retriever", "step2"):
        memory = 16 * encoder + width * (64 * own.at_once * PASSAGE + 4.0 * profile.index.shard)
    elif kind == "index":
        memory = 4.0 * profile.index.trained_on * width
    work = units * operations.get(kind, 0.0)
    row = (stage.name, kind, units, work, BASE + memory, stays or 2e5, passing)
    return dict(zip(COLUMNS, row, strict=True))


def downloads(profile: Profile) -> dict[str, float]:
    """What is fetched from the hub, in GB (NaN: not known here)."""
    models, known = (profile.reader.model, profile.retriever.model), HUB["tables"]
    found = {model: HUB["models"].get(model, {}).get("gb", np.nan) for model in models}
    for one in (one for one in profile.sets if isinstance(one, HubSet)):
        asked = [(one.questions, {one.train, one.heldout}), (one.passages, {one.passage_split})]
        for table, splits in asked:
            if isinstance(table, HubTable):
                whole = known.get(table.dataset, {"gb": {}})
                gb = known.get(f"{table.dataset}: {table.config}", whole)["gb"]
                found[table.dataset] = gb.get("all", sum(gb.get(one, np.nan) for one in splits))
    here = {what for what in found if what in EMBEDDED or Path(what).exists()}
    return {what: gb for what, gb in found.items() if what not in here}


def make(lab: Lab) -> tuple[pd.DataFrame, str]:
    """What is missing of a run: COLUMNS and seconds, a row a stage; and where seconds come from."""
    profile, missing = lab.profile, [one for one in stages_of(lab.graph) if lab.store.why_not(one)]
    table = pd.DataFrame([needs(one, profile) for one in missing], columns=COLUMNS)
    seen, how = recorded(lab, lab.runs), "by stages that earlier runs recorded here"
    if not set(table["kind"]) <= set(seen["kind"]):
        outside = any(isinstance(one, HubSet) for one in profile.sets) or downloads(profile)
        if outside or shape_of(profile.reader.model)[0] > LARGE:
            where = f"one GPU ({GPU})" if profile.device == "cuda" else "this processor"
            seconds = table["operations"] / operations_a_second(profile)
            return table.assign(seconds=seconds), f"by arithmetic on {where}"
        seen, how = measured(lab), "by two small runs of the same stages, measured now"
    table["seconds"] = 0.0
    for kind, points in seen.groupby("kind"):  # seconds at the start and a unit, not negative
        known = np.stack([np.ones(len(points)), points["units"]], axis=1)
        start, rate = nnls(known, points["seconds"])[0]
        rows = table["kind"] == kind
        table.loc[rows, "seconds"] = start + rate * table.loc[rows, "units"]
    return table, how


def recorded(lab: Lab, runs: Path) -> pd.DataFrame:
    """What the runs in a folder took for stages with the lab's models: kind, units, seconds."""

    def made_with(kind: str, settings: Any) -> tuple[Any, ...]:
        return kind, *(settings.get(name, {}).get("model") for name in ("reader", "retriever"))

    wanted = {made_with(one.kind, one.settings) for one in stages_of(lab.graph)}
    rows = []
    for saved in map(read_record, runs.glob("*/stages/*/*")):
        if saved and made_with(saved["kind"], saved["record"].get("settings", {})) in wanted:
            rows.append((saved["kind"], sum(saved["units"].values()), saved["seconds"]))
    return pd.DataFrame(rows, columns=["kind", "units", "seconds"])


def measured(lab: Lab) -> pd.DataFrame:
    """The same, of the first stages of each kind in two runs on a few questions of one set."""
    profile, first = lab.profile, lab.profile.sets[0]
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 8):
            few = {p: min(16 * times, getattr(first, p)) for p in ("distill", "dev", "test")}
            few |= {"entities": 30 * times} if isinstance(first, WorldSet) else {}
            reader = profile.reader.model_copy(update={"steps": 4 * times})
            crops = profile.retriever.model_copy(update={"crop_steps": 8 * times})
            less = {"sets": (first.model_copy(update=few),), "reader": reader, "retriever": crops}
            half = profile.distill.model_copy(update={"questions": 8 * times})  # the rest: Step 1's
            less |= {"distill": half, "encoder_decoder": None}  # it is about as large as the other
            small, seen = Lab(profile.model_copy(update=less), folder), Counter[str]()
            for stage in stages_of(small.graph):
                seen[stage.kind] += 1
                if seen[stage.kind] <= 2:  # the first of a kind also pays for what is loaded once
                    small.open_stage(stage)
        return recorded(lab, Path(folder))


def told(lab: Lab) -> str:
    """The plan, for people (`assets/plan.txt`): what is fetched, takes hours, does not fit."""
    fetched, (table, how) = downloads(lab.profile), make(lab)
    at_once = workers_of(lab)
    seconds = table["seconds"].sum() / at_once + (0 if table.empty else NOTEBOOKS)
    room = {"here": psutil.virtual_memory().total / at_once}
    if lab.profile.device == "cuda":
        room = {f"on {name}": card["gb"] * 1e9 for name, card in HUB["gpus"].items()}
    stays = table["stays"].sum() + 1e9 * np.nansum([*fetched.values()])
    given = {"lab": lab, "fetched": fetched, "table": table, "how": how, "room": room}
    given |= {"seconds": seconds, "stays": stays, "free": shutil.disk_usage(lab.folder).free}
    form = Template(asset("plan.txt").read_text("utf8"), trim_blocks=True)
    return form.render(given, knobs=KINDS, duration=timedelta)
