"""Checkpoints of a training loop: one safetensors file, or one a process where the module is split; replaced in one step, safe to load."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ragkit.errors import CheckpointError
from ragkit.models import device as fleet

log = logging.getLogger(__name__)
FILE = "checkpoint.safetensors"


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name; a tied parameter appears once."""
    return {
        f"module.{name}": tensor
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def mine(tensor: Tensor) -> Tensor:
    """A tensor as this process holds it: its own part where it is split over the processes."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def place_of(folder: Path, module: nn.Module) -> Path:
    """The main process's checkpoint, or this process's own where the module is split."""
    return folder / (f"checkpoint-{fleet.rank()}.safetensors" if fleet.is_sharded(module) else FILE)


def save(
    folder: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], history: Any
) -> None:
    """Writes everything the loop needs to go on: weights, optimizers' states, torch's random state, `history` (JSON).

    The file is written aside and renamed, so a kill at any moment leaves the old checkpoint or the new one. The main process
    writes it, and all load it; of a module that is split over the processes (FSDP) each writes its part.
    """
    split, path = fleet.is_sharded(module), place_of(folder, module)
    if not (split or fleet.is_main()):
        return
    tensors = {name: mine(tensor).contiguous() for name, tensor in weights(module).items()}
    tensors["random"] = torch.get_rng_state()
    plain: list[dict[str, Any]] = []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        values: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            values[str(index)] = {
                name: value for name, value in entries.items() if not isinstance(value, Tensor)
            }
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{index}.{name}"] = mine(value).contiguous()
        plain.append({"groups": state["param_groups"], "values": values})
    aside = path.with_name(f"{path.name}.new")
    save_file(
        tensors, aside, metadata={"optimizers": json.dumps(plain), "history": json.dumps(history)}
    )
    if split:
        fleet.wait()  # parts of two moments are of no use: all are whole before the first is renamed
    aside.replace(path)


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """A checkpoint's metadata and tensors; None if there is none, or only an unreadable one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no mapping
    except SafetensorError as error:
        log.warning("The checkpoint %s is damaged (%s); the training starts again.", path, error)
        return None


def load(
    folder: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Any | None:
    """Puts a saved state back and returns its `history`; None if there is no checkpoint, or only an unreadable one."""
    path = place_of(folder, module)
    found = read(path)
    if fleet.is_sharded(module) and len(set(gather_object([found and found[0]["history"]]))) > 1:
        log.warning(
            "The parts of the checkpoint in %s are of different moments; the training starts again.",
            folder,
        )
        return None
    if found is None:
        return None
    metadata, tensors = found
    own, saved = (
        weights(module),
        {name: tensor for name, tensor in tensors.items() if name.startswith("module.")},
    )
    plain = json.loads(metadata["optimizers"])
    if {n: mine(t).shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()} or len(
        plain
    ) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint {path} belongs to another model or optimizer. Remove it, or choose another folder."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            mine(tensor).copy_(saved[name])
    for number, (optimizer, kept) in enumerate(zip(optimizers, plain, strict=True)):
        state = {int(index): dict(values) for index, values in kept["values"].items()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, entry = name.split(".", 3)
                state[int(index)][entry] = (
                    split_like(tensor, trained[int(index)]) if tensor.ndim else tensor
                )
        # JSON knows no tuples; torch's own groups hold them where JSON gives lists
        groups = [
            {
                key: tuple(value) if isinstance(value, list) and key != "params" else value
                for key, value in group.items()
            }
            for group in kept["groups"]
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["random"])
    log.info("going on from the checkpoint in %s", folder)
    return json.loads(metadata["history"])


def split_like(part: Tensor, parameter: Tensor) -> Tensor:
    """An optimizer's state of a parameter, from this process's part of it."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def remove(folder: Path) -> None:
    """Takes the checkpoint away at the end of the loop."""
    fleet.wait()
    for path in folder.glob("checkpoint*.safetensors*"):
        path.unlink(missing_ok=True)
