"""The machine that a run would have: its processor or GPU, their memory, and the room on disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ragkit.profile import Profile

USABLE = 0.92  # of a memory: the rest is the system's, or lost between tensors


@dataclass(frozen=True)
class Hardware:
    """What is here. `device` is what the run would compute on here: the profile's, or the processor where it asks for a GPU that is not here.

    Memory and disk in bytes; `gpu_memory` is 0 without a GPU.
    """

    device: str
    name: str
    cores: int
    memory: float
    gpu_memory: float
    free_disk: float
    gpus: int = 0
    load: float = 0.0  # processes that want the processor now, mean over a minute

    @property
    def memory_for_run(self) -> float:
        return USABLE * self.memory

    @property
    def gpu_memory_for_run(self) -> float:
        return USABLE * self.gpu_memory


def nearest(folder: Path) -> Path:
    """A folder, or the nearest above it that is there: both stand on the same disk."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def find(profile: Profile, folder: Path) -> Hardware:
    """The machine at hand; `folder` stands on the disk that counts."""
    gpu = torch.cuda.is_available()
    return Hardware(
        device="cuda" if gpu and profile.machine.device == "cuda" else "cpu",
        name=torch.cuda.get_device_name() if gpu else "no GPU",
        cores=os.cpu_count() or 1,
        memory=float(psutil.virtual_memory().total),
        gpu_memory=float(torch.cuda.get_device_properties(0).total_memory) if gpu else 0.0,
        free_disk=float(shutil.disk_usage(nearest(folder)).free),
        gpus=torch.cuda.device_count(),
        load=psutil.getloadavg()[0],
    )
