"""Passages on disk: one Arrow file, memory-mapped, so that 21 million of them need no memory."""

import csv
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ragkit.data.files import open_text
from ragkit.errors import DataError

log = logging.getLogger(__name__)
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])
CSV_FIELD = re.compile('"(?:[^"]|"")*"')  # in quotes, those within doubled


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be retrieved; its place in the corpus is its index."""

    id: str
    title: str
    text: str


class Passages(Sequence[Passage]):
    """The passages of a file of `write_passages`; only those asked for are read."""

    def __init__(self, path: Path) -> None:
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            told = f"The passages in {path} cannot be read ({error}). Remove the stage's folder"
            raise DataError(f"{told}, then give the same command.") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, place: Any) -> Any:
        """The passage at a place, or those of a slice, as of a list."""
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return Passage(*(column[range(len(self))[place]].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self.table.to_batches():
            yield from map(Passage, *(column.to_pylist() for column in batch.columns))


def passage_text(passage: Passage) -> str:
    """What retrievers encode and search: the title, then the text."""
    return f"{passage.title} {passage.text}".strip()


def block(title: str, text: str) -> str:
    """How a passage stands in pretraining text and in every prompt."""
    return f"{title}: {text}"


def write_passages(path: Path, passages: Iterable[Passage]) -> Passages:
    """Writes passages as they come, and opens them; DataError if there are none, or ids repeat."""
    waiting = map(vars, passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while batch := list(islice(waiting, 10_000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
    made = Passages(path)
    if not len(made):
        raise DataError("There are no passages.")
    if pc.count_distinct(made.table["id"]).as_py() < len(made):
        ids = made.table["id"].to_pandas()
        first, again, *_ = ids.index[ids == ids[ids.duplicated().idxmax()]] + 1
        raise DataError(f"Passages {first} and {again} have the same id {ids[again - 1]!r}.")
    return made


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
