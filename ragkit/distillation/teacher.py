"""The teacher's look: one reader reads every question's passages; all targets come from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.attention import branch, contributions, passage_scores, read_prefix, record
from ragkit.data.files import write_arrays
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.distillation.asked import Asked
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.reader import Prompt, Reader, note_trimmed
from ragkit.settings import POOLINGS, ROWS, AttentionSettings

Array = NDArray[np.float32]


def row_weights(prompt: Prompt, row_type: str) -> list[int]:
    """Positions of a row type in a prompt that ends with its answer and an end token.

    `last_prompt` has not seen the answer, whose first token it predicts; `predicting` predict each
    token of it (ATLAS-style); `consuming` have read them.
    """
    first, last = prompt.answer_start, len(prompt.ids) - 1  # the end token stands at `last`
    return {
        "last_prompt": [first - 1],
        "predicting": list(range(first - 1, last - 1)),
        "consuming": list(range(first, last)),
    }[row_type]


def token_contributions(reader: Reader, prompts: list[Prompt]) -> Tensor:
    """Token contributions of every row type, without and with the value norm, from one pass.

    `[norm (off, on), layers, ROWS, prompts, tokens]`, padded on the right. The prompts must hold
    their answers.
    """
    places = [[row_weights(p, row_type) for row_type in ROWS] for p in prompts]
    positions = [sorted(set(chain.from_iterable(one))) for one in places]
    widest = max(map(len, positions))
    rows = torch.tensor([p + [p[-1]] * (widest - len(p)) for p in positions])
    uses = torch.zeros(len(ROWS), *rows.shape)
    for i, one in enumerate(places):
        for group, used in enumerate(one):
            for position in used:
                uses[group, i, positions[i].index(position)] = 1
    return reader.attention(prompts, rows, uses)


def calibrated_scores(
    reader: Reader, question: Question, passages: list[Passage], settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """Passage scores `[k]` from the prompt's last row, asked the question and asked 'N/A'.

    Their difference is the calibrated score (ICR): what the passages get for the question, not for
    where they stand. The passages are read once: both questions go on from the same cache.
    """
    blank = replace(question, text="N/A", cloze="N/A")
    prompts = [reader.prompt(q, passages) for q in (question, blank)]
    shortest, shared = min(len(p.ids) for p in prompts), 0
    while shared < shortest - 1 and prompts[0].ids[shared] == prompts[1].ids[shared]:
        shared += 1
    prefix = torch.tensor([prompts[0].ids[:shared]])
    cache = read_prefix(reader.model, prefix, torch.ones_like(prefix)) if shared else None
    scores = []
    for prompt in prompts:
        ids, mask = torch.tensor([prompt.ids[shared:]]), torch.ones(1, len(prompt.ids))
        past = branch(cache) if cache is not None else None
        seen = record(reader.model, ids, mask, torch.tensor([[ids.shape[1] - 1]]), past)
        tokens = contributions(seen, torch.ones(1, 1), settings.norm)[:, 0].mean(0)
        owner = torch.tensor(prompt.owner, device=tokens.device)
        scores.append(passage_scores(tokens, owner, len(passages), settings.pooling))
    return scores[0], scores[1]


def in_order(
    prompts: list[Prompt], at_once: int, work: Callable[[list[Prompt]], Iterable[Any]], desc: str
) -> list[Any]:
    """What `work` gives for each prompt, in order; it gets batches of like length.

    The processes of a run share the batches.
    """
    batches = device.by_length([len(p.ids) for p in prompts], at_once)
    parts = device.spread(batches, lambda chosen: [prompts[i] for i in chosen], work, desc)
    made = dict(zip(chain.from_iterable(batches), chain.from_iterable(parts), strict=True))
    return [made[i] for i in range(len(prompts))]


def look(
    reader: Reader, questions: list[Question], found: list[list[Passage]]
) -> dict[str, NDArray[Any]]:
    """Scores of every question's passages, for all choices at once.

    `attention` `[questions, ROWS, norm (off, on), layers, POOLINGS, k]`; `outside` `[questions,
    ROWS]`: share of attention that falls on no passage's own text (sinks, template);
    `answer_logs` `[questions, k, answer tokens]`: log-probability of each answer token given that
    passage alone, NaN behind the end; `trimmed` `[questions]`: tokens cut off a prompt too long.
    """
    k, pairs = len(found[0]), list(zip(questions, found, strict=True))
    prompts = [reader.prompt(q, passages, q.answers[0]) for q, passages in pairs]

    def seen(batch: list[Prompt]) -> list[tuple[Array, Array]]:
        tokens, result = token_contributions(reader, batch).cpu().float(), []
        for place, prompt in enumerate(batch):
            owner = torch.tensor(prompt.owner)
            own = tokens[..., place, : len(owner)]
            pools = [passage_scores(own, owner, k, pooling) for pooling in POOLINGS]
            attention = torch.stack(pools, dim=3).permute(2, 0, 1, 3, 4)
            mean_row = own[0].mean(0)
            outside = mean_row[:, owner < 0].sum(-1) / mean_row.sum(-1)
            result.append((attention.numpy(), outside.numpy()))
        return result

    made = in_order(prompts, reader.settings.at_once, seen, "attention")
    alone = [reader.prompt(q, [p], q.answers[0]) for q, passages in pairs for p in passages]
    logs = -answer_losses(reader, alone, 4 * reader.settings.at_once)
    return {
        "attention": np.stack([attention for attention, _ in made]),
        "outside": np.stack([outside for _, outside in made]),
        "answer_logs": logs.reshape(len(questions), k, -1),
        "trimmed": np.array([p.trimmed for p in prompts]),
    }


def answer_losses(reader: Reader, prompts: list[Prompt], at_once: int) -> Array:
    """Negative log-likelihood of each prompt's answer tokens `[prompts, tokens]`, NaN behind it."""
    longest = max(len(p.ids) - p.answer_start for p in prompts)
    losses = np.full((len(prompts), longest), np.nan, dtype=np.float32)

    @torch.no_grad()
    def of_batch(batch: list[Prompt]) -> Array:
        return reader.token_losses(batch).float().cpu().numpy()

    for row, one in zip(losses, in_order(prompts, at_once, of_batch, "likelihood"), strict=True):
        row[: len(one)] = one
    return losses


def left_out_losses(reader: Reader, questions: list[Question], found: list[list[Passage]]) -> Array:
    """LOOP's scores `[questions, k]` (ATLAS): the answer's mean loss without that passage."""
    prompts = [
        reader.prompt(q, passages[:place] + passages[place + 1 :], q.answers[0])
        for q, passages in zip(questions, found, strict=True)
        for place in range(len(passages))
    ]
    losses = answer_losses(reader, prompts, reader.settings.at_once)
    return np.nanmean(losses, axis=1).reshape(len(questions), -1)


def make_teacher(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """A reader's look at the questions for distillation: `scores.safetensors`, `trimmed.json`."""
    asked = Asked.open(inputs, settings["questions"], settings["k"])
    scores = look(open_reader(inputs, settings), asked.questions, asked.passages())
    if device.is_main():
        write_arrays(folder / "scores.safetensors", scores)
    note_trimmed(int((scores["trimmed"] > 0).sum()), len(asked.questions), folder)


def make_loop(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The same reader without one passage at a time: `scores.safetensors` with `loop`."""
    asked = Asked.open(inputs, settings["questions"], settings["k"])
    losses = left_out_losses(open_reader(inputs, settings), asked.questions, asked.passages())
    if device.is_main():
        write_arrays(folder / "scores.safetensors", {"loop": losses})
