"""The teacher's look: one reader reads every question's passages; all targets come from such."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ragkit.attention.record import passage_scores
from ragkit.data.corpus import Passage, Question
from ragkit.distillation.targets import Scores, holding
from ragkit.models import device
from ragkit.models.fid import opened
from ragkit.models.reader import Prompt, Reader

Array = NDArray[np.float32]
Found = Sequence[list[Passage]]  # the passages of each question


def token_contributions(reader: Reader, prompts: list[Prompt]) -> Tensor:
    """Token contributions of every row type, without and with the value norm, from one pass. `[norm
    (off, on), layers, ROWS, prompts, heads, tokens]`, padded on the right. The prompts end with
    their answers and an end token. `last_prompt` has not seen the answer, whose first token it
    predicts; `predicting` predict each token of it (ATLAS-style); `consuming` have read them."""
    before = torch.tensor([[p.answer_start - 1] for p in prompts])
    # of an empty answer the end token alone is predicted, and read
    answers = torch.tensor([[max(1, len(p.ids) - 1 - p.answer_start)] for p in prompts])
    steps = torch.arange(int(answers.max()) + 1).expand(len(prompts), -1)
    uses = torch.stack([steps == 0, steps < answers, (steps > 0) & (steps <= answers)])
    return reader.attention(prompts, before + steps.minimum(answers), uses.float())


def places_of(order: str, n: int, k: int, seed: int) -> NDArray[np.int64]:
    """The place in the prompt of each of k passages, best first, of n questions `[n, k]`."""
    ranks = np.tile(np.arange(k), (n, 1))
    shuffled = np.random.default_rng(seed).permuted(ranks, axis=1)
    return {"rank": ranks, "empty": ranks, "reversed": ranks[:, ::-1], "shuffled": shuffled}[order]


def look(
    reader: Reader, questions: Sequence[Question], found: Found, order: str = "rank", seed: int = 0
) -> Scores:
    """Scores of every question's passages, best first in `found`, which stand in the prompt in an
    order: `rank`, `reversed`, `shuffled` by a seed, or `empty`: `rank`, and no word is asked.
    `attention` `[questions, ROWS, norm (off, on), layers, heads, k]`, summed over a passage's
    tokens, whose number is in `tokens` `[questions, k]`; `outside` `[questions, ROWS]`: share of
    attention that falls on no passage's own text (sinks, template); `holds`, `places` `[questions,
    k]`: whether a passage holds an answer as text, and its place in the prompt; `trimmed`
    `[questions]`: tokens cut off a prompt too long."""
    holds, k = holding(questions, found).astype(np.uint8), len(found[0])
    if order == "empty":
        questions = [replace(q, text="", cloze="", answers=("",)) for q in questions]
    places = places_of(order, len(found), k, seed)

    def seen(batch: list[Prompt]) -> list[tuple[Array, Array, NDArray[np.int64]]]:
        tokens, result = token_contributions(reader, batch).cpu().float(), []
        for padded, prompt in zip(tokens.unbind(3), batch, strict=True):
            own, owner = padded[..., : len(prompt.owner)], torch.tensor(prompt.owner)
            plain = own[0].mean((0, 2))
            outside = plain[:, owner < 0].sum(-1) / plain.sum(-1)
            counts = torch.bincount(owner[owner >= 0], minlength=k).numpy()
            scores = passage_scores(own, owner, k).permute(2, 0, 1, 3, 4)
            result.append((scores.numpy(), outside.numpy(), counts))
        return result

    prompts = []
    for question, passages, row in zip(questions, found, places, strict=True):
        shown = [passages[i] for i in row.argsort()]
        prompts.append(reader.prompt(question, shown, question.answers[0]))
    rows = device.spread(prompts, reader.settings.at_once, seen, "attention")
    attention, outside, counts = map(np.stack, zip(*rows, strict=True))
    return {
        "attention": np.take_along_axis(attention, places[:, None, None, None, None], -1),
        "tokens": np.take_along_axis(counts, places, 1),
        "outside": outside,
        "holds": holds,
        "places": places,
        "trimmed": np.array([p.trimmed for p in prompts]),
    }


def answer_losses(reader: Reader, prompts: list[Prompt], at_once: int) -> Array:
    """Negative log-likelihood of each prompt's answer tokens `[prompts, tokens]`, NaN behind it."""

    @torch.no_grad()
    def of_batch(batch: list[Prompt]) -> list[Tensor]:
        return list(reader.token_losses(batch).float().cpu())

    rows = device.spread(prompts, at_once, of_batch, "likelihood")
    return pad_sequence(rows, batch_first=True, padding_value=math.nan).numpy()


def alone(reader: Reader, questions: Sequence[Question], found: Found) -> Array:
    """Log-probability of answer tokens by each passage alone `[questions, k, tokens]`, or NaN."""
    pairs = zip(questions, found, strict=True)
    prompts = [reader.prompt(q, [p], q.answers[0]) for q, passages in pairs for p in passages]
    logs = -answer_losses(reader, prompts, 4 * reader.settings.at_once)
    return logs.reshape(len(questions), len(found[0]), -1)


def left_out_losses(reader: Reader, questions: Sequence[Question], found: Found) -> Array:
    """LOOP's scores `[questions, k]` (ATLAS): the answer's mean loss without that passage."""
    prompts = []
    for q, passages in zip(questions, found, strict=True):
        rest = (passages[:place] + passages[place + 1 :] for place in range(len(passages)))
        prompts += [reader.prompt(q, others, q.answers[0]) for others in rest]
    losses = answer_losses(reader, prompts, reader.settings.at_once)
    return np.nanmean(losses, axis=1).reshape(len(questions), -1)


def make_teacher(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """A reader's look at the questions of a part: `scores.safetensors`, `trimmed.json`."""
    asked, reader = opened(inputs, settings)
    scores = look(reader, asked.questions, asked.passages, settings["order"], settings["seed"])
    counts = {"trimmed": int((scores["trimmed"] > 0).sum()), "prompts": len(asked.questions)}
    device.write(folder, {"scores.safetensors": scores, "trimmed.json": counts})


make_heads = make_teacher  # of dev: the look by which heads are chosen


def make_alone(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """What each passage alone says for the answer: `scores.safetensors` with `answer_logs`."""
    asked, reader = opened(inputs, settings)
    logs = alone(reader, asked.questions, asked.passages)
    device.write(folder, {"scores.safetensors": {"answer_logs": logs}})


def make_loop(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The same reader without one passage at a time: `scores.safetensors` with `loop`."""
    asked, reader = opened(inputs, settings)
    losses = left_out_losses(reader, asked.questions, asked.passages)
    device.write(folder, {"scores.safetensors": {"loop": losses}})
