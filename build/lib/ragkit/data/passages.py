"""Passages on disk: one Arrow file, memory-mapped when opened, so that 21 million of them need no memory."""

from __future__ import annotations

from ragkit.errors import DataError

import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from ragkit.data.files import open_text

log = logging.getLogger(__name__)
AT_ONCE = 10_000  # passages of a batch in the file
FIELDS = ("id", "title", "text")


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be retrieved; its place in the corpus is its index."""

    id: str
    title: str
    text: str


class Passages(Sequence[Passage]):
    """The passages of a file that `write_passages` made; only those asked for are read. Raises DataError if it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"The passages in {path} cannot be read ({error}). Remove the stage's folder, then give the same command.") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Passage: ...
    @overload
    def __getitem__(self, place: slice) -> list[Passage]: ...
    def __getitem__(self, place: int | slice) -> Passage | list[Passage]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step == 1:
                return list(rows_of(self.table.slice(start, max(0, stop - start))))
            return [self[i] for i in range(start, stop, step)]
        number = int(place)
        if not -len(self) <= number < len(self):
            raise IndexError(f"passage {number} of {len(self)}")
        return Passage(*(self.table.column(name)[number % len(self)].as_py() for name in FIELDS))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self.table.to_batches(AT_ONCE):
            yield from rows_of(batch)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


def rows_of(part: Any) -> Iterator[Passage]:
    """The passages of an Arrow table or batch."""
    return map(Passage, *(part.column(name).to_pylist() for name in FIELDS))


def write_passages(path: Path, passages: Iterable[Passage]) -> Passages:
    """Writes passages as they come, and opens them. Raises DataError if there are none, or two have one id."""
    schema = pa.schema([(name, pa.string()) for name in FIELDS])
    waiting = iter(passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(waiting, AT_ONCE)):
            writer.write_batch(pa.record_batch([[getattr(p, name) for p in batch] for name in FIELDS], schema=schema))
    made = Passages(path)
    if not len(made):
        raise DataError("There are no passages.")
    counts = pc.value_counts(made.table.column("id"))
    if len(counts) < len(made):
        name = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))[0]["values"].as_py()
        first, second = islice((place for place, passage in enumerate(made, 1) if passage.id == name), 2)
        raise DataError(f"Passages {first} and {second} have the same id {name!r}. Give each its own.")
    return made


def read_tsv(path: Path) -> Iterator[Passage]:
    """Passages of a DPR-format TSV (`id`, `text`, `title`, with that header), plain or gzipped, one after another.

    A passage without text is left out, and the log says how many were: real files hold a few. Raises DataError that names
    file and line.
    """
    empty: list[int] = []
    with open_text(path) as file:
        rows = csv.reader(file, delimiter="\t")
        try:
            header = next(rows, None)
            if header != ["id", "text", "title"]:
                raise DataError(f"{path}, line 1: expected the header id, text, title (tab-separated), found {header}.")
            for row in rows:
                if len(row) != 3:
                    raise DataError(f"{path}, line {rows.line_num}: expected 3 tab-separated fields, found {len(row)}.")
                if row[1].strip():
                    yield Passage(row[0], row[2], row[1])
                else:
                    empty.append(rows.line_num)
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: not a tab-separated row ({error}). A quote that is never closed does this.") from None
    if empty:
        log.warning("%s: %d passages without text were left out (the first at line %d).", path, len(empty), empty[0])
