"""Stages that run models, made by as many processes as there are: see `test_processes`.

`python tests/sharding.py OUT`, or the same by torchrun.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from ragkit.data.corpus import Corpus, write_passages
from ragkit.data.files import write_jsonl
from ragkit.data.worlds import build_world
from ragkit.distillation.teacher import make_teacher
from ragkit.models import device
from ragkit.models.answers import make_answers
from ragkit.models.fid import open_reader
from ragkit.models.index import make_candidates, make_index, make_vectors
from ragkit.models.retriever import make_retriever
from ragkit.models.step1 import make_step1
from ragkit.settings import ReaderSettings, WorldSet

SIZES = {"entities": 40, "distill": 45, "dev": 20, "test": 20}
ONE = WorldSet(source="world", name="a", world="almanac", seed=5, **SIZES)
READER = ReaderSettings(steps=6, checkpoints=1, batch=4, at_once=2)
SETTINGS = {
    "set": ONE.model_dump(),
    "retriever": {"crop_steps": 10, "at_once": 4},
    "index": {"shard": 50},
    "reader": READER.model_dump(),
    "world": "almanac",
    "which": "off-the-shelf",
    "answered": 11,
    "k": 3,
    "seed": 0,
    "questions": 9,
    "part": "distill",
    "order": "shuffled",
    "closed_book": False,
}
MAKERS = {
    "retriever": make_retriever,
    "vectors": make_vectors,
    "index": make_index,
    "candidates": make_candidates,
    "teacher": make_teacher,
    "answers": make_answers,
    "step1": make_step1,
}


def main(out: Path) -> None:
    device.start("cpu", 1)
    inputs = dict.fromkeys(("passages", "questions"), out)
    if device.is_main():
        corpus = build_world(ONE)
        write_passages(out / "passages.arrow", corpus.passages)
        for part, questions in corpus.questions.items():
            write_jsonl(out / f"{part}.jsonl", map(asdict, questions))
    device.agreed()
    for name, make in MAKERS.items():
        if device.is_main():
            (out / name).mkdir()
        device.agreed()
        given = inputs
        if name == "answers":
            given = {role: inputs[role] for role in ("passages", "questions")}
            given["ranking"] = inputs["candidates"]
        make(out / name, given, SETTINGS)
        device.agreed()
        inputs[name] = out / name
    corpus = Corpus.load("a", out, out)
    questions, passages = corpus.questions["dev"], list(corpus.passages[:3])
    reader = open_reader(inputs, SETTINGS | {"which": "step 3"})
    prompts = [reader.prompt(q, passages, q.answers[0]) for q in questions]
    with torch.no_grad():
        losses = device.spread(prompts, 1, lambda one: reader.losses(one).tolist(), "losses")
    mean = device.mean_over_processes(float(PartialState().process_index))
    seen = {"losses": losses, "mean rank": mean, "size": device.size()}
    seen["started"] = int(os.environ.get("WORLD_SIZE", 1))
    seen["backend"] = dist.get_backend() if dist.is_initialized() else None
    if device.is_main():
        (out / "seen.json").write_text(json.dumps(seen))
    device.agreed()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
