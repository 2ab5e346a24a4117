"""The teacher pass: one look of a reader at every question's passages, kept so that every target can be made from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ragkit.attention import contributions, passage_scores, record
from ragkit.corpus import Passage, Question
from ragkit.profile import AttentionSettings
from ragkit.reader import Prompt, Reader

ROWS = ("last_prompt", "predicting", "consuming")
POOLINGS = ("sum", "mean")


def row_weights(prompt: Prompt, row_type: str) -> list[int]:
    """Positions of a row type in a prompt that ends with its answer and an end token.

    `last_prompt` predicts the first answer token and has not seen the answer; `predicting` are the positions that
    predict each answer token (ATLAS-style); `consuming` those that have read it.
    """
    first, last = prompt.answer_start, len(prompt.ids) - 1  # the end token stands at `last`
    return {"last_prompt": [first - 1], "predicting": list(range(first - 1, last - 1)), "consuming": list(range(first, last))}[row_type]


def token_contributions(reader: Reader, prompts: list[Prompt], norm: bool = True) -> dict[str, Tensor]:
    """Per row type the token contributions per layer `[layers, prompts, tokens]` (padded on the right)."""
    ids, mask = reader.batch(prompts)
    positions = [sorted({i for row_type in ROWS for i in row_weights(p, row_type)}) for p in prompts]
    widest = max(map(len, positions))
    rows = torch.tensor([p + [p[-1]] * (widest - len(p)) for p in positions])
    seen = record(reader.model, ids, mask, rows)
    result = {}
    for row_type in ROWS:
        use = torch.zeros(rows.shape)
        for i, prompt in enumerate(prompts):
            for position in row_weights(prompt, row_type):
                use[i, positions[i].index(position)] = 1
        result[row_type] = contributions(seen, use, norm)
    return result


def look(reader: Reader, questions: list[Question], found: list[list[Passage]], batch: int = 16) -> dict[str, NDArray[np.float32]]:
    """Scores of every question's passages, for all choices at once.

    `attention` `[questions, row types, norm (off, on), layers, poolings, k]`, in the order of ROWS and POOLINGS;
    `outside` `[questions, row types]`: share of attention that falls on no passage's own text (sinks, template);
    `likelihood` `[questions, k]`: minus the mean token NLL of the answer given that passage alone.
    """
    k, n = len(found[0]), len(questions)
    layers = reader.model.config.num_hidden_layers
    attention = np.zeros((n, len(ROWS), 2, layers, len(POOLINGS), k), dtype=np.float32)
    outside = np.zeros((n, len(ROWS)), dtype=np.float32)
    likelihood = np.zeros((n, k), dtype=np.float32)
    prompts = [reader.prompt(q, passages, q.answers[0]) for q, passages in zip(questions, found, strict=True)]
    order = sorted(range(n), key=lambda i: len(prompts[i].ids))
    for start in tqdm(range(0, n, batch), desc="attention", leave=False):
        chosen = order[start : start + batch]
        for norm in (False, True):
            tokens = token_contributions(reader, [prompts[i] for i in chosen], norm)
            for r, row_type in enumerate(ROWS):
                for place, i in enumerate(chosen):
                    owner = torch.tensor(prompts[i].owner)
                    for layer in range(layers):
                        row = tokens[row_type][layer, place, : len(owner)]
                        for pool, pooling in enumerate(POOLINGS):
                            attention[i, r, int(norm), layer, pool] = passage_scores(row, owner, k, pooling).numpy()
                    if not norm:
                        mean_row = tokens[row_type][:, place, : len(owner)].mean(0)
                        outside[i, r] = float(mean_row[owner < 0].sum() / mean_row.sum())
    alone = [(i, j, reader.prompt(questions[i], [found[i][j]], questions[i].answers[0])) for i in range(n) for j in range(k)]
    alone.sort(key=lambda item: len(item[2].ids))
    with torch.no_grad():
        for start in tqdm(range(0, len(alone), 4 * batch), desc="likelihood", leave=False):
            chosen_alone = alone[start : start + 4 * batch]
            for (i, j, _), loss in zip(chosen_alone, reader.losses([p for _, _, p in chosen_alone]), strict=True):
                likelihood[i, j] = -float(loss)
    return {"attention": attention, "outside": outside, "likelihood": likelihood, "trimmed": np.array([p.trimmed for p in prompts])}


def save(scores: dict[str, NDArray[np.float32]], folder: Path) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in scores.items()}, folder / "scores.safetensors")


def load(folder: Path) -> dict[str, NDArray[np.float32]]:
    return load_file(folder / "scores.safetensors")


def attention_scores(scores: dict[str, NDArray[np.float32]], settings: AttentionSettings) -> NDArray[np.float64]:
    """Passage scores `[questions, k]` under one choice of rows, norm and pooling, averaged over layers."""
    picked = scores["attention"][:, ROWS.index(settings.rows), int(settings.norm), :, POOLINGS.index(settings.pooling)]
    return picked.mean(1).astype(np.float64)
