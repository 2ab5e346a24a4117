"""Files that a run reads and writes; what is damaged is named with its file and line."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ragkit.errors import DataError, StoreError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGE, PIECES, PIECE = 2**28, 64, 2**20  # bytes, number, bytes: see `file_hash`
ROW = """an object a question, such as {"question": "...", "answer": ["..."]}"""
GAP = re.compile(r"[\s,]*")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, gzipped or not. Raises DataError if it is missing, cut short or not UTF-8."""
    if not path.is_file():
        raise DataError(
            f"No file {path}. Check the path in the profile; relative paths start from its folder."
        )
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or no gzip file ({error}). Fetch it again, or unpack it and drop "
            "the .gz."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line, or of each entry of a JSON array (DPR's own files).

    Raises DataError that names file and line.
    """
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "").strip()
        file.seek(0)
        is_whole = first.startswith("[") or first == "{"  # else a value a line
        for number, row in _entries(file.read(), path) if is_whole else _lines(file, path):
            where = f"{path}, line {number}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected {ROW}.")
            if isinstance(row.get("data"), list) and "question" not in row:
                raise DataError(f"{where}: a SQuAD file (articles with paragraphs). Write {ROW}.")
            try:
                json.dumps(row, ensure_ascii=False).encode("utf8")
            except UnicodeEncodeError:
                raise DataError(
                    f"{where}: half a character (a lone surrogate such as \\ud800). Mend the text."
                ) from None
            yield number, row


def _lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error}). Mend or remove the line."
                ) from None


def _entries(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON array, or values over several lines, with the lines they start on."""
    decoder, is_array = json.JSONDecoder(), text.lstrip().startswith("[")
    place = text.index("[") + 1 if is_array else 0
    number, counted = 1, 0
    while True:
        place += len(GAP.match(text, place).group())  # type: ignore[union-attr]
        if text.startswith("]", place) or (place == len(text) and not is_array):
            return
        number, counted = number + text.count("\n", counted, place), place
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Mend the file."
            ) from None
        yield number, row


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes an object a line."""
    with open(path, "w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, ensure_ascii=False), "utf8")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a safetensors file."""
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file aside and renames it: the old file or the new one, never half of one."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, "utf8")
    aside.replace(path)


@contextmanager
def room_on_disk(folder: Path, doing: str) -> Iterator[None]:
    """Turns a full disk or quota met inside into a StoreError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, SafetensorError):  # it writes through Rust: the number is in its words
            number = next((n for n in NO_ROOM if f"(os error {n})" in str(error)), None)
        if number not in NO_ROOM:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise StoreError(
            f"No room to write {doing} in {folder} ({os.strerror(number)}; {free:.0f} MiB free on "
            "its disk). Free some space or choose another place with --runs, then give the same "
            "command: what was finished is kept."
        ) from error


def file_hash(path: Path) -> str:
    """The SHA-256 of a file; above LARGE bytes, of its size and of PIECES pieces spread over it."""
    with open(path, "rb") as file:
        if (size := path.stat().st_size) <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(PIECES):
            file.seek((size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
        return digest.hexdigest()


def input_hash(path: Path) -> str:
    """`file_hash` of a file that a run reads; read once while its size and time stay the same."""
    status = path.stat()
    return _hash_seen(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_seen(path: Path, size: int, time_ns: int) -> str:
    return file_hash(path)
