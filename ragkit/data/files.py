"""Text files that a run reads: opened, cut into rows, and every damage named with its file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ragkit.errors import DataError


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, gzipped or not; one that is missing, cut short or no UTF-8 text is an error that names it."""
    if not path.is_file():
        raise DataError(
            f"No file {path}. Check the path in the profile; relative paths start from the profile's folder."
        )
    try:
        with (
            gzip.open(path, "rt", encoding="utf8", newline="")
            if path.suffix == ".gz"
            else open(path, encoding="utf8", newline="") as file
        ):
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or no gzip file ({error}). Fetch it again, or unpack it and drop the .gz."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line; a malformed line is an error that names file and line."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error}). Mend or remove the line."
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: expected an object with 'question' and 'answer'."
                )
            yield number, row


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """An object a line."""
    with open(path, "w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
