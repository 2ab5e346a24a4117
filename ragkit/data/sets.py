"""Question sets made: from the embedded worlds, from files, or from tables of the hub."""

import csv
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from pydantic import TypeAdapter

from ragkit.data.corpus import PARTS, PASSAGES, Passage, Passages, Question, drawn, write_passages
from ragkit.data.files import open_text, read_jsonl, text_and_answers, write_jsonl
from ragkit.data.text import same_question
from ragkit.data.worlds import build_world
from ragkit.errors import DataError
from ragkit.settings import FileSet, HubSet, HubTable, QuestionSet, WorldSet

log = logging.getLogger(__name__)
GOLD_KEYS = ("gold_id", "gold_passage_id", "psg_id")  # of a question's gold passage in files
CSV_FIELD = re.compile('"(?:[^"]|"")*"')  # in quotes, those within doubled
ID_KEYS = ("id", "docid", "psg_id", "passage_id")
Row = tuple[str, str, dict[str, Any]]  # of a table of the hub: its part, its name, its values


def make_passages(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Writes the passages of a set, by its `passage_settings`."""
    chosen = settings["set"]
    passages: Iterable[Passage]
    if chosen["source"] == "world":
        world = WorldSet(name="any", **chosen)
        passages = build_world(world.model_copy(update=dict.fromkeys(PARTS, 0))).passages
    elif chosen.get("pools"):
        passages = from_hub(HubSet(name="any", **chosen))[0]
    elif isinstance(chosen["passages"], str):
        passages = read_tsv(Path(chosen["passages"]))
    else:
        table, columns = HubTable(**chosen["passages"]), ("id", "title", "text")
        batches = load(table, chosen["passage_split"], columns).with_format("arrow").iter(1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        passages = with_text(rows, f"{table.dataset}: a passage of the table")
    write_passages(folder / PASSAGES, passages)


def make_questions(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Writes the questions of a set, by part; the log says how many were left out and why."""
    one: QuestionSet = TypeAdapter(QuestionSet).validate_python(settings["set"])
    left_out: Counter[str] = Counter()
    if isinstance(one, WorldSet):
        parts = build_world(one).questions
    elif isinstance(one, FileSet):
        read = read_questions(Path(one.questions), Passages(inputs["passages"] / PASSAGES))
        questions = without_repeats(read)
        left_out["repeated"] = len(read) - len(questions)
        shuffled = random.Random(f"split {one.seed}").sample(questions, len(questions))
        parts = drawn(shuffled, one, PARTS)
    else:
        _, parts, left_out = from_hub(one)
    for part, asked in parts.items():
        write_jsonl(folder / f"{part}.jsonl", map(asdict, asked))
    for why, number in (+left_out).items():
        log.warning("%s: %d questions were left out (%s).", one.name, number, why)


def read_questions(path: Path, passages: Sequence[Passage]) -> list[Question]:
    """Questions of a file (see `text_and_answers`), a gold passage's id under one of GOLD_KEYS.
    Raises DataError that names file and line, also for a gold passage that is not there."""
    rows = list(read_jsonl(path))
    named = ([row.get(key) for key in GOLD_KEYS] for _, row in rows)
    golds = [next((str(one) for one in keys if one is not None), "") for keys in named]
    wanted, questions = set(golds) - {""}, []
    places = {p.id: (i,) for i, p in enumerate(passages if wanted else ()) if p.id in wanted}
    for (line, row), gold in zip(rows, golds, strict=True):
        where = f"{path}, line {line}"
        if gold and gold not in places:
            raise DataError(f"{where}: gold passage {gold!r} is not among the passages.")
        told = text_and_answers(row, where)
        questions.append(Question(f"{path.name}:{line}", *told, places.get(gold, ())))
    return questions


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """Each question once, in order, with the answers and gold passages of all its repeats."""
    found: dict[str, Question] = {}
    for one in questions:
        first = found.setdefault(same_question(one.text), one)
        answers = tuple(dict.fromkeys(first.answers + one.answers))
        gold = tuple(sorted({*first.gold, *one.gold}))
        found[same_question(one.text)] = replace(first, answers=answers, gold=gold)
    return list(found.values())


def load(table: HubTable, split: str, columns: Sequence[str]) -> Dataset:
    """One split of a table, memory-mapped, with these of our columns. Raises DataError where it
    cannot be had, lacks a column or does not have as many rows as the profile says."""
    where = f"Table {table.dataset!r}, configuration {table.config!r}, split {split!r}"
    kind, is_local = table.dataset, Path(table.dataset).is_dir()
    options: dict[str, Any] = {"name": table.config, "revision": table.revision}
    if table.files:
        kind = "parquet" if table.files.endswith(".parquet") else "json"
        root = table.dataset if is_local else f"hf://datasets/{table.dataset}@{table.revision}"
        options = {"data_files": {split: f"{root}/{table.files.format(split=split)}"}}
    try:
        found = load_dataset(kind, split=split, **options)
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        told = str(error.__cause__ or error).strip().partition("\n")[0][:300]
        raise DataError(
            f"{where} cannot be loaded ({told or type(error).__name__}). A folder needs its whole "
            "files; the hub must be reached, have it, and may have to know you (`hf auth login`)."
        ) from None
    if (expected := table.rows.get(split, len(found))) != len(found):
        raise DataError(f"{where}: {len(found)} rows; the profile expects {expected}.")
    own = {table.columns.get(name, name): name for name in columns}
    if missing := [f"{name!r} (our {own[name]!r})" for name in own if name not in found.features]:
        there = f"no column {', '.join(missing)}; there are {', '.join(found.features)}"
        raise DataError(f"{where}: {there}. Say in `columns` of the profile which to read.")
    return found.select_columns(list(own)).rename_columns(own)


def with_text(rows: Iterable[Any], where: str) -> Iterator[Passage]:
    """Passages of objects with `text`, perhaps `title`, an id. Without: left out, or DataError."""
    for row in rows:
        if not isinstance(row, Mapping) or "text" not in row:
            raise DataError(f"{where}: no 'text'. A passage is an object with 'title' and 'text'.")
        names = [str(row[key]) for key in ID_KEYS if row.get(key) not in (None, "")]
        for key in ("title", "text"):
            if not isinstance(row.get(key), str | None):
                told = f"{key!r} is no text but {row[key]!r:.60}"
                raise DataError(f"{where} ({', '.join(names)}): {told}. Mend it.")
        title, text = row.get("title") or "", row["text"] or ""
        if text.strip():
            yield Passage([*names, f"{title}: {text}"][0], title, text)


def hub_rows(settings: HubSet, columns: Sequence[str]) -> tuple[list[Row], Counter[str]]:
    """The rows drawn, and how many were left out: no question stands in two parts. Of one asked
    twice the first row counts; one in both splits is kept for `test`."""
    heldout, rows, left_out = settings.heldout, list[Row](), Counter[str]()
    tables = {name: load(settings.questions, name, columns) for name in (settings.train, heldout)}
    texts = {name: pd.Series(map(str, table["question"])) for name, table in tables.items()}
    asked = {name: own.map(same_question) for name, own in texts.items()}
    rng = random.Random(f"split {settings.seed}")
    for name, table in tables.items():
        kept = asked[name].drop_duplicates()
        left_out["repeated"] += len(table) - len(kept)
        if name != heldout:
            shared = kept.isin(asked[heldout])
            left_out["in another split"] += int(shared.sum())
            kept = kept[~shared]
        own = [p for p in PARTS if name == (heldout if p == "test" else settings.train)]
        shuffled = rng.sample(kept.index.tolist(), len(kept))
        for part, places in drawn(shuffled, settings, own).items():
            pairs = zip(places, table.select(places), strict=True)
            rows += [(part, f"{name}:{place}", row) for place, row in pairs]
    return rows, left_out


def from_hub(settings: HubSet) -> tuple[list[Passage], dict[str, list[Question]], Counter[str]]:
    """The passages of all pools, each once; the questions; how many were left out and why. A column
    named `gold` holds the passages that state an answer, be it one of the pools or not."""
    table, parts = settings.questions, dict[str, list[Question]]()
    gold = ["gold"] if settings.pools and "gold" in table.columns else []
    pools = [*settings.pools, *gold]
    rows, left_out = hub_rows(settings, ["question", "answer", *pools])
    passages: dict[str, tuple[int, Passage]] = {}  # by id: its place, and itself
    for part, name, row in rows:
        where, golds = f"{table.dataset}, row {name}", set[int]()
        for column in [one for one in row if one in pools]:  # a table's own column once
            found = with_text(row[column] or [], f"{where}, {column}: a passage of the pool")
            places = {passages.setdefault(one.id, (len(passages), one))[0] for one in found}
            golds |= places if column == "gold" else set()
        question = Question(name, *text_and_answers(row, where), tuple(sorted(golds)))
        parts.setdefault(part, []).append(question)
    return [passage for _, passage in passages.values()], parts, left_out


def read_tsv(path: Path) -> Iterator[Passage]:
    """Passages of a DPR-format TSV (`id`, `text`, `title`, with that header), plain or gzipped; the
    log says how many of no text were left out. DataError names file and line."""
    is_csv, number, empty = has_csv_quotes(path), 1, list[int]()
    style: Any = csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE
    with open_text(path) as file:
        rows = csv.reader(file, delimiter="\t", quoting=style, strict=True)
        try:
            if (header := next(rows, [])) != ["id", "text", "title"]:
                raise csv.Error(f"expected the header id, text, title; found {header}")
            number = 2
            for row in rows:
                if len(row) != 3:
                    raise csv.Error(f"expected 3 fields, between tabs; found {row}")
                if not is_csv and line_quotes("\t".join(row)):
                    raise csv.Error("quotes are doubled here, as in CSV")
                if row[1].strip():
                    yield Passage(row[0], row[2], row[1])
                else:
                    empty.append(number)
                number = rows.line_num + 1
        except csv.Error as error:
            kind = "CSV's, and doubled within the text" if is_csv else "part of the text"
            told = f"{error} (the file's quotes are {kind}). Mend the row."
            raise DataError(f"{path}, line {number}: {told}") from None
    if empty:
        left_out = f"{len(empty)} passages without text were left out"
        log.warning("%s: %s (the first at line %d).", path, left_out, empty[0])


def line_quotes(line: str) -> bool | None:
    """Whether a line's quotes must be CSV's (True) or part of the text (False); None: either."""
    fields = line.rstrip("\r\n").split("\t")
    quoted = [field for field in fields if '"' in field]
    if len(fields) != 3:
        return True  # the beginning of a row of several lines, or a tab within quotes
    if not all(CSV_FIELD.fullmatch(field) for field in quoted):
        return False
    return len(quoted) == 3 or any('""' in field[1:-1] for field in quoted) or None


def has_csv_quotes(path: Path) -> bool:
    """Whether a TSV's quotes are CSV's (DPR's own file), by the first line that tells."""
    unclear = 0
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if '"' in line and (tells := line_quotes(line)) is not None:
                return tells
            unclear = unclear or number * ('"' in line)
    if unclear:
        told = "are these quotes CSV's or part of the text? No line of the file tells. Take them"
        raise DataError(f"{path}, line {unclear}: {told} away, or double those within a text.")
    return False
