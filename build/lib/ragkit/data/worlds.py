"""The embedded worlds: a seeded generator of encyclopedia-like passages and questions about invented entities.

`assets/worlds.yaml` holds the wordings and the pieces of names. Name words are split in two by a hash: reserved words
appear only in the frozen worlds that the notebooks measure on, all others only in training text, so that no name of
the measured worlds was ever seen by a reader.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

RESERVED_SHARE = 5  # one name word in five is kept for the frozen worlds
YEARS = range(1710, 1960)
NUMBERS = range(2, 60)
TWO_PART_KINDS = ("company", "press", "medal")


@cache
def spec() -> dict[str, Any]:
    """The parsed `assets/worlds.yaml`."""
    return yaml.safe_load(resources.files("ragkit").joinpath("assets/worlds.yaml").read_text("utf8"))


def relations(world: str) -> dict[tuple[str, str], dict[str, Any]]:
    """All relations of a world, keyed by (entity kind, relation name)."""
    entities = spec()["worlds"][world]["entities"]
    return {(kind, name): rel for kind, entity in entities.items() for name, rel in entity["relations"].items()}


@cache
def plain_words() -> frozenset[str]:
    """Every lower-case word of the wordings, the closed answer lists and the fixed parts of names (no name pieces)."""
    texts: list[str] = [frame for frames in spec()["prose"].values() for frame in frames]
    for world in spec()["worlds"].values():
        for entity in world["entities"].values():
            texts += entity["shorts"]
            for rel in entity["relations"].values():
                texts += rel["statements"] + rel["details"] + rel["questions"] + [rel.get("clue", "")]
                texts += rel["answer"] if isinstance(rel["answer"], list) else []
    names = spec()["names"]
    for kind in names.values():
        texts += kind.get("after", []) + kind.get("before", []) + kind.get("adjectives", []) + kind.get("nouns", [])
    cleaned = re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()
    return frozenset(re.findall(r"[a-z]+", cleaned)) | {"the", "question", "answer"}


def is_reserved(word: str) -> bool:
    """Whether a name word belongs to the frozen worlds only (a stable hash, the same on every machine)."""
    return zlib.crc32(word.encode()) % RESERVED_SHARE == 0


@cache
def name_words(kind: str, reserved: bool) -> tuple[str, ...]:
    """The words of one kind of name: a three-letter start joined to an ending.

    A combination that begins with an ordinary word longer than its start is left out: a longest-match tokenizer would
    cut it elsewhere.
    """
    pieces = spec()["names"][kind]
    words = [start + end for start in pieces["starts"] for end in pieces["ends"]]
    words = [w for w in words if not any(w[:n] in plain_words() for n in range(4, len(w) + 1))]
    return tuple(w for w in words if is_reserved(w) == reserved)


class NameMaker:
    """Draws names from small pools, so that entities share parts of their names.

    `sharing` is about how many entities share a given part: pools are that much smaller than the number of names.
    """

    def __init__(self, rng: random.Random, reserved: bool, n_names: int, sharing: float = 3.0) -> None:
        self.rng, self.reserved = rng, reserved
        self.pool_size = max(3, round(n_names / sharing))
        self.pools: dict[str, list[str]] = {}

    def pool(self, kind: str) -> list[str]:
        if kind not in self.pools:
            words = name_words(kind, self.reserved)
            self.pools[kind] = self.rng.sample(words, min(self.pool_size, len(words)))
        return self.pools[kind]

    def draw(self, kind: str) -> str:
        """One name of a kind of `assets/worlds.yaml`, capitalised; `person` and `year` are understood too."""
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
        raise ValueError(f"only {len(found)} different names of kind {kind!r} can be drawn from this pool, not {n}")


@dataclass(frozen=True)
class Entity:
    """An invented thing: its facts map a relation to the answer's aliases (the first is the full one)."""

    world: str
    kind: str
    name: str
    facts: dict[str, tuple[str, ...]] = field(hash=False)

    @property
    def short(self) -> str:
        return self.name.split()[-1] if self.kind == "person" else spec()["worlds"][self.world]["entities"][self.kind]["shorts"][0]


@dataclass(frozen=True)
class Statement:
    """A sentence that states a fact: `text[answer[0]:answer[1]]` is the alias it uses."""

    text: str
    answer: tuple[int, int]


def aliases(kind: str | list[str], value: str, world: str) -> tuple[str, ...]:
    """The accepted forms of an answer: `a|b` lists give both; trivia persons may be called by their last name."""
    if isinstance(kind, list):
        return tuple(value.split("|"))
    if kind == "person" and spec()["worlds"][world]["style"] == "long":
        return value, value.split()[-1]
    return (value,)


def make_entities(world: str, n: int, rng: random.Random, reserved: bool, sharing: float = 3.0, kind: str | None = None) -> list[Entity]:
    """`n` entities with all their facts, spread evenly over the world's kinds (or of one `kind`)."""
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
    filled = [
        s.replace("{s}", entity.short).replace("{year}", str(rng.choice(YEARS))).replace("{n}", str(rng.choice(NUMBERS)))
        for s in rng.sample(sentences, len(sentences))
    ]
    return [s[0].upper() + s[1:] for s in filled]


def write_passage(entity: Entity, relation: str, wording: int, rng: random.Random, n_details: int = 3) -> tuple[str, tuple[int, int]]:
    """A passage about one fact, and the characters at which its answer stands. The fact is first or second."""
    closed = isinstance(relations(entity.world)[entity.kind, relation]["answer"], list)
    fact = state(entity, relation, wording, alias=int(closed and rng.random() < 0.2))
    details = detail(entity, relation, rng)[:n_details]
    first = [details.pop()] if len(details) > 1 and rng.random() < 0.3 else []
    offset = len(first[0]) + 1 if first else 0
    return " ".join([*first, fact.text, *details]), (fact.answer[0] + offset, fact.answer[1] + offset)


def ask(entity: Entity, relation: str, wording: int, rng: random.Random) -> str:
    """The question for a fact in one of its wordings.

    Long questions draw two clues from the entity's other facts, in the alias that its passages rarely use: a clue
    describes, it does not quote.
    """
    rels = relations(entity.world)
    text = rels[entity.kind, relation]["questions"][wording]
    if "{c1}" in text:
        closed = [r for r in entity.facts if r != relation and isinstance(rels[entity.kind, r]["answer"], list)]
        others = rng.sample(closed, 2)
        for slot, other in zip(("{c1}", "{c2}"), others, strict=True):
            text = text.replace(slot, rels[entity.kind, other]["clue"].replace("{a}", entity.facts[other][1]))
        text = text.replace("{e}", entity.name)
        return text[0].upper() + text[1:]
    return text.replace("{e}", entity.name).lower()


def cloze(entity: Entity, relation: str, wording: int = 0) -> str:
    """The beginning of a statement up to the answer: what a plain language model can complete."""
    fact = state(entity, relation, wording)
    return fact.text[: fact.answer[0]].rstrip()


def block(title: str, text: str) -> str:
    """How a passage stands in pretraining text and in every prompt."""
    return f"{title}: {text}"


Span = tuple[str, Literal["given", "frame", "answer"]]  # text told for the first time, text around, a fact's answer told again
Draw = Literal["same_relation", "same_entity", "mixed"]


def told_again(entity: Entity, relation: str, wording: int) -> list[Span]:
    """A statement of a fact that the page has already told, its answer marked."""
    fact = state(entity, relation, wording)
    start, end = fact.answer
    return [(" " + fact.text[:start], "frame"), (fact.text[start:end], "answer"), (fact.text[end:], "frame")]


def register_page(rng: random.Random, n: int, sharing: float, wordings: int) -> list[Span]:
    """A page of pretraining prose: a register `name: answer.` of one kind of fact, and its entries again in any order.

    Each entry comes again three times as an entry, or once and in `wordings` sentences. The shortest text
    in which a reader must look up *whose* fact is meant.
    """
    world = rng.choice(list(spec()["worlds"]))
    kind, relation = rng.choice(list(relations(world)))
    entities = make_entities(world, n, rng, reserved=False, sharing=sharing, kind=kind)
    spans: list[Span] = [(rng.choice(spec()["prose"]["register"]), "given")]
    spans += [(f" {e.name}: {e.facts[relation][0]}.", "given") for e in entities]
    spans.append(("\n" + rng.choice(spec()["prose"]["digest"]), "frame"))
    entry: list[Span]
    again: list[list[Span]] = []
    for entity in entities:
        entry = [(f" {entity.name}: ", "frame"), (entity.facts[relation][0], "answer"), (".", "frame")]
        again += [entry] * (1 if wordings else 3)
        again += [told_again(entity, relation, w) for w in rng.sample(range(5), wordings)]
    for sentence in rng.sample(again, len(again)):
        spans += sentence
    return spans


def passages_page(rng: random.Random, n: int, n_details: int, sharing: float, restated: int, n_open: int) -> list[Span]:
    """A page of pretraining prose: `n` passages, then their facts again in other words; no question with its answer.

    `n_open` sentences hold a question's wording as prose that leaves it open, so that a reader has met the words.
    """
    world = rng.choice(list(spec()["worlds"]))
    rels = relations(world)
    draw: Draw = rng.choice(("same_relation", "same_relation", "same_relation", "same_entity", "mixed"))
    kind, relation = rng.choice(list(rels))
    entities = make_entities(world, n, rng, reserved=False, sharing=sharing, kind=kind if draw != "mixed" else None)
    facts: list[tuple[Entity, str]] = []
    for entity in entities:
        if draw == "same_relation":
            facts.append((entity, relation))
        else:
            owner = entities[0] if draw == "same_entity" and rng.random() < 0.6 else entity
            facts.append((owner, rng.choice(list(owner.facts))))
    paragraphs: list[str] = []
    unused: dict[tuple[str, str], tuple[Entity, list[int]]] = {}
    for entity, rel in facts:
        wording = rng.randrange(len(rels[entity.kind, rel]["statements"]))
        paragraphs.append(block(entity.name, write_passage(entity, rel, wording, rng, n_details)[0]))
        unused.setdefault((entity.name, rel), (entity, [w for w in range(5) if w != wording]))
    restatements = [(entity, rel, w) for (_, rel), (entity, wordings) in unused.items() for w in wordings]
    sentences = [told_again(*choice) for choice in rng.sample(restatements, min(restated, len(restatements)))]
    for _ in range(n_open):
        entity, rel = rng.choice(facts)
        sentence = " " + left_open(entity, rel, rng)
        sentences.insert(rng.randint(0, len(sentences)), [(sentence, "frame")])
    return [("\n".join(paragraphs), "given"), ("\n" + rng.choice(spec()["prose"]["digest"]), "frame"), *(span for s in sentences for span in s)]


def left_open(entity: Entity, relation: str, rng: random.Random) -> str:
    """A sentence of prose that carries one of a question's wordings and leaves it open."""
    frame = rng.choice(spec()["prose"]["open"])
    wording = rng.randrange(len(relations(entity.world)[entity.kind, relation]["questions"]))
    sentence = frame.replace("{q}", ask(entity, relation, wording, rng))
    return sentence if sentence.endswith(("?", ".")) else sentence + "."


def open_prose(world: str, n: int, rng: random.Random) -> list[str]:
    """`n` pieces of training prose that carry a question's wording about some unmeasured entity and leave it open.

    A share of them (`topical_prose` of the world) goes on with a sentence on the same topic: that is how text ties the
    words of a question to the words of passages, and how hard the set is for a retriever trained on such text.
    """
    share = spec()["worlds"][world]["topical_prose"]
    entities = make_entities(world, min(n, 200), rng, reserved=False)
    pieces = []
    for _ in range(n):
        entity = rng.choice(entities)
        relation = rng.choice(list(entity.facts))
        piece = left_open(entity, relation, rng)
        pieces.append(f"{piece} {detail(entity, relation, rng)[0]}" if rng.random() < share else piece)
    return pieces
