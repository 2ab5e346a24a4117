"""What a run would fetch, need and take, before it is begun: the graph, walked without making it.
Seconds are units of work times rates. Rates come from stages that earlier runs recorded here with
the same models; where there are none, from two small runs of the same graph; and where data or
models are not here yet, from arithmetic: a stage's operations over a machine's."""

import math
import shutil
import tempfile
from collections import Counter
from datetime import timedelta
from functools import cache
from pathlib import Path
from timeit import timeit
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
NOTEBOOKS = 45.0  # seconds of a run's notebooks, most of them their kernels' start
HUB = yaml.safe_load(asset("hub_sizes.yaml").read_text("utf8"))  # how large things are there
COLUMNS = ("name", "kind", "units", "operations", "memory", "stays", "passing")


@cache
def shape_of(model: str) -> tuple[float, int, int]:
    """A reader's or retriever's number of weights, layers, and hidden size, by its configuration.
    ProfileError for a model that is neither here nor in `assets/hub_sizes.yaml`."""
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
    return float(weights), config.num_hidden_layers, config.hidden_size


def needs(stage: Stage, profile: Profile) -> dict[str, Any]:
    """A stage's COLUMNS by arithmetic: units of work, floating-point operations, peak bytes of
    memory, and bytes on disk that stay, or lie there in passing besides."""
    settings, own, kind = profile.reader, profile.retriever, stage.kind
    weights, layers, hidden = shape_of(settings.model)
    encoder, _, width = (1e6, 2, 128) if own.model == "embedded" else shape_of(own.model)
    units = float(sum(stage.units.values()))
    tokens = min(settings.context, profile.k * PASSAGE + QUESTION)
    lean, trained = settings.gradient_checkpointing, 0.02 if settings.lora_rank else 1.0
    read = 2 * weights * tokens  # a prompt: two operations for each weight and token
    answer, asked = read + 2 * weights * ANSWER, 2 * encoder * QUESTION
    operations = dict.fromkeys(("tokens", "contextual", "alone", "teacher", "heads"), read)
    operations |= {"premises": answer, "answers": answer, "loop": (profile.k - 1) * read}
    operations |= {"vectors": 2 * encoder * PASSAGE, "candidates": asked, "step2": 3 * asked}
    operations["step1"] = (4 if lean else 3) * read
    index = 0 if profile.index.factory == "Flat" else 80
    vector = width * WIDTH[profile.index.dtype]
    stays = units * {"passages": 700, "vectors": vector, "index": index}.get(kind, 0)
    passing = stays if kind == "index" else 0.0
    states = 4.0 * settings.at_once * tokens * hidden  # of one layer
    memory = weights * WIDTH[settings.dtype] + 16 * states
    if kind == "step1":  # each reader kept; a checkpoint beside the one that it replaces
        memory = weights * (4 + 12 * trained) + states * layers * (3 if lean else 16)
        stays = 4 * weights * (1 + len(settings.kept_steps))
        passing = 24 * weights * trained
    elif kind in ("vectors", "retriever", "step2"):
        texts = 64.0 * own.at_once * PASSAGE + 4.0 * profile.index.shard
        memory = 16 * encoder + texts * width
    elif kind == "index":
        memory = 4.0 * profile.index.trained_on * width
    work = units * operations.get(kind, 0.0)
    row = (stage.name, kind, units, work, BASE + memory, stays or 2e5, passing)
    return dict(zip(COLUMNS, row, strict=True))


def downloads(profile: Profile) -> dict[str, float]:
    """What is fetched from the hub, in GB (NaN: not known here)."""
    models, known = (profile.reader.model, profile.retriever.model), HUB["tables"]
    found = {model: HUB["models"].get(model, {}).get("gb", math.nan) for model in models}
    for one in (one for one in profile.sets if isinstance(one, HubSet)):
        asked = [(one.questions, {one.train, one.heldout}), (one.passages, {one.passage_split})]
        for table, splits in asked:
            if isinstance(table, HubTable):
                whole = known.get(table.dataset, {"gb": {}})
                gb = known.get(f"{table.dataset}: {table.config}", whole)["gb"]
                found[table.dataset] = gb.get("all", sum(gb.get(one, math.nan) for one in splits))
    here = {what for what in found if what in EMBEDDED or Path(what).exists()}
    return {what: gb for what, gb in found.items() if what not in here}


def make(lab: Lab) -> tuple[pd.DataFrame, str]:
    """What is missing of a run: COLUMNS and seconds, a row a stage; and where seconds come from."""
    profile, missing = lab.profile, [one for one in stages_of(lab.graph) if lab.store.why_not(one)]
    table = pd.DataFrame([needs(one, profile) for one in missing], columns=COLUMNS)
    if downloads(profile) or any(isinstance(one, HubSet) for one in profile.sets):
        import torch  # only who plans waits for it

        one, how = torch.randn(1024, 1024), "by arithmetic on this processor"
        a_second = 20 * 2 * 1024**3 / timeit(lambda: one @ one, number=20)
        if profile.device == "cuda":
            how = f"by arithmetic on one GPU ({GPU})"
            a_second = SHARE_OF_PEAK * 1e12 * HUB["gpus"][GPU]["tflops"]
        return table.assign(seconds=table["operations"] / a_second), how
    seen, how = recorded(lab, lab.runs), "by stages that earlier runs recorded here"
    if not set(table["kind"]) <= set(seen["kind"]):
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
    # Of a large reader a prompt takes seconds, of a small one milliseconds.
    most, asked_at, steps = (2, 8, 1) if shape_of(profile.reader.model)[0] > 1e7 else (8, 16, 4)
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, most):
            few = {p: min(asked_at * times, getattr(first, p)) for p in ("distill", "dev", "test")}
            few |= {"entities": 30 * times} if isinstance(first, WorldSet) else {}
            reader = profile.reader.model_copy(update={"steps": steps * times})
            crops = profile.retriever.model_copy(update={"crop_steps": 8 * times})
            less = {"sets": (first.model_copy(update=few),), "reader": reader, "retriever": crops}
            asked = {"questions": asked_at * times // 2}  # Step 1 of real text learns from the rest
            less |= {"distill": profile.distill.model_copy(update=asked)}
            less |= {"encoder_decoder": None}  # of the decoder's size, about
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
    numbers = {"seconds": seconds, "stays": stays, "free": shutil.disk_usage(lab.folder).free}
    given = {"lab": lab, "fetched": fetched, "table": table, "how": how, "room": room, **numbers}
    text = asset("plan.txt").read_text("utf8")
    return Template(text, trim_blocks=True).render(given, knobs=KINDS, duration=timedelta)
