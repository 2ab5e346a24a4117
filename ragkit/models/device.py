"""What a run computes on: one process or several that work as one (Hugging Face Accelerate), and what they did.

Every process walks through the same stages. Lists of work are dealt out with `spread` and come back whole and in order to
all; a batch of training is shared out with `share`. Only the main process writes files.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import faiss
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ragkit.errors import MachineError
from ragkit.profile import MachineSettings, Precision

Item = TypeVar("Item")
Made = TypeVar("Made")
done: defaultdict[str, float] = defaultdict(float)  # what this process has done: see `counting`


def start(settings: MachineSettings, threads: int) -> None:
    """Takes the profile's device, kernel and threads for this process; joins the others if it was started as one of several."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "machine.device is 'cuda', but torch finds no GPU here. Install the CUDA build of torch, or set machine.device to 'cpu'."
        )
    if PartialState._shared_state and (PartialState().device.type != settings.device):
        raise MachineError(
            f"This process already computes on {PartialState().device.type}: start another for a profile on {settings.device}."
        )
    PartialState(cpu=settings.device == "cpu")
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    if settings.device == "cuda":
        backends = torch.backends.cuda
        switches = {
            "flash": backends.enable_flash_sdp,
            "efficient": backends.enable_mem_efficient_sdp,
            "math": backends.enable_math_sdp,
        }
        for name, switch in switches.items():
            switch(settings.kernel in ("auto", name))


def device() -> torch.device:
    return PartialState().device


def is_main() -> bool:
    """Whether this process writes the files."""
    return bool(PartialState().is_main_process)


def size() -> int:
    return int(PartialState().num_processes)


def rank() -> int:
    return int(PartialState().process_index)


def wait() -> None:
    """Until every process has come here."""
    PartialState().wait_for_everyone()


def agreed(value: Any) -> Any:
    """The main process's value, in every process."""
    return value if size() == 1 else gather_object([value])[0]


def spread(
    items: Sequence[Item], prepare: Callable[[Item], Any], work: Callable[[Any], Made], desc: str
) -> list[Made]:
    """`work(prepare(item))` for every item, in order, in every process; each does its share of the items.

    The shares do not depend on the number of processes but for who does them, so the results do not either. `prepare`
    (tokenising) runs one item ahead, while the device computes.
    """
    mine = items[rank() :: size()]
    hidden = {"disable": True} if len(mine) < 20 or not is_main() else {}
    made = [
        work(ready)
        for ready in tqdm(ahead(mine, prepare), total=len(mine), desc=desc, leave=False, **hidden)
    ]
    if size() == 1:
        return made
    every = dict(gather_object(list(zip(range(rank(), len(items), size()), made, strict=True))))
    return [every[i] for i in range(len(items))]


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Places of texts in batches of like length, so that little is padded; longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def ahead(items: Iterable[Item], prepare: Callable[[Item], Made]) -> Iterator[Made]:
    """`prepare(item)` of each item, on a GPU made in a thread while the one before is worked on; the time spent waiting is counted.

    A CPU has nothing to gain: the thread would take its cores from the work.
    """

    def take(make: Callable[[], Made]) -> Made:
        started = time.perf_counter()
        ready = make()
        done["waited"] += time.perf_counter() - started
        return ready

    if device().type == "cpu":
        for item in items:
            yield take(partial(prepare, item))
        return
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            following = pool.submit(prepare, item)
            if coming is not None:
                yield take(coming.result)
            coming = following
        if coming is not None:
            yield take(coming.result)


def share(batch: Any) -> tuple[Any, float]:
    """This process's part of a training batch (a list or a tensor), and the weight of its mean loss.

    The processes' gradients are averaged, so a part of n out of N items weighs n * processes / N. A process without an item takes
    the first with weight 0: all must compute, or the others wait for ever.
    """
    mine = batch[rank() :: size()]
    return (mine, len(mine) * size() / len(batch)) if len(mine) else (batch[:1], 0.0)


def accelerator(dtype: Precision) -> Accelerator:
    """What prepares a model and its optimizer for training: several processes, and mixed precision."""
    AcceleratorState._reset_state()  # a reader and a retriever may differ in precision; the processes stay connected
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # BERT's pooler
    return Accelerator(
        cpu=device().type == "cpu",
        kwargs_handlers=[unused],
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype],
    )


def shard(module: nn.Module, layers: Iterable[nn.Module], dtype: Precision) -> None:
    """Splits a module's weights over the processes in place, and with them its gradients and its optimizer (FSDP, torch's `fully_shard`).

    Each of `layers` is brought together while it computes, what lies outside them while the whole module does. It computes in `dtype`.
    Accelerate would do the same on GPUs only; so it can be tried without one.
    """
    mesh, computed = init_device_mesh(device().type, (size(),)), getattr(torch, dtype)
    policy = (
        MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
        if dtype != "float32"
        else MixedPrecisionPolicy()
    )
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A sharded module's state, brought together tensor by tensor in the main process's memory; empty in the others, which must all call it.

    Tied tensors appear once, under their first name.
    """
    state, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            together = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            if is_main():
                state[name] = together.cpu()
    return state


def mean_over_processes(value: float) -> float:
    return value if size() == 1 else float(sum(gather_object([value])) / size())


@contextmanager
def counting() -> Iterator[None]:
    """What is done inside is counted from zero, and does not count outside: one stage may open another."""
    before = dict(done)
    done.clear()
    try:
        yield
    finally:
        done.clear()
        done.update(before)


def counted() -> dict[str, float]:
    """What all processes did within `counting`: passages, questions, tokens...; `waited`, seconds, is their mean."""
    if size() == 1:
        return dict(done)
    total: defaultdict[str, float] = defaultdict(float)
    for one in gather_object([dict(done)]):
        for what, amount in one.items():
            total[what] += amount / size() if what == "waited" else amount
    return dict(total)
