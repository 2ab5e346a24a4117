"""Tables of the Hugging Face hub, or of a folder in its layout: loaded, checked and read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from ragkit.data.passages import Passage
from ragkit.errors import DataError
from ragkit.settings import HubTable

ID_KEYS = ("id", "docid", "psg_id", "passage_id")


def load(table: HubTable, split: str, columns: Sequence[str]) -> Dataset:
    """One split of a table, memory-mapped, with these of our columns.

    Raises DataError where it cannot be had, lacks a column or does not have as many rows as the
    profile says.
    """
    where = f"Table {table.dataset!r}, configuration {table.config!r}, split {split!r}"
    is_local = Path(table.dataset).is_dir()
    kind = table.dataset
    options: dict[str, Any] = {} if is_local else {"revision": table.revision}
    if table.files:
        kind = "parquet" if table.files.endswith(".parquet") else "json"
        root = table.dataset if is_local else f"hf://datasets/{table.dataset}@{table.revision}"
        options = {"data_files": {split: f"{root}/{table.files.format(split=split)}"}}
    elif table.config:
        options["name"] = table.config
    try:
        found = load_dataset(kind, split=split, **options)
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        told = str(error.__cause__ or error).strip().partition("\n")[0][:300]
        raise DataError(
            f"{where} cannot be loaded ({told or type(error).__name__}). A folder must hold its "
            "whole files; the hub must be reached, have it at this revision and, where it is "
            "gated, know you (`hf auth login`). Files that came whole are kept."
        ) from None
    expected, there = table.rows.get(split, len(found)), found.column_names
    if expected != len(found):
        raise DataError(f"{where}: {len(found)} rows; the profile expects {expected}.")
    ours = {table.columns.get(name, name): name for name in columns}
    if missing := [f"{name!r} (our {ours[name]!r})" for name in ours if name not in there]:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; there are {', '.join(there)}. Say in "
            "`columns` of the profile which of them to read."
        )
    renamed = {name: our for name, our in ours.items() if name != our}
    return found.select_columns(list(ours)).rename_columns(renamed)


def passages_of(table: HubTable, split: str) -> Iterator[Passage]:
    """The passages of a table, batch by batch; those without text are left out."""
    for batch in load(table, split, ("id", "title", "text")).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            passage = passage_of(row, f"{table.dataset}, passage {row['id']}")
            if passage.text.strip():
                yield passage


def passage_of(row: Any, where: str) -> Passage:
    """A passage from an object with `text`, perhaps `title` and an id; null counts as empty.

    Raises DataError for other types.
    """
    if not isinstance(row, Mapping) or "text" not in row:
        raise DataError(f"{where}: no 'text'. A passage is an object with 'title' and 'text'.")
    for key in ("title", "text"):
        if not isinstance(row.get(key), str | None):
            raise DataError(f"{where}: {key!r} is no text but {row[key]!r:.60}. Mend it.")
    title, text = row.get("title") or "", row["text"] or ""
    names = (str(row[key]) for key in ID_KEYS if row.get(key) not in (None, ""))
    return Passage(next(names, f"{title}: {text}"), title, text)
