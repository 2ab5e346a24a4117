"""The recipe of the embedded off-the-shelf reader: a plain language model on endless freshly drawn worlds."""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from ragkit.data import worlds as world
from ragkit.data.vocabulary import build_tokenizer
from ragkit.experiment.store import file_hash
from ragkit.models import checkpoint

log = logging.getLogger(__name__)

HIDDEN, LAYERS, HEADS = 64, 3, 8
PEAK_RATE, WARM_UP = 3e-3, 100
DECAY_STEPS = 6000  # the learning rate is constant, and falls to zero over these last steps: a run can be lengthened
REGISTERS_ONLY, SHORT_PAGES = (
    1500,
    6000,
)  # steps: first registers alone, then pages of two bare passages too, then full pages
WEIGHTS = {
    "given": 0.2,
    "frame": 1.0,
    "answer": 8.0,
}  # of a token's loss: most text cannot be foretold, a fact told again can
SIMILARITY, COPYING, BRANCH = 0.12, 0.08, 0.002  # the first weights, see `start`


def reader_config(tokenizer: PreTrainedTokenizerFast) -> FalconConfig:
    """Falcon-RW-1B's architecture (ALiBi, multi-head attention, biases), much smaller."""
    return FalconConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, alibi=True,
        multi_query=False, parallel_attn=False, new_decoder_architecture=False, bias=True, hidden_dropout=0.0,
        attention_dropout=0.0, initializer_range=0.05, max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def start(config: FalconConfig) -> FalconForCausalLM:
    """An untrained reader whose later layers begin by attending to similar contexts and copying what they find.

    Mimetic initialisation (Trockman and Kolter 2023): in every layer but the first, keys begin equal to queries and
    value times output begins as a multiple of the identity; all other branches begin near zero. With Falcon's usual
    random attention, finding the entity meant was still at chance after twice the text that this start needed.
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


def pages(step: int, seed: int) -> list[list[world.Span]]:
    """The pages of a step: always the same ones, so that a run can be resumed. All pages of a step are of one kind."""
    rng = random.Random(f"pretrain {seed} {step}")
    if step < REGISTERS_ONLY or rng.random() < (0.4 if step < SHORT_PAGES else 0.1):
        n, wordings = rng.choice((2, 3, 4)), 0 if step < REGISTERS_ONLY else rng.choice((0, 2))
        sharing = 0.15 if step < REGISTERS_ONLY else rng.choice((0.15, 1.0, 2.0))
        return [world.register_page(rng, n, sharing, wordings) for _ in range(48 // n)]
    if step < SHORT_PAGES:
        sharing = (
            rng.choice((0.15, 0.5))
            if step < SHORT_PAGES // 2
            else rng.choice((0.15, 0.5, 1.0, 2.0))
        )
        return [world.passages_page(rng, 2, 0, sharing, 8, 0) for _ in range(16)]
    n, sharing = rng.randint(2, 5), rng.choice((0.15, 1.0, 2.0, 3.0))
    return [
        world.passages_page(rng, n, rng.randint(0, 3), sharing, 3 * n + 2, 2)
        for _ in range(24 // n)
    ]


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: list[list[world.Span]]
) -> tuple[Tensor, Tensor]:
    """Token ids `[pages, tokens]` and each token's kind of span as an index into WEIGHTS (-1: no loss)."""
    kinds = list(WEIGHTS)
    encoded = iter(
        tokenizer.backend_tokenizer.encode_batch_fast(
            [text for page in batch for text, _ in page], add_special_tokens=False
        )
    )
    rows, marks = [], []
    for page in batch:
        ids, mark = [tokenizer.bos_token_id], [-1]
        for _, kind in page:
            ids += (span := next(encoded).ids)
            mark += [kinds.index(kind)] * len(span)
        rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        marks.append(torch.tensor([*mark, kinds.index("frame")]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(
        marks, batch_first=True, padding_value=-1
    )


@torch.no_grad()
def entity_matching(
    model: FalconForCausalLM, tokenizer: PreTrainedTokenizerFast, n_passages: int, n: int = 200
) -> dict[str, float]:
    """Two skills of reading, on clozes after passages that all state the same kind of fact about different entities.

    `exact` is the share whose first answer token is the most likely token; `whose` the share in which the right
    passage's answer is more likely than the other passages' (chance is 1 / n_passages).
    """
    exact, whose = 0, 0
    for i in range(n):
        rng = random.Random(f"matching {i}")
        world_name = rng.choice(list(world.spec()["worlds"]))
        kind, relation = rng.choice(list(world.relations(world_name)))
        entities = world.make_entities(world_name, n_passages, rng, reserved=True, kind=kind)
        text = "\n".join(
            world.block(e.name, world.write_passage(e, relation, rng.randrange(5), rng)[0])
            for e in entities
        )
        ids = tokenizer(
            text + "\nIn short. " + world.cloze(entities[0], relation), return_tensors="pt"
        ).input_ids
        logits = model(ids).logits[0, -1]
        firsts = [
            tokenizer(e.facts[relation][0], add_special_tokens=False).input_ids[0] for e in entities
        ]
        exact += int(logits.argmax()) == firsts[0]
        whose += int(logits[firsts].argmax()) == firsts.index(firsts[0])
    return {"exact": exact / n, "whose": whose / n}


def pretrain(out: Path, steps: int, seed: int, check_every: int = 500) -> FalconForCausalLM:
    """Trains the reader and writes it to `out`; a killed run goes on from its last checkpoint there."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = start(reader_config(tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    weights = torch.tensor([*WEIGHTS.values(), 0.0])  # the last one is for -1
    out.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, float]] = checkpoint.load(out, model, [optimizer]) or []
    first_step = int(curve[-1]["step"]) if curve else 0
    started = time.monotonic() - (60 * curve[-1]["minutes"] if curve else 0)
    running = 0.0
    for step in range(first_step, steps):
        rate = min(1.0, (step + 1) / WARM_UP, (steps - step) / DECAY_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        ids, kinds = encode(tokenizer, pages(step, seed))
        losses = torch.nn.functional.cross_entropy(
            model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[kinds[:, 1:].flatten()]
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answer = losses.detach()[kinds[:, 1:].flatten() == list(WEIGHTS).index("answer")].mean()
        running += (float(answer) - running) / min(100, step - first_step + 1)
        if (step + 1) % check_every == 0 or step + 1 == steps:
            model.eval()
            seen = {
                f"{key}_{n}": value
                for n in (2, 5)
                for key, value in entity_matching(model, tokenizer, n).items()
            }
            model.train()
            curve.append(
                {
                    "step": step + 1,
                    "minutes": round((time.monotonic() - started) / 60, 1),
                    "answer_loss": round(running, 4),
                    **seen,
                }
            )
            log.info("%s", curve[-1])
            checkpoint.save(out, model, [optimizer], curve)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve), "utf8")
    hashes = [
        f"{file_hash(out / name)}  {name}\n" for name in ("model.safetensors", "tokenizer.json")
    ]
    (out / "sha256.txt").write_text("".join(hashes), "utf8")
    checkpoint.remove(out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded reader")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=22000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
