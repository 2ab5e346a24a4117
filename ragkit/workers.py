"""Sets are worked on side by side: a process each, and who is done helps the others."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ragkit import RagkitError


def start_logging() -> None:
    """Plain lines on the error stream; libraries speak only when something is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("papermill", "httpx", "bm25s", "datasets", "faiss", "traitlets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it reports BERT's unused pooling layer at every load


def make_sets(profile: str, runs: Path, names: list[str]) -> None:
    """Makes the stages of all sets side by side, a process each; the notebooks then find them made."""
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    workers = {}
    for name in names:
        others = [other for other in names if other != name]
        workers[name] = context.Process(target=make_set, args=(profile, runs, name, others, errors), daemon=True)
    for worker in workers.values():
        worker.start()
    try:
        running = dict(workers)
        while running:
            multiprocessing.connection.wait([worker.sentinel for worker in running.values()])
            for name in [name for name, worker in running.items() if worker.exitcode is not None]:
                code = running.pop(name).exitcode
                if code == 2:
                    raise RagkitError(errors.get())
                if code:
                    raise RagkitError(
                        f"The process that made the stages of {name} ended with {code}"
                        + (". Its traceback stands above." if code > 0 else ": it was killed, most likely because memory ran out.")
                        + " The same command goes on from what was finished."
                    )
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def make_set(profile: str, runs: Path, name: str, others: list[str], errors: Any) -> None:
    """The work of one process of `make_sets`: every stage of a set that the notebooks ask for, then what is left of the others' Step 2.

    That is begun from its end, towards the process whose set it is. The process ends with its parent, whatever ends that.
    """
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    os.environ["TQDM_DISABLE"] = "1"  # the bars of two processes on one line cannot be read
    start_logging()
    from ragkit.analysis import Analysis
    from ragkit.choices import trained
    from ragkit.evidence import parts
    from ragkit.lab import Lab

    try:
        lab = Lab(profile, runs)
        lab.premises(name)
        lab.answer_rows(name)
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
