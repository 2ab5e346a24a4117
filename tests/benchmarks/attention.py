"""Seconds and peak memory of a plain fused pass, ours, and eager attention; `make bench` runs it.

Every measurement runs in a process of its own. Times: the ways take turns within a process, and the
median of the wall clock counts; on a CPU two threads work, so nothing else should run on a machine
of two cores. Memory: the peak of one pass beyond the loaded model. The plain pass is the base
model's, without the head, so that ours is not flattered by it; ours records 8 rows and reduces them
to token contributions; eager keeps `output_attentions`. Writes attention_bench.csv (drawn in A2)
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

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import FalconConfig, FalconModel, LlamaConfig, LlamaModel, PreTrainedModel

from ragkit.attention import observe, pooled

ROWS = 8
THREADS = 2
EAGER_UP_TO = 4096  # beyond it, eager attention of this shape needs more than 24 GiB
VOCABULARY = 1000  # the embedding is looked up, not computed with
WAYS = ("fused", "ours", "eager")
ON_GPU = "falcon-rw-1b"
GPT2 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
ALIBI = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
GROUPED = {"num_key_value_heads": 4, "intermediate_size": 2048, "max_position_embeddings": 8192}
SIZES = {
    "falcon": {**GPT2, **ALIBI},
    "llama": {**GPT2, **GROUPED},
    ON_GPU: {**ALIBI, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
}


def model_of(kind: str, implementation: str) -> PreTrainedModel:
    of_config, of_model = (
        (LlamaConfig, LlamaModel) if kind == "llama" else (FalconConfig, FalconModel)
    )
    config = of_config(**SIZES[kind], vocab_size=VOCABULARY)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return of_model(config).eval()


def run(model: PreTrainedModel, way: str, tokens: int) -> None:
    """One pass over one prompt of random tokens."""
    ids = torch.randint(3, VOCABULARY, (1, tokens), device=model.device)
    mask = torch.ones_like(ids)
    if way == "ours":
        rows = torch.arange(tokens - ROWS, tokens)[None]
        uses = torch.ones(1, 1, ROWS, device=model.device)
        pooled(lambda visit: observe(model, ids, mask, rows, visit), uses)
    else:
        kept = {"use_cache": False, "output_attentions": way == "eager"}
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, **kept)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def resident(field: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` at most since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


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
    torch.set_num_threads(THREADS)
    models = {}
    for implementation in {"eager" if way == "eager" else "sdpa" for way in ways}:
        models[implementation] = model_of(kind, implementation)
        if kind == ON_GPU:
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
    command = [sys.executable, __file__, "--measure", kind, str(tokens), ",".join(ways)]
    # Freed tensors must go back to the system at once, or the peak holds what glibc kept for later.
    environment = os.environ if repeats else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, str(repeats)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        said = done.stderr[-2000:]
        raise SystemExit(f"{kind}, {tokens} tokens, {ways}: failed (out of memory?).\n{said}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of(kinds: list[str], lengths: list[int], repeats: int, folder: Path) -> pd.DataFrame:
    """One line for each kind, length and way, with the ratios to the plain pass."""
    kept = folder / "measured.json"
    lines = json.loads(kept.read_text()) if kept.exists() else []
    cases = [(kind, tokens) for tokens in lengths for kind in kinds if kind != ON_GPU]
    cases += [(ON_GPU, 2048)] * (ON_GPU in kinds)
    for kind, tokens in tqdm(cases, desc="bench"):
        if any(line["kind"] == kind and line["tokens"] == tokens for line in lines):
            continue
        ways = [way for way in WAYS if way != "eager" or tokens <= EAGER_UP_TO]
        seconds = apart(kind, tokens, ways, repeats)
        for way in ways:
            line = {"kind": kind, "tokens": tokens, "way": way}
            line |= {"seconds": statistics.median(seconds[way])}
            line |= {"MB": apart(kind, tokens, [way], 0)[way] / 1e6, "runs": repeats}
            lines.append(line)
        kept.write_text(json.dumps(lines))
    table = pd.DataFrame(lines).sort_values(["kind", "tokens"], kind="stable", ignore_index=True)
    plain = table[table["way"] == "fused"].set_index(["kind", "tokens"])
    for column, ratio in (("seconds", "time ratio"), ("MB", "memory ratio")):
        base = plain[column].reindex(pd.MultiIndex.from_frame(table[["kind", "tokens"]]))
        table[ratio] = table[column] / base.to_numpy()
    on_cpu = f"cpu, {THREADS} threads"
    table["device"] = ["cuda" if kind == ON_GPU else on_cpu for kind in table["kind"]]
    table["versions"] = f"torch {torch.__version__}"
    return table.round({"seconds": 4, "MB": 1, "time ratio": 3, "memory ratio": 3})


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
    kinds = ["falcon", "llama"] + ([ON_GPU] if torch.cuda.is_available() else [])
    given.folder.mkdir(parents=True, exist_ok=True)
    table = table_of(kinds, given.tokens, given.repeats, given.folder)
    table.to_csv(given.folder / "attention_bench.csv", index=False)
    print(table.drop(columns=["versions"]).to_string(index=False))


if __name__ == "__main__":
    main()
