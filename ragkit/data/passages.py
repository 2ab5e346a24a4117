"""Passages on disk: one Arrow file, memory-mapped, so that 21 million of them need no memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from ragkit.data.files import open_text
from ragkit.errors import DataError

log = logging.getLogger(__name__)
AT_ONCE = 10_000  # passages of a batch in the file
FIELDS = ("id", "title", "text")
HEADER = ["id", "text", "title"]
MOST_LINES = 10_000  # of one row of a TSV: one with more has a quote that is never closed
# A row of three fields: one with quotes, tabs or line ends stands in quotes, its quotes doubled.
QUOTED_ROW = re.compile("\t".join([r'("(?:[^"]++|"")*+"|[^"\t\r\n]*)'] * 3) + r"[\r\n]*")


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be retrieved; its place in the corpus is its index."""

    id: str
    title: str
    text: str


class Passages(Sequence[Passage]):
    """The passages of a file that `write_passages` made; only those asked for are read.

    Raises DataError if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"The passages in {path} cannot be read ({error}). Remove the stage's folder, then "
                "give the same command."
            ) from None

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


def passage_text(passage: Passage) -> str:
    """What retrievers encode and search: the title, then the text."""
    return f"{passage.title} {passage.text}".strip()


def block(title: str, text: str) -> str:
    """How a passage stands in pretraining text and in every prompt."""
    return f"{title}: {text}"


def passage_from(row: Any, name: str, where: str) -> Passage:
    """A passage from an object with `text`, perhaps `title`; raises DataError for other types."""
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
        raise DataError(f"{where}: no 'text'. A passage is an object with 'title' and 'text'.")
    title = row.get("title")
    if title is not None and not isinstance(title, str):
        raise DataError(f"{where}: 'title' is no text but {title!r:.60}. Mend it or leave it out.")
    return Passage(name, title or "", row["text"])


def rows_of(part: Any) -> Iterator[Passage]:
    """The passages of an Arrow table or batch."""
    return map(Passage, *(part.column(name).to_pylist() for name in FIELDS))


def write_passages(path: Path, passages: Iterable[Passage]) -> Passages:
    """Writes passages as they come, and opens them.

    Raises DataError if there are none, or two have one id.
    """
    schema = pa.schema([(name, pa.string()) for name in FIELDS])
    waiting = iter(passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(waiting, AT_ONCE)):
            writer.write_batch(
                pa.record_batch(
                    [[getattr(p, name) for p in batch] for name in FIELDS], schema=schema
                )
            )
    made = Passages(path)
    if not len(made):
        raise DataError("There are no passages.")
    counts = pc.value_counts(made.table.column("id"))
    if len(counts) < len(made):
        name = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))[0]["values"].as_py()
        first, second = islice(
            (place for place, passage in enumerate(made, 1) if passage.id == name), 2
        )
        raise DataError(
            f"Passages {first} and {second} have the same id {name!r}. Give each its own."
        )
    return made


def read_tsv(path: Path) -> Iterator[Passage]:
    """Passages of a DPR-format TSV (`id`, `text`, `title`, with that header), plain or gzipped.

    Quotes are CSV's (DPR's own file) or part of the text (raw), as `quoting` finds. Passages of no
    text are left out, and the log says how many. Raises DataError that names file and line.
    """
    quoted, decided = quoting(path)
    empty: list[int] = []
    with open_text(path) as file:
        lines = enumerate(file, start=1)
        for number, line in lines:
            where = f"{path}, line {number}"
            row = line.rstrip("\r\n").split("\t")
            if '"' in line and len(row) == 3:
                tells = line_quoting(line)
                if tells is (not quoted) and (tells or line.count('"') % 2 == 0):
                    here, there = ("single", "doubled") if quoted else ("doubled", "single")
                    raise DataError(
                        f"{where}: quotes inside the text are {here} here, {there} in line "
                        f"{decided}. Write them all alike."
                    )
            if quoted and '"' in line:
                parts, is_open = [line], line.count('"') % 2
                while is_open and len(parts) < MOST_LINES and (more := next(lines, None)):
                    parts.append(more[1])
                    is_open ^= more[1].count('"') % 2
                if not (match := QUOTED_ROW.fullmatch("".join(parts))):
                    raise DataError(
                        f"{where}: not a tab-separated row: a quote that is never closed?"
                    )
                row = [unquoted(field) for field in match.groups()]
            if number == 1 and row != HEADER:
                raise DataError(
                    f"{where}: expected the header id, text, title (tab-separated), found {row}."
                )
            if len(row) != 3:
                raise DataError(f"{where}: expected 3 tab-separated fields, found {len(row)}.")
            if not row[1].strip():
                empty.append(number)
            elif number > 1:
                yield Passage(row[0], row[2], row[1])
    if empty:
        said = "%s: %d passages without text were left out (the first at line %d)."
        log.warning(said, path, len(empty), empty[0])


def unquoted(field: str) -> str:
    """A field of a row as CSV means it."""
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def line_quoting(line: str) -> bool | None:
    """Whether a line's quotes must be CSV's (True) or part of the text (False); None: either."""
    is_row = line.count("\t") == 2
    if not (match := QUOTED_ROW.fullmatch(line)):
        return not is_row  # the beginning of a row of several lines, or plain text
    is_doubled = any(field.startswith('"') and '""' in field[1:-1] for field in match.groups())
    return True if is_doubled or not is_row else None


def quoting(path: Path) -> tuple[bool, int]:
    """Whether a TSV's quotes are CSV's, and the line that tells. Raises DataError if none does."""
    unclear = 0
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if '"' in line:
                tells = line_quoting(line)
                if tells is not None or number == 1:  # a quoted header is CSV's
                    return tells is not False, number
                unclear = unclear or number
    if unclear:
        raise DataError(
            f"{path}, line {unclear}: are these quotes CSV's or part of the text? No line of the "
            "file tells. Take them away, or double those of the text and put it in quotes."
        )
    return False, 0
