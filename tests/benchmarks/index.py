"""Seconds, memory and recall of an IVF-PQ over a million vectors; `make bench` runs it.

The vectors are made: clusters in a space of 128 of the 768 dimensions, whose variance falls with their number, around a common mean, with a little noise in all
dimensions and lengths spread by 15 %, as MiniLM's are on real passages. A query is a passage that was moved within those 128
dimensions by half a standard deviation in each (a cluster's own spread is 0.8). Exact neighbours come from a scan of all vectors.
Writes index_bench_steps.csv and index_bench_recall.csv to the folder given, beside the vectors (1.5 GB in float16) and the index, which stay: a bench that
was stopped goes on, but then its seconds are those of the last part. Memory is the process's peak up to the end of each step, mapped pages of files included.
Nothing else should run on a machine of two cores.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ragkit import index
from ragkit.index import build, exact_search, open_index
from ragkit.profile import IndexSettings
from ragkit.vectors import Vectors, shards, write_shard

THREADS = 2
DIMENSIONS, RANK, SHARD, QUERIES, K, SEED = 768, 128, 50_000, 1000, 5, 0
A_CLUSTER = 40  # vectors
SETTINGS = IndexSettings(kind="ivfpq", dtype="float16", shard=SHARD, trained_on=200_000, lists=2048, code_bytes=64)
PROBES, CANDIDATES = (16, 64, 128, 256, 512, 1024), (5, 20, 100, 400)
GOAL = 0.9  # recall@5


def plane() -> NDArray[np.float32]:
    """The directions `[rank, dimensions]` in which vectors differ, each as long as its standard deviation."""
    axes = np.linalg.qr(np.random.default_rng(SEED).standard_normal((DIMENSIONS, RANK)))[0].T
    return (axes * np.arange(1, RANK + 1)[:, None] ** -0.4).astype(np.float32)


def make_shard(number: int, rows: int, clusters: int) -> NDArray[np.float16]:
    fixed, rng = np.random.default_rng(SEED + 1), np.random.default_rng([SEED, number])
    centres = fixed.standard_normal((clusters, RANK), np.float32)
    mean = 3 * fixed.standard_normal(DIMENSIONS, np.float32) / DIMENSIONS**0.5
    inside = centres[rng.integers(clusters, size=rows)] + 0.8 * rng.standard_normal((rows, RANK), np.float32)
    vectors = mean + inside @ plane() + 0.02 * rng.standard_normal((rows, DIMENSIONS), np.float32)
    return (vectors * np.exp(0.15 * rng.standard_normal((rows, 1), np.float32))).astype(np.float16)


def make_queries(vectors: Vectors) -> NDArray[np.float32]:
    rng = np.random.default_rng(SEED + 2)
    return vectors.take(rng.integers(len(vectors), size=QUERIES)) + 0.5 * rng.standard_normal((QUERIES, RANK), np.float32) @ plane()


class Steps:
    """A table of what each step took."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    @contextmanager
    def step(self, name: str, made: Path | None = None) -> Iterator[None]:
        """`made` is a file or folder whose size is noted."""
        started = time.perf_counter()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        line = {"step": name, "seconds": round(time.perf_counter() - started, 2), "peak MiB so far": peak}
        if made is not None:
            files = [made] if made.is_file() else made.rglob("*")
            line["MB on disk"] = round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)
        self.lines.append(line)
        print(line, flush=True)

    def inside(self, name: str, function: str) -> None:
        """Makes each call of one of `ragkit.index`'s functions a step of its own, within the step that calls it."""
        plain = getattr(index, function)

        def timed(*given):
            with self.step(name):
                return plain(*given)

        setattr(index, function, timed)


def bench(folder: Path, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of steps and of recall."""
    faiss.omp_set_num_threads(THREADS)
    steps, home = Steps(), folder / "index"
    with steps.step("make the vectors", folder / "vectors"):
        for number in tqdm(sorted({*range(-(-count // SHARD))} - {*shards(folder / "vectors")}), desc="vectors"):
            write_shard(folder / "vectors", number, make_shard(number, min(SHARD, count - number * SHARD), count // A_CLUSTER))
    vectors = Vectors(folder / "vectors")
    queries = make_queries(vectors)
    steps.inside("- learn", "learn_ivfpq")
    steps.inside("- write a file of FAISS", "write_index")
    with steps.step("build", home):
        home.mkdir(exist_ok=True)
        build(vectors, SETTINGS, home, SEED)
    with steps.step("open"):
        open_index(vectors, SETTINGS, home)
    with steps.step(f"exact search of {QUERIES} queries"):
        best = exact_search(queries, vectors, K)[0]
    lines = []
    with steps.step(f"{len(PROBES) * len(CANDIDATES)} approximate searches of {QUERIES} queries"):
        for probes in PROBES:
            for candidates in CANDIDATES:
                opened = open_index(vectors, SETTINGS.model_copy(update={"probes": probes, "candidates": candidates}), home)
                opened.search(queries[:20], K)  # the lists are mapped anew; reading them for the first time is not counted
                started = time.perf_counter()
                found = opened.search(queries, K)[0]
                seconds = time.perf_counter() - started
                recall = (best[:, :, None] == found[:, None, :]).any(2).mean()
                lines.append({"probes": probes, "candidates": candidates, f"recall@{K}": round(recall, 4), "queries a second": round(QUERIES / seconds, 1)})
                print(lines[-1], flush=True)
    return pd.DataFrame(steps.lines), pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench"))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    steps, recall = bench(given.folder, given.vectors)
    steps.to_csv(given.folder / "index_bench_steps.csv", index=False)
    recall.to_csv(given.folder / "index_bench_recall.csv", index=False)
    print(steps.to_string(index=False), recall.to_string(index=False), sep="\n\n")
    reached = recall[recall[f"recall@{K}"] >= GOAL]
    if reached.empty:
        raise SystemExit(f"No setting reached recall@{K} of {GOAL}.")
    print(f"\nFastest of those with recall@{K} of {GOAL} or more:", reached.loc[reached["queries a second"].idxmax()].to_dict())


if __name__ == "__main__":
    main()
