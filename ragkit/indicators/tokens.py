"""One look of a reader at every question's prompt, kept token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.files import write_json
from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.distillation.teacher import in_order, token_contributions
from ragkit.indicators.measures import Ints, Tokens
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.reader import PART, Prompt, Reader

# the parts of a prompt in the order of `measures.PLACES`, behind the passages
PARTS_BESIDE = ("title", "question", "other", "answer")


def look_at_tokens(
    reader: Reader, questions: Sequence[Question], found: Sequence[Sequence[Passage]]
) -> Tokens:
    """One pass over every question's prompt with its answer."""
    prompts = [
        reader.prompt(q, list(passages), q.answers[0])
        for q, passages in zip(questions, found, strict=True)
    ]
    look = partial(contributions_and_mass, reader)
    seen = in_order(prompts, reader.settings.at_once, look, "tokens")
    parts = []
    for number, (prompt, passages) in enumerate(zip(prompts, found, strict=True)):
        owner = np.array(prompt.owner)
        inside = owner >= 0
        ids, own = np.array(prompt.ids)[inside], owner[inside]
        ends = [last_characters(reader, p.text, ids[own == i]) for i, p in enumerate(passages)]
        from_end = (prompt.answer_start - np.arange(len(owner)))[inside]
        mine = np.full(len(ids), number)
        parts.append(Tokens(ids, own, mine, from_end, np.concatenate(ends), *seen[number]))
    names = vars(parts[0])
    return Tokens(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in names})


def contributions_and_mass(
    reader: Reader, prompts: list[Prompt]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Of each prompt: `contribution` and `mass`, as `Tokens` holds them."""
    every = token_contributions(reader, prompts).cpu().float()  # [norm, layers, rows, prompts, ..]
    result = []
    for place, prompt in enumerate(prompts):
        owner = np.array(prompt.owner)
        each = every[:, :, :, place, : len(owner)].permute(3, 2, 0, 1).numpy()
        plain = each[:, :, 0].mean(2)  # [tokens, rows]
        parts = np.stack([owner >= 0, *(owner == PART[name] for name in PARTS_BESIDE)])
        parts[:, 0] = False
        sums = np.stack([plain[part].sum(0) for part in parts] + [plain[0]], axis=1)
        mass = (sums / plain.sum(0)[:, None]).astype(np.float32)
        result.append((each[owner >= 0], mass[None]))
    return result


def last_characters(reader: Reader, text: str, ids: Ints) -> Ints:
    """The place in a passage's text of the last character of each of its first tokens `[tokens]`,
    which are given as they stand in a prompt; all -1 where the text alone has other tokens."""
    encoded = reader.tokenizer(" " + text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"][: len(ids)] != ids.tolist():
        return np.full(len(ids), -1)
    ends = [end for _, end in encoded["offset_mapping"][: len(ids)]]
    return np.array(ends, dtype=np.int64) - 2  # one for the space put before the text


def asked(
    inputs: Mapping[str, Path], part: str, n: int, k: int
) -> tuple[list[Question], list[list[Passage]]]:
    """The first n questions of a part, with the first k candidates of each."""
    corpus = Corpus.load(part, inputs["passages"], inputs["questions"])
    questions = corpus.questions[part][:n]
    ranking = load_file(inputs["candidates"] / "candidates.safetensors")[part][: len(questions)]
    return questions, [[corpus.passages[i] for i in row[:k]] for row in ranking]


def make_tokens(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The test questions' tokens as a reader sees them: `tokens.safetensors` (Tokens), and
    `words.json`: how the vocabulary spells each token that occurs, by its id."""
    reader = open_reader(inputs, settings)
    tokens = look_at_tokens(reader, *asked(inputs, "test", settings["questions"], settings["k"]))
    if device.is_main():
        tokens.save(folder)
        ids = np.unique(tokens.ids).tolist()
        spelt = reader.tokenizer.convert_ids_to_tokens(ids)
        write_json(folder / "words.json", dict(zip(map(str, ids), spelt, strict=True)))
