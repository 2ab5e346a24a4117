"""Question sets made: from the embedded worlds, from files, or from the hub."""

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from ragkit.data import hub
from ragkit.data.files import write_json, write_jsonl
from ragkit.data.passages import Passage, Passages, read_tsv, write_passages
from ragkit.data.questions import (
    PARTS,
    PASSAGES,
    Question,
    read_questions,
    same_question,
    text_and_answers,
    without_repeats,
)
from ragkit.data.worlds import build_world
from ragkit.errors import DataError
from ragkit.settings import FileSet, HubSet, HubTable, QuestionSet, WorldSet

log = logging.getLogger(__name__)
Rows = dict[str, list[tuple[str, dict[str, Any]]]]  # of a hub's table: names and rows by part


def make_passages(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Writes the passages of a set; `settings["set"]` is its `passage_settings`."""
    chosen = {key: value for key, value in settings["set"].items() if key != "contents"}
    passages: Iterable[Passage]
    if chosen["source"] == "world":
        world = WorldSet(name="any", **chosen)
        passages = build_world(world.model_copy(update=dict.fromkeys(PARTS, 0))).passages
    elif chosen.get("pools"):
        one = HubSet(name="any", **chosen)
        passages = pooled(one, hub_rows(one)[0])[0]
    elif isinstance(chosen["passages"], str):
        passages = read_tsv(Path(chosen["passages"]))
    else:
        passages = hub.passages_of(HubTable(**chosen["passages"]), chosen["passage_split"])
    write_passages(folder / PASSAGES, passages)


def make_questions(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Writes the questions of a set by part, and counts.json: how many were left out and why.

    `settings["set"]` is the set's `question_settings`.
    """
    chosen = {key: value for key, value in settings["set"].items() if key != "contents"}
    one: QuestionSet = TypeAdapter(QuestionSet).validate_python(chosen)
    left_out = {"repeated": 0, "in another split": 0}
    if isinstance(one, WorldSet):
        parts = build_world(one).questions
    elif isinstance(one, FileSet):
        read = read_questions(Path(one.questions), Passages(inputs["passages"] / PASSAGES))
        questions = without_repeats(read)
        left_out["repeated"] = len(read) - len(questions)
        parts = split(questions, one, PARTS, random.Random(f"split {one.seed}"))
    else:
        parts, left_out = hub_questions(one)
    for part, asked in parts.items():
        write_jsonl(folder / f"{part}.jsonl", map(asdict, asked))
    write_json(folder / "counts.json", left_out)
    for why, number in left_out.items():
        if number:
            log.warning("%s: %d questions were left out (%s).", one.name, number, why)


def split(
    items: Sequence[Any], settings: FileSet | HubSet, parts: Sequence[str], rng: random.Random
) -> dict[str, list[Any]]:
    """Disjoint random parts of the set's sizes. Raises DataError if there are too few items."""
    sizes = {part: getattr(settings, part) for part in parts}
    if sum(sizes.values()) > len(items):
        raise DataError(
            f"set {settings.name}: {sum(sizes.values())} questions asked for, {len(items)} "
            "different there. Lower distill, dev or test."
        )
    shuffled = iter(rng.sample(items, len(items)))
    return {part: [next(shuffled) for _ in range(size)] for part, size in sizes.items()}


def hub_rows(settings: HubSet) -> tuple[Rows, dict[str, int]]:
    """The rows drawn for each part, and how many were left out: no question stands in two parts.

    Of a question asked twice the first row counts; one in both splits is kept for `test`.
    """
    gold = [name for name in settings.questions.columns if name == "gold"]
    columns = ["question", "answer", *settings.pools, *gold]
    parts = {settings.train: PARTS[:2], settings.heldout: PARTS[2:]}
    if settings.train == settings.heldout:
        parts = {settings.train: PARTS}
    tables = {name: hub.load(settings.questions, name, columns) for name in parts}
    asked = {}
    for name, table in tables.items():
        asked[name] = pd.Series([same_question(str(text)) for text in table["question"]])
    rows: Rows = {}
    left_out, rng = {"repeated": 0, "in another split": 0}, random.Random(f"split {settings.seed}")
    for name, table in tables.items():
        kept = asked[name].drop_duplicates()
        left_out["repeated"] += len(table) - len(kept)
        if name != settings.heldout:
            shared = kept.isin(asked[settings.heldout])
            left_out["in another split"] += int(shared.sum())
            kept = kept[~shared]
        for part, places in split(kept.index.tolist(), settings, parts[name], rng).items():
            chosen = zip(places, table.select(places), strict=True)
            rows[part] = [(f"{name}:{place}", row) for place, row in chosen]
    return rows, left_out


def hub_questions(settings: HubSet) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """The questions of each part, and how many were left out."""
    rows, left_out = hub_rows(settings)
    golds = pooled(settings, rows)[1]
    parts: dict[str, list[Question]] = {}
    for part, drawn in rows.items():
        parts[part] = []
        for name, row in drawn:
            told = text_and_answers(row, f"{settings.questions.dataset}, row {name}")
            parts[part].append(Question(name, *told, golds.get(name, ())))
    return parts, left_out


def pooled(settings: HubSet, rows: Rows) -> tuple[list[Passage], dict[str, tuple[int, ...]]]:
    """The passages of all pools, each once, and by row the places of its gold ones where told."""
    places: dict[str, int] = {}
    passages: list[Passage] = []
    golds: dict[str, tuple[int, ...]] = {}
    gold = [name for name in settings.questions.columns if name == "gold" and settings.pools]
    for name, row in (one for part in rows.values() for one in part):
        for column in [*settings.pools, *gold]:
            where = f"{settings.questions.dataset}, row {name}, {column}: a passage of the pool"
            found = [hub.passage_of(one, where) for one in row[column] or []]
            found = [passage for passage in found if passage.text.strip()]
            for passage in found:
                if passage.id not in places:
                    places[passage.id] = len(passages)
                    passages.append(passage)
            if column == "gold":
                golds[name] = tuple(sorted({places[passage.id] for passage in found}))
    return passages, golds
