"""What a run would fetch, need and take, before it is begun: the graph, walked without making it.

Seconds are units of work times rates. Rates come from stages that earlier runs recorded here with
the same models; where there are none, from two small runs of the same graph; and where data or
models are not here yet, from arithmetic: a stage's operations over a machine's (`needs`).
"""

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from ragkit.experiment import needs
from ragkit.experiment.lab import Lab
from ragkit.experiment.run import workers_of
from ragkit.experiment.store import Stage, read_record
from ragkit.profile import Profile
from ragkit.settings import HubSet, WorldSet

SHARE_OF_PEAK = 0.3  # of its operations a second that a GPU reaches on such models
NOTEBOOK = 9.0  # seconds of one notebook, most of them its kernel's start
USABLE = 0.92  # of a memory


@dataclass(frozen=True)
class Plan:
    """What a run needs: `wall` seconds from begin to end; `how` says where seconds come from.

    `needs` has a row a stage that is missing: name, kind, units, operations, memory (peak bytes),
    stays and passing (bytes on disk for good, and more while it is made), seconds.
    """

    lab: Lab
    needs: pd.DataFrame
    how: str
    wall: float


def make(lab: Lab) -> Plan:
    """Plans what is missing of a run."""
    profile, rows = lab.profile, []
    missing = [one for one in lab.stages if lab.store.why_not(one) is not None]
    for one in missing:
        work = needs.units(one), needs.operations(one, profile), needs.memory(one, profile)
        rows.append((one.name, one.kind, *work, *needs.disk(one, profile)))
    columns = ["name", "kind", "units", "operations", "memory", "stays", "passing"]
    table = pd.DataFrame(rows, columns=columns)
    if needs.downloads(profile) or any(isinstance(one, HubSet) for one in profile.sets):
        table["seconds"] = table["operations"] / operations_a_second()
        how = "by arithmetic on this processor"
    else:
        seen, how = recorded(lab, lab.runs), "by stages that earlier runs recorded here"
        if not set(table["kind"]) <= set(seen["kind"]):
            seen, how = measured(lab), "by two small runs of the same stages, measured now"
        rates = {kind: line(points) for kind, points in seen.groupby("kind")}
        pairs = zip(table["kind"], table["units"], strict=True)
        table["seconds"] = [rates[kind][0] + rates[kind][1] * units for kind, units in pairs]
    return Plan(lab, table, how, wall_of(lab, missing, table["seconds"].tolist()))


def recorded(lab: Lab, runs: Path) -> pd.DataFrame:
    """What the runs in a folder took for stages with the lab's models: kind, units, seconds."""

    def models(settings: Any) -> list[Any]:
        return [settings.get(name, {}).get("model") for name in ("reader", "retriever")]

    wanted = {one.kind: models(one.settings) for one in lab.stages}
    rows = []
    for saved in map(read_record, runs.glob("*/stages/*/*")):
        if saved and wanted.get(saved["kind"]) == models(saved["record"].get("settings", {})):
            rows.append((saved["kind"], sum(saved["units"].values()), saved["seconds"]))
    return pd.DataFrame(rows, columns=["kind", "units", "seconds"])


def measured(lab: Lab) -> pd.DataFrame:
    """The same, of the first stages of each kind in two small runs, one four times the other."""
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 4):
            small, seen = Lab(miniature(lab.profile, times), folder), Counter[str]()
            for stage in small.stages:
                seen[stage.kind] += 1
                if seen[stage.kind] <= 2:  # the first of a kind also pays for what is loaded once
                    small.open_stage(stage)
        return recorded(lab, Path(folder))


def miniature(profile: Profile, times: int) -> Profile:
    """The same profile on a few questions of its first set, `times` over."""
    few, first = 16 * times, profile.sets[0]
    sizes = {"distill": few, "dev": 8, "test": 8}
    sizes |= {"entities": 30 * times} if isinstance(first, WorldSet) else {}
    changes: dict[str, dict[str, Any]] = {
        "reader": {"steps": 4 * times, "checkpoints": 1},
        "retriever": {"crop_steps": 8 * times},
        "distill": {"seeds": (0,), "epochs": 1, "questions": few},
        "indicators": {"questions": 8},
        "evaluate": {"answered": 8},
        "choices": {"variations": ()},
    }
    made: dict[str, Any] = {"sets": (first.model_copy(update=sizes),), "index_refreshes": 0}
    for section, new in changes.items():
        made[section] = getattr(profile, section).model_copy(update=new)
    return profile.model_copy(update=made | {"step1_seeds": profile.step1_seeds[:1]})


def line(points: pd.DataFrame) -> tuple[float, float]:
    """Seconds at the start and by unit, neither negative, that fit what was seen."""
    units, seconds = points["units"], points["seconds"]
    slope, start = np.polyfit(units, seconds, 1) if np.ptp(units) else (0.0, -1.0)
    if min(start, slope) >= 0:
        return start, slope
    return 0.0, seconds.sum() / max(units.sum(), 1.0)


def operations_a_second() -> float:
    """Of this processor, on a product of two matrices."""
    import torch  # only who plans waits for it

    one, count, started = torch.randn(1024, 1024), 0, time.monotonic()
    while time.monotonic() - started < 1.0:
        one @ one
        count += 1
    return 2 * 1024**3 * count / (time.monotonic() - started)


def wall_of(lab: Lab, missing: Sequence[Stage], seconds: Sequence[float]) -> float:
    """Seconds from begin to end: the work shared by the processes, or the longest chain."""
    ends: dict[str, float] = {}
    for stage, own in zip(missing, seconds, strict=True):
        before = (ends.get(one.key, 0.0) for one in stage.inputs.values())
        ends[stage.key] = max(before, default=0.0) + own
    shared = sum(seconds) / workers_of(lab)
    return max(shared, *ends.values()) + 5 * NOTEBOOK if missing else 0.0


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
    for kind, rows in plan.needs.groupby("kind", sort=False):
        took, units = duration(rows["seconds"].sum()), rows["units"].sum()
        held, stays = rows["memory"].max() / 1e9, rows["stays"].sum() / 1e9
        yield f"  {kind:11}{len(rows):>7}{units:>12,.0f}{took:>9}{held:>7.1f} GB{stays:>7.2f} GB"
    yield f"Time: {duration(plan.wall)} from begin to end, {plan.how}."
    stays = plan.needs["stays"].sum() / 1e9 + np.nansum([*fetched.values()])
    passing = max(plan.needs["passing"], default=0.0) / 1e9
    free = shutil.disk_usage(plan.lab.folder).free / 1e9
    told = f"Disk: {stays:.1f} GB stay, {passing:.1f} GB more in passing; {free:.0f} GB free: "
    helps = "Fewer reader.checkpoints, a narrower index.dtype, or another --runs helps."
    yield told + ("fits." if stays + passing < free else f"does NOT fit. {helps}")
    if not plan.needs.empty:
        yield from memory_lines(plan)


def memory_lines(plan: Plan) -> Iterator[str]:
    """Whether memory suffices, here or on a GPU, and what helps where it does not."""
    most = plan.needs.loc[plan.needs["memory"].idxmax()]
    room = psutil.virtual_memory().total / workers_of(plan.lab)
    if plan.lab.profile.machine.device == "cuda":
        gpus, work = needs.hub()["gpus"], plan.needs["operations"].sum()
        for name, card in gpus.items():
            took = duration(work / (card["tflops"] * 1e12 * SHARE_OF_PEAK))
            room = USABLE * card["gb"] * 1e9
            enough = "suffices" if most["memory"] < room else "does NOT suffice"
            yield f"  {name:20} about {took:>8}; its memory {enough}"
        room = max(card["gb"] for card in gpus.values()) * 1e9
    if most["memory"] > USABLE * room:
        yield (
            f"Memory: {most['kind']} needs {most['memory'] / 1e9:.0f} GB. Lower reader.at_once, "
            "set reader.gradient_checkpointing, or train adapters only with reader.lora_rank."
        )
