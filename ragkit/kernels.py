"""Work that talks to a notebook's kernel, and can still be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil


def stoppable(work: Callable[[], object]) -> None:
    """Runs `work` in a thread of its own, because in the main thread papermill and nbclient take Ctrl-C for themselves.

    On Ctrl-C the kernels are ended and KeyboardInterrupt goes on; otherwise what `work` raises is raised.
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        try:
            running.result()
        except KeyboardInterrupt:
            while not running.done():
                for kernel in psutil.Process().children():
                    kernel.kill()
                time.sleep(0.1)
            raise
