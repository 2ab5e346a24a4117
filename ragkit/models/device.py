"""What a run computes on: one process, or several (torchrun and Accelerate) that walk through the
same stages: `spread` deals out lists of work, `share` the batches of a training, and only the main
process writes files. And how models get there: what is wrong with them is said."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from ragkit.errors import ProfileError, RagkitError
from ragkit.settings import Device

PATIENCE = timedelta(days=14)  # of the others, while the main process works alone


def start(device: Device, threads: int) -> None:
    """Takes device and threads, joins the run's processes; ProfileError on another device."""
    PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if (here := PartialState().device.type) != device:
        told = f"device is {device!r}, but this process computes on {here!r}. Set that, or start"
        raise ProfileError(f"{told} another process: for 'cuda' one whose torch finds a GPU.")
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


def write(folder: Path, files: Mapping[str, Any]) -> None:
    """Writes what a stage made, in the main process: arrays to safetensors, else values to JSON."""
    for name, made in files.items() if is_main() else ():
        if name.endswith(".safetensors"):
            save_file({key: np.ascontiguousarray(one) for key, one in made.items()}, folder / name)
        else:
            (folder / name).write_text(json.dumps(made, ensure_ascii=False), "utf8")


def agreed(value: Any = None) -> Any:
    """The main process's value, in every process: they wait here for each other."""
    return gather_object([value])[0]


def mean_over_processes(value: float) -> float:
    """The mean of the processes' values, in every process."""
    return float(sum(gather_object([value])) / size())


def spread(
    items: Sequence[Any], at_once: int, work: Callable[[list[Any]], Iterable[Any]], desc: str
) -> list[Any]:
    """What `work` makes of each item, in order, in every process; it gets batches of items of like
    length, so that little is padded, the longest first: memory runs out at once or never. Processes
    take batches in turn; no result depends on who works on which."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    batches = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    mine = batches[PartialState().process_index :: size()]
    shown = tqdm(mine, desc=desc, leave=False) if len(mine) >= 20 and is_main() else mine
    made = [list(work([items[i] for i in batch])) for batch in shown]
    found = [None] * len(items)
    for batch, results in gather_object(list(zip(mine, made, strict=True))):
        for place, one in zip(batch, results, strict=True):
            found[place] = one
    return found


def share(batch: Any) -> tuple[Any, float]:
    """This process's part of a training batch (a list or a tensor), and its mean loss's weight:
    gradients are averaged over processes, so n of N items weigh n * processes / N. Who gets none
    takes the first with weight 0: all must compute, or the others wait for ever."""
    mine = batch[PartialState().process_index :: size()]
    return (mine, len(mine) * size() / len(batch)) if len(mine) else (batch[:1], 0.0)


def accelerator(dtype: str) -> Accelerator:
    """What prepares a model and its optimizer for several processes and mixed precision."""
    AcceleratorState._reset_state()  # models may differ in precision; the processes stay connected
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # such as BERT's pooler
    lower, on_cpu = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no"), device().type == "cpu"
    return Accelerator(cpu=on_cpu, kwargs_handlers=[unused], mixed_precision=lower)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what goes wrong with a model inside into a sentence; keeps the libraries quiet."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except RagkitError:
        raise
    except Exception as error:  # libraries raise anything over an odd folder
        why = "its folder lacks safetensors weights or a tokenizer that work here. Fetch it again"
        if Path(name).is_file():
            why = "it is no whole GGUF file of an architecture that transformers reads from one. "
            why += "Fetch it again, or give the model's folder"
            if isinstance(error, ImportError):
                why = "the package gguf is missing or too old. Install ragkit's dependencies"
        elif not Path(name).is_dir():
            why = "there is no such folder or file, and the hub did not give it (no network, a "
            why += "wrong name, or terms to accept: `hf auth login`). Give a local folder"
        what = f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:1])}"
        raise RagkitError(f"Model {name!r} cannot be loaded: {why}. ({what})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def refuse_missing(name: str, loaded: Mapping[str, Any]) -> None:
    """Raises RagkitError if weights were missing, as transformers says; BERT's pooler may be."""
    if lacks := sorted(one for one in loaded["missing_keys"] if not one.startswith("pooler.")):
        told = f"Model {name!r} lacks {len(lacks)} of its weights ({', '.join(lacks[:3])}...): "
        raise RagkitError(told + "they would be random. Save or fetch it again.")
