"""Sets are worked on side by side: a process each, and who is done helps the others."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from ragkit.errors import RagkitError
from ragkit.profile import load_profile


def start_logging() -> None:
    """Plain lines on the error stream; libraries speak only when something is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("papermill", "httpx", "bm25s", "datasets", "faiss", "traitlets", "spacy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ["TRANSFORMERS_VERBOSITY"] = (
        "error"  # it reports BERT's unused pooling layer at every load
    )


def make_sets(profile: str, runs: Path, names: list[str]) -> None:
    """Makes the stages of all sets; the notebooks then find them made.

    On a CPU with one process a set: all side by side. Otherwise one set after another, by all of the profile's processes.
    """
    machine = load_profile(profile).machine
    if machine.device == "cpu" and machine.processes == 1:
        together([(name, None) for name in names], profile, runs, names)
    else:
        for name in names:
            together([(name, rank) for rank in range(machine.processes)], profile, runs, names)


def together(
    jobs: list[tuple[str, int | None]], profile: str, runs: Path, names: list[str]
) -> None:
    """Runs processes, each with a set and, where several share one set, its rank; if one fails all are ended, and the reason is raised."""
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    port, workers = free_port(), {}
    for name, rank in jobs:
        others = [other for other in names if other != name] if rank is None else []
        joined = None if rank is None else (rank, len(jobs), port)
        workers[name, rank] = context.Process(
            target=make_set, args=(profile, runs, name, others, joined, errors), daemon=True
        )
    for worker in workers.values():
        worker.start()
    try:
        running = dict(workers)
        while running:
            multiprocessing.connection.wait([worker.sentinel for worker in running.values()])
            for name, rank in [
                job for job, worker in running.items() if worker.exitcode is not None
            ]:
                code = running.pop((name, rank)).exitcode
                if code == 2:
                    raise RagkitError(errors.get())
                if code:
                    raise RagkitError(
                        f"The process that made the stages of {name}"
                        + (
                            f" (number {rank + 1} of {len(jobs)})"
                            if rank is not None and len(jobs) > 1
                            else ""
                        )
                        + f" ended with {code}"
                        + (
                            ". Its traceback stands above."
                            if code > 0
                            else ": it was killed, most likely because memory ran out."
                        )
                        + " The same command goes on from what was finished."
                    )
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def free_port() -> int:
    """A port of this machine on which processes can find each other."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make_set(
    profile: str,
    runs: Path,
    name: str,
    others: list[str],
    joined: tuple[int, int, int] | None,
    errors: Any,
) -> None:
    """The work of one process: every stage of a set that the notebooks ask for, then what is left of the others' Step 2.

    That is begun from its end, towards the process whose set it is. `joined` is the process's rank, how many work on the set
    together, and the port on which they meet. The process ends with its parent, whatever ends that.
    """
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()  # type: ignore[union-attr]
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends this process
    os.environ["TQDM_DISABLE"] = "1"  # the bars of two processes on one line cannot be read
    if joined is not None and joined[1] > 1:
        rank, size, port = (str(value) for value in joined)
        os.environ |= {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    start_logging()
    from ragkit.experiment import tables as measured
    from ragkit.experiment.analysis import Analysis
    from ragkit.experiment.choices import trained
    from ragkit.experiment.evidence import parts
    from ragkit.experiment.lab import Lab

    try:
        lab = Lab(profile, runs)
        measured.premises(lab, name)
        measured.answer_rows(lab, name)
        measured.ceiling(lab, name)
        analysis = Analysis(lab, name)
        for which in lab.readers():
            analysis.tokens(which)
        trained(analysis)
        for target in analysis.targets():  # the longest part comes last: others can help with it
            analysis.hit_gains(target)
        parts(analysis)
        for other in others:
            for target in reversed(analysis.targets()):
                for seed in reversed(lab.profile.distill.seeds):
                    lab.distilled(other, target, seed)
    except RagkitError as error:
        errors.put(str(error))
        sys.exit(2)
