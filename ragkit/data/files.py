"""Files that a run reads and writes; what is damaged is named with its file and line."""

import ast
import errno
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from ragkit.errors import DataError, StoreError
from ragkit.settings import HubTable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGE, PIECES, PIECE = 2**28, 64, 2**20  # bytes, number, bytes: see `file_hash`
ROW = 'an object a question, such as {"question": "...", "answer": ["..."]}'


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, gzipped or not. Raises DataError if it is missing, cut short or not UTF-8."""
    if not path.is_file():
        raise DataError(f"No file {path}. Check the path: a profile's start from its folder.")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = f"is damaged, no gzip file or not UTF-8 ({error})"
        raise DataError(f"{path} {why}. Fetch it again, or save it as UTF-8.") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file, or of a JSON array (DPR's own), with their lines, which errors name."""
    with open_text(path) as file:
        text = file.read()
    opening, gap, decoder = re.match(r"\s*\[", text), re.compile(r"[\s,]*"), json.JSONDecoder()
    place, counted, line = opening.end() if opening else 0, 0, 1
    while True:
        place = gap.match(text, place).end()  # type: ignore[union-attr]
        if text.startswith("]", place) or (place == len(text) and not opening):
            return
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, place = decoder.raw_decode(text, place)
            json.dumps(row, ensure_ascii=False).encode("utf8")  # half a character would come later
        except ValueError as error:
            raise DataError(f"{path}, line {line}: not valid JSON ({error}). Mend it.") from None
        if not isinstance(row, dict) or ("data" in row and "question" not in row):
            raise DataError(f"{path}, line {line}: expected {ROW}, not values or SQuAD's articles.")
        yield line, row


def text_and_answers(row: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """The question and its answers, each once. Answers are a text, a list, TriviaQA's object with
    `value` and `aliases`, or a list written as text (DPR's CSV); others raise DataError."""
    text, answers = row.get("question"), row.get("answer", row.get("answers"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'question' is missing or empty.")
    if isinstance(answers, dict):
        answers = _listed(answers.get("value")) + _listed(answers.get("aliases"))
    elif isinstance(answers, str) and re.fullmatch(r"\s*\[.*\]\s*", answers, re.DOTALL):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # then it is a text
            answers = ast.literal_eval(answers.strip())
    if wrong := [one for one in _listed(answers) if not isinstance(one, str)]:
        raise DataError(f"{where}: the answer {wrong[0]!r:.60} is no text. Put it in quotes.")
    if not (kept := dict.fromkeys(one.strip() for one in _listed(answers) if one.strip())):
        raise DataError(f"{where}: no answers. 'answer' is a text, or a list with at least one.")
    return text.strip(), tuple(kept)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes an object a line, by `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
        told = re.search(r"(?:Errno|os error) (\d+)", str(error))  # safetensors tells it in words
        if not told or int(told[1]) not in NO_ROOM:
            raise
        why = f"No room to write {doing} in {folder} ({error}). Free some space or choose another"
        raise StoreError(f"{why} --runs; the same command goes on from what is there.") from error


def file_hash(path: Path) -> str:
    """A file's SHA-256, kept while size and time stay; above LARGE bytes, of PIECES parts."""
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_of(path: Path, size: int, time_ns: int) -> str:
    with open(path, "rb") as file:
        if size <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(PIECES):
            file.seek((size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
        return digest.hexdigest()


def contents(source: HubTable | str | None) -> dict[str, str]:
    """The files of a source on disk, by hash; a hub's table is told by its revision."""
    if source is None:
        return {}
    place = Path(source.dataset if isinstance(source, HubTable) else source)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return {str(file): file_hash(file) for file in files}
