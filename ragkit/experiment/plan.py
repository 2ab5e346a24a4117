"""What a run would fetch, need and take, before it is begun: the graph, walked without making it.

Seconds are units of work times rates. Rates come from stages that earlier runs recorded here with
the same models; where there are none, from two small runs of the same graph; and where data or
models are not here yet, from arithmetic: a stage's operations over a machine's (`needs`).
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ragkit.data.files import write_whole
from ragkit.experiment import needs
from ragkit.experiment.lab import Lab
from ragkit.experiment.run import set_of, workers_of
from ragkit.experiment.store import Stage, read_record
from ragkit.profile import Profile
from ragkit.settings import HubSet, QuestionSet, WorldSet

FILE = "plan.json"
SHARE_OF_PEAK = 0.3  # of its operations a second that a GPU reaches on such models
NOTEBOOK = 9.0  # seconds of one notebook, most of them its kernel's start
USABLE = 0.92  # of a memory
Points = dict[str, list[tuple[float, float]]]  # units and seconds of stages, by kind


@dataclass(frozen=True)
class Need:
    """What a stage needs: seconds, peak memory, disk that stays and disk in passing (bytes)."""

    stage: Stage
    seconds: float
    memory: float
    stays: float
    passing: float


@dataclass(frozen=True)
class Plan:
    """What a run needs; `how` says where its seconds come from, `wall` is from begin to end."""

    lab: Lab
    needs: list[Need]
    how: str
    wall: float


def at_hand(profile: Profile) -> bool:
    """Whether a profile's data and models are here, so that a few units can be measured."""
    models = (profile.reader.model, profile.retriever.model)
    local = all(name == "embedded" or Path(name).exists() for name in models)
    return local and not any(isinstance(one, HubSet) for one in profile.sets)


def models_of(settings: Any) -> tuple[str, ...]:
    """The models that a stage's settings name."""
    return tuple(str((settings.get(n) or {}).get("model", "")) for n in ("reader", "retriever"))


def recorded(lab: Lab) -> Points:
    """What earlier runs beside this one took for stages with the same models."""
    wanted = {one.kind: models_of(one.settings) for one in lab.stages}
    found: Points = {}
    for home in lab.runs.glob("*/stages/*/*"):
        saved = read_record(home)
        if saved and wanted.get(saved["kind"]) == models_of(saved["record"].get("settings", {})):
            point = (float(sum(saved["units"].values())), saved["seconds"])
            found.setdefault(saved["kind"], []).append(point)
    return found


def miniature(profile: Profile, times: int) -> Profile:
    """The same profile on a few questions of its first set, `times` over."""
    few, first = 16 * times, profile.sets[0]
    sizes = {"distill": few, "dev": 8, "test": 8}
    if isinstance(first, WorldSet):
        sizes["entities"] = 30 * times
    small: QuestionSet = first.model_copy(update=sizes)
    changes: dict[str, dict[str, Any]] = {
        "reader": {"steps": 4 * times, "checkpoints": 1},
        "retriever": {"crop_steps": 8 * times},
        "distill": {"seeds": (0,), "epochs": 1, "questions": few},
        "indicators": {"questions": 8},
        "evaluate": {"answered": 8},
        "choices": {"variations": ()},
    }
    sections = {
        name: getattr(profile, name).model_copy(update=new) for name, new in changes.items()
    }
    whole = {"sets": (small,), "step1_seeds": profile.step1_seeds[:1], "index_refreshes": 0}
    return profile.model_copy(update=sections | whole)


def measured(lab: Lab) -> Points:
    """What the first stages of each kind take in two small runs, one four times the other."""
    found: Points = {}
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 4):
            small, seen = Lab(miniature(lab.profile, times), folder), Counter[str]()
            for stage in small.stages:
                seen[stage.kind] += 1
                if seen[stage.kind] <= 2:  # the first of a kind also pays for what is loaded once
                    for one in stage.inputs.values():
                        small.open_stage(one)
                    started = time.monotonic()
                    small.open_stage(stage)
                    point = (needs.units(stage), time.monotonic() - started)
                    found.setdefault(stage.kind, []).append(point)
    return found


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds at the start and by unit, neither negative, that fit what was seen."""
    units, seconds = np.array(points).T
    if np.ptp(units) > 0:
        slope, start = np.polyfit(units, seconds, 1)
        if start >= 0 and slope >= 0:
            return float(start), float(slope)
    return 0.0, float(seconds.sum() / max(units.sum(), 1.0))


def make(lab: Lab) -> Plan:
    """Plans what is missing of a run, and keeps its seconds by kind in the run's folder."""
    profile, here = lab.profile, at_hand(lab.profile)
    missing = [one for one in lab.stages if lab.store.why_not(one) is not None]
    points, how = recorded(lab), "by stages that earlier runs recorded here"
    if here and not {one.kind for one in missing} <= points.keys():
        points, how = measured(lab), "by two small runs of the same stages, measured now"
    rates = {kind: line(seen) for kind, seen in points.items()}
    speed = 1.0 if here else operations_a_second()
    how = how if here else "by arithmetic on this processor"
    found = []
    for one in missing:
        start, slope = rates.get(one.kind, (0.0, 0.0))
        arithmetic = needs.operations(one, profile) / speed
        seconds = start + slope * needs.units(one) if here else arithmetic
        places = needs.disk(one, profile, set_of(one))
        found.append(Need(one, seconds, needs.memory(one, profile), *places))
    kinds: Counter[str] = Counter()
    for need in found:
        kinds[need.stage.kind] += need.seconds  # type: ignore[assignment]
    write_whole(lab.folder / FILE, json.dumps(kinds))
    return Plan(lab, found, how, wall_of(lab, found))


def operations_a_second() -> float:
    """Of this processor, on a product of two matrices."""
    import torch  # only who plans waits for it

    one, count, started = torch.randn(1024, 1024), 0, time.monotonic()
    while time.monotonic() - started < 1.0:
        one @ one
        count += 1
    return 2 * 1024**3 * count / (time.monotonic() - started)


def wall_of(lab: Lab, found: list[Need]) -> float:
    """Seconds from begin to end: the work shared by the processes, or the longest chain."""
    ends: dict[str, float] = {}
    for need in found:
        before = (ends.get(one.key, 0.0) for one in need.stage.inputs.values())
        ends[need.stage.key] = max(before, default=0.0) + need.seconds
    work = sum(need.seconds for need in found) / workers_of(lab)
    return max(work, max(ends.values(), default=0.0)) + bool(found) * 5 * NOTEBOOK


def duration(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lines(plan: Plan) -> Iterator[str]:
    """The plan, for people."""
    yield f"Plan of profile {plan.lab.profile.name}. Nothing is fetched for it."
    fetched = needs.downloads(plan.lab.profile)
    for what, gb in fetched.items():
        yield f"  to fetch: {what}: {'size not known here' if math.isnan(gb) else f'{gb:.2f} GB'}"
    yield f"  {'stage':11}{'number':>7}{'units':>12}{'time':>9}{'memory':>10}{'disk':>10}"
    for kind in dict.fromkeys(need.stage.kind for need in plan.needs):
        mine = [need for need in plan.needs if need.stage.kind == kind]
        took = duration(sum(need.seconds for need in mine))
        held = f"{max(need.memory for need in mine) / 1e9:.1f} GB"
        stays = f"{sum(need.stays for need in mine) / 1e9:.2f} GB"
        units = sum(needs.units(need.stage) for need in mine)
        yield f"  {kind:11}{len(mine):>7}{units:>12,.0f}{took:>9}{held:>10}{stays:>10}"
    yield f"Time: {duration(plan.wall)} from begin to end, {plan.how}."
    yield disk_line(plan, sum(gb for gb in fetched.values() if not math.isnan(gb)))
    yield from memory_lines(plan)


def disk_line(plan: Plan, fetched: float) -> str:
    """Whether the disk suffices; `fetched` in GB."""
    stays = sum(need.stays for need in plan.needs) / 1e9 + fetched
    passing = max((need.passing for need in plan.needs), default=0.0) / 1e9
    free = shutil.disk_usage(plan.lab.folder).free / 1e9
    help = "fits." if stays + passing < free else (
        "does NOT fit. Fewer reader.checkpoints, a narrower index.dtype, or another --runs helps."
    )  # fmt: skip
    return (
        f"Disk: {stays:.1f} GB stay, {passing:.1f} GB more in passing; {free:.0f} GB free: {help}"
    )


def memory_lines(plan: Plan) -> Iterator[str]:
    """Whether memory suffices, here or on a GPU, and what helps where it does not."""
    profile, most = plan.lab.profile, max(plan.needs, key=lambda need: need.memory, default=None)
    if most is None:
        return
    room = USABLE * psutil.virtual_memory().total / workers_of(plan.lab)
    if profile.machine.device == "cuda":
        work = sum(needs.operations(need.stage, profile) for need in plan.needs)
        for name, card in needs.hub()["gpus"].items():
            took = duration(work / (card["tflops"] * 1e12 * SHARE_OF_PEAK))
            enough = "suffices" if most.memory < USABLE * card["gb"] * 1e9 else "does NOT suffice"
            yield f"  {name:20} about {took:>8}; its memory {enough}"
        room = USABLE * 1e9 * max(card["gb"] for card in needs.hub()["gpus"].values())
    if most.memory > room:
        yield (
            f"Memory: {most.stage.kind} needs {most.memory / 1e9:.0f} GB. Lower reader.at_once, "
            "set reader.gradient_checkpointing, or train adapters only with reader.lora_rank."
        )


def against(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The plan kept in a run's folder beside what its stages took, by kind; None without one."""
    if not (folder / FILE).is_file():
        return None
    planned, took = json.loads((folder / FILE).read_text("utf8")), Counter[str]()
    for stage in manifest["stages"].values():
        took[stage["kind"]] += stage["seconds"]
    rows = [(kind, planned[kind], took[kind]) for kind in planned if took[kind]]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return [
        {"kind": kind, "predicted": round(p, 1), "measured": round(m, 1), "ratio": round(p / m, 2)}
        for kind, p, m in rows
        if m
    ]
