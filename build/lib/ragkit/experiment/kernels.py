"""Work that talks to notebooks' kernels, and can still be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import psutil


def stoppable(works: Sequence[Callable[[], object]], at_once: int = 1) -> None:
    """Runs works in threads, begun in order, because in the main thread papermill and nbclient take Ctrl-C for themselves.

    On Ctrl-C the kernels are ended and KeyboardInterrupt goes on. The first work that raises ends what has not begun; what runs is finished, and the
    error is raised then.
    """
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(work) for work in works]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
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
