"""The recipe of the embedded off-the-shelf reader: a plain language model on endless fresh worlds.

`python -m ragkit.models.pretrain FOLDER` makes it (hours); nothing imports this module.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from ragkit.data import prose, worlds
from ragkit.data.files import file_hash
from ragkit.data.passages import block
from ragkit.data.vocabulary import build_tokenizer
from ragkit.models import device
from ragkit.settings import MachineSettings

log = logging.getLogger(__name__)
HIDDEN, LAYERS, HEADS = 64, 3, 8
SPECIAL = ("bos", "eos", "pad")
# The rate is constant and falls to zero over the last DECAY_STEPS: a run can be lengthened.
PEAK_RATE, WARM_UP, DECAY_STEPS = 3e-3, 100, 6000
# Steps: first registers alone, then pages of two bare passages too, then full pages.
REGISTERS_ONLY, SHORT_PAGES = 1500, 6000
# Of a token's loss: most text cannot be foretold, a fact told again can.
WEIGHTS = {"given": 0.2, "frame": 1.0, "answer": 8.0}
SIMILARITY, COPYING, BRANCH = 0.12, 0.08, 0.002  # the first weights, see `start`
CHECKPOINT = "checkpoint.pt"


def reader_config(tokenizer: PreTrainedTokenizerFast) -> FalconConfig:
    """Falcon-RW-1B's architecture (ALiBi, multi-head attention, biases), much smaller."""
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": HEADS, "max_position_embeddings": 1024}
    shape |= {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    shape |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    return FalconConfig(vocab_size=len(tokenizer), initializer_range=0.05, **shape)


@torch.no_grad()
def start(config: FalconConfig) -> FalconForCausalLM:
    """An untrained reader whose later layers begin by attending to similar contexts and copying
    what they find.

    Mimetic initialisation (Trockman and Kolter 2023): in every layer but the first, keys begin
    equal to queries and value times output begins as a multiple of the identity; all other branches
    begin near zero. With Falcon's usual random attention, finding the entity meant was still at
    chance after twice the text that this start needed.
    """
    model = FalconForCausalLM(config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = hidden // heads
    layers: Any = model.transformer.h
    for number, layer in enumerate(layers):
        attention = layer.self_attention
        layer.mlp.dense_4h_to_h.weight.normal_(0, BRANCH)
        if number == 0:  # gathers each token's neighbours
            attention.dense.weight.normal_(0, 0.02)
            continue
        rotation = torch.linalg.qr(torch.randn(hidden, hidden))[0] * COPYING**0.5
        by_head = attention.query_key_value.weight.view(heads, 3, size, hidden)
        by_head[:, 0].normal_(0, SIMILARITY)
        by_head[:, 1] = by_head[:, 0]
        by_head[:, 2] = rotation.view(heads, size, hidden)
        attention.dense.weight.copy_(rotation.T)
    return model


def pages(step: int, seed: int) -> list[list[prose.Span]]:
    """The pages of a step, all of one kind; always the same ones, so that a run can be resumed."""
    rng = random.Random(f"pretrain {seed} {step}")
    if step < REGISTERS_ONLY or rng.random() < (0.4 if step < SHORT_PAGES else 0.1):
        n, wordings = rng.choice((2, 3, 4)), 0 if step < REGISTERS_ONLY else rng.choice((0, 2))
        sharing = 0.15 if step < REGISTERS_ONLY else rng.choice((0.15, 1.0, 2.0))
        return [prose.register_page(rng, n, sharing, wordings) for _ in range(48 // n)]
    if step < SHORT_PAGES:
        shares = (0.15, 0.5) if step < SHORT_PAGES // 2 else (0.15, 0.5, 1.0, 2.0)
        sharing = rng.choice(shares)
        return [prose.passages_page(rng, 2, 0, sharing, 8, 0) for _ in range(16)]
    n, sharing = rng.randint(2, 5), rng.choice((0.15, 1.0, 2.0, 3.0))
    more = 3 * n + 2
    count = range(24 // n)
    return [prose.passages_page(rng, n, rng.randint(0, 3), sharing, more, 2) for _ in count]


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: list[list[prose.Span]]
) -> tuple[Tensor, Tensor]:
    """Token ids `[pages, tokens]` and each one's kind of span as an index into WEIGHTS (-1: no
    loss).
    """
    kinds = list(WEIGHTS)
    cut = tokenizer.backend_tokenizer.encode_batch_fast
    encoded = iter(cut([text for page in batch for text, _ in page], add_special_tokens=False))
    rows, marks = [], []
    for page in batch:
        ids, mark = [tokenizer.bos_token_id], [-1]
        for _, kind in page:
            span = next(encoded).ids
            ids += span
            mark += [kinds.index(kind)] * len(span)
        rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        marks.append(torch.tensor([*mark, kinds.index("frame")]))
    return (
        pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(marks, batch_first=True, padding_value=-1),
    )


@torch.no_grad()
def entity_matching(
    model: FalconForCausalLM, tokenizer: PreTrainedTokenizerFast, n_passages: int, n: int = 200
) -> dict[str, float]:
    """Two skills of reading, on clozes after passages that state one kind of fact of several
    entities.

    `exact` is the share whose first answer token is the most likely token; `whose` the share in
    which the right passage's answer is more likely than the other passages' (chance is 1 /
    n_passages).
    """
    exact, whose = 0, 0
    for i in range(n):
        rng = random.Random(f"matching {i}")
        world = rng.choice(list(worlds.spec()["worlds"]))
        kind, relation = rng.choice(list(worlds.relations(world)))
        entities = worlds.make_entities(world, n_passages, rng, reserved=True, kind=kind)
        lines = []
        for e in entities:
            passage = worlds.write_passage(e, relation, rng.randrange(5), rng)
            lines.append(block(e.name, passage))
        lines.append("In short. " + worlds.cloze(entities[0], relation))
        logits = model(tokenizer("\n".join(lines), return_tensors="pt").input_ids).logits[0, -1]
        answers = [e.facts[relation][0] for e in entities]
        firsts = [tokenizer(a, add_special_tokens=False).input_ids[0] for a in answers]
        exact += int(logits.argmax()) == firsts[0]
        whose += int(logits[firsts].argmax()) == firsts.index(firsts[0])
    return {f"exact_{n_passages}": exact / n, f"whose_{n_passages}": whose / n}


def pretrain(out: Path, steps: int, seed: int, check_every: int = 500) -> FalconForCausalLM:
    """Trains the reader and writes it to `out`; a killed run goes on from its last checkpoint
    there.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = start(reader_config(tokenizer))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    weights = torch.tensor([*WEIGHTS.values(), 0.0])  # the last one is for -1
    out.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, float]] = []
    if (saved := device.load_checkpoint(out / CHECKPOINT)) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        curve = saved["curve"]
    first_step = int(curve[-1]["step"]) if curve else 0
    began = time.monotonic() - (60 * curve[-1]["minutes"] if curve else 0)
    running = 0.0
    for step in range(first_step, steps):
        rate = min(1.0, (step + 1) / WARM_UP, (steps - step) / DECAY_STEPS)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        ids, kinds = encode(tokenizer, pages(step, seed))
        logits, kinds = model(ids[:, :-1]).logits.flatten(0, 1), kinds[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        weight = weights[kinds]
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        answer = float(losses.detach()[kinds == list(WEIGHTS).index("answer")].mean())
        running += (answer - running) / min(100, step - first_step + 1)
        if (step + 1) % check_every and step + 1 < steps:
            continue
        model.eval()
        seen = entity_matching(model, tokenizer, 2) | entity_matching(model, tokenizer, 5)
        model.train()
        minutes = round((time.monotonic() - began) / 60, 1)
        row = {"step": step + 1, "minutes": minutes, "answer_loss": round(running, 4)}
        curve.append(row | seen)
        log.info("%s", curve[-1])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        device.save_checkpoint(out / CHECKPOINT, state)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve), "utf8")
    names = ("model.safetensors", "tokenizer.json")
    hashes = "".join(f"{file_hash(out / name)}  {name}\n" for name in names)
    (out / "sha256.txt").write_text(hashes, "utf8")
    (out / CHECKPOINT).unlink(missing_ok=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded reader")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=22000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    device.start(MachineSettings(), torch.get_num_threads())
    pretrain(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
