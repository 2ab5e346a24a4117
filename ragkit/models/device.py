"""What a run computes on: one process, or several that work as one (Hugging Face Accelerate).

Every process walks through the same stages. Lists of work are dealt out with `spread` and come back
whole and in order to all; a batch of training is shared out with `share`. Only the main process
writes files.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import faiss
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from tqdm.auto import tqdm

from ragkit.errors import MachineError
from ragkit.profile import MachineSettings

Item = TypeVar("Item")
Made = TypeVar("Made")
log = logging.getLogger(__name__)
PATIENCE = timedelta(days=14)  # of the others, while the main process works alone


def start(machine: MachineSettings, threads: int) -> None:
    """Takes the profile's device, kernel and threads for this process; joins the others of its run,
    if there are any.

    Raises MachineError if there is no such device, or this process already computes on another.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "machine.device is 'cuda', but torch finds no GPU here. "
            "Install the CUDA build of torch, or set machine.device to 'cpu'."
        )
    if PartialState._shared_state and device().type != machine.device:
        raise MachineError(
            f"This process already computes on {device().type}: "
            f"start another for a profile on {machine.device}."
        )
    PartialState(cpu=machine.device == "cpu", timeout=PATIENCE)
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    if machine.device == "cuda":
        kernel, backends = machine.kernel, torch.backends.cuda
        backends.enable_flash_sdp(kernel in ("auto", "flash"))
        backends.enable_mem_efficient_sdp(kernel in ("auto", "efficient"))
        backends.enable_math_sdp(kernel in ("auto", "math"))


def device() -> torch.device:
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
    return value if size() == 1 else float(sum(gather_object([value])) / size())


def spread(
    items: Sequence[Item], prepare: Callable[[Item], Any], work: Callable[[Any], Made], desc: str
) -> list[Made]:
    """`work(prepare(item))` for every item, in order, in every process; each does its share of the
    items.

    Results do not depend on the number of processes: the items stay as they are, only who works on
    them changes. `prepare` (tokenising) runs one item ahead while a GPU computes.
    """
    mine = items[rank() :: size()]
    hidden = {"disable": True} if len(mine) < 20 or not is_main() else {}
    bar = tqdm(ahead(mine, prepare), total=len(mine), desc=desc, leave=False, **hidden)
    made = [work(ready) for ready in bar]
    if size() == 1:
        return made
    every = dict(gather_object(list(zip(range(rank(), len(items), size()), made, strict=True))))
    return [every[i] for i in range(len(items))]


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Places of texts in batches of like length, so that little is padded.

    The longest come first, so that memory runs out at once or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def ahead(items: Iterable[Item], prepare: Callable[[Item], Made]) -> Iterator[Made]:
    """`prepare(item)` of each item, on a GPU made in a thread while the one before is worked on.

    A CPU has nothing to gain: the thread would take its cores from the work.
    """
    if device().type == "cpu":
        yield from map(prepare, items)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            following = pool.submit(prepare, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def share(batch: Any) -> tuple[Any, float]:
    """This process's part of a training batch (a list or a tensor), and the weight of its mean
    loss.

    Gradients are averaged over the processes, so n of N items weigh n * processes / N. A process
    without an item takes the first with weight 0: all must compute, or the others wait for ever.
    """
    mine = batch[rank() :: size()]
    return (mine, len(mine) * size() / len(batch)) if len(mine) else (batch[:1], 0.0)


def accelerator(dtype: str) -> Accelerator:
    """What prepares a model and its optimizer for training: several processes, and mixed
    precision.
    """
    AcceleratorState._reset_state()  # models may differ in precision; the processes stay connected
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # such as BERT's pooler
    return Accelerator(
        cpu=device().type == "cpu",
        kwargs_handlers=[unused],
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype],
    )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, texts, lists, dicts) and torch's generators aside and
    renames it.

    The main process writes. A kill at any moment leaves the old checkpoint or the new one.
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
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning("The checkpoint %s is damaged (%s); the training starts again.", path, why)
        return None
    torch.set_rng_state(whole["generators"]["cpu"])
    if device().type == "cuda" and "cuda" in whole["generators"]:
        torch.cuda.set_rng_state(whole["generators"]["cuda"])
    log.info("going on from the checkpoint %s", path)
    return whole["state"]
