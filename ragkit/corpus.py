"""Passages and questions: from the embedded worlds, or from DPR-style TSV and JSONL files."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ragkit import RagkitError, world
from ragkit.profile import FileSet, WorldSet
from ragkit.store import input_hash

log = logging.getLogger(__name__)
PARTS = ("distill", "dev", "test")


class DataError(RagkitError):
    """A data file cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be retrieved; its place in the corpus is its index."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the corpus indices of the passages that state the answer (gold).

    `cloze` is the beginning of a statement with the same answer, for readers that only complete text; `relation` and
    `wording` name the kind of question in the embedded worlds (empty and -1 on real text).
    """

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    cloze: str = ""
    relation: str = ""
    wording: int = -1
    entity: str = ""


@dataclass(frozen=True)
class Corpus:
    """A question set: passages, and questions in three parts."""

    name: str
    passages: list[Passage]
    questions: dict[str, list[Question]]

    def save(self, folder: Path) -> None:
        """Writes passages.jsonl and one file of questions a part."""
        write_jsonl(folder / "passages.jsonl", map(asdict, self.passages))
        for part, questions in self.questions.items():
            write_jsonl(folder / f"{part}.jsonl", map(asdict, questions))

    @classmethod
    def load(cls, name: str, folder: Path) -> Corpus:
        passages = [Passage(**row) for _, row in read_jsonl(folder / "passages.jsonl")]
        parts = {part: [question_from(row) for _, row in read_jsonl(folder / f"{part}.jsonl")] for part in PARTS}
        return cls(name, passages, parts)


def question_from(row: dict[str, Any]) -> Question:
    return Question(**{**row, "answers": tuple(row["answers"]), "gold": tuple(row["gold"])})


def write_jsonl(path: Path, rows: Any) -> None:
    with open(path, "w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, gzipped or not; one that is missing, cut short or no UTF-8 text is an error that names it."""
    if not path.is_file():
        raise DataError(f"No file {path}. Check the path in the profile; relative paths start from the profile's folder.")
    try:
        with gzip.open(path, "rt", encoding="utf8", newline="") if path.suffix == ".gz" else open(path, encoding="utf8", newline="") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or no gzip file ({error}). Fetch it again, or unpack it and drop the .gz.") from None
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
                raise DataError(f"{path}, line {number}: not valid JSON ({error}). Mend or remove the line.") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected an object with 'question' and 'answer'.")
            yield number, row


def read_passages(path: Path) -> list[Passage]:
    """Passages of a DPR-format TSV (`id`, `text`, `title`, with that header), plain or gzipped.

    A passage without text is left out, and the log says how many were: real files hold a few.
    """
    passages: dict[str, Passage] = {}
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
                if row[0] in passages:
                    raise DataError(f"{path}, line {rows.line_num}: a second passage with the id {row[0]!r}. Give each its own.")
                if not row[1].strip():
                    empty.append(rows.line_num)
                    continue
                passages[row[0]] = Passage(row[0], row[2], row[1])
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: not a tab-separated row ({error}). A quote that is never closed does this.") from None
    if empty:
        log.warning("%s: %d passages without text were left out (the first at line %d).", path, len(empty), empty[0])
    if not passages:
        raise DataError(f"{path}: no passages.")
    return list(passages.values())


def read_questions(path: Path, passages: list[Passage]) -> list[Question]:
    """Questions of NQ-open or DPR/TriviaQA JSONL.

    Answers stand under `answer` or `answers`, a list or TriviaQA's object with `value` and `aliases`; a gold passage's
    id, where the file has one, under `gold_id`, `gold_passage_id` or `psg_id`.
    """
    place = {p.id: i for i, p in enumerate(passages)}
    questions = []
    for number, row in read_jsonl(path):
        text, answers = row.get("question"), row.get("answer", row.get("answers"))
        if isinstance(answers, dict):
            answers = [answers.get("value"), *answers.get("aliases", [])]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, line {number}: 'question' is missing or empty.")
        if not isinstance(answers, list) or not (kept := tuple(dict.fromkeys(a for a in answers if isinstance(a, str) and a.strip()))):
            raise DataError(f"{path}, line {number}: no answers ('answer' must be a list with at least one text).")
        gold_id = next((str(row[key]) for key in ("gold_id", "gold_passage_id", "psg_id") if key in row), None)
        if gold_id is not None and gold_id not in place:
            raise DataError(f"{path}, line {number}: gold passage {gold_id!r} is not among the passages.")
        questions.append(Question(f"{path.name}:{number}", text.strip(), kept, (place[gold_id],) if gold_id else ()))
    return questions


def build(settings: WorldSet | FileSet) -> Corpus:
    """The question set that a profile describes."""
    return build_world(settings) if isinstance(settings, WorldSet) else build_files(settings)


def input_hashes(settings: WorldSet | FileSet) -> dict[str, str]:
    """The files that a question set is read from, by hash, so that an edited file is read again."""
    if isinstance(settings, WorldSet):
        return {}
    return {name: input_hash(Path(name)) for name in (settings.passages, settings.questions) if Path(name).is_file()}


def split(items: list[Any], sizes: dict[str, int], rng: random.Random, what: str) -> dict[str, list[Any]]:
    """Disjoint random parts of the given sizes."""
    if sum(sizes.values()) > len(items):
        raise DataError(f"{what}: {sum(sizes.values())} questions asked for, {len(items)} there. Lower distill, dev or test.")
    shuffled = rng.sample(items, len(items))
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[part] = shuffled[start : start + size]
        start += size
    return parts


def build_files(settings: FileSet) -> Corpus:
    """A question set read from local files, its parts drawn by the seed."""
    passages = read_passages(Path(settings.passages))
    questions = read_questions(Path(settings.questions), passages)
    sizes = {part: getattr(settings, part) for part in PARTS}
    return Corpus(settings.name, passages, split(questions, sizes, random.Random(f"split {settings.seed}"), settings.questions))


def build_world(settings: WorldSet, reserved: bool = True) -> Corpus:
    """A question set of an embedded world, drawn from reserved names (the measured sets) or from the others (training).

    Each fact is stated by `wordings_per_fact` passages in different wordings. Two thirds of the entities serve
    distillation, a sixth each dev and test. The last wording of each question is held out: dev and test only.
    """
    rng = random.Random(f"world {settings.world} {settings.seed}")
    entities = rng.sample(made := world.make_entities(settings.world, settings.entities, rng, reserved), len(made))
    passages: list[Passage] = []
    gold: dict[tuple[str, str], list[int]] = {}
    for entity in entities:
        n_wordings = len(world.relations(settings.world)[entity.kind, next(iter(entity.facts))]["statements"])
        for relation in entity.facts:
            for wording in rng.sample(range(n_wordings), settings.wordings_per_fact):
                gold.setdefault((entity.name, relation), []).append(len(passages))
                passages.append(Passage("", entity.name, world.write_passage(entity, relation, wording, rng)[0]))
    order = rng.sample(range(len(passages)), len(passages))
    place = {old: new for new, old in enumerate(order)}
    passages = [Passage(str(new), passages[old].title, passages[old].text) for new, old in enumerate(order)]

    third = len(entities) // 6
    owners = {"dev": entities[:third], "test": entities[third : 2 * third], "distill": entities[2 * third :]}
    questions: dict[str, list[Question]] = {}
    for part in PARTS:
        asked = []
        for entity in owners[part]:
            for relation in entity.facts:
                wordings = len(world.relations(settings.world)[entity.kind, relation]["questions"])
                for wording in range(wordings - 1 if part == "distill" else wordings):
                    asked.append(
                        Question(
                            id=f"{settings.name}-{entity.name}-{relation}-{wording}".replace(" ", "_"),
                            text=world.ask(entity, relation, wording, rng),
                            answers=entity.facts[relation],
                            gold=tuple(sorted(place[i] for i in gold[entity.name, relation])),
                            cloze=world.cloze(entity, relation),
                            relation=relation,
                            wording=wording,
                            entity=entity.name,
                        )
                    )
        questions |= split(asked, {part: getattr(settings, part)}, rng, f"set {settings.name}, part {part}")
    return Corpus(settings.name, passages, questions)
