"""The embedded worlds: encyclopedia-like passages and questions about invented entities, by a seed.

`assets/worlds.yaml` holds the wordings and the pieces of names. Name words are split in two by a
hash: reserved words appear only in the worlds that the notebooks measure on, all others only in
training text, so that no reader has seen a name of the measured worlds.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml

from ragkit.data.passages import Passage
from ragkit.data.questions import PARTS, Corpus, Question
from ragkit.errors import DataError
from ragkit.settings import WorldSet, asset

RESERVED_SHARE = 5  # one name word in five is kept for the frozen worlds
YEARS = range(1710, 1960)
NUMBERS = range(2, 60)
TWO_PART_KINDS = ("company", "press", "medal")


@cache
def spec() -> dict[str, Any]:
    """The parsed `assets/worlds.yaml`."""
    return yaml.safe_load(asset("worlds.yaml").read_text("utf8"))


def relations(world: str) -> dict[tuple[str, str], dict[str, Any]]:
    """All relations of a world, keyed by (entity kind, relation name)."""
    kinds = spec()["worlds"][world]["entities"]
    return {(kind, name): rel for kind in kinds for name, rel in kinds[kind]["relations"].items()}


@cache
def plain_words() -> frozenset[str]:
    """Every lower-case word of wordings, closed answer lists and the fixed parts of names."""
    texts: list[str] = [frame for frames in spec()["prose"].values() for frame in frames]
    for world in spec()["worlds"].values():
        for entity in world["entities"].values():
            texts += entity["shorts"]
            for rel in entity["relations"].values():
                texts += rel["statements"] + rel["details"] + rel["questions"]
                texts.append(rel.get("clue", ""))
                texts += rel["answer"] if isinstance(rel["answer"], list) else []
    for pieces in spec()["names"].values():
        for fixed in ("after", "before", "adjectives", "nouns"):
            texts += pieces.get(fixed, [])
    cleaned = re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()
    return frozenset(re.findall(r"[a-z]+", cleaned)) | {"the", "question", "answer"}


def is_reserved(word: str) -> bool:
    """Whether a name word belongs to the measured worlds (a hash that is the same everywhere)."""
    return zlib.crc32(word.encode()) % RESERVED_SHARE == 0


@cache
def name_words(kind: str, reserved: bool) -> tuple[str, ...]:
    """The words of one kind of name: a three-letter start joined to an ending.

    One that begins with an ordinary word longer than its start is left out: a longest-match
    tokenizer would cut it elsewhere.
    """
    pieces = spec()["names"][kind]
    words = [start + end for start in pieces["starts"] for end in pieces["ends"]]
    words = [w for w in words if not any(w[:n] in plain_words() for n in range(4, len(w) + 1))]
    return tuple(w for w in words if is_reserved(w) == reserved)


class NameMaker:
    """Draws names from small pools: about `sharing` entities share a given part of their names."""

    def __init__(self, rng: random.Random, reserved: bool, n: int, sharing: float = 3.0) -> None:
        self.rng, self.reserved = rng, reserved
        self.pool_size = max(3, round(n / sharing))
        self.pools: dict[str, list[str]] = {}

    def pool(self, kind: str) -> list[str]:
        if kind not in self.pools:
            words = name_words(kind, self.reserved)
            self.pools[kind] = self.rng.sample(words, min(self.pool_size, len(words)))
        return self.pools[kind]

    def draw(self, kind: str) -> str:
        """One name of a kind of `assets/worlds.yaml`, of a `person`, or a `year`."""
        rng, names = self.rng, spec()["names"]
        if kind == "year":
            return str(rng.choice(YEARS))
        if kind == "person":
            return f"{rng.choice(self.pool('first'))} {rng.choice(self.pool('last'))}".title()
        if kind == "novel":
            while True:
                pair = f"{rng.choice(names[kind]['adjectives'])} {rng.choice(names[kind]['nouns'])}"
                if is_reserved(pair) == self.reserved:
                    return f"The {pair.title()}"
        word = rng.choice(self.pool(kind))
        if kind in TWO_PART_KINDS:
            word = f"{word} {rng.choice(names[kind]['after'])}"
        elif kind == "town" and rng.random() < 0.7:
            word = f"{rng.choice(names[kind]['before'])} {word}"
        return word.title()

    def draw_many(self, kind: str, n: int) -> list[str]:
        """`n` different names."""
        found: dict[str, None] = {}
        for _ in range(200 * n + 1000):
            if len(found) == n:
                return list(found)
            found[self.draw(kind)] = None
        raise DataError(f"{len(found)} names of kind {kind!r} are there, not {n}: lower entities.")


@dataclass(frozen=True)
class Entity:
    """An invented thing: its facts map a relation to the answer's aliases, the full one first."""

    world: str
    kind: str
    name: str
    facts: dict[str, tuple[str, ...]] = field(hash=False)

    @property
    def short(self) -> str:
        if self.kind == "person":
            return self.name.split()[-1]
        return spec()["worlds"][self.world]["entities"][self.kind]["shorts"][0]


@dataclass(frozen=True)
class Statement:
    """A sentence that states a fact: `text[answer[0]:answer[1]]` is the alias it uses."""

    text: str
    answer: tuple[int, int]


def aliases(kind: str | list[str], value: str, world: str) -> tuple[str, ...]:
    """The accepted forms of an answer: both of `a|b`; of a person in trivia also the last name."""
    if isinstance(kind, list):
        return tuple(value.split("|"))
    if kind == "person" and spec()["worlds"][world]["style"] == "long":
        return value, value.split()[-1]
    return (value,)


def make_entities(
    world: str,
    n: int,
    rng: random.Random,
    reserved: bool,
    sharing: float = 3.0,
    kind: str | None = None,
) -> list[Entity]:
    """`n` entities with all their facts, spread evenly over the world's kinds or of one `kind`."""
    kinds = [kind] if kind else list(spec()["worlds"][world]["entities"])
    names = NameMaker(rng, reserved, n, sharing)
    values = NameMaker(rng, reserved, 4 * n, sharing)  # answers come from wider pools of their own
    made = []
    for i, entity_kind in enumerate(kinds):
        rels = spec()["worlds"][world]["entities"][entity_kind]["relations"]
        for name in names.draw_many(entity_kind, len(range(i, n, len(kinds)))):
            facts = {}
            for rel_name, rel in rels.items():
                answer = rel["answer"]
                value = rng.choice(answer) if isinstance(answer, list) else values.draw(answer)
                while value == name:
                    value = values.draw(answer)
                facts[rel_name] = aliases(answer, value, world)
            made.append(Entity(world, entity_kind, name, facts))
    return made


def state(entity: Entity, relation: str, wording: int, alias: int = 0) -> Statement:
    """The fact in one of its wordings, with the place of the answer in it."""
    template = relations(entity.world)[entity.kind, relation]["statements"][wording]
    answer = entity.facts[relation][alias % len(entity.facts[relation])]
    before = template[: template.index("{a}")].replace("{e}", entity.name)
    after = template[template.index("{a}") + 3 :].replace("{e}", entity.name)
    if not before:
        answer = answer[0].upper() + answer[1:]
    return Statement(before + answer + after, (len(before), len(before) + len(answer)))


def detail(entity: Entity, relation: str, rng: random.Random) -> list[str]:
    """The relation's sentences that do not give its answer, in random order, numbers filled in."""
    sentences = relations(entity.world)[entity.kind, relation]["details"]
    filled = []
    for text in rng.sample(sentences, len(sentences)):
        year, number = str(rng.choice(YEARS)), str(rng.choice(NUMBERS))
        text = text.replace("{s}", entity.short).replace("{year}", year).replace("{n}", number)
        filled.append(text[0].upper() + text[1:])
    return filled


def write_passage(
    entity: Entity, relation: str, wording: int, rng: random.Random, n_details: int = 3
) -> tuple[str, tuple[int, int]]:
    """A passage about one fact, told first or second, and the characters of its answer."""
    closed = isinstance(relations(entity.world)[entity.kind, relation]["answer"], list)
    fact = state(entity, relation, wording, alias=int(closed and rng.random() < 0.2))
    details = detail(entity, relation, rng)[:n_details]
    first = [details.pop()] if len(details) > 1 and rng.random() < 0.3 else []
    offset = len(first[0]) + 1 if first else 0
    start, end = fact.answer
    return " ".join([*first, fact.text, *details]), (start + offset, end + offset)


def ask(entity: Entity, relation: str, wording: int, rng: random.Random) -> str:
    """The question for a fact in one of its wordings.

    Long questions draw two clues from the entity's other facts, in the alias that its passages
    rarely use: a clue describes, it does not quote.
    """
    rels = relations(entity.world)
    text = rels[entity.kind, relation]["questions"][wording].replace("{e}", entity.name)
    if "{c1}" not in text:
        return text.lower()
    others = [r for r in entity.facts if r != relation]
    closed = [r for r in others if isinstance(rels[entity.kind, r]["answer"], list)]
    for slot, other in zip(("{c1}", "{c2}"), rng.sample(closed, 2), strict=True):
        clue = rels[entity.kind, other]["clue"].replace("{a}", entity.facts[other][1])
        text = text.replace(slot, clue.replace("{e}", entity.name))
    return text[0].upper() + text[1:]


def cloze(entity: Entity, relation: str, wording: int = 0) -> str:
    """The beginning of a statement up to the answer: what a plain language model can complete."""
    fact = state(entity, relation, wording)
    return fact.text[: fact.answer[0]].rstrip()


@dataclass(frozen=True)
class Drawn:
    """A world's entities in random order, and where each fact (entity, relation) is stated."""

    entities: list[Entity]
    gold: dict[tuple[str, str], tuple[int, ...]]
    rng: random.Random  # draws the questions next


def world_passages(settings: WorldSet, reserved: bool = True) -> tuple[list[Passage], Drawn]:
    """The passages of a world: `wordings_per_fact` of them state each fact, in other words."""
    rng = random.Random(f"world {settings.world} {settings.seed}")
    made = make_entities(settings.world, settings.entities, rng, reserved)
    entities = rng.sample(made, len(made))
    passages: list[tuple[str, str]] = []
    stated: dict[tuple[str, str], list[int]] = {}
    for entity in entities:
        rels = relations(settings.world)
        n_wordings = len(rels[entity.kind, next(iter(entity.facts))]["statements"])
        for relation in entity.facts:
            for wording in rng.sample(range(n_wordings), settings.wordings_per_fact):
                stated.setdefault((entity.name, relation), []).append(len(passages))
                text = write_passage(entity, relation, wording, rng)[0]
                passages.append((entity.name, text))
    order = rng.sample(range(len(passages)), len(passages))
    place = {old: new for new, old in enumerate(order)}
    gold = {fact: tuple(sorted(place[i] for i in places)) for fact, places in stated.items()}
    shuffled = [Passage(str(new), *passages[old]) for new, old in enumerate(order)]
    return shuffled, Drawn(entities, gold, rng)


def build_world(settings: WorldSet, reserved: bool = True) -> Corpus:
    """A question set of a world, of reserved names (the measured sets) or of the others (training).

    Two thirds of the entities serve distillation, a sixth each dev and test. The last wording of
    each question is asked in dev and test only. Raises DataError if there are too few questions.
    """
    passages, drawn = world_passages(settings, reserved)
    sixth = len(drawn.entities) // 6
    bounds = {"dev": (0, sixth), "test": (sixth, 2 * sixth), "distill": (2 * sixth, None)}
    questions: dict[str, list[Question]] = {}
    for part in PARTS:
        asked = []
        for entity in drawn.entities[slice(*bounds[part])]:
            for relation in entity.facts:
                n_wordings = len(relations(settings.world)[entity.kind, relation]["questions"])
                for wording in range(n_wordings - (part == "distill")):
                    name = f"{settings.name}-{entity.name}-{relation}-{wording}".replace(" ", "_")
                    text = ask(entity, relation, wording, drawn.rng)
                    answers, gold = entity.facts[relation], drawn.gold[entity.name, relation]
                    kind = (cloze(entity, relation), relation, wording, entity.name)
                    asked.append(Question(name, text, answers, gold, *kind))
        wanted = getattr(settings, part)
        if wanted > len(asked):
            raise DataError(
                f"set {settings.name}, part {part}: {wanted} questions asked for, {len(asked)} "
                "there. Lower distill, dev or test, or raise entities."
            )
        questions[part] = drawn.rng.sample(asked, len(asked))[:wanted]
    return Corpus(settings.name, passages, questions)
