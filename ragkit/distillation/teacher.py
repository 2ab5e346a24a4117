"""The teacher's look: one reader reads every question's passages; all targets come from that."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ragkit.attention.record import passage_scores
from ragkit.data.corpus import Asked, Passage, Question
from ragkit.data.files import write_arrays, write_json
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.reader import Prompt, Reader
from ragkit.settings import POOLINGS

Array = NDArray[np.float32]


def token_contributions(reader: Reader, prompts: list[Prompt]) -> Tensor:
    """Token contributions of every row type, without and with the value norm, from one pass.

    `[norm (off, on), layers, ROWS, prompts, tokens]`, padded on the right. The prompts end with
    their answers and an end token. `last_prompt` has not seen the answer, whose first token it
    predicts; `predicting` predict each token of it (ATLAS-style); `consuming` have read them.
    """
    before = torch.tensor([[p.answer_start - 1] for p in prompts])
    answers = torch.tensor([[len(p.ids) - 1 - p.answer_start] for p in prompts])
    steps = torch.arange(int(answers.max()) + 1).expand(len(prompts), -1)
    uses = torch.stack([steps == 0, steps < answers, (steps > 0) & (steps <= answers)])
    return reader.attention(prompts, before + steps.minimum(answers), uses.float())


def look(
    reader: Reader, questions: Sequence[Question], found: Sequence[list[Passage]]
) -> dict[str, NDArray[Any]]:
    """Scores of every question's passages, for all choices at once.

    `attention` `[questions, ROWS, norm (off, on), layers, POOLINGS, k]`; `outside` `[questions,
    ROWS]`: share of attention that falls on no passage's own text (sinks, template);
    `answer_logs` `[questions, k, answer tokens]`: log-probability of each answer token given that
    passage alone, NaN behind the end; `trimmed` `[questions]`: tokens cut off a prompt too long.
    """
    k, pairs = len(found[0]), list(zip(questions, found, strict=True))

    def seen(batch: list[Prompt]) -> list[tuple[Array, Array]]:
        tokens, result = token_contributions(reader, batch).cpu().float(), []
        for padded, prompt in zip(tokens.unbind(3), batch, strict=True):
            own, owner = padded[..., : len(prompt.owner)], torch.tensor(prompt.owner)
            pools = [passage_scores(own, owner, k, pooling) for pooling in POOLINGS]
            mean_row = own[0].mean(0)
            outside = mean_row[:, owner < 0].sum(-1) / mean_row.sum(-1)
            result.append((torch.stack(pools, 3).permute(2, 0, 1, 3, 4).numpy(), outside.numpy()))
        return result

    at_once = reader.settings.at_once
    prompts = [reader.prompt(q, passages, q.answers[0]) for q, passages in pairs]
    attention, outside = zip(*device.spread(prompts, at_once, seen, "attention"), strict=True)
    alone = [reader.prompt(q, [p], q.answers[0]) for q, passages in pairs for p in passages]
    logs = -answer_losses(reader, alone, 4 * at_once)
    return {
        "attention": np.stack(attention),
        "outside": np.stack(outside),
        "answer_logs": logs.reshape(len(questions), k, -1),
        "trimmed": np.array([p.trimmed for p in prompts]),
    }


def answer_losses(reader: Reader, prompts: list[Prompt], at_once: int) -> Array:
    """Negative log-likelihood of each prompt's answer tokens `[prompts, tokens]`, NaN behind it."""

    @torch.no_grad()
    def of_batch(batch: list[Prompt]) -> list[Tensor]:
        return list(reader.token_losses(batch).float().cpu())

    rows = device.spread(prompts, at_once, of_batch, "likelihood")
    return pad_sequence(rows, batch_first=True, padding_value=math.nan).numpy()


def left_out_losses(
    reader: Reader, questions: Sequence[Question], found: Sequence[list[Passage]]
) -> Array:
    """LOOP's scores `[questions, k]` (ATLAS): the answer's mean loss without that passage."""
    prompts = []
    for question, passages in zip(questions, found, strict=True):
        for place in range(len(passages)):
            others = passages[:place] + passages[place + 1 :]
            prompts.append(reader.prompt(question, others, question.answers[0]))
    losses = answer_losses(reader, prompts, reader.settings.at_once)
    return np.nanmean(losses, axis=1).reshape(len(questions), -1)


def make_teacher(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """A reader's look at the questions for distillation: `scores.safetensors`, `trimmed.json`."""
    asked = Asked.open(inputs, "distill", settings["questions"], settings["k"])
    scores = look(open_reader(inputs, settings), asked.questions, asked.passages)
    if device.is_main():
        write_arrays(folder / "scores.safetensors", scores)
        counts = {"trimmed": int((scores["trimmed"] > 0).sum()), "prompts": len(asked.questions)}
        write_json(folder / "trimmed.json", counts)


def make_loop(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The same reader without one passage at a time: `scores.safetensors` with `loop`."""
    asked = Asked.open(inputs, "distill", settings["questions"], settings["k"])
    losses = left_out_losses(open_reader(inputs, settings), asked.questions, asked.passages)
    if device.is_main():
        write_arrays(folder / "scores.safetensors", {"loop": losses})
