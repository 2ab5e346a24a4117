"""The recipe of the embedded off-the-shelf reader: a plain language model on endless freshly drawn worlds."""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from ragkit import world
from ragkit.vocabulary import build_tokenizer

log = logging.getLogger(__name__)

HIDDEN, LAYERS, HEADS = 128, 4, 8
BATCH, PEAK_RATE, WARM_UP = 32, 2e-3, 200
PAIRS_FIRST = 1500  # steps with two passages a page; from then on two to five
DECAY_SHARE = 0.2  # the learning rate is constant, and falls to zero over this last share: a run can be lengthened


def reader_config(tokenizer: PreTrainedTokenizerFast) -> FalconConfig:
    """Falcon-RW-1B's architecture (ALiBi, multi-head attention, biases) at about a million parameters."""
    return FalconConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, alibi=True,
        multi_query=False, parallel_attn=False, new_decoder_architecture=False, bias=True, hidden_dropout=0.0,
        attention_dropout=0.0, initializer_range=0.05, max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, first_step: int, steps: int) -> Iterator[torch.Tensor]:
    """Batches `[sequences, tokens]` of pretraining pages; step i is always the same page, so a run can be resumed."""
    for step in range(first_step, steps):
        rng = random.Random(f"pretrain {seed} {step}")
        n_passages = 2 if step < PAIRS_FIRST else rng.randint(2, 5)
        size = BATCH if n_passages < 4 else BATCH * 3 // 4
        pages = [world.training_document(rng, n_passages, 3 * n_passages + 2, n_details=rng.choice((1, 2, 3))) for _ in range(size)]
        yield tokenizer([page + "[EOS]" for page in pages], padding=True, return_tensors="pt").input_ids


@torch.no_grad()
def entity_matching(model: FalconForCausalLM, tokenizer: PreTrainedTokenizerFast, n_passages: int, n: int = 200) -> dict[str, float]:
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
        text = "\n".join(world.block(e.name, world.write_passage(e, relation, rng.randrange(5), rng)[0]) for e in entities)
        ids = tokenizer(text + "\nIn short. " + world.cloze(entities[0], relation), return_tensors="pt").input_ids
        logits = model(ids).logits[0, -1]
        firsts = [tokenizer(e.facts[relation][0], add_special_tokens=False).input_ids[0] for e in entities]
        exact += int(logits.argmax()) == firsts[0]
        whose += int(logits[firsts].argmax()) == firsts.index(firsts[0])
    return {"exact": exact / n, "whose": whose / n}


def pretrain(out: Path, steps: int, seed: int, check_every: int = 250) -> FalconForCausalLM:
    """Trains the reader and writes it to `out`; a killed run goes on from its last checkpoint there."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = FalconForCausalLM(reader_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    out.mkdir(parents=True, exist_ok=True)
    state_file, seconds, first_step = out / "training.pt", 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds = state["step"], state["seconds"]
    started = time.monotonic() - seconds
    running = 0.0
    for step, ids in enumerate(batches(tokenizer, seed, first_step, steps), start=first_step):
        rate = min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += (float(loss.detach()) - running) / min(100, step - first_step + 1)
        if (step + 1) % check_every == 0 or step + 1 == steps:
            model.eval()
            seen = {f"{key}_{n}": value for n in (2, 5) for key, value in entity_matching(model, tokenizer, n).items()}
            model.train()
            seconds = time.monotonic() - started
            row = {"step": step + 1, "minutes": round(seconds / 60, 1), "loss": round(running, 4), **seen}
            log.info("%s", row)
            with open(out / "curve.jsonl", "a", encoding="utf8") as curve:
                curve.write(json.dumps(row) + "\n")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds},
                state_file.with_suffix(".new"),
            )
            state_file.with_suffix(".new").replace(state_file)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded reader")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
