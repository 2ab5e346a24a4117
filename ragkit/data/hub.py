"""Tables of the Hugging Face hub, or of a folder in its layout: loaded, checked and read."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, load_dataset

from ragkit.data.passages import Passage, passage_from
from ragkit.errors import DataError
from ragkit.settings import HubTable

ID_KEYS = ("id", "docid", "psg_id", "passage_id")  # of the passages of a pool


@contextmanager
def fetching(table: HubTable, what: str) -> Iterator[None]:
    """A clear word on a table that cannot be had, in place of the libraries' own."""
    name = f"{table.dataset!r}" + (f", configuration {table.config!r}" if table.config else "")
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        first = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        if Path(table.dataset).is_dir():
            why = (
                "its folder does not hold whole data files of this configuration and split. "
                "Fetch them again, or mend the profile"
            )
        elif isinstance(error, ValueError | datasets.exceptions.DatasetNotFoundError):
            why = (
                "the hub has no such table, revision or split, or it is gated. Look at its page, "
                "accept its terms there and log in (`hf auth login`), or mend the profile"
            )
        else:
            why = (
                "it did not come whole: no network, the hub's offline mode, a full disk, or a file "
                "that was cut off. The same command goes on with the files that are whole; or give "
                "a local folder in the profile"
            )
        raise DataError(f"The {what} {name} cannot be loaded: {why}. ({first[0][:300]})") from None


def load(table: HubTable, split: str, what: str, needed: Iterable[str]) -> Dataset:
    """One split of a table, memory-mapped, its `needed` columns renamed to our own names.

    `what` names the table in messages. Raises DataError where it cannot be had, lacks a column or
    does not have as many rows as the profile says.
    """
    with fetching(table, what):
        local = Path(table.dataset).is_dir()
        if table.files:
            root = table.dataset if local else f"hf://datasets/{table.dataset}@{table.revision}"
            kind = "parquet" if table.files.endswith(".parquet") else "json"
            files = {split: f"{root}/{table.files.format(split=split)}"}
            found = load_dataset(kind, data_files=files, split=split)
        else:
            revision = {} if local else {"revision": table.revision}
            found = load_dataset(table.dataset, table.config, split=split, **revision)
    if (expected := table.rows.get(split, len(found))) != len(found):
        raise DataError(
            f"The {what} {table.dataset!r}, split {split!r}, has {len(found)} rows; the profile "
            f"expects {expected}: another revision, or a file is missing."
        )
    theirs = {ours: table.columns.get(ours, ours) for ours in needed}
    there = found.column_names
    if missing := [
        f"{name!r} (our {ours!r})" for ours, name in theirs.items() if name not in there
    ]:
        raise DataError(
            f"The {what} {table.dataset!r} has no column {', '.join(missing)}; there are "
            f"{', '.join(there)}. Say in `columns` of the profile which of them to read."
        )
    renamed = {name: ours for ours, name in theirs.items() if name != ours}
    return found.select_columns(list(theirs.values())).rename_columns(renamed)


def drawn(n: int, most: int | None, seed: int) -> list[int]:
    """The places of `most` of n passages drawn by the seed, in order, or all places."""
    if most is None or most >= n:
        return list(range(n))
    return sorted(random.Random(f"passages {seed}").sample(range(n), most))


def passages_of(table: Dataset) -> Iterator[Passage]:
    """The passages of a table with our columns, batch by batch; those without text are left out."""
    for batch in table.iter(batch_size=1000):
        for name, title, text in zip(batch["id"], batch["title"], batch["text"], strict=True):
            if text is None or (isinstance(text, str) and not text.strip()):
                continue
            yield passage_from({"title": title, "text": text}, str(name), f"passage {name}")


def pool(cell: Any, where: str) -> list[Passage]:
    """The passages of one question's pool: a list of objects, or an object of lists."""
    if isinstance(cell, dict):
        cell = [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    made = []
    for one in cell or []:
        found = passage_from(one, "", f"{where}, a passage of the pool")
        names = (str(one[key]) for key in ID_KEYS if one.get(key) not in (None, ""))
        if found.text.strip():
            made.append(replace(found, id=next(names, f"{found.title}: {found.text}")))
    return made
