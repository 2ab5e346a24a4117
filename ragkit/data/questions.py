"""Question sets: passages, and questions in three parts; from the embedded worlds, from files, or from the hub."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.data import hub
from ragkit.data import worlds as world
from ragkit.data.files import read_jsonl, write_jsonl
from ragkit.data.passages import Passage, Passages, read_tsv, write_passages
from ragkit.errors import DataError
from ragkit.experiment.store import input_hash
from ragkit.indicators.metrics import holds_answer
from ragkit.profile import FileSet, HubSet, HubTable, QuestionSet, WorldSet

PARTS = ("distill", "dev", "test")
PASSAGES = "passages.arrow"
GOLD_KEYS = ("gold_id", "gold_passage_id", "psg_id")  # of a question's gold passage in files


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
    """A question set: passages, in memory or on disk, and questions in three parts."""

    name: str
    passages: Sequence[Passage]
    questions: dict[str, list[Question]]

    def save(self, folder: Path) -> None:
        """Writes one file of passages, unless they lie there, and one file of questions a part."""
        if not isinstance(self.passages, Passages):
            write_passages(folder / PASSAGES, self.passages)
        for part, questions in self.questions.items():
            write_jsonl(folder / f"{part}.jsonl", map(asdict, questions))

    @classmethod
    def load(cls, name: str, folder: Path) -> Corpus:
        parts = {
            part: [question_from(row) for _, row in read_jsonl(folder / f"{part}.jsonl")]
            for part in PARTS
        }
        return cls(name, Passages(folder / PASSAGES), parts)

    def golds(
        self, questions: Sequence[Question], ranking: NDArray[np.int64]
    ) -> list[tuple[int, ...]]:
        """The passages that count as found for each question: the gold ones.

        Where no gold passage is known (NQ-open, TriviaQA): those of its row of the ranking `[questions, k]` whose text holds
        an answer, which is how DPR, FiD and Contriever count hits.
        """
        return [
            self.gold(question, row)
            for question, row in zip(questions, ranking.tolist(), strict=True)
        ]

    def gold(self, question: Question, found: Sequence[int]) -> tuple[int, ...]:
        """See `golds`."""
        return question.gold or tuple(
            place for place in found if holds_answer(self.passages[place].text, question.answers)
        )


def question_from(row: dict[str, Any]) -> Question:
    return Question(**{**row, "answers": tuple(row["answers"]), "gold": tuple(row["gold"])})


def text_and_answers(row: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """The question and its answers, without repeats: a text, a list, or TriviaQA's object with `value` and `aliases`."""
    text, answers = row.get("question"), row.get("answer", row.get("answers"))
    if isinstance(answers, dict):
        answers = [answers.get("value"), *(answers.get("aliases") or [])]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'question' is missing or empty.")
    if not isinstance(answers, list) or not (
        kept := tuple(dict.fromkeys(a.strip() for a in answers if isinstance(a, str) and a.strip()))
    ):
        raise DataError(
            f"{where}: no answers. 'answer' must be a text, or a list with at least one."
        )
    return text.strip(), kept


def read_questions(path: Path, passages: Sequence[Passage]) -> list[Question]:
    """Questions of NQ-open or DPR/TriviaQA JSONL (see `text_and_answers`); a gold passage's id, where the file has one, under GOLD_KEYS."""
    rows = [
        (number, row, next((str(row[key]) for key in GOLD_KEYS if key in row), None))
        for number, row in read_jsonl(path)
    ]
    wanted = {gold for _, _, gold in rows if gold is not None}
    place = {p.id: i for i, p in enumerate(passages) if p.id in wanted} if wanted else {}
    questions = []
    for number, row, gold in rows:
        text, answers = text_and_answers(row, f"{path}, line {number}")
        if gold is not None and gold not in place:
            raise DataError(
                f"{path}, line {number}: gold passage {gold!r} is not among the passages."
            )
        questions.append(
            Question(
                f"{path.name}:{number}", text, answers, (place[gold],) if gold is not None else ()
            )
        )
    return questions


def build(settings: QuestionSet, folder: Path, with_passages: bool = False) -> None:
    """Writes the question set that a profile describes; its passages go to disk as they come, or are there already (of a hub's set)."""
    made = (
        build_world(settings)
        if isinstance(settings, WorldSet)
        else build_files(settings, folder)
        if isinstance(settings, FileSet)
        else build_hub(settings, folder, with_passages)
    )
    made.save(folder)


def input_hashes(settings: QuestionSet) -> dict[str, str]:
    """The files that a question set is read from, by hash, so that an edited file is read again; a hub's table is told by its revision."""
    if isinstance(settings, WorldSet):
        return {}
    named = (settings.passages, settings.questions)
    places = [
        Path(one.dataset if isinstance(one, HubTable) else one) for one in named if one is not None
    ]
    files = [
        file
        for place in places
        for file in (
            sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        )
    ]
    return {str(file): input_hash(file) for file in files if file.is_file()}


def card(settings: QuestionSet) -> list[dict[str, str]]:
    """Where a set's questions and passages come from: rows of what, source, revision, licence."""

    def row(what: str, source: str, revision: str, licence: str) -> dict[str, str]:
        return {
            "set": settings.name,
            "what": what,
            "source": source,
            "revision": revision,
            "licence": licence,
        }

    def of_table(what: str, table: HubTable) -> dict[str, str]:
        return row(
            what,
            table.dataset + (f" ({table.config})" if table.config else ""),
            table.revision,
            table.licence,
        )

    if isinstance(settings, WorldSet):
        return [
            row(
                "questions and passages",
                f"embedded world {settings.world!r}",
                f"seed {settings.seed}",
                "Apache-2.0",
            )
        ]
    hashes = input_hashes(settings)

    def of_file(what: str, path: str) -> dict[str, str]:
        return row(
            what,
            Path(path).name,
            f"sha256 {hashes.get(path, 'unknown')[:12]}",
            "as its source says",
        )

    if isinstance(settings, FileSet):
        return [of_file("questions", settings.questions), of_file("passages", settings.passages)]
    if settings.passages is None:
        return [
            of_table("questions", settings.questions),
            of_table(f"passages ({', '.join(settings.pools)})", settings.questions),
        ]
    passages = (
        of_file("passages", settings.passages)
        if isinstance(settings.passages, str)
        else of_table("passages", settings.passages)
    )
    return [of_table("questions", settings.questions), passages]


def split(
    items: Sequence[Any], sizes: dict[str, int], rng: random.Random, what: str
) -> dict[str, list[Any]]:
    """Disjoint random parts of the given sizes."""
    if sum(sizes.values()) > len(items):
        raise DataError(
            f"{what}: {sum(sizes.values())} questions asked for, {len(items)} there. Lower distill, dev or test."
        )
    shuffled = rng.sample(items, len(items))
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[part] = shuffled[start : start + size]
        start += size
    return parts


def build_files(settings: FileSet, folder: Path) -> Corpus:
    """A question set read from local files, its parts drawn by the seed."""
    passages = write_passages(folder / PASSAGES, read_tsv(Path(settings.passages)))
    questions = read_questions(Path(settings.questions), passages)
    sizes = {part: getattr(settings, part) for part in PARTS}
    return Corpus(
        settings.name,
        passages,
        split(questions, sizes, random.Random(f"split {settings.seed}"), settings.questions),
    )


def build_hub(settings: HubSet, folder: Path, with_passages: bool) -> Corpus:
    """A question set of the hub: distill and dev carved from one split by the seed, test drawn from another."""
    table, rng = settings.questions, random.Random(f"split {settings.seed}")
    columns = (
        "question",
        "answer",
        *settings.pools,
        *(("gold",) if "gold" in table.columns else ()),
    )
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    drawn_from = (
        {settings.train: PARTS}
        if settings.train == settings.heldout
        else {settings.train: PARTS[:2], settings.heldout: PARTS[2:]}
    )
    for name, parts in drawn_from.items():
        loaded = hub.load(table, name, "question table", columns)
        sizes = {part: getattr(settings, part) for part in parts}
        for part, places in split(
            range(len(loaded)), sizes, rng, f"{table.dataset}, split {name}"
        ).items():
            rows[part] = [
                (f"{name}:{place}", row)
                for place, row in zip(places, loaded.select(places), strict=True)
            ]
    if settings.pools:
        pooled, golds = pools(settings, rows)
        passages = write_passages(folder / PASSAGES, pooled)
    else:
        passages, golds = (
            Passages(folder / PASSAGES)
            if with_passages
            else write_passages(folder / PASSAGES, hub_passages(settings)),
            {},
        )
    questions = {
        part: [
            Question(
                name, *text_and_answers(row, f"{table.dataset}, row {name}"), golds.get(name, ())
            )
            for name, row in rows[part]
        ]
        for part in PARTS
    }
    return Corpus(settings.name, passages, questions)


def pools(
    settings: HubSet, rows: dict[str, list[tuple[str, dict[str, Any]]]]
) -> tuple[list[Passage], dict[str, tuple[int, ...]]]:
    """The passages of all pools, each once, and the places of each question's gold ones where a column holds these."""
    places: dict[str, int] = {}
    passages: list[Passage] = []
    golds: dict[str, tuple[int, ...]] = {}
    columns = [*settings.pools, *(["gold"] if "gold" in settings.questions.columns else [])]
    for name, row in (one for part in rows.values() for one in part):
        for column in columns:
            found = hub.pool(
                row[column], f"{settings.questions.dataset}, row {name}, column {column}"
            )
            for passage in found:
                if passage.id not in places:
                    places[passage.id] = len(passages)
                    passages.append(passage)
            if column == "gold":
                golds[name] = tuple(sorted({places[passage.id] for passage in found}))
    return passages, golds


def hub_passages(settings: HubSet) -> Iterator[Passage]:
    """The passages of a table or a TSV, all or `most_passages` of them, never all in memory."""
    if isinstance(settings.passages, str):
        path = Path(settings.passages)
        chosen = (
            None
            if settings.most_passages is None
            else set(
                hub.drawn(sum(1 for _ in read_tsv(path)), settings.most_passages, settings.seed)
            )
        )
        return (
            passage
            for place, passage in enumerate(read_tsv(path))
            if chosen is None or place in chosen
        )
    assert settings.passages is not None
    table = hub.load(
        settings.passages, settings.passage_split, "passage table", ("id", "title", "text")
    )
    return hub.passages_of(
        table
        if settings.most_passages is None
        else table.select(hub.drawn(len(table), settings.most_passages, settings.seed))
    )


def build_world(settings: WorldSet, reserved: bool = True) -> Corpus:
    """A question set of an embedded world, drawn from reserved names (the measured sets) or from the others (training).

    Each fact is stated by `wordings_per_fact` passages in different wordings. Two thirds of the entities serve
    distillation, a sixth each dev and test. The last wording of each question is held out: dev and test only.
    """
    rng = random.Random(f"world {settings.world} {settings.seed}")
    entities = rng.sample(
        made := world.make_entities(settings.world, settings.entities, rng, reserved), len(made)
    )
    passages: list[Passage] = []
    gold: dict[tuple[str, str], list[int]] = {}
    for entity in entities:
        n_wordings = len(
            world.relations(settings.world)[entity.kind, next(iter(entity.facts))]["statements"]
        )
        for relation in entity.facts:
            for wording in rng.sample(range(n_wordings), settings.wordings_per_fact):
                gold.setdefault((entity.name, relation), []).append(len(passages))
                passages.append(
                    Passage("", entity.name, world.write_passage(entity, relation, wording, rng)[0])
                )
    order = rng.sample(range(len(passages)), len(passages))
    place = {old: new for new, old in enumerate(order)}
    passages = [
        Passage(str(new), passages[old].title, passages[old].text) for new, old in enumerate(order)
    ]

    third = len(entities) // 6
    owners = {
        "dev": entities[:third],
        "test": entities[third : 2 * third],
        "distill": entities[2 * third :],
    }
    questions: dict[str, list[Question]] = {}
    for part in PARTS:
        asked = []
        for entity in owners[part]:
            for relation in entity.facts:
                wordings = len(world.relations(settings.world)[entity.kind, relation]["questions"])
                for wording in range(wordings - 1 if part == "distill" else wordings):
                    asked.append(
                        Question(
                            id=f"{settings.name}-{entity.name}-{relation}-{wording}".replace(
                                " ", "_"
                            ),
                            text=world.ask(entity, relation, wording, rng),
                            answers=entity.facts[relation],
                            gold=tuple(sorted(place[i] for i in gold[entity.name, relation])),
                            cloze=world.cloze(entity, relation),
                            relation=relation,
                            wording=wording,
                            entity=entity.name,
                        )
                    )
        questions |= split(
            asked, {part: getattr(settings, part)}, rng, f"set {settings.name}, part {part}"
        )
    return Corpus(settings.name, passages, questions)
