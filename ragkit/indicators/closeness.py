"""A reader's look at every question's prompt, token by token, and how close passage tokens are to
the answer and to the question's nouns, in several spaces."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.corpus import Asked, Passage, Question, block
from ragkit.data.files import write_arrays, write_json
from ragkit.distillation.teacher import Array, Found, token_contributions
from ragkit.indicators import measures
from ragkit.indicators.measures import Bools, Embed, Floats, Ints, Tokens
from ragkit.models import device
from ragkit.models.fid import load_reader, open_reader
from ragkit.models.reader import PART, Prompt, Reader
from ragkit.models.retriever import Retriever
from ragkit.settings import ReaderSettings, RetrieverSettings

Words = Sequence[tuple[int, int]]  # where they stand in a text, by their characters
Spans = Sequence[Words]  # the nouns of each question
Arrays = dict[str, NDArray[Any]]


def passage_tokens(prompt: Prompt) -> tuple[Ints, Ints, Bools]:
    """The places in a prompt of its passages' tokens, titles included, the passage of each, and
    whether it is one of the title's."""
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
        ids, ends = np.array(prompt.ids)[places], np.full(len(places), -1)
        for i, passage in enumerate(passages):
            for text, is_title in ((block(passage.title, ""), True), (passage.text, False)):
                there = (own == i) & (title == is_title)
                ends[there] = last_characters(reader, text, ids[there])
        mine, from_end = np.full(len(ids), number), prompt.answer_start - places
        parts.append((ids, own, title, mine, from_end, ends, *one))
    return Tokens(*map(np.concatenate, zip(*parts, strict=True)))


def last_characters(reader: Reader, text: str, ids: Ints) -> Ints:
    """The place in a text of the last character of each of its first tokens `[tokens]`, which are
    given as they stand in a prompt; all -1 where the text alone has other tokens."""
    for before in (" ", "\n", ""):  # as behind a title, behind a passage, at a prompt's beginning
        encoded = reader.tokenizer(
            before + text, add_special_tokens=False, return_offsets_mapping=True
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        own = [(token, end) for token, (_, end) in pairs if end > len(before)][: len(ids)]
        if [token for token, _ in own] == ids.tolist():
            return np.array([end for _, end in own], dtype=np.int64) - 1 - len(before)
    return np.full(len(ids), -1)


def within_spans(
    reader: Reader, question: Question, spans: Words, passages: Sequence[Passage] = ()
) -> list[tuple[int, bool]]:
    """The question's tokens as they stand in a question prompt, and whether each overlaps one of
    the spans of its text, such as its nouns."""
    asking = copy.copy(reader)
    asking.style = "question"
    pieces = asking.pieces(question, passages)
    texts, owners = zip(*pieces, strict=True)
    before = len("".join(texts[: owners.index(PART["question"])]))
    offsets = asking.tokenizer("".join(texts), return_offsets_mapping=True)["offset_mapping"]
    coded = zip(*asking.tokens(pieces), offsets, strict=False)  # without a last end token
    return [
        (token, any(start < last + before and end > first + before for first, last in spans))
        for token, who, (start, end) in coded
        if who == PART["question"]
    ]


def wanted_ids(
    reader: Reader, questions: Sequence[Question], nouns: Spans | None
) -> dict[str, list[list[int]]]:
    """The tokens that closeness is measured to, by goal: each question's first answer as behind its
    prompt, without the end token, and its nouns. ReaderError for too long a question."""
    prompts = [reader.prompt(question, [], question.answers[0]) for question in questions]
    wanted = {"answer": [prompt.ids[prompt.answer_start : -1] for prompt in prompts]}
    if nouns is not None:
        words = [within_spans(reader, *pair) for pair in zip(questions, nouns, strict=True)]
        wanted["nouns"] = [[token for token, is_noun in word if is_noun] for word in words]
    return wanted


def space(reader: Reader, model: Reader | Retriever) -> Embed:
    """What gives the vectors of a reader's tokens `[ids, d]` in a model's input embeddings. A token
    of another tokenizer is the mean of the pieces that its text has there; without any, NaN."""
    tokenizer, owner = reader.tokenizer, model.tokenizer
    is_own, special = tokenizer.get_vocab() == owner.get_vocab(), set(owner.all_special_ids)
    table = model.model.get_input_embeddings().weight.detach()

    def embed(ids: Ints) -> Floats:
        vectors = np.full((len(ids), table.shape[1]), np.nan)
        for row, token in enumerate(ids.tolist()):
            pieces = [token]
            if not is_own:
                cut = owner(tokenizer.decode([token]), add_special_tokens=False)["input_ids"]
                pieces = [piece for piece in cut if piece not in special]
            if pieces:
                vectors[row] = table[pieces].double().mean(0).cpu().numpy()
        return vectors

    return embed


@torch.no_grad()
def contextual_closeness(
    reader: Reader, questions: Sequence[Question], found: Found, nouns: Spans | None
) -> Arrays:
    """Closeness of each token of `Tokens` to the `answer` and to the `nouns`, and its id (`ids`)
    `[tokens]`: in a decoder's last hidden states of the prompt with its answer."""

    def look(batch: Iterable[Any]) -> Iterator[Arrays]:
        for question, passages, spans in batch:
            prompt = reader.prompt(question, passages, question.answers[0])
            ids, mask = reader.batch([prompt])
            seen = reader.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            states, owner = seen.last_hidden_state[0].double().cpu().numpy(), np.array(prompt.owner)
            goals = {"answer": states[prompt.answer_start : -1]}
            if nouns is not None:
                words = within_spans(reader, question, spans, passages)
                inside = np.array([is_noun for _, is_noun in words], dtype=bool)
                goals["nouns"] = states[owner == PART["question"]][inside]
            here = passage_tokens(prompt)[0]
            own = {name: measures.closeness(states[here], to) for name, to in goals.items()}
            yield own | {"ids": np.array(prompt.ids)[here]}

    asked = list(zip(questions, found, nouns or [[]] * len(questions), strict=True))
    parts = device.spread(asked, 1, look, "contextual")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def opened(
    inputs: Mapping[str, Path], settings: Mapping[str, Any]
) -> tuple[Asked, Spans | None, Reader]:
    """The first test questions, their nouns (None where no noun finder is at hand), and the
    off-the-shelf reader, asked by questions."""
    asked, nouns = Asked.open(inputs, "test", settings["questions"], settings["k"]), None
    if "nouns" in inputs:
        spans = json.loads((inputs["nouns"] / "spans.json").read_text("utf8"))
        nouns = spans["test"][: len(asked.questions)]
    base = ReaderSettings(**settings["base"])
    return asked, nouns, load_reader(base.model, base)


def make_tokens(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The test questions' tokens as a reader sees them: `tokens.safetensors` (Tokens), and
    `words.json`: how the vocabulary spells each token that occurs, by its id."""
    asked = Asked.open(inputs, "test", settings["questions"], settings["k"])
    reader = open_reader(inputs, settings)
    tokens = look_at_tokens(reader, asked.questions, asked.passages)
    if device.is_main():
        write_arrays(folder / "tokens.safetensors", vars(tokens))
        ids = np.unique(tokens.ids).tolist()
        words = reader.tokenizer.convert_ids_to_tokens(ids)
        write_json(folder / "words.json", dict(zip(ids, words, strict=True)))


def make_contextual(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`contextual.safetensors`: `contextual_closeness` of the test questions for the off-the-shelf
    reader; nothing for an encoder-decoder."""
    asked, nouns, reader = opened(inputs, settings)
    arrays: Arrays = {}
    if not reader.model.config.is_encoder_decoder:
        arrays = contextual_closeness(reader, asked.questions, asked.passages, nouns)
    if device.is_main():
        write_arrays(folder / "contextual.safetensors", arrays)


def make_closeness(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`closeness.safetensors`: of the test questions' tokens as a reader saw them, for each goal
    (`answer`, `nouns`) `{goal}/exact`, and `{goal}/{space}` in each of SPACES and CONTROLS, but
    `contextual` only where this reader saw the off-the-shelf one's passage tokens. Beside it, for
    whoever measures by hand: `vectors.safetensors` (the input space's vectors of all `ids` that
    occur, sorted), and `answers.json`, the tokens of each question's answer."""
    tokens, reader = Tokens.load(inputs["tokens"]), open_reader(inputs, settings)
    contextual = load_file(inputs["contextual"] / "contextual.safetensors")
    asked, nouns, base = opened(inputs, settings)
    encoding = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(inputs["retriever"] / "model", encoding)
    spaces = {"input": space(reader, base), "own": space(reader, reader)}
    spaces |= {"retriever": space(reader, retriever), "permuted": spaces["input"]}
    wanted = wanted_ids(reader, asked.questions, nouns)
    arrays: Arrays = {}
    for goal, goals in wanted.items():
        exact = measures.exact(tokens, goals)
        arrays |= {f"{goal}/exact": exact.astype(np.uint8), f"{goal}/overlap": exact.astype(float)}
        for name, embed in spaces.items():
            dealt = np.random.default_rng(settings["seed"]) if name == "permuted" else None
            arrays[f"{goal}/{name}"] = measures.closeness_to(tokens, goals, embed, dealt)
        if goal in contextual and np.array_equal(contextual["ids"], tokens.ids):
            arrays[f"{goal}/contextual"] = contextual[goal]
    if device.is_main():
        write_arrays(folder / "closeness.safetensors", arrays)
        ids = np.unique(np.concatenate([tokens.ids, *map(np.array, wanted["answer"])]))
        by_hand = {"ids": ids, "vectors": spaces["input"](ids)}
        write_arrays(folder / "vectors.safetensors", by_hand)
        write_json(folder / "answers.json", wanted["answer"])
