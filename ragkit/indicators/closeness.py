"""How close passage tokens are to the answer and to the question's nouns, in several spaces."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ragkit.data.files import write_arrays, write_json
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.indicators import measures
from ragkit.indicators.measures import Floats, Ints, Tokens
from ragkit.indicators.tokens import asked, look_at_tokens
from ragkit.models import device
from ragkit.models.fid import load_reader, open_reader
from ragkit.models.reader import PART, Reader
from ragkit.models.retriever import Retriever
from ragkit.profile import AttentionSettings, ReaderSettings, RetrieverSettings

Spans = Sequence[Sequence[tuple[int, int]]]  # the nouns of each question, by their characters


def answer_ids(reader: Reader, questions: Sequence[Question]) -> list[list[int]]:
    """The tokens of each question's first answer, as they stand behind its prompt.

    Raises ReaderError for a question longer than the reader's context.
    """
    prompts = [reader.prompt(question, [], question.answers[0]) for question in questions]
    return [prompt.ids[prompt.answer_start : -1] for prompt in prompts]  # without the end token


def within_spans(
    reader: Reader,
    question: Question,
    spans: Sequence[tuple[int, int]],
    passages: Sequence[Passage] = (),
) -> list[tuple[int, bool]]:
    """The question's tokens as they stand in a question prompt, and whether each overlaps one of
    the character spans of its text, such as its nouns."""
    asking = copy.copy(reader)
    asking.style = "question"
    pieces, text, before = asking.pieces(question, list(passages)), "", 0
    for piece, who in pieces:
        if who == PART["question"]:
            before = len(text)
        text += piece
    offsets = asking.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for token, who, (start, end) in zip(*asking.tokens(pieces), offsets, strict=True):
        if who == PART["question"]:
            inside = any(start < last + before and end > first + before for first, last in spans)
            found.append((token, inside))
    return found


def wanted_ids(
    reader: Reader, questions: Sequence[Question], nouns: Spans | None
) -> dict[str, list[list[int]]]:
    """The tokens that closeness is measured to, by goal: each question's answer, and its nouns."""
    wanted = {"answer": answer_ids(reader, questions)}
    if nouns is not None:
        wanted["nouns"] = [
            [token for token, inside in within_spans(reader, question, spans) if inside]
            for question, spans in zip(questions, nouns, strict=True)
        ]
    return wanted


def embeddings(
    tokenizer: PreTrainedTokenizerBase, ids: Ints, table: Tensor, owner: PreTrainedTokenizerBase
) -> Floats:
    """Vectors of tokens `[tokens, d]` in an embedding `table` `[vocabulary, d]` of the tokenizer
    `owner`. A token of another tokenizer is the mean of the pieces that its text has there; one
    without any becomes NaN.
    """

    def rows(chosen: Any) -> Floats:
        return table.detach()[chosen].float().cpu().numpy().astype(np.float64)

    if tokenizer.get_vocab() == owner.get_vocab():
        return rows(ids)
    unique, place = np.unique(ids, return_inverse=True)
    vectors = np.full((len(unique), table.shape[1]), np.nan)
    for row, token in enumerate(unique):
        pieces = owner(tokenizer.decode([int(token)]), add_special_tokens=False)["input_ids"]
        if pieces := [piece for piece in pieces if piece not in owner.all_special_ids]:
            vectors[row] = rows(pieces).mean(0)
    return vectors[place]


@torch.no_grad()
def contextual_closeness(
    reader: Reader,
    questions: Sequence[Question],
    found: Sequence[Sequence[Passage]],
    nouns: Spans | None,
) -> dict[str, NDArray[Any]]:
    """Closeness of each passage token to the `answer` and to the `nouns`, and its id (`ids`)
    `[tokens]`, as in `Tokens`: in a decoder's last hidden states of the prompt with its answer."""

    def look(number: int) -> dict[str, NDArray[Any]]:
        question = questions[number]
        prompt = reader.prompt(question, list(found[number]), question.answers[0])
        ids, mask = reader.batch([prompt])
        seen = reader.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        states, owner = seen.last_hidden_state[0].double().cpu().numpy(), np.array(prompt.owner)
        own, answer = states[owner >= 0], states[prompt.answer_start : -1]
        result = {"ids": np.array(prompt.ids)[owner >= 0]}
        result["answer"] = measures.closeness(own, answer)
        if nouns is not None:
            words = within_spans(reader, question, nouns[number], found[number])
            inside = np.array([is_noun for _, is_noun in words], dtype=bool)
            result["nouns"] = measures.closeness(own, states[owner == PART["question"]][inside])
        return result

    parts = device.spread(range(len(questions)), int, look, "contextual")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def noun_spans(inputs: Mapping[str, Path], part: str, n: int) -> Spans | None:
    """The nouns of the first n questions of a part; None where no noun finder is at hand."""
    if "nouns" not in inputs:
        return None
    return json.loads((inputs["nouns"] / "spans.json").read_text("utf8"))[part][:n]


def untaught(settings: Mapping[str, Any]) -> Reader:
    """The off-the-shelf reader, asked by questions."""
    return load_reader(settings["reader"]["model"], ReaderSettings(**settings["reader"]))


def make_contextual(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`contextual.safetensors`: `contextual_closeness` of the test questions for the off-the-shelf
    reader; nothing for an encoder-decoder."""
    reader, arrays = untaught(settings), {}
    if not reader.model.config.is_encoder_decoder:
        questions, found = asked(inputs, "test", settings["questions"], settings["k"])
        nouns = noun_spans(inputs, "test", len(questions))
        arrays = contextual_closeness(reader, questions, found, nouns)
    if device.is_main():
        write_arrays(folder / "contextual.safetensors", arrays)


def make_closeness(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`closeness.safetensors`: of the test questions' tokens as a reader saw them, for each goal
    (`answer`, `nouns`) `{goal}/exact`, and `{goal}/{space}` in each of SPACES and CONTROLS.

    `contextual` is left out where this reader saw other passage tokens than the off-the-shelf one.
    """
    tokens, reader, base = (
        Tokens.load(inputs["tokens"]),
        open_reader(inputs, settings),
        untaught(settings),
    )
    retriever_settings = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(str(inputs["retriever"] / "model"), retriever_settings)
    table = base.model.get_input_embeddings().weight
    spaces = {
        "input": (table, base.tokenizer),
        "own": (reader.model.get_input_embeddings().weight, reader.tokenizer),
        "retriever": (retriever.model.get_input_embeddings().weight, retriever.tokenizer),
        "permuted": (table, base.tokenizer),
    }
    contextual = {}
    if "contextual" in inputs:
        contextual = load_file(inputs["contextual"] / "contextual.safetensors")
    questions, _ = asked(inputs, "test", settings["questions"], settings["k"])
    wanted = wanted_ids(reader, questions, noun_spans(inputs, "test", len(questions)))
    arrays: dict[str, NDArray[Any]] = {}
    for goal, goals in wanted.items():
        exact = measures.exact(tokens, goals)
        arrays[f"{goal}/exact"] = exact.astype(np.uint8)
        arrays[f"{goal}/overlap"] = exact.astype(np.float64)
        for space, (vectors, owner) in spaces.items():
            embed = partial(embeddings, reader.tokenizer, table=vectors, owner=owner)
            dealt = np.random.default_rng(settings["seed"]) if space == "permuted" else None
            arrays[f"{goal}/{space}"] = measures.closeness_to(tokens, goals, embed, dealt)
        if goal in contextual and np.array_equal(contextual["ids"], tokens.ids):
            arrays[f"{goal}/contextual"] = contextual[goal]
    if device.is_main():
        write_arrays(folder / "closeness.safetensors", arrays)


def make_probe(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`indicators.json`: of a reader, on the first dev questions, `answer lift`, `answer Spearman`,
    `nouns lift`, `nouns Spearman`, where they are defined, in the off-the-shelf reader's input
    embeddings."""
    questions, found = asked(inputs, "dev", settings["questions"], settings["k"])
    reader, base = open_reader(inputs, settings), untaught(settings)
    table = base.model.get_input_embeddings().weight
    embed = partial(embeddings, reader.tokenizer, table=table, owner=base.tokenizer)
    tokens = look_at_tokens(reader, questions, found)
    attention = tokens.attention(AttentionSettings(**settings["attention"]))
    wanted = wanted_ids(reader, questions, noun_spans(inputs, "dev", len(questions)))
    measured = {}
    for goal, goals in wanted.items():
        close, exact = measures.closeness_to(tokens, goals, embed), measures.exact(tokens, goals)
        rows = measures.indicator(attention, close, tokens.question, exact, settings["share"])
        for name, short in (("attention", "lift"), ("Spearman", "Spearman")):
            if rows[name].notna().any():
                measured[f"{goal} {short}"] = float(np.nanmean(rows[name].to_numpy()))
    if device.is_main():
        write_json(folder / "indicators.json", measured)
