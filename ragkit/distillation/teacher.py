"""The teacher pass: one look of a reader at every question's passages, kept so that every target can be made from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from ragkit.attention import branch, contributions, passage_scores, read_prefix, record
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.experiment.store import write_arrays
from ragkit.models import device as fleet
from ragkit.models.reader import Prompt, Reader
from ragkit.profile import AttentionSettings

ROWS = ("last_prompt", "predicting", "consuming")
POOLINGS = ("sum", "mean")


def row_weights(prompt: Prompt, row_type: str) -> list[int]:
    """Positions of a row type in a prompt that ends with its answer and an end token.

    `last_prompt` predicts the first answer token and has not seen the answer; `predicting` are the positions that
    predict each answer token (ATLAS-style); `consuming` those that have read it.
    """
    first, last = prompt.answer_start, len(prompt.ids) - 1  # the end token stands at `last`
    return {
        "last_prompt": [first - 1],
        "predicting": list(range(first - 1, last - 1)),
        "consuming": list(range(first, last)),
    }[row_type]


def token_contributions(reader: Reader, prompts: list[Prompt]) -> Tensor:
    """Token contributions of every row type, in the order of ROWS, without and with the value norm, from one pass.

    `[norm (off, on), layers, row types, prompts, tokens]`, padded on the right. The prompts must hold their answers.
    """
    places = [[row_weights(p, row_type) for row_type in ROWS] for p in prompts]
    positions = [sorted({i for used in one for i in used}) for one in places]
    widest = max(map(len, positions))
    rows = torch.tensor([p + [p[-1]] * (widest - len(p)) for p in positions])
    uses = torch.zeros(len(ROWS), *rows.shape)
    for i, one in enumerate(places):
        for group, used in enumerate(one):
            for position in used:
                uses[group, i, positions[i].index(position)] = 1
    return reader.attention(prompts, rows, uses)


def calibrated_scores(
    reader: Reader,
    question: Question,
    passages: list[Passage],
    settings: AttentionSettings,
    neutral: str = "N/A",
) -> tuple[Tensor, Tensor]:
    """Passage scores `[k]` from the last row of the prompt, asked the question and asked something without content.

    Their difference is the calibrated score (ICR): what the passages get for the question, not for where they stand. The
    passages are read once: both questions go on from the same cache.
    """
    asked, blank = (
        reader.prompt(q, passages)
        for q in (question, replace(question, text=neutral, cloze=neutral))
    )
    shared = 0
    while (
        shared < min(len(asked.ids), len(blank.ids)) - 1 and asked.ids[shared] == blank.ids[shared]
    ):
        shared += 1
    prefix = torch.tensor([asked.ids[:shared]])
    cache = read_prefix(reader.model, prefix, torch.ones_like(prefix)) if shared else None
    scores = []
    for prompt in (asked, blank):
        ids = torch.tensor([prompt.ids[shared:]])
        past = branch(cache) if cache is not None else None
        seen = record(
            reader.model,
            ids,
            torch.ones(1, len(prompt.ids)),
            torch.tensor([[ids.shape[1] - 1]]),
            past,
        )
        tokens = contributions(seen, torch.ones(1, 1), settings.norm)[:, 0].mean(0)
        scores.append(
            passage_scores(
                tokens,
                torch.tensor(prompt.owner, device=tokens.device),
                len(passages),
                settings.pooling,
            )
        )
    return scores[0], scores[1]


def look(
    reader: Reader, questions: list[Question], found: list[list[Passage]]
) -> dict[str, NDArray[np.float32]]:
    """Scores of every question's passages, for all choices at once.

    `attention` `[questions, row types, norm (off, on), layers, poolings, k]`, in the order of ROWS and POOLINGS;
    `outside` `[questions, row types]`: share of attention that falls on no passage's own text (sinks, template);
    `answer_logs` `[questions, k, answer tokens]`: log-probability of each answer token given that passage alone, NaN behind the end.
    """
    k, n = len(found[0]), len(questions)
    prompts = [
        reader.prompt(q, passages, q.answers[0])
        for q, passages in zip(questions, found, strict=True)
    ]

    def seen(batch: list[Prompt]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        tokens, result = token_contributions(reader, batch).cpu().float(), []
        for place, prompt in enumerate(batch):
            owner = torch.tensor(prompt.owner)
            own = tokens[..., place, : len(owner)]
            pools = torch.stack(
                [passage_scores(own, owner, k, pooling) for pooling in POOLINGS], dim=3
            )
            mean_row = own[0].mean(0)
            result.append(
                (
                    pools.permute(2, 0, 1, 3, 4).numpy(),
                    (mean_row[:, owner < 0].sum(-1) / mean_row.sum(-1)).numpy(),
                )
            )
        return result

    batches = fleet.by_length([len(p.ids) for p in prompts], reader.settings.at_once)
    parts = fleet.spread(batches, lambda chosen: [prompts[i] for i in chosen], seen, "attention")
    by_place = dict(
        zip(
            (i for chosen in batches for i in chosen),
            (one for part in parts for one in part),
            strict=True,
        )
    )
    attention, outside = (np.stack([by_place[i][which] for i in range(n)]) for which in (0, 1))
    alone = [
        reader.prompt(q, [passage], q.answers[0])
        for q, passages in zip(questions, found, strict=True)
        for passage in passages
    ]
    logs = -answer_losses(reader, alone, 4 * reader.settings.at_once).reshape(n, k, -1)
    fleet.done["questions"] += n if fleet.is_main() else 0
    return {
        "attention": attention,
        "outside": outside,
        "answer_logs": logs,
        "trimmed": np.array([p.trimmed for p in prompts]),
    }


def answer_losses(reader: Reader, prompts: list[Prompt], at_once: int) -> NDArray[np.float32]:
    """Negative log-likelihood of each prompt's answer tokens `[prompts, answer tokens]`, NaN behind the end. The processes share the prompts."""
    longest = max(len(p.ids) - p.answer_start for p in prompts)
    losses = np.full((len(prompts), longest), np.nan, dtype=np.float32)

    @torch.no_grad()
    def found(batch: list[Prompt]) -> NDArray[np.float32]:
        return reader.token_losses(batch).float().cpu().numpy()

    batches = fleet.by_length([len(p.ids) for p in prompts], at_once)
    for chosen, part in zip(
        batches,
        fleet.spread(batches, lambda chosen: [prompts[i] for i in chosen], found, "likelihood"),
        strict=True,
    ):
        losses[chosen, : part.shape[1]] = part
    return losses


def replaced(
    scores: dict[str, NDArray[np.float32]],
    new: dict[str, NDArray[np.float32]],
    places: NDArray[np.int64],
) -> dict[str, NDArray[np.float32]]:
    """The scores of a look with those of some questions taken from another; answers may be longer in one of them."""
    longest = max(one["answer_logs"].shape[2] for one in (scores, new))

    def wide(logs: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.pad(logs, ((0, 0), (0, 0), (0, longest - logs.shape[2])), constant_values=np.nan)

    made = {
        name: wide(value) if name == "answer_logs" else value.copy()
        for name, value in scores.items()
    }
    for name, value in new.items():
        made[name][places] = wide(value) if name == "answer_logs" else value
    return made


def likelihood(scores: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """Perplexity distillation's passage scores `[questions, k]`: mean log-probability of the answer's tokens given that passage alone."""
    return np.nanmean(scores["answer_logs"], axis=2).astype(np.float64)


def left_out_losses(
    reader: Reader, questions: list[Question], found: list[list[Passage]]
) -> NDArray[np.float32]:
    """LOOP's passage scores `[questions, k]`: mean loss of the answer's tokens when that passage is left out (ATLAS)."""
    k = len(found[0])
    prompts = [
        reader.prompt(q, [p for other, p in enumerate(passages) if other != left_out], q.answers[0])
        for q, passages in zip(questions, found, strict=True)
        for left_out in range(k)
    ]
    fleet.done["questions"] += len(questions) if fleet.is_main() else 0
    return np.nanmean(answer_losses(reader, prompts, reader.settings.at_once), axis=1).reshape(
        -1, k
    )


def save(scores: dict[str, NDArray[np.float32]], folder: Path) -> None:
    write_arrays(folder / "scores.safetensors", scores)


def load(folder: Path) -> dict[str, NDArray[np.float32]]:
    return load_file(folder / "scores.safetensors")


def over_layers(values: NDArray[np.float32], layers: str) -> NDArray[np.float64]:
    """Values `[..., layers]` of the first, middle or last layer, or averaged over all."""
    if layers == "all":
        return values.mean(-1).astype(np.float64)
    return values[
        ..., {"first": 0, "middle": (values.shape[-1] - 1) // 2, "last": -1}[layers]
    ].astype(np.float64)


def attention_scores(
    scores: dict[str, NDArray[np.float32]], settings: AttentionSettings
) -> NDArray[np.float64]:
    """Passage scores `[questions, k]` under one choice of rows, norm, pooling and layers."""
    picked = scores["attention"][
        :, ROWS.index(settings.rows), int(settings.norm), :, POOLINGS.index(settings.pooling)
    ]
    return over_layers(np.moveaxis(picked, 1, -1), settings.layers)
