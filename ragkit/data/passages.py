"""Passages on disk: one Arrow file, memory-mapped, so that 21 million of them need no memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

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
    """The passages of a file of `write_passages`; only those asked for are read.

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
            return [self[i] for i in range(len(self))[place]]
        row = range(len(self))[place]  # as of a list: from its end too, and no further than it goes
        return Passage(*(self.table.column(name)[row].as_py() for name in FIELDS))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self.table.to_batches():
            yield from map(Passage, *(batch.column(name).to_pylist() for name in FIELDS))


def passage_text(passage: Passage) -> str:
    """What retrievers encode and search: the title, then the text."""
    return f"{passage.title} {passage.text}".strip()


def block(title: str, text: str) -> str:
    """How a passage stands in pretraining text and in every prompt."""
    return f"{title}: {text}"


def write_passages(path: Path, passages: Iterable[Passage]) -> Passages:
    """Writes passages as they come, and opens them.

    Raises DataError if there are none, or two have one id.
    """
    schema = pa.schema([(name, pa.string()) for name in FIELDS])
    waiting = iter(passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(waiting, AT_ONCE)):
            columns = [[getattr(passage, name) for passage in batch] for name in FIELDS]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    made = Passages(path)
    if not len(made):
        raise DataError("There are no passages.")
    if pc.count_distinct(made.table.column("id")).as_py() < len(made):
        seen: dict[str, int] = {}
        for place, name in enumerate(made.table.column("id").to_pylist(), 1):
            if (first := seen.setdefault(name, place)) < place:
                raise DataError(f"Passages {first} and {place} have the same id {name!r}.")
    return made


def read_tsv(path: Path) -> Iterator[Passage]:
    """Passages of a DPR-format TSV (`id`, `text`, `title`, with that header), plain or gzipped.

    Quotes are CSV's (DPR's own file) or part of the text (raw), as `quoting` finds. Passages of no
    text are left out, and the log says how many. Raises DataError that names file and line.
    """
    quoted, decided = quoting(path)
    empty: list[int] = []
    with open_text(path) as file:
        for number, line in rows_of(file, quoted):
            row = line.rstrip("\r\n").split("\t")
            match = QUOTED_ROW.fullmatch(line)
            if '"' in line and (match is None if quoted else len(row) == 3 and line_quoting(line)):
                kind = "CSV's: closed, and doubled within the text" if quoted else "just text"
                raise DataError(
                    f"{path}, line {number}: not a row of a file whose quotes are {kind} (see line "
                    f"{decided}). Write them all alike."
                )
            if quoted and match:
                row = [unquoted(field) for field in match.groups()]
            if len(row) != 3 or (number == 1 and row != HEADER):
                wanted = "the header id, text, title" if number == 1 else "3 fields"
                raise DataError(f"{path}, line {number}: expected {wanted} (tabs), found {row}.")
            if not row[1].strip():
                empty.append(number)
            elif number > 1:
                yield Passage(row[0], row[2], row[1])
    if empty:
        said = "%s: %d passages without text were left out (the first at line %d)."
        log.warning(said, path, len(empty), empty[0])


def rows_of(lines: Iterable[str], quoted: bool) -> Iterator[tuple[int, str]]:
    """Rows with the line they start on; a quoted one goes on until its quotes are closed."""
    numbered = enumerate(lines, start=1)
    for number, line in numbered:
        parts, is_open = [line], quoted and line.count('"') % 2 == 1
        while is_open and len(parts) < MOST_LINES and (more := next(numbered, None)):
            parts.append(more[1])
            is_open ^= more[1].count('"') % 2 == 1
        yield number, "".join(parts)


def unquoted(field: str) -> str:
    """A field of a row as CSV means it."""
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def line_quoting(line: str) -> bool | None:
    """Whether a line's quotes must be CSV's (True) or part of the text (False); None: either."""
    if line.count("\t") != 2:
        return True  # the beginning of a row of several lines, or a tab within quotes
    if not (match := QUOTED_ROW.fullmatch(line)):
        return False
    return any(field.startswith('"') and '""' in field[1:-1] for field in match.groups()) or None


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
