"""Passages on disk: one Arrow file, memory-mapped, so that 21 million of them need no memory."""

import csv
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
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
CSV_FIELD = re.compile('"(?:[^"]|"")*"')  # in quotes, those within doubled


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
    is_csv, decided = quoting(path)
    number, empty = 1, []
    with open_text(path) as file:
        style: Any = csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE
        rows = csv.reader(file, delimiter="\t", quoting=style, strict=True)
        try:
            for row in rows:
                if len(row) != 3 or (number == 1 and row != HEADER):
                    wanted = "the header id, text, title" if number == 1 else "3 fields"
                    raise csv.Error(f"expected {wanted}, between tabs; found {row}")
                if not is_csv and line_quoting("\t".join(row)):
                    raise csv.Error("quotes are doubled here, as in CSV")
                if not row[1].strip():
                    empty.append(number)
                elif number > 1:
                    yield Passage(row[0], row[2], row[1])
                number = rows.line_num + 1
        except csv.Error as error:
            kind = "CSV's, and doubled within the text" if is_csv else "part of the text"
            told = f" By line {decided} the file's quotes are {kind}." if decided else ""
            raise DataError(f"{path}, line {number}: {error}.{told} Mend the row.") from None
    if empty:
        said = "%s: %d passages without text were left out (the first at line %d)."
        log.warning(said, path, len(empty), empty[0])


def line_quoting(line: str) -> bool | None:
    """Whether a line's quotes must be CSV's (True) or part of the text (False); None: either."""
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 3:
        return True  # the beginning of a row of several lines, or a tab within quotes
    quoted = [field for field in fields if '"' in field]
    if not all(CSV_FIELD.fullmatch(field) for field in quoted):
        return False
    return any('""' in field[1:-1] for field in quoted) or None


def quoting(path: Path) -> tuple[bool, int]:
    """Whether a TSV's quotes are CSV's, and the line that tells (0: there are no quotes).

    Raises DataError if no line tells.
    """
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
