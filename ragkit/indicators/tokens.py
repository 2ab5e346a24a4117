"""One look of a reader at every question's prompt, kept token by token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.data.asked import Asked
from ragkit.data.files import write_arrays, write_json
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.distillation.teacher import token_contributions
from ragkit.indicators.measures import Ints, Tokens
from ragkit.models import device
from ragkit.models.fid import open_reader
from ragkit.models.reader import PART, Prompt, Reader, in_order

Seen = dict[str, NDArray[np.float32]]  # `contribution` and `mass`, as `Tokens` holds them


def look_at_tokens(
    reader: Reader, questions: Sequence[Question], found: Sequence[Sequence[Passage]]
) -> Tokens:
    """One pass over every question's prompt with its answer."""

    def look(batch: list[Prompt]) -> list[Seen]:
        every = token_contributions(reader, batch).cpu().float()
        result = []
        for place, prompt in enumerate(batch):
            own = every[..., place, : len(prompt.owner)].permute(3, 2, 0, 1).numpy()
            result.append(seen(np.array(prompt.owner), own))
        return result

    pairs = list(zip(questions, found, strict=True))
    prompts = [reader.prompt(q, list(passages), q.answers[0]) for q, passages in pairs]
    parts = []
    shown = in_order(prompts, reader.settings.at_once, look, "tokens")
    for number, (prompt, one) in enumerate(zip(prompts, shown, strict=True)):
        owner = np.array(prompt.owner)
        places = np.flatnonzero(owner >= 0)
        ids, own = np.array(prompt.ids)[places], owner[places]
        texts = [passage.text for passage in found[number]]
        ends = [last_characters(reader, text, ids[own == i]) for i, text in enumerate(texts)]
        mine, from_end = np.full(len(ids), number), prompt.answer_start - places
        parts.append(Tokens(ids, own, mine, from_end, np.concatenate(ends), **one))
    names = vars(parts[0])
    return Tokens(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in names})


def seen(owner: Ints, contribution: NDArray[np.float32]) -> Seen:
    """What a prompt's tokens with these owners got `[tokens, rows, norm (off, on), layers]`."""
    plain = contribution[:, :, 0].mean(2)  # [tokens, rows]
    beside = ("title", "question", "other", "answer")  # in the order of `measures.PLACES`
    parts = np.stack([owner >= 0, *(owner == PART[name] for name in beside)])
    parts[:, 0] = False  # the first token is a place of its own
    sums = np.stack([plain[part].sum(0) for part in parts] + [plain[0]], axis=1)
    mass = (sums / plain.sum(0)[:, None]).astype(np.float32)
    return {"contribution": contribution[owner >= 0], "mass": mass[None]}


def last_characters(reader: Reader, text: str, ids: Ints) -> Ints:
    """The place in a passage's text of the last character of each of its first tokens `[tokens]`,
    which are given as they stand in a prompt; all -1 where the text alone has other tokens."""
    encoded = reader.tokenizer(" " + text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"][: len(ids)] != ids.tolist():
        return np.full(len(ids), -1)
    ends = [end for _, end in encoded["offset_mapping"][: len(ids)]]
    return np.array(ends, dtype=np.int64) - 2  # one for the space put before the text


def make_tokens(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The test questions' tokens as a reader sees them: `tokens.safetensors` (Tokens), and
    `words.json`: how the vocabulary spells each token that occurs, by its id."""
    reader = open_reader(inputs, settings)
    asked = Asked.open(inputs, "test", settings["questions"], settings["k"])
    tokens = look_at_tokens(reader, asked.questions, asked.passages)
    if device.is_main():
        write_arrays(folder / "tokens.safetensors", vars(tokens))
        ids = np.unique(tokens.ids).tolist()
        words = zip(map(str, ids), reader.tokenizer.convert_ids_to_tokens(ids), strict=True)
        write_json(folder / "words.json", dict(words))
