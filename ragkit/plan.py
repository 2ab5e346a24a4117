"""The plan of a run before anything is fetched or trained: downloads, disk, memory and hours of every kind of stage, and what helps where it does not fit.

Hours are units of work (`ragkit.work`) times what a unit was measured to cost here (`ragkit.calibrate`); memory is from first principles
(`ragkit.memory`). The plan is kept as JSON in the run's folder, so that the report can hold the finished run against it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ragkit import RagkitError, hardware
from ragkit.calibrate import Costs, calibrate
from ragkit.hardware import Hardware
from ragkit.memory import Memory
from ragkit.profile import Profile
from ragkit.sizes import Download, SetSize, Shape, downloads, reader_config, retriever_config, set_size, shape_of
from ragkit.work import SetWork, Stage, notebooks

FILE = "plan.json"
ALONE = (  # done by one process
    "passages prepared", "vectors written", "vectors read", "vectors indexed", "vectors learnt from", "searches", "exact searches",
    "taggers trained", "questions tagged",
)  # fmt: skip
HELPED = "step2"  # the stages in which the processes of two sets help each other


class PlanError(RagkitError):
    """A plan cannot be made or held against a run."""


@dataclass(frozen=True)
class Needs:
    """What a stage needs: seconds, bytes on the device, in the host's memory beside it, and left on disk."""

    stage: Stage
    seconds: float
    device: float
    host: float
    disk: float


@dataclass(frozen=True)
class Plan:
    """Everything that `make plan` says."""

    profile: Profile
    machine: Hardware
    costs: dict[str, Costs]
    downloads: list[Download]
    needs: list[Needs]

    @property
    def disk(self) -> float:
        return sum(need.disk for need in self.needs) + sum(one.bytes_on_disk for one in self.downloads)

    @property
    def side_by_side(self) -> int:
        """Sets that are worked on at the same time."""
        machine = self.profile.machine
        return len(self.profile.sets) if machine.device == "cpu" and machine.processes == 1 else 1

    @property
    def seconds_of_work(self) -> float:
        return sum(need.seconds for need in self.needs)

    @property
    def wall(self) -> float:
        """Seconds from beginning to end."""
        own: dict[str, float] = dict.fromkeys((s.name for s in self.profile.sets), 0.0)
        alone: dict[str, float] = dict(own)
        for need in (need for need in self.needs if need.stage.set_name):
            own[need.stage.set_name] += need.seconds
            alone[need.stage.set_name] += 0 if need.stage.kind == HELPED and not need.stage.home else need.seconds
        after = sum(need.seconds for need in self.needs if not need.stage.set_name)
        beside = self.side_by_side * self.profile.machine.processes if self.profile.machine.device == "cpu" else 1
        crowded = max(1.0, beside * self.profile.threads / self.machine.cores)
        return crowded * max(max(alone.values()), sum(own.values()) / self.side_by_side) + after

    def fits(self, need: Needs) -> bool | None:
        """Whether a stage's memory suffices here; None where the profile asks for a GPU that is not here."""
        processes = self.profile.machine.processes
        if self.profile.machine.device == "cpu":
            return self.side_by_side * processes * (need.device + need.host) <= self.machine.memory_for_run
        if self.machine.device == "cpu":
            return None
        return need.device <= self.machine.gpu_memory_for_run and processes * need.host <= self.machine.memory_for_run

    def save(self, folder: Path) -> Path:
        """Writes the plan as JSON into a run's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "profile": self.profile.model_dump(mode="json"), "machine": asdict(self.machine), "costs": self.costs,
            "downloads": [asdict(one) for one in self.downloads], "seconds_of_work": self.seconds_of_work, "wall": self.wall, "disk": self.disk,
            "stages": [
                {"home": n.stage.home, "name": n.stage.name, "units": n.stage.units, "seconds": n.seconds, "device": n.device, "host": n.host, "disk": n.disk}
                for n in self.needs
            ],
        }  # fmt: skip
        (folder / FILE).write_text(json.dumps(values, indent=1), "utf8")
        return folder / FILE


@dataclass(frozen=True)
class Ground:
    """What a plan stands on before anything is measured: sizes of sets, shapes of models."""

    profile: Profile
    sizes: dict[str, SetSize]
    reader: Shape
    retriever: Shape

    @classmethod
    def of(cls, profile: Profile) -> Ground:
        """Raises SizeError where something's size cannot be known."""
        sizes = {settings.name: set_size(settings) for settings in profile.sets}
        return cls(profile, sizes, shape_of(reader_config(profile.reader), head=True), shape_of(retriever_config(profile.retriever), head=False))

    def changed(self, profile: Profile) -> Ground:
        """The same under a profile with other settings of the same models and data."""
        return Ground(profile, self.sizes, self.reader, self.retriever)

    def needs(self, costs: dict[str, Costs]) -> list[Needs]:
        """What every stage needs; without costs the seconds are 0."""
        found = []
        for settings in self.profile.sets:
            size, mine = self.sizes[settings.name], costs.get(settings.name, {})
            memory = Memory(self.profile, size, self.reader, self.retriever)
            for stage in SetWork(self.profile, settings, size).stages():
                device, host = memory.peak(stage)
                found.append(Needs(stage, seconds_of(stage, mine, self.profile.machine.processes), device, host, memory.left_on_disk(stage)))
        last, first = notebooks(self.profile), self.profile.sets[0].name
        seconds = seconds_of(last, costs.get(first, {}), 1)
        looking = max((need for need in found if need.stage.kind in ("tokens", "answers")), key=lambda need: need.device + need.host)
        return [*found, Needs(last, seconds, looking.device, looking.host, 0.0)]


def seconds_of(stage: Stage, costs: Costs, processes: int) -> float:
    """Units times what they cost; what processes share is divided among them."""
    return sum(amount * costs.get(unit, 0.0) / (1 if unit in ALONE else processes) for unit, amount in stage.units.items())


def make(ground: Ground, folder: Path) -> Plan:
    """Measures this machine for about a minute and plans a run in a folder. Fetches nothing."""
    profile, machine = ground.profile, hardware.find(ground.profile, folder)
    costs = calibrate(profile, ground.sizes, ground.reader, ground.retriever, machine.device, hardware.nearest(folder))
    return Plan(profile, machine, costs, downloads(profile), ground.needs(costs))


def read_costs(profile: Profile, run: Path) -> dict[str, Costs]:
    """What a unit of work cost when the run in this folder was planned. Raises PlanError where it was not, or for another profile."""
    how = f"python -m ragkit plan --profile ... --runs {run.parent}"
    try:
        saved = json.loads((run / FILE).read_text("utf8"))
        costs, planned = dict(saved["costs"]), saved["profile"]
    except FileNotFoundError:
        raise PlanError(f"There is no plan in {run}. First: {how}") from None
    except (ValueError, KeyError, TypeError):
        raise PlanError(f"The plan in {run / FILE} is damaged. Make it again: {how}") from None
    if planned != profile.model_dump(mode="json"):
        raise PlanError(f"The plan in {run / FILE} is of another profile. Make it again: {how}")
    return costs


def measured(run: Path) -> dict[tuple[str, str], float]:
    """Seconds of every stage that a run made, by the home of its lab and the stage's name; what a lab took over from the run counts there only."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for file in run.rglob("stage.json"):
        home, _, name = str(file.parent.relative_to(run)).rpartition("stages/")
        records[home.rstrip("/"), name] = json.loads(file.read_text("utf8"))
    made = {}
    for (home, name), record in records.items():
        above = records.get((home.rpartition("varied/")[0].rstrip("/"), name)) if home else None
        if above is None or above["key"] != record["key"]:
            made[home, name] = float(record["seconds"])
    return made


def predicted_against_measured(profile: Profile, run: Path) -> pd.DataFrame:
    """How a finished run compares with the plan in its folder: columns kind, stages, predicted and measured (seconds), ratio (predicted / measured).

    A row a kind of stage, then `notebooks` and `all`. Only stages that both know are compared. Raises PlanError where the folder holds no plan.
    """
    costs, seconds = read_costs(profile, run), measured(run)
    needs = Ground.of(profile).needs(costs)
    seconds["", "notebooks"] = sum(json.loads(file.read_text("utf8"))["seconds"] for file in (run / "notebooks").glob("*.json"))
    rows = [
        {"kind": need.stage.kind, "stages": 1, "predicted": need.seconds, "measured": seconds[need.stage.home, need.stage.name]}
        for need in needs
        if (need.stage.home, need.stage.name) in seconds
    ]
    table = pd.DataFrame(rows).groupby("kind", sort=False).sum().reset_index()
    whole = table.drop(columns="kind").sum()
    table = pd.concat([table, pd.DataFrame([{"kind": "all", **whole}])], ignore_index=True)
    return table.assign(stages=table["stages"].astype(int), ratio=table["predicted"] / table["measured"])
