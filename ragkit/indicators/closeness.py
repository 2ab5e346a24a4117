"""What a reader attends to, token by token; how close that is to the answer, and to nouns."""

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.corpus import Asked, Passage, Question, block
from ragkit.data.text import folded, readable, word_places
from ragkit.distillation.teacher import Array, Found, token_contributions
from ragkit.indicators import measures
from ragkit.indicators.measures import Bools, Floats, Ints, Tokens
from ragkit.models import device, fid
from ragkit.models.fid import load_reader, open_reader
from ragkit.models.reader import PART, Prompt, Reader
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings, IndicatorSettings, ReaderSettings

Words = Sequence[tuple[int, int]]  # where they stand in a text, by their characters
Spans = Sequence[Words]  # the nouns of each question
PLACE = ("question", "owner", "title", "ends")  # of a token, however a prompt is laid out
Arrays = dict[str, NDArray[Any]]


def passage_tokens(prompt: Prompt) -> tuple[Ints, Ints, Bools]:
    """Where a prompt's passage tokens stand, titles included; each one's passage; if of a title."""
    owner = np.array(prompt.owner)
    title, texts = owner == PART["title"], np.flatnonzero(owner >= 0)
    places = np.flatnonzero(title | (owner >= 0))
    after = np.append(texts, 0)[np.searchsorted(texts, places)]  # a title's text comes next
    return places, owner[after], title[places]


def look_at_tokens(reader: Reader, questions: Sequence[Question], found: Found) -> Tokens:
    """One pass over every question's prompt with its answer."""

    def look(batch: list[Prompt]) -> Iterator[tuple[Array, Array]]:
        every = token_contributions(reader, batch).mean(4).cpu().float()  # over heads
        for place, prompt in enumerate(batch):
            # [tokens, rows, norm (off, on), layers]
            own = every[..., place, : len(prompt)].permute(3, 2, 0, 1).numpy()
            owner, plain = np.array(prompt.owner), own[:, :, 0].mean(2)
            beside = ("title", "question", "other", "answer")  # in the order of `measures.PLACES`
            parts = np.stack([owner >= 0, *(owner == PART[name] for name in beside)])
            parts[:, 0] = False  # the first token is a place of its own
            sums = np.stack([plain[part].sum(0) for part in parts] + [plain[0]], axis=1)
            shares = (sums / plain.sum(0)[:, None]).astype(np.float32)
            yield own[passage_tokens(prompt)[0]], shares[None]

    prompts = [reader.prompt(q, p, q.answers[0]) for q, p in zip(questions, found, strict=True)]
    seen = device.spread(prompts, reader.settings.at_once, look, "tokens")
    parts = []
    for number, (prompt, passages, one) in enumerate(zip(prompts, found, seen, strict=True)):
        places, own, title = passage_tokens(prompt)
        ids, mine = np.array(prompt.ids)[places], np.full(len(places), number)
        ends = ends_of(reader, ids, own, title, passages)
        parts.append((ids, own, title, mine, prompt.answer_start - places, ends, *one))
    return Tokens(*map(np.concatenate, zip(*parts, strict=True)))


def ends_of(
    reader: Reader, ids: Ints, owner: Ints, title: Bools, passages: Sequence[Passage]
) -> Ints:
    """The place of the last character of each passage token in its title or text `[tokens]`."""
    ends = np.full(len(ids), -1)
    for place, passage in enumerate(passages):
        for text, is_title in ((block(passage.title, ""), True), (passage.text, False)):
            there = (owner == place) & (title == is_title)
            ends[there] = last_characters(reader, text, ids[there])
    return ends


def last_characters(reader: Reader, text: str, ids: Ints) -> Ints:
    """The place in a text of the last character of each of its first tokens `[tokens]`, which are
    given as they stand in a prompt; all -1 where the text alone has other tokens."""
    # as behind a title, behind a passage, at a prompt's beginning; a token may hold the line break
    # that follows, and a tokenizer may cut otherwise where one does
    for after, before in product(("", "\n"), (" ", "\n", "")):
        told = f"{before}{readable(text)}{after}"
        encoded = reader.tokenizer(told, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        own = [(token, end) for token, (_, end) in pairs if end > len(before)][: len(ids)]
        if [token for token, _ in own] == ids.tolist():
            ends = np.array([end for _, end in own], dtype=np.int64) - len(before)
            return np.minimum(ends, len(text)) - 1
    return np.full(len(ids), -1)


def within_spans(reader: Reader, text: str, spans: Words, ids: Ints) -> Bools:
    """Whether each token of a text, as `last_characters` takes them, ends in one of its spans."""
    ends = last_characters(reader, text, ids).tolist()
    return np.array([any(first <= end < last for first, last in spans) for end in ends], dtype=bool)


@dataclass(frozen=True)
class InWords:
    """Closeness compares words, case-folded, however a tokenizer cuts them. `tokens`: passage
    tokens with the number of their word for an id; `wanted`: by goal the words that closeness is
    measured to, of each question; `forms`: by number, each word as it is written most often."""

    tokens: Tokens
    wanted: dict[str, list[list[int]]]
    forms: list[str]


def in_words(
    reader: Reader, tokens: Tokens, asked: Sequence[Question], found: Found, nouns: Spans | None
) -> InWords:
    """The words of passage tokens as the reader saw them, of each question's first answer, and of
    its nouns. A token whose place in its passage is unknown is a word of its own."""
    written = defaultdict[str, Counter[str]](Counter)

    def named(shown: str) -> str:
        name = folded(shown, "NFC")
        written[name][shown] += 1
        return name

    def meant(text: str, spans: Words) -> list[str]:
        """The words within the spans of a text; signs count only where there is nothing else."""
        here = [
            text[start:end]
            for start, end in word_places(text)
            if any(start < last and end > first for first, last in spans)
        ]
        return [named(one) for one in here if any(map(str.isalnum, one))] or [*map(named, here)]

    def cut(text: str) -> list[tuple[int, int, str]]:
        return [(start, end, text[start:end]) for start, end in word_places(text)]

    shown = measures.by_word(tokens, found, cut)
    alone = [str(reader.tokenizer.decode([token])).strip() for token in tokens.ids.tolist()]
    names = [named(one or other) for one, other in zip(shown, alone, strict=True)]
    goals = {"answer": [meant(q.answers[0], [(0, len(q.answers[0]))]) for q in asked]}
    if nouns is not None:
        goals["nouns"] = [meant(q.text, spans) for q, spans in zip(asked, nouns, strict=True)]
    number = {name: place for place, name in enumerate(sorted(written))}
    return InWords(
        replace(tokens, ids=np.array([number[name] for name in names])),
        {goal: [[number[name] for name in row] for row in rows] for goal, rows in goals.items()},
        [written[name].most_common(1)[0][0] for name in number],
    )


def space(forms: Sequence[str], model: Reader | Retriever) -> Floats:
    """The vectors of words `[words, d]` in a model's input embeddings: the mean over the tokens
    that its tokenizer cuts a word into behind a space; NaN for a word without any."""
    owner, special = model.tokenizer, set(model.tokenizer.all_special_ids)
    table = model.model.get_input_embeddings().weight.detach()
    vectors = np.full((len(forms), table.shape[1]), np.nan)
    cut = owner([f" {one}" for one in forms], add_special_tokens=False)["input_ids"]
    for row, ids in enumerate(cut):
        told = [one for one in ids if one not in special]
        if pieces := [one for one in told if str(owner.decode([one])).strip()]:
            vectors[row] = table[pieces].double().mean(0).cpu().numpy()
    return vectors


def indicators_of(
    models: tuple[Reader, Reader | Retriever],
    tokens: Tokens,
    questions: Sequence[Question],
    found: Found,
    nouns: Spans | None,
) -> tuple[dict[str, pd.DataFrame], int]:
    """Both indicators by goal, of a model's tokens in another's space; how many lack a vector."""
    reader, base = models
    words = in_words(reader, tokens, questions, found, nouns)
    vectors, seen = space(words.forms, base), words.tokens
    attention, tables = tokens.attention(AttentionSettings()), {}
    for goal, wanted in words.wanted.items():
        close, exact = measures.closeness_to(seen, wanted, vectors), measures.exact(seen, wanted)
        given = attention, close, tokens.question, exact, IndicatorSettings().share
        tables[goal] = measures.indicator(*given)
    return tables, int(np.isnan(vectors[seen.ids]).any(1).sum())


@torch.no_grad()
def contextual_closeness(
    reader: Reader, questions: Sequence[Question], found: Found, nouns: Spans | None
) -> Arrays:
    """Closeness of passage tokens to the `answer` and to the `nouns` `[tokens]`, and their PLACE
    (`place` `[tokens, 4]`): in a decoder's last hidden states of the prompt with its answer, the
    question first whatever the reader's layout: a state knows only what stands before it."""
    asking = copy.copy(reader)
    asking.settings = reader.settings.model_copy(update={"layout": "question first"})

    def look(batch: Iterable[Any]) -> Iterator[Arrays]:
        for number, question, passages, spans in batch:
            prompt = asking.prompt(question, passages, question.answers[0])
            ids, mask = asking.batch([prompt])
            seen = asking.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            states, owner = seen.last_hidden_state[0].double().cpu().numpy(), np.array(prompt.owner)
            goals = {"answer": states[prompt.answer_start : -1]}
            if nouns is not None:
                asks = owner == PART["question"]
                inside = within_spans(asking, question.text, spans, np.array(prompt.ids)[asks])
                goals["nouns"] = states[asks][inside]
            here, own, title = passage_tokens(prompt)
            made = {name: measures.closeness(states[here], to) for name, to in goals.items()}
            ends = ends_of(asking, np.array(prompt.ids)[here], own, title, passages)
            mine = np.full(len(here), number)
            yield made | {"place": np.stack([mine, own, title, ends], axis=1)}

    spans = nouns or [[]] * len(questions)
    asked = list(zip(range(len(questions)), questions, found, spans, strict=True))
    parts = device.spread(asked, 1, look, "contextual")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def opened(
    inputs: Mapping[str, Path], settings: Mapping[str, Any]
) -> tuple[Asked, Spans | None, Reader]:
    """A part's first questions, their nouns (None without a finder), the reader of the space."""
    part, nouns = settings["part"], None
    asked = Asked.open(inputs, part, settings["questions"], settings["k"]).scored(settings["base"])
    if "nouns" in inputs:
        spans = json.loads((inputs["nouns"] / "spans.json").read_text("utf8"))
        nouns = spans[part][: len(asked.questions)]
    base = ReaderSettings(**settings["base"])
    return asked, nouns, load_reader(base.model, base)


def make_tokens(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The test questions' tokens as a reader sees them: `tokens.safetensors` (Tokens), and
    `words.json`: how the vocabulary spells each token that occurs, by its id."""
    asked, reader = fid.opened(inputs, settings)
    tokens = look_at_tokens(reader, asked.questions, asked.passages)
    ids = np.unique(tokens.ids).tolist()
    words = dict(zip(ids, reader.tokenizer.convert_ids_to_tokens(ids), strict=True))
    device.write(folder, {"tokens.safetensors": vars(tokens), "words.json": words})


def make_contextual(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`contextual.safetensors`: `contextual_closeness` by the off-the-shelf decoder."""
    asked, nouns, reader = opened(inputs, settings)
    arrays: Arrays = {}
    if not reader.model.config.is_encoder_decoder:
        arrays = contextual_closeness(reader, asked.questions, asked.passages, nouns)
    device.write(folder, {"contextual.safetensors": arrays})


def make_closeness(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`closeness.safetensors`: of the test questions' tokens as a reader saw them, by their words,
    for each goal (`answer`, `nouns`) `{goal}/exact`, and `{goal}/{space}` in each of SPACES and
    CONTROLS (`contextual` only of a decoder: by token, NaN where the place is unknown). Beside it,
    for whoever measures by hand: `vectors.safetensors`, the input space's `vectors` of all words
    and each token's `word`, its place in them; and `answers.json`, each answer's words."""
    tokens, reader = Tokens.load(inputs["tokens"]), open_reader(inputs, settings)
    contextual = load_file(inputs["contextual"] / "contextual.safetensors")
    asked, nouns, base = opened(inputs, settings)
    words = in_words(reader, tokens, asked.questions, asked.passages, nouns)
    spaces = {"input": space(words.forms, base), "own": space(words.forms, reader)}
    spaces["retriever"] = space(words.forms, Retriever.open(inputs, settings))
    spaces["permuted"] = spaces["input"]
    arrays: Arrays = {}
    for goal, wanted in words.wanted.items():
        exact = measures.exact(words.tokens, wanted)
        arrays |= {f"{goal}/exact": exact.astype(np.uint8), f"{goal}/overlap": exact.astype(float)}
        for name, vectors in spaces.items():
            dealt = np.random.default_rng(settings["seed"]) if name == "permuted" else None
            close = measures.closeness_to(words.tokens, wanted, vectors, dealt)
            arrays[f"{goal}/{name}"] = close
        if goal in contextual:
            at = map(tuple, contextual["place"].tolist())
            known = dict(zip(at, contextual[goal].tolist(), strict=True))
            places = zip(*(getattr(tokens, name).tolist() for name in PLACE), strict=True)
            seen = [known.get(one, np.nan) if one[-1] >= 0 else np.nan for one in places]
            arrays[f"{goal}/contextual"] = np.array(seen)
    by_hand = {"vectors": spaces["input"], "word": words.tokens.ids}
    made = {"closeness.safetensors": arrays, "vectors.safetensors": by_hand}
    device.write(folder, made | {"answers.json": words.wanted["answer"]})
