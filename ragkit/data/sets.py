"""Question sets made: from the embedded worlds, from files, or from the hub."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from ragkit.data.worlds import build_world, world_passages
from ragkit.errors import DataError
from ragkit.settings import FileSet, HubSet, HubTable, QuestionSet, WorldSet

log = logging.getLogger(__name__)
Rows = dict[str, list[tuple[str, dict[str, Any]]]]  # of a hub's table: names and rows by part


def make_passages(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Writes the passages of a set; `settings["set"]` is its `passage_settings`."""
    chosen = {key: value for key, value in settings["set"].items() if key != "contents"}
    passages: Iterator[Passage] | Sequence[Passage]
    if chosen["source"] == "world":
        passages = world_passages(WorldSet(name="any", **chosen))[0]
    elif chosen["source"] == "files":
        passages = read_tsv(Path(chosen["passages"]))
    elif chosen.get("pools"):
        one = HubSet(name="any", **chosen)
        passages = pooled(one, hub_rows(one)[0])[0]
    else:
        passages = hub_passages(chosen)
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
        sizes = {part: getattr(one, part) for part in PARTS}
        parts = split(questions, sizes, random.Random(f"split {one.seed}"), one.questions)
    else:
        rows, left_out = hub_rows(one)
        golds = pooled(one, rows)[1]
        parts = {part: [hub_question(one, *row, golds) for row in rows[part]] for part in PARTS}
    for part, asked in parts.items():
        write_jsonl(folder / f"{part}.jsonl", map(asdict, asked))
    write_json(folder / "counts.json", left_out)
    for why, number in left_out.items():
        if number:
            log.warning("%s: %d questions were left out (%s).", one.name, number, why)


def split(
    items: Sequence[Any], sizes: dict[str, int], rng: random.Random, what: str
) -> dict[str, list[Any]]:
    """Disjoint random parts of the given sizes. Raises DataError if there are too few items."""
    if sum(sizes.values()) > len(items):
        raise DataError(
            f"{what}: {sum(sizes.values())} questions asked for, {len(items)} different there. "
            "Lower distill, dev or test."
        )
    shuffled = rng.sample(items, len(items))
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[part] = shuffled[start : start + size]
        start += size
    return parts


def hub_rows(settings: HubSet) -> tuple[Rows, dict[str, int]]:
    """The rows drawn for each part, and how many were left out: no question stands in two parts.

    Of a question asked twice the first row counts; one in both splits is kept for `test`.
    """
    table, rng = settings.questions, random.Random(f"split {settings.seed}")
    gold = ["gold"] if "gold" in table.columns else []
    columns = ["question", "answer", *settings.pools, *gold]
    drawn_from = {settings.train: PARTS[:2], settings.heldout: PARTS[2:]}
    if settings.train == settings.heldout:
        drawn_from = {settings.train: PARTS}
    loaded = {name: hub.load(table, name, "question table", columns) for name in drawn_from}
    asked = {name: [same_question(str(q)) for q in loaded[name]["question"]] for name in loaded}
    rows: Rows = {}
    left_out = {"repeated": 0, "in another split": 0}
    for name, parts in drawn_from.items():
        first: dict[str, int] = {}
        for place, key in enumerate(asked[name]):
            first.setdefault(key, place)
        left_out["repeated"] += len(asked[name]) - len(first)
        if name != settings.heldout:
            shared = first.keys() & set(asked[settings.heldout])
            left_out["in another split"] += len(shared)
            first = {key: place for key, place in first.items() if key not in shared}
        sizes = {part: getattr(settings, part) for part in parts}
        what = f"{table.dataset}, split {name}"
        for part, places in split(list(first.values()), sizes, rng, what).items():
            chosen = zip(places, loaded[name].select(places), strict=True)
            rows[part] = [(f"{name}:{place}", row) for place, row in chosen]
    return rows, left_out


def hub_question(
    settings: HubSet, name: str, row: dict[str, Any], golds: Mapping[str, tuple[int, ...]]
) -> Question:
    """The question of a row."""
    where = f"{settings.questions.dataset}, row {name}"
    return Question(name, *text_and_answers(row, where), golds.get(name, ()))


def pooled(settings: HubSet, rows: Rows) -> tuple[list[Passage], dict[str, tuple[int, ...]]]:
    """The passages of all pools, each once, and by row the places of its gold ones where told."""
    places: dict[str, int] = {}
    passages: list[Passage] = []
    golds: dict[str, tuple[int, ...]] = {}
    gold = ["gold"] if settings.pools and "gold" in settings.questions.columns else []
    for name, row in (one for part in rows.values() for one in part):
        for column in [*settings.pools, *gold]:
            where = f"{settings.questions.dataset}, row {name}, column {column}"
            found = hub.pool(row[column], where)
            for passage in found:
                if passage.id not in places:
                    places[passage.id] = len(passages)
                    passages.append(passage)
            if column == "gold":
                golds[name] = tuple(sorted({places[passage.id] for passage in found}))
    return passages, golds


def hub_passages(chosen: Mapping[str, Any]) -> Iterator[Passage]:
    """The passages of a table or a TSV, all or `most_passages` of them, never all in memory."""
    source, most = chosen["passages"], chosen["most_passages"]
    if isinstance(source, str):
        if most is None:
            return read_tsv(Path(source))
        number = sum(1 for _ in read_tsv(Path(source)))
        places = set(hub.drawn(number, most, chosen["seed"]))
        return (one for place, one in enumerate(read_tsv(Path(source))) if place in places)
    columns = ("id", "title", "text")
    table = hub.load(HubTable(**source), chosen["passage_split"], "passage table", columns)
    if most is not None:
        table = table.select(hub.drawn(len(table), most, chosen["seed"]))
    return hub.passages_of(table)
