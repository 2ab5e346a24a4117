"""A run: every stage made by a pool of processes, every notebook executed, the manifest written."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ragkit.data.files import room_on_disk, write_whole
from ragkit.errors import RagkitError
from ragkit.experiment import store
from ragkit.experiment.executed import Notebooks, told
from ragkit.experiment.lab import Lab, read_json
from ragkit.experiment.store import Stage, Store
from ragkit.profile import save_profile

log = logging.getLogger(__name__)
NOISY = "papermill httpx bm25s datasets faiss traitlets spacy asyncio sentence_transformers"


def start_logging() -> None:
    """Plain lines on the error stream; libraries speak only when something is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in NOISY.split():
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it reports BERT's unused pooler at every load


def begin_worker() -> None:
    """A worker leaves Ctrl-C to the main process, and ends with it, whatever ends that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # the bars of two processes on one line cannot be read
    start_logging()


_stores: dict[Path, Store] = {}  # of a worker: what it has checked once it need not check again


def make_one(folder: Path, stage: Stage) -> str:
    """What a worker does: makes one stage whose inputs are there; returns what happened to it."""
    kept = _stores.setdefault(folder, Store(folder))
    kept.open(stage)
    return kept.status[stage.name]


def workers_of(lab: Lab) -> int:
    """Stages made at the same time: as many processes as cores, one on a GPU."""
    if store.SHARED or lab.profile.device != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // lab.profile.threads)


def make_all(lab: Lab, stages: Sequence[Stage]) -> None:
    """Makes every stage that is missing, each as soon as its inputs are there, in the list's order.
    The first error ends the run; what was finished is kept."""
    there = [lab.store.why_not(one) is None for one in stages] if store.MAIN else []
    pairs = zip(stages, store.agreed(there), strict=True)  # the processes of a run see one state
    unmade = {one.key: one for one, made in pairs if not made}
    lab.store.status |= {one.name: "reused" for one in stages if one.key not in unmade}
    log.info("%d stages are there, %d are to be made", len(stages) - len(unmade), len(unmade))
    if (at_once := workers_of(lab)) == 1 or len(unmade) < 2:
        for one in unmade.values():
            lab.store.open(one)
        return
    context, waiting = multiprocessing.get_context("spawn"), list(unmade.values())
    pool = futures.ProcessPoolExecutor(at_once, context, initializer=begin_worker)
    running: dict[futures.Future[str], Stage] = {}
    try:
        while unmade:
            for one in list(waiting):
                ready = not any(other.key in unmade for other in one.inputs.values())
                if ready and len(running) < at_once:
                    waiting.remove(one)
                    running[pool.submit(make_one, lab.folder, one)] = one
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                lab.store.status[running[future].name] = future.result()
                del unmade[running.pop(future).key]
    except BrokenProcessPool:
        names = " or ".join(one.name for one in running.values())
        why = "most likely because memory ran out. The same command goes on from what was finished"
        raise RagkitError(f"A process that made {names} was killed, {why}.") from None
    finally:
        for process in multiprocessing.active_children() if running else ():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def stoppable(works: Sequence[Callable[[], object]], at_once: int = 1) -> None:
    """Runs works that talk to notebooks' kernels in threads, begun in order: in the main thread
    papermill and nbclient take Ctrl-C for themselves. On Ctrl-C the kernels are ended. The first
    work that raises ends what has not begun; what runs is finished, and the error is raised then.
    """
    with futures.ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(work) for work in works]
        try:
            futures.wait(running, return_when=futures.FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(one.done() for one in running):
                for kernel in psutil.Process().children():
                    kernel.kill()
                time.sleep(0.1)
            raise
        for one in running:
            if not one.cancelled():
                one.result()


def reproduce(lab: Lab, sources: Path) -> dict[str, Any]:
    """Makes every stage, runs every notebook in `sources`, and writes and returns the manifest. Of
    several processes that work as one, the main one alone does what follows the stages."""
    if not store.MAIN:
        make_all(lab, lab.stages)
        return {}
    started, when = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with store.only_run(lab.folder), room_on_disk(lab.folder, "notebooks and manifest"):
        save_profile(lab.profile, lab.folder / "profile.yaml")  # notebooks and `tidy` read it
        make_all(lab, lab.stages)
        kept = Notebooks(lab, sources)
        works = [partial(kept.run, source) for source in kept.sources]
        stoppable(works, 2 if lab.profile.device == "cpu" else 1)
        kept.publish()
        stages, trimmed = dict[str, Any](), dict[str, Any]()
        for one in lab.stages:
            home = lab.store.home(one)
            stages[one.name] = {"key": one.key, **told(home, lab.store.status[one.name])}
            if (file := home / "trimmed.json").is_file():
                trimmed[one.name] = read_json(file)
        manifest = {
            "profile": lab.profile.model_dump(mode="json"),
            "started": when,
            "seconds_of_this_call": round(time.monotonic() - started, 1),
            "stages": stages,
            "trimmed_prompts": {name: one for name, one in trimmed.items() if one["trimmed"]},
            "notebooks": {n: told(home, kept.status[n]) for n, home in sorted(kept.homes.items())},
        }
        write_whole(lab.folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def tidy(lab: Lab, sources: Path) -> int:
    """Removes what the run's profile does not reach any more; returns how many stages that were."""
    wanted = {lab.store.home(stage) for stage in lab.stages}
    with store.only_run(lab.folder):
        notebooks = Notebooks(lab, sources)
        wanted |= {home for source in notebooks.sources if (home := notebooks.state(source)[0])}
        old = [home for home in (lab.folder / "stages").glob("*/*") if home not in wanted]
        for place in [*old, *(lab.folder / "partial").iterdir()]:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return len(old)
