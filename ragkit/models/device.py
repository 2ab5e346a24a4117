"""What a run computes on: one process, or several that work as one (torchrun and Accelerate).

Every process walks through the same stages: `spread` deals out lists of work, `share` the batches
of a training. Only the main process writes files.
"""

import logging
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import faiss
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from tqdm.auto import tqdm

from ragkit.errors import ProfileError
from ragkit.settings import MachineSettings

Item = TypeVar("Item")
Made = TypeVar("Made")
log = logging.getLogger(__name__)
PATIENCE = timedelta(days=14)  # of the others, while the main process works alone


def start(machine: MachineSettings, threads: int) -> None:
    """Takes the profile's device and threads; joins the other processes of the run.

    Raises ProfileError if there is no such device, or this process already computes on another.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise ProfileError(
            "machine.device is 'cuda', but torch finds no GPU here. "
            "Install the CUDA build of torch, or set machine.device to 'cpu'."
        )
    if PartialState._shared_state and device().type != machine.device:
        here = device().type
        raise ProfileError(f"This process computes on {here}: start another for {machine.device}.")
    PartialState(cpu=machine.device == "cpu", timeout=PATIENCE)
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def device() -> torch.device:
    """The device of this process."""
    return PartialState().device


def is_main() -> bool:
    """Whether this process writes the files."""
    return bool(PartialState().is_main_process)


def size() -> int:
    """The number of processes of this run."""
    return int(PartialState().num_processes)


def rank() -> int:
    """The number of this process among them, from 0 on."""
    return int(PartialState().process_index)


def wait() -> None:
    """Until every process has come here."""
    PartialState().wait_for_everyone()


def agreed(value: Any) -> Any:
    """The main process's value, in every process."""
    return value if size() == 1 else gather_object([value])[0]


def mean_over_processes(value: float) -> float:
    """The mean of the processes' values, in every process."""
    return value if size() == 1 else float(sum(gather_object([value])) / size())


def spread(
    items: Sequence[Item], prepare: Callable[[Item], Any], work: Callable[[Any], Made], desc: str
) -> list[Made]:
    """`work(prepare(item))` of every item, in order, in every process; each does a share of them.

    The items go round in turn, so that a list sorted by length is shared evenly. Results do not
    depend on the number of processes: only who works on an item changes.
    """
    mine = items[rank() :: size()]
    hidden = {"disable": True} if len(mine) < 20 or not is_main() else {}
    made = [work(prepare(item)) for item in tqdm(mine, desc=desc, leave=False, **hidden)]
    if size() == 1:
        return made
    every = dict(gather_object(list(zip(range(rank(), len(items), size()), made, strict=True))))
    return [every[i] for i in range(len(items))]


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Places of texts in batches of like length, so that little is padded.

    The longest come first: memory runs out at once or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def share(batch: Any) -> tuple[Any, float]:
    """This process's part of a training batch (a list or a tensor), and its mean loss's weight.

    Gradients are averaged over processes, so n of N items weigh n * processes / N. Who gets none
    takes the first with weight 0: all must compute, or the others wait for ever.
    """
    mine = batch[rank() :: size()]
    return (mine, len(mine) * size() / len(batch)) if len(mine) else (batch[:1], 0.0)


def accelerator(dtype: str) -> Accelerator:
    """What prepares a model and its optimizer for several processes and mixed precision."""
    AcceleratorState._reset_state()  # models may differ in precision; the processes stay connected
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # such as BERT's pooler
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    on_cpu = device().type == "cpu"
    return Accelerator(cpu=on_cpu, kwargs_handlers=[unused], mixed_precision=precision)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, texts, lists, dicts) and torch's generators.

    The main process writes, aside, and renames: a kill leaves the old checkpoint or the new one.
    """
    if not is_main():
        return
    generators = {"cpu": torch.get_rng_state()}
    if device().type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state()
    aside = path.with_name(f"{path.name}.new")
    torch.save({"state": state, "generators": generators}, aside)
    aside.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, in memory, with torch's generators as they were.

    None if there is no checkpoint, or only a damaged one, which the log then says.
    """
    if not path.is_file():
        return None
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        log.warning("The checkpoint %s is damaged (%r); the training starts again.", path, error)
        return None
    torch.set_rng_state(whole["generators"]["cpu"])
    if device().type == "cuda" and "cuda" in whole["generators"]:
        torch.cuda.set_rng_state(whole["generators"]["cuda"])
    log.info("going on from the checkpoint %s", path)
    return whole["state"]
