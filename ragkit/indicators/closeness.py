"""How close passage tokens are to the answer and to the question's nouns, in several spaces."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ragkit.data.asked import Asked
from ragkit.data.files import write_arrays, write_json
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.indicators import measures
from ragkit.indicators.measures import Floats, Ints, Tokens
from ragkit.indicators.tokens import look_at_tokens
from ragkit.models import device
from ragkit.models.fid import load_reader, open_reader
from ragkit.models.reader import PART, Reader
from ragkit.models.retriever import Retriever
from ragkit.settings import AttentionSettings, ReaderSettings, RetrieverSettings

Spans = Sequence[Sequence[tuple[int, int]]]  # the nouns of each question, by their characters


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
    pieces = asking.pieces(question, list(passages))
    place = [who for _, who in pieces].index(PART["question"])
    texts = [text for text, _ in pieces]
    before = len("".join(texts[:place]))
    offsets = asking.tokenizer("".join(texts), return_offsets_mapping=True)["offset_mapping"]
    found = []
    for token, who, (start, end) in zip(*asking.tokens(pieces), offsets, strict=True):
        if who == PART["question"]:
            inside = any(start < last + before and end > first + before for first, last in spans)
            found.append((token, inside))
    return found


def wanted_ids(
    reader: Reader, questions: Sequence[Question], nouns: Spans | None
) -> dict[str, list[list[int]]]:
    """The tokens that closeness is measured to, by goal: each question's first answer, as it stands
    behind its prompt without the end token, and its nouns.

    Raises ReaderError for a question longer than the reader's context.
    """
    prompts = [reader.prompt(question, [], question.answers[0]) for question in questions]
    wanted = {"answer": [prompt.ids[prompt.answer_start : -1] for prompt in prompts]}
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
    without any becomes NaN."""
    is_own, special = tokenizer.get_vocab() == owner.get_vocab(), set(owner.all_special_ids)
    vectors = np.full((len(ids), table.shape[1]), np.nan)
    for row, token in enumerate(ids.tolist()):
        pieces = [token]
        if not is_own:
            text = tokenizer.decode([token])
            pieces = owner(text, add_special_tokens=False)["input_ids"]
            pieces = [piece for piece in pieces if piece not in special]
        if pieces:
            vectors[row] = table[pieces].detach().double().mean(0).cpu().numpy()
    return vectors


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


def opened(
    inputs: Mapping[str, Path], settings: Mapping[str, Any], part: str
) -> tuple[Asked, Spans | None]:
    """The first questions of a part, and their nouns; None where no noun finder is at hand."""
    asked = Asked.open(inputs, part, settings["questions"], settings["k"])
    if "nouns" not in inputs:
        return asked, None
    spans = json.loads((inputs["nouns"] / "spans.json").read_text("utf8"))
    return asked, spans[part][: len(asked.questions)]


def untaught(settings: Mapping[str, Any]) -> Reader:
    """The off-the-shelf reader, asked by questions."""
    return load_reader(settings["reader"]["model"], ReaderSettings(**settings["reader"]))


def space(reader: Reader, model: Reader | Retriever) -> Callable[[Ints], Floats]:
    """What gives the vectors of a reader's tokens `[ids, d]` in a model's input embeddings."""
    table = model.model.get_input_embeddings().weight
    return partial(embeddings, reader.tokenizer, table=table, owner=model.tokenizer)


def make_contextual(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`contextual.safetensors`: `contextual_closeness` of the test questions for the off-the-shelf
    reader; nothing for an encoder-decoder."""
    reader, arrays = untaught(settings), {}
    if not reader.model.config.is_encoder_decoder:
        asked, nouns = opened(inputs, settings, "test")
        arrays = contextual_closeness(reader, asked.questions, asked.passages, nouns)
    if device.is_main():
        write_arrays(folder / "contextual.safetensors", arrays)


def make_closeness(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`closeness.safetensors`: of the test questions' tokens as a reader saw them, for each goal
    (`answer`, `nouns`) `{goal}/exact`, and `{goal}/{space}` in each of SPACES and CONTROLS.

    `contextual` is left out where this reader saw other passage tokens than the off-the-shelf one.
    Beside it, for whoever measures by hand: `vectors.safetensors` (the input space's vectors of all
    `ids` that occur, sorted), and `answers.json`, the tokens of each question's answer.
    """
    tokens, contextual = Tokens.load(inputs["tokens"]), {}
    if "contextual" in inputs:
        contextual = load_file(inputs["contextual"] / "contextual.safetensors")
    encoding = RetrieverSettings(**settings["retriever"])
    retriever = Retriever.load(str(inputs["retriever"] / "model"), encoding)
    reader, base = open_reader(inputs, settings), untaught(settings)
    models: dict[str, Reader | Retriever] = {"input": base, "own": reader}
    models |= {"retriever": retriever, "permuted": base}
    asked, nouns = opened(inputs, settings, "test")
    wanted = wanted_ids(reader, asked.questions, nouns)
    arrays: dict[str, NDArray[Any]] = {}
    for goal, goals in wanted.items():
        exact = measures.exact(tokens, goals)
        arrays[f"{goal}/exact"] = exact.astype(np.uint8)
        arrays[f"{goal}/overlap"] = exact.astype(np.float64)
        for name, model in models.items():
            dealt = np.random.default_rng(settings["seed"]) if name == "permuted" else None
            embed = space(reader, model)
            arrays[f"{goal}/{name}"] = measures.closeness_to(tokens, goals, embed, dealt)
        if goal in contextual and np.array_equal(contextual["ids"], tokens.ids):
            arrays[f"{goal}/contextual"] = contextual[goal]
    ids = np.unique(np.concatenate([tokens.ids, *map(np.array, wanted["answer"])]))
    vectors = {"ids": ids, "vectors": space(reader, base)(ids)}
    if device.is_main():
        write_arrays(folder / "closeness.safetensors", arrays)
        write_arrays(folder / "vectors.safetensors", vectors)
        write_json(folder / "answers.json", wanted["answer"])


def make_probe(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`indicators.json`: of a reader, on the first dev questions, `answer lift`, `answer Spearman`,
    `nouns lift`, `nouns Spearman`, where they are defined, in the off-the-shelf reader's input
    embeddings."""
    asked, nouns = opened(inputs, settings, "dev")
    reader = open_reader(inputs, settings)
    embed = space(reader, untaught(settings))
    tokens = look_at_tokens(reader, asked.questions, asked.passages)
    attention = tokens.attention(AttentionSettings(**settings["attention"]))
    measured = {}
    for goal, goals in wanted_ids(reader, asked.questions, nouns).items():
        close, exact = measures.closeness_to(tokens, goals, embed), measures.exact(tokens, goals)
        rows = measures.indicator(attention, close, tokens.question, exact, settings["share"])
        for name, short in (("attention", "lift"), ("Spearman", "Spearman")):
            if rows[name].notna().any():
                measured[f"{goal} {short}"] = float(np.nanmean(rows[name].to_numpy()))
    if device.is_main():
        write_json(folder / "indicators.json", measured)
