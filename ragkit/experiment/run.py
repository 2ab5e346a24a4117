"""A run: stages made by a pool of processes, notebooks executed by papermill, the manifest."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from ragkit import errors
from ragkit.data.files import file_hash, room_on_disk, write_whole
from ragkit.errors import NotebookError, RagkitError
from ragkit.experiment import store
from ragkit.experiment.lab import FIGURES, Lab, read_json
from ragkit.experiment.provenance import PACKAGE, closure
from ragkit.experiment.store import Stage, Store
from ragkit.experiment.wanted import stages as stages_of
from ragkit.profile import save_profile
from ragkit.settings import REFERENCES, reference

log = logging.getLogger(__name__)
NOISY = "papermill httpx bm25s datasets faiss traitlets spacy asyncio sentence_transformers"
DRAWN_WITH = ("pandas", "matplotlib", "seaborn", "papermill", "nbclient", "ipykernel")
KILLED = "its Python process was killed, most likely because memory ran out. Close other "
KILLED += "programs, then give the same command: it goes on from there."
QUIET = {"TQDM_DISABLE": "1"}  # bars cannot be read of two processes, or kept in a notebook
OWN_ERRORS = {*vars(errors), "AttentionError"}


def start_logging() -> None:
    """Plain lines on the error stream; libraries speak only when something is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in NOISY.split():
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it reports BERT's unused pooler at every load


def begin_worker() -> None:
    """A worker leaves Ctrl-C to the main process, and ends with it, whatever ends that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store.SHARED = False  # it is none of several processes that work as one

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.environ |= QUIET
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
    """Makes what is missing, in order, each once its inputs are there; the first error ends it."""
    unmade = {one.key: one for one in stages if lab.store.agreed_reason(one) is not None}
    lab.store.status |= {s.name: "reused" for s in stages if s.key not in unmade} | lab.store.status
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
        raise RagkitError(f"Stage {names}: {KILLED}") from None
    finally:
        for process in multiprocessing.active_children() if running else ():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def stoppable(work: Callable[[], object]) -> None:
    """Runs work that talks to a notebook's kernel in a thread: in the main thread papermill and
    nbclient take Ctrl-C for themselves. On Ctrl-C the kernel is ended."""
    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread is there: what it does is known from here on
        try:
            pool.submit(work).result()
        except KeyboardInterrupt:
            behind = pool.submit(int)
            while not behind.done():
                for kernel in psutil.Process().children():
                    kernel.kill()
                time.sleep(0.1)
            raise


def kernel_of_here(**env: str) -> type[AsyncKernelManager]:
    """A class of kernels that run this interpreter and package, not those of a `python3` installed
    elsewhere; as one process alone, and without a log: a cell's errors stand in the notebook."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    alone = {"PYTHONPATH": path, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}
    quiet = ["ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"]
    spec = KernelSpec(argv=[sys.executable, "-m", *quiet], env=alone | QUIET | env)
    return type("KernelOfHere", (AsyncKernelManager,), {"kernel_spec": spec})


def notebooks_of(lab: Lab, sources: Path) -> list[Stage]:
    """The notebooks in `sources` as stages made of all others, which they may open. One depends
    besides on its source, profile, code, the libraries that it draws with, and the tables that it
    may open (`tables.published`): those of references, of which this run may be one."""
    files = sorted(sources.glob("[0-9A]*.ipynb"))
    if not files:
        raise NotebookError(f"No notebooks in {sources}. Run this from a checkout.")
    inputs = {one.name: one for one in stages_of(lab.graph)}
    common = {
        "profile": lab.profile.model_dump(mode="json", exclude={"name"}),
        "drawn with": {name: metadata.version(name) for name in DRAWN_WITH},
    }
    notebooks = []
    for file in files:
        cells = nbformat.read(file, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        own = {"its source": store.fingerprint([one.source for one in cells]), **closure(code)}
        settings: Any = common | {"code": own, "source": os.path.relpath(file, PACKAGE.parent)}
        if "published(" in code:
            here = lab.folder / "figures" if reference(lab.base).is_dir() else REFERENCES
            tables = {*REFERENCES.rglob("*.csv"), *here.glob("*.csv")}
            others = [one for one in sorted(tables) if not one.name.startswith(file.stem[:2])]
            settings["tables"] = [[one.name, file_hash(one)] for one in others]
        maker = f"{__name__}:make_notebook"
        notebooks.append(Stage("notebook", file.stem, maker, settings, inputs))
    return notebooks


def make_notebook(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Executes a notebook, figures in `figures/`; NotebookError names notebook, cell, problem."""
    import papermill  # it takes a second, and a run with nothing to do need not wait for it
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    run, source = folder.resolve().parent.parent, PACKAGE.parent / settings["source"]
    out, figures = folder.resolve() / source.name, folder.resolve() / "figures"
    figures.mkdir(exist_ok=True)
    given = {"PROFILE": str(run / "profile.yaml"), "RUNS": str(run.parent)}
    # papermill only warns of a parameter that a notebook lacks; its own value would count then
    if lacks := sorted(given.keys() - papermill.inspect_notebook(str(source)).keys()):
        told = f"{source.name} does not know the parameter {', '.join(lacks)}"
        raise NotebookError(f"{told}: give it a line in its cell tagged 'parameters'.")
    kernel = kernel_of_here(**{FIGURES: str(figures)})
    options = {"kernel_manager_class": kernel, "progress_bar": False}
    try:
        stoppable(partial(papermill.execute_notebook, source, out, given, **options))
    except DeadKernelError:
        raise NotebookError(f"Notebook {source.name}: {KILLED}") from None
    except PapermillExecutionError as error:
        where = f"Notebook {source.name}, cell {error.exec_count}"
        if error.ename in OWN_ERRORS:  # they speak for themselves
            raise NotebookError(f"{where}: {error.evalue}") from None
        first = next(filter(None, map(str.strip, error.source.splitlines())), "")
        told = f"{error.ename}: {error.evalue}\nThe notebook with its traceback: {out}"
        raise NotebookError(f"{where} ({first!r}): {told}") from None


def publish(lab: Lab, notebooks: Sequence[Stage]) -> None:
    """Executes notebooks, and lays them with their figures into the run's folder."""
    make_all(lab, notebooks)
    for part, below in (("notebooks", "*.ipynb"), ("figures", "figures/*")):
        with store.replaced(lab.folder / part) as aside:
            for one in notebooks:
                for file in lab.store.home(one).glob(below):
                    shutil.copy(file, aside)


def told(lab: Lab, stage: Stage) -> dict[str, Any]:
    """What a stage or notebook says of itself, for the manifest, and what happened to it now."""
    saved = read_json(lab.store.home(stage) / store.RECORD)
    kept = {key: saved[key] for key in ("kind", "seconds", "peak_mib", "units", "made")}
    if stage.kind == "notebook":
        del kept["peak_mib"]  # that of the process which started its kernel
    return {"key": stage.key, **kept, "status": lab.status[stage.name]}


def reproduce(lab: Lab, sources: Path) -> dict[str, Any]:
    """Makes every stage, runs every notebook in `sources`, and writes and returns the manifest. Of
    several processes that work as one, the main one alone does what follows the stages."""
    if store.SHARED:  # from here on the processes know of each other
        import_module("ragkit.models.device").start(lab.profile.device, lab.profile.threads)
    if not store.MAIN:
        make_all(lab, stages_of(lab.graph))
        return {}
    started, when = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with store.only_run(lab.folder), room_on_disk(lab.folder, "notebooks and manifest"):
        save_profile(lab.profile, lab.folder / "profile.yaml")  # notebooks and `tidy` read it
        make_all(lab, stages_of(lab.graph))
        store.SHARED = False  # what follows, the main process does alone
        alone = [one for one in notebooks_of(lab, sources) if "tables" not in one.settings]
        publish(lab, alone)
        publish(lab, notebooks := notebooks_of(lab, sources))  # now with those of these tables
        trimmed = {}
        for one in stages_of(lab.graph):
            file = lab.store.home(one) / "trimmed.json"
            if file.is_file() and (counts := read_json(file))["trimmed"]:
                trimmed[one.name] = counts
        manifest = {
            "profile": lab.profile.model_dump(mode="json"),
            "started": when,
            "seconds_of_this_call": round(time.monotonic() - started, 1),
            "stages": {one.name: told(lab, one) for one in stages_of(lab.graph)},
            "trimmed_prompts": trimmed,
            "notebooks": {one.name: told(lab, one) for one in notebooks},
        }
        write_whole(lab.folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def tidy(lab: Lab, sources: Path) -> int:
    """Removes what the run's profile does not reach any more; returns how many stages that were."""
    wanted = {lab.store.home(one) for one in [*stages_of(lab.graph), *notebooks_of(lab, sources)]}
    with store.only_run(lab.folder):
        old = [home for home in (lab.folder / "stages").glob("*/*") if home not in wanted]
        for place in [*old, *(lab.folder / "partial").iterdir()]:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return len(old)
