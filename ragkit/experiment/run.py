"""A run: every stage made by a pool of processes, every notebook executed by papermill and kept in
`<run>/stages/notebook/<key>`, the manifest written."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import psutil

from ragkit import errors
from ragkit.data.files import file_hash, room_on_disk, write_whole
from ragkit.errors import NotebookError, RagkitError
from ragkit.experiment import store
from ragkit.experiment.lab import FIGURES, OPENED, Lab, read_json
from ragkit.experiment.provenance import PACKAGE, closure, versions
from ragkit.experiment.store import Stage, Store
from ragkit.profile import save_profile

log = logging.getLogger(__name__)
NOISY = "papermill httpx bm25s datasets faiss traitlets spacy asyncio sentence_transformers"
DRAWN_WITH = ("pandas", "matplotlib", "seaborn", "papermill", "nbclient", "ipykernel")
KILLED = (
    "its Python process was killed, most likely because memory ran out. Close other programs, then "
    "give the same command: it goes on from there."
)
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
        raise RagkitError(f"Stage {names}: {KILLED}") from None
    finally:
        for process in multiprocessing.active_children() if running else ():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def stoppable(works: Sequence[Callable[[], object]], at_once: int = 1) -> None:
    """Runs works that talk to notebooks' kernels in threads, begun in order: in the main thread
    papermill and nbclient take Ctrl-C for themselves. On Ctrl-C the kernels are ended. After an
    error nothing is begun; what runs is finished, and the error is raised then."""
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


def told(home: Path, status: str) -> dict[str, Any]:
    """What a stage or notebook says of itself, for the manifest, and what happened to it now."""
    kept = ("kind", "seconds", "peak_mib", "units", "made")
    saved = {key: value for key, value in read_json(home / store.RECORD).items() if key in kept}
    return {"key": home.name, **saved, "status": status}


def kernel_of_here(folder: Path, name: str, env: dict[str, str]) -> str:
    """Writes a kernel that runs this interpreter and package, for a `python3` that others installed
    may run another; returns its name. It is none of several processes that work as one, and logs
    nothing: a cell's errors stand in the notebook."""
    place = folder / "kernels" / name
    place.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1", **env}
    quiet = ["ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"]
    spec = {"argv": [sys.executable, "-m", *quiet], "display_name": name, "language": "python"}
    write_whole(place / "kernel.json", json.dumps(spec | {"env": env}))
    known = [str(folder), *os.environ.get("JUPYTER_PATH", "").split(os.pathsep)]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, dict.fromkeys(known)))
    return name


class Notebooks:
    """The notebooks in `sources` as stages of a run, whose own stages must be made. An execution,
    with its figures, holds as long as its source, profile, code, libraries and the stages that it
    opened are the same. `homes` and `status` say by name where one lies and what happened to it."""

    def __init__(self, lab: Lab, sources: Path) -> None:
        self.lab, self.sources = lab, sorted(sources.glob("[0-9A]*.ipynb"))
        self.homes, self.status = dict[str, Path](), dict[str, str]()
        if not self.sources:
            raise NotebookError(f"No notebooks in {sources}. Run this from a checkout.")

    def record(self, source: Path) -> dict[str, Any]:
        """What an execution depends on besides the stages that it opens."""
        cells = nbformat.read(source, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        profile = store.without_free(self.lab.profile.model_dump(mode="json", exclude={"name"}))
        own = {"its source": file_hash(source), **closure(code)}
        return {"profile": profile, "code": own, "versions": versions(DRAWN_WITH)}

    def state(self, source: Path) -> tuple[Path | None, str]:
        """The folder of an execution that holds; if there is none, why not the newest."""
        record, reasons = self.record(source), []
        keys = {stage.key for stage in self.lab.stages}  # a variation opens many under its own name
        for home, saved in store.remembered(self.lab.folder, "notebook", source.stem):
            was = saved["record"]
            opened = {n: pair for n, pair in was.get("inputs", {}).items() if pair[1] in keys}
            now = record | {"inputs": opened}
            if was == now and store.contents(home) == saved["files"]:
                return home, ""
            damaged = "its files are damaged or missing"
            reasons.append(damaged if was == now else store.difference(was, now))
        return None, [*reasons, "not made yet"][0]

    def run(self, source: Path) -> None:
        """Executes a notebook aside and keeps it with its figures, if no execution holds."""
        (home, reason), name, place = self.state(source), source.stem, self.lab.folder / "partial"
        self.status[name] = f"ran: {reason}" if home is None else "reused"
        if home is not None:
            self.homes[name] = home
            log.info("reused   notebook %s", name)
            return
        log.info("running  notebook %s (%s)", name, reason)
        folder, noted = place / f"notebook-{name}", place / f"{name}.opened"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "figures").mkdir(parents=True)
        noted.write_text("")
        record, started = self.record(source), time.monotonic()
        self.execute(source, folder, {OPENED: str(noted), FIGURES: str(folder / "figures")})
        seconds = round(time.monotonic() - started, 1)
        pairs = map(json.loads, noted.read_text("utf8").splitlines())
        record["inputs"] = {stage: [stage, key] for stage, key in pairs}
        home = self.lab.folder / "stages" / "notebook" / store.fingerprint(record)
        saved = {"name": name, "kind": "notebook", "record": record, "seconds": seconds}
        store.keep(folder, home, saved | {"units": {"notebooks": 1}})
        self.homes[name] = home
        log.info("done     notebook %s in %.0f s", name, seconds)

    def execute(self, source: Path, folder: Path, env: dict[str, str]) -> None:
        """Runs a notebook; what goes wrong ends as one sentence that names notebook and cell."""
        import papermill  # it takes a second, and a run with nothing to do need not wait for it
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        profile, out = (self.lab.folder / "profile.yaml").resolve(), folder / source.name
        given = {"PROFILE": str(profile), "RUNS": str(self.lab.runs.resolve())}
        # papermill only warns of a parameter that a notebook lacks; its own value would count then
        if lacks := sorted(given.keys() - papermill.inspect_notebook(str(source)).keys()):
            told = f"{source.name} does not know the parameter {', '.join(lacks)}"
            raise NotebookError(f"{told}: give it a line in its cell tagged 'parameters'.")
        kernels, name = self.lab.folder / "partial" / "jupyter", f"ragkit-{source.stem}"
        options = {"kernel_name": kernel_of_here(kernels, name, env), "progress_bar": False}
        try:
            papermill.execute_notebook(str(source), str(out), given, **options)
        except DeadKernelError:
            raise NotebookError(f"Notebook {source.name}: {KILLED}") from None
        except PapermillExecutionError as error:
            where = f"Notebook {source.name}, cell {error.exec_count}"
            if error.ename in OWN_ERRORS:  # they speak for themselves
                raise NotebookError(f"{where}: {error.evalue}") from None
            first = next(filter(None, map(str.strip, error.source.splitlines())), "")
            told = f"{error.ename}: {error.evalue}\nThe notebook with its traceback: {out}"
            raise NotebookError(f"{where} ({first!r}): {told}") from None

    def publish(self) -> None:
        """Lays the notebooks with their outputs, and all their figures, into the run's folder."""
        for part, below in (("notebooks", "*.ipynb"), ("figures", "figures/*")):
            with store.replaced(self.lab.folder / part) as aside:
                for home in self.homes.values():
                    for file in home.glob(below):
                        shutil.copy(file, aside)


def reproduce(lab: Lab, sources: Path) -> dict[str, Any]:
    """Makes every stage, runs every notebook in `sources`, and writes and returns the manifest. Of
    several processes that work as one, the main one alone does what follows the stages."""
    if store.SHARED:  # from here on the processes know of each other
        import_module("ragkit.models.device").start(lab.profile.device, lab.profile.threads)
    if not store.MAIN:
        make_all(lab, lab.stages)
        return {}
    started, when = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with store.only_run(lab.folder), room_on_disk(lab.folder, "notebooks and manifest"):
        save_profile(lab.profile, lab.folder / "profile.yaml")  # notebooks and `tidy` read it
        make_all(lab, lab.stages)
        store.SHARED = False  # what follows, the main process does alone
        kept = Notebooks(lab, sources)
        works = [partial(kept.run, source) for source in kept.sources]
        stoppable(works, 2 if lab.profile.device == "cpu" else 1)
        kept.publish()
        homes = {one.name: lab.store.home(one) for one in lab.stages}
        files = {name: home / "trimmed.json" for name, home in homes.items()}
        trimmed = {name: read_json(file) for name, file in files.items() if file.is_file()}
        manifest = {
            "profile": lab.profile.model_dump(mode="json"),
            "started": when,
            "seconds_of_this_call": round(time.monotonic() - started, 1),
            "stages": {n: told(home, lab.store.status[n]) for n, home in homes.items()},
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
