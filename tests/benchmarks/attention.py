"""Seconds and peak memory of a plain fused pass, ours, and eager attention; `make bench` runs it.

Every measurement runs in a process of its own. Times: the ways take turns within a process, and the
median of the wall clock counts; on a CPU two threads work, so nothing else should run on a machine
of two cores. Memory: the peak of one pass beyond the loaded model. The plain pass is the base
model's, without the head, so that ours is not flattered by it; ours records 8 rows and reduces them
to token contributions; eager keeps `output_attentions`. Writes attention_bench.csv, .png and .svg
to the folder given, and every measurement as soon as it is made: a stopped bench goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import FalconConfig, FalconModel, LlamaConfig, LlamaModel, PreTrainedModel

from ragkit.attention import observe, pooled
from ragkit.attention.cost import (
    Shape,
    eager_bytes,
    fitted_rates,
    fused_work,
    recorded_bytes,
    recorded_work,
)

ROWS = 8
THREADS = 2
EAGER_UP_TO = 4096  # beyond it, eager attention of this shape needs more than 24 GiB
VOCABULARY = 1000  # the embedding is looked up, not computed with
WAYS = ("fused", "ours", "eager")
SHAPES = {
    "falcon": Shape(12, 12, 64, 12, 2 * 768 * 3072),
    "llama": Shape(12, 12, 64, 4, 3 * 768 * 2048),
    "falcon-rw-1b": Shape(24, 32, 64, 32, 2 * 2048 * 8192),
}


def model_of(kind: str, implementation: str) -> PreTrainedModel:
    shape = SHAPES[kind]
    same = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            **same,
            intermediate_size=2048,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=8192,
        )
        config._attn_implementation = implementation
        return LlamaModel(config).eval()
    config = FalconConfig(
        **same,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
        bias=True,
    )
    config._attn_implementation = implementation
    return FalconModel(config).eval()


def run(model: PreTrainedModel, way: str, tokens: int) -> None:
    """One pass over one prompt of random tokens."""
    ids = torch.randint(3, VOCABULARY, (1, tokens), device=model.device)
    mask = torch.ones_like(ids)
    if way == "ours":
        rows = torch.arange(tokens - ROWS, tokens)[None]
        uses = torch.ones(1, 1, ROWS, device=model.device)
        pooled(lambda visit: observe(model, ids, mask, rows, visit), uses)
    else:
        with torch.no_grad():
            model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                output_attentions=way == "eager",
            )
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def resident(field: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` at most since the peak was reset."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def peak(model: PreTrainedModel, way: str, tokens: int) -> int:
    """Bytes that one pass needs at most, beyond what is there before it."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, way, tokens)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    before = resident("VmRSS")
    run(model, way, tokens)
    return resident("VmHWM") - before


def measure(kind: str, tokens: int, ways: list[str], repeats: int) -> None:
    """In a process of its own: prints seconds (or, without repeats, peak bytes) of each way."""
    on_gpu = kind == "falcon-rw-1b"
    torch.set_num_threads(THREADS)
    models = {}
    for implementation in {"eager" if way == "eager" else "sdpa" for way in ways}:
        models[implementation] = model_of(kind, implementation)
        if on_gpu:
            models[implementation] = models[implementation].to("cuda", torch.bfloat16)
    chosen = {way: models["eager" if way == "eager" else "sdpa"] for way in ways}
    for way, model in chosen.items():
        run(model, way, 64)
    if not repeats:
        print(json.dumps({way: peak(model, way, tokens) for way, model in chosen.items()}))
        return
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, model in chosen.items():
            started = time.perf_counter()
            run(model, way, tokens)
            seconds[way].append(time.perf_counter() - started)
    print(json.dumps(seconds))


def apart(kind: str, tokens: int, ways: list[str], repeats: int) -> dict:
    arguments = ["--measure", kind, str(tokens), ",".join(ways), str(repeats)]
    # Freed tensors must go back to the system at once, or the peak holds what glibc kept for later.
    environment = os.environ if repeats else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        said = done.stderr[-2000:]
        raise SystemExit(f"{kind}, {tokens} tokens, {ways}: failed (out of memory?).\n{said}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of(kinds: list[str], lengths: list[int], repeats: int, folder: Path) -> pd.DataFrame:
    """One line for each kind, length and way; see `modelled` for the last columns."""
    kept = folder / "measured.json"
    lines = json.loads(kept.read_text()) if kept.exists() else []
    cases = [(kind, tokens) for tokens in lengths for kind in kinds if kind != "falcon-rw-1b"] + [
        ("falcon-rw-1b", 2048)
    ] * ("falcon-rw-1b" in kinds)
    for kind, tokens in tqdm(cases, desc="bench"):
        if any(line["kind"] == kind and line["tokens"] == tokens for line in lines):
            continue
        ways = [way for way in WAYS if way != "eager" or tokens <= EAGER_UP_TO]
        seconds = apart(kind, tokens, ways, repeats)
        for way in ways:
            memory = apart(kind, tokens, [way], 0)[way]
            lines.append(
                {
                    "kind": kind,
                    "tokens": tokens,
                    "way": way,
                    "seconds": statistics.median(seconds[way]),
                    "MB": memory / 1e6,
                    "runs": repeats,
                }
            )
        kept.write_text(json.dumps(lines))
    return modelled(
        pd.DataFrame(lines).sort_values(["kind", "tokens"], kind="stable", ignore_index=True)
    )


def modelled(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the ratios to the plain pass, and what the cost model says (of eager only its memory).

    The rates are fitted to the plain passes of a kind; the memory of ours is the plain pass's plus
    the model's.
    """
    plain = table[table["way"] == "fused"].set_index(["kind", "tokens"])
    table["time ratio"] = [
        s / plain.loc[(k, t), "seconds"]
        for k, t, s in zip(table["kind"], table["tokens"], table["seconds"], strict=True)
    ]
    table["memory ratio"] = [
        m / plain.loc[(k, t), "MB"]
        for k, t, m in zip(table["kind"], table["tokens"], table["MB"], strict=True)
    ]
    for kind, part in table.groupby("kind"):
        shape, fused = SHAPES[str(kind)], part[part["way"] == "fused"]
        if len(fused) < 2:
            continue  # two rates cannot be fitted to one length
        rates = fitted_rates(shape, fused["tokens"].tolist(), fused["seconds"].to_numpy(np.float64))
        for i, line in part.iterrows():
            work = {
                "fused": fused_work(shape, line["tokens"]),
                "ours": recorded_work(shape, line["tokens"], ROWS),
            }.get(line["way"])
            table.loc[i, "modelled seconds"] = (
                float("nan") if work is None else (work / rates).sum()
            )
            base = float(plain.loc[(kind, line["tokens"]), "MB"])
            more = {
                "fused": float("nan"),
                "ours": base + recorded_bytes(shape, line["tokens"], ROWS) / 1e6,
                "eager": eager_bytes(shape, line["tokens"]) / 1e6,
            }
            table.loc[i, "modelled MB"] = more[line["way"]]
    table["device"] = [
        "cuda" if kind == "falcon-rw-1b" else f"cpu, {THREADS} threads" for kind in table["kind"]
    ]
    table["versions"] = f"torch {torch.__version__}"
    return table.round(
        {
            "seconds": 4,
            "MB": 1,
            "time ratio": 3,
            "memory ratio": 3,
            "modelled seconds": 4,
            "modelled MB": 1,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        kind, tokens, ways, repeats = given.measure
        measure(kind, int(tokens), ways.split(","), int(repeats))
        return
    kinds = ["falcon", "llama"] + (["falcon-rw-1b"] if torch.cuda.is_available() else [])
    given.folder.mkdir(parents=True, exist_ok=True)
    table = table_of(kinds, given.tokens, given.repeats, given.folder)
    from ragkit.pages import plots  # not at the top: the measuring processes would pay for it

    plots.use_theme()
    figure, alt = plots.attention_cost(table)
    plots.show(figure, alt, given.folder, "attention_bench", table)
    print(table.drop(columns=["versions"]).to_string(index=False))


if __name__ == "__main__":
    main()
