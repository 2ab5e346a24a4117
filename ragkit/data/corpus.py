"""A question set: passages on disk (one Arrow file, memory-mapped, so that 21 million of them need
no memory), questions in three parts, and what their stages are made of."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from ragkit.data.files import contents, read_jsonl
from ragkit.data.text import holds_answer
from ragkit.errors import DataError
from ragkit.settings import FileSet, HubSet, QuestionSet, WorldSet

PARTS = ("distill", "dev", "test")
PASSAGES = "passages.arrow"
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])
CUTS = (1, 5, 20)
POOL, ROW, ROW_GZ = 50, 650, 220  # about: passages of a question's pool; bytes of one in a TSV
Places = Sequence[Sequence[int]]  # of passages, a row a question


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be retrieved; its place in the corpus is its index."""

    id: str
    title: str
    text: str


class Passages(Sequence[Passage]):
    """The passages of a file of `write_passages`; only those asked for are read."""

    def __init__(self, path: Path) -> None:
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            told = f"The passages in {path} cannot be read ({error}). Remove the stage's folder"
            raise DataError(f"{told}, then give the same command.") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, place: Any) -> Any:
        """The passage at a place, or those of a slice, as of a list."""
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return Passage(*(column[range(len(self))[place]].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Passage]:
        for batch in self.table.to_batches():
            yield from map(Passage, *(column.to_pylist() for column in batch.columns))


def passage_text(passage: Passage) -> str:
    """What retrievers encode and search: the title, then the text."""
    return f"{passage.title} {passage.text}".strip()


def block(title: str, text: str) -> str:
    """How a passage stands in pretraining text and in every prompt."""
    return f"{title}: {text}"


def write_passages(path: Path, passages: Iterable[Passage]) -> Passages:
    """Writes passages as they come, and opens them; DataError if there are none, or ids repeat."""
    waiting = map(vars, passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while batch := list(islice(waiting, 10_000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
    made = Passages(path)
    if not len(made):
        raise DataError("There are no passages.")
    if pc.count_distinct(made.table["id"]).as_py() < len(made):
        ids = made.table["id"].to_pandas()
        first, again, *_ = ids.index[ids == ids[ids.duplicated().idxmax()]] + 1
        raise DataError(f"Passages {first} and {again} have the same id {ids[again - 1]!r}.")
    return made


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the corpus indices of the passages that state one."""

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    cloze: str = ""  # a statement up to the answer, for readers that only complete text
    relation: str = ""  # the kind of question in the embedded worlds, and its wording
    wording: int = -1
    entity: str = ""


Pair = tuple[Question, list[Passage]]


def found_first(question: Question, found: Sequence[Passage]) -> Question:
    """The question with that of its answers first which stands in most of some passages' texts;
    the earlier of those that tie, so that without any in them it stays as it is."""
    counts = [sum(holds_answer(p.text, [one]) for p in found) for one in question.answers]
    best = question.answers[counts.index(max(counts))]
    return replace(question, answers=tuple(dict.fromkeys((best, *question.answers))))


@dataclass(frozen=True)
class Corpus:
    """A question set: passages, in memory or on disk, and questions by part."""

    name: str
    passages: Sequence[Passage]
    questions: dict[str, list[Question]]

    @classmethod
    def load(cls, name: str, passages: Path, questions: Path) -> "Corpus":
        """Opens the folders that `make_passages` and `make_questions` wrote."""
        read, parts = TypeAdapter(Question).validate_python, {}
        for part in PARTS:
            parts[part] = [read(row) for _, row in read_jsonl(questions / f"{part}.jsonl")]
        return cls(name, Passages(passages / PASSAGES), parts)

    def gold(self, question: Question, found: Sequence[int]) -> tuple[int, ...]:
        """A question's gold passages; if none is known, those found that hold an answer (DPR)."""
        return question.gold or tuple(
            place for place in found if holds_answer(self.passages[place].text, question.answers)
        )

    def golds(self, asked: Sequence[Question], ranking: NDArray[np.int64]) -> list[tuple[int, ...]]:
        """`gold` of each question and its row of the ranking `[questions, k]`."""
        return [self.gold(q, row) for q, row in zip(asked, ranking.tolist(), strict=True)]


@dataclass(frozen=True)
class Asked:
    """Questions and their candidates: places of passages `[questions, k]`."""

    corpus: Corpus
    questions: list[Question]
    candidates: NDArray[np.int64]

    @classmethod
    def open(
        cls, inputs: Mapping[str, Path], part: str, most: int | None = None, k: int | None = None
    ) -> "Asked":
        """At most so many questions of a part, with k candidates each, from their stages: those of
        `candidates`, or of the `ranking`, which may be a stage of candidates or of Step 2."""
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        questions = corpus.questions[part][:most]
        folder = inputs["ranking"] if "ranking" in inputs else inputs["candidates"]
        file = next(folder.glob("ranking.safetensors"), folder / "candidates.safetensors")
        return cls(corpus, questions, load_file(file)[part][: len(questions), :k])

    @property
    def passages(self) -> list[list[Passage]]:
        """The candidates as passages, best first, for each question."""
        return [[self.corpus.passages[place] for place in row] for row in self.candidates]

    def scored(self, reader: Mapping[str, Any]) -> "Asked":
        """These, each with the answer first that a reader of these settings is scored by."""
        if reader["answer"] == "first":
            return self
        pairs = zip(self.questions, self.passages, strict=True)
        return replace(self, questions=[found_first(*pair) for pair in pairs])


def hits(found: Places, golds: Places, k: int) -> NDArray[np.float64]:
    """1.0 for each question with a gold passage among its first k `[questions]` (HR@k)."""
    return (reciprocal_ranks(found, golds) >= 1 / k).astype(float)


def reciprocal_ranks(found: Places, golds: Places) -> NDArray[np.float64]:
    """1 / rank of the first gold passage, 0 if none was found `[questions]`; MRR is the mean."""
    rows = zip(found, golds, strict=True)
    ranks = [next((n for n, i in enumerate(row, 1) if i in gold), np.inf) for row, gold in rows]
    return 1 / np.array(ranks)


def drawn(items: list[Any], settings: QuestionSet, parts: Sequence[str]) -> dict[str, list[Any]]:
    """Parts of the set's sizes, one after the other. DataError if there are too few items."""
    sizes = {part: getattr(settings, part) for part in parts}
    if (n := sum(sizes.values())) > len(items):
        there = f"{n} questions asked for, {len(items)} different there. Lower distill, dev or test"
        raise DataError(f"set {settings.name}: {there} (or raise a world's entities).")
    rest = iter(items)
    return {part: list(islice(rest, size)) for part, size in sizes.items()}


def passage_settings(settings: QuestionSet) -> dict[str, Any]:
    """What determines a set's passages: settings, files. Sets that agree in it share the stage."""
    kept, source = {"source", "world", "seed", "entities", "wordings_per_fact"}, None
    if not isinstance(settings, WorldSet):
        kept, source = {"source", "passages", "passage_split"}, settings.passages
    if isinstance(settings, HubSet) and settings.pools:  # passages of the questions that are drawn
        kept, source = set(HubSet.model_fields) - {"name"}, settings.questions
    chosen = settings.model_dump(mode="json", include=kept)
    return {"set": chosen, "contents": contents(source)}


def passage_count(settings: FileSet | HubSet) -> int:
    """About how many passages a set has, before it is read; 0 if nobody can tell."""
    if isinstance(settings.passages, str):
        file = Path(settings.passages)
        size = file.stat().st_size if file.is_file() else 0
        return size // (ROW_GZ if file.suffix == ".gz" else ROW)
    if settings.passages is None:
        return POOL * (settings.distill + settings.dev + settings.test)
    return settings.passages.rows.get(settings.passage_split, 0)
