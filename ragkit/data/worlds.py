"""The embedded worlds: encyclopedia-like passages and questions about invented entities, by a seed.
`assets/worlds.yaml` holds the wordings and the pieces of names. Name words are split in two by a
hash: reserved words appear only in the worlds that the notebooks measure on, all others only in
training text, so that no reader has seen a name of the measured worlds."""

import random
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import yaml

from ragkit.data.corpus import PARTS, Corpus, Passage, Question, drawn
from ragkit.errors import DataError
from ragkit.settings import WorldSet, asset

SPEC: dict[str, Any] = yaml.safe_load(asset("worlds.yaml").read_text("utf8"))
YEARS, NUMBERS = range(1710, 1960), range(2, 60)


def relations(world: str) -> dict[tuple[str, str], dict[str, Any]]:
    """All relations of a world, keyed by (entity kind, relation name)."""
    kinds = SPEC["worlds"][world]["entities"]
    return {(kind, name): rel for kind in kinds for name, rel in kinds[kind]["relations"].items()}


@cache
def plain_words() -> frozenset[str]:
    """Every lower-case word of wordings, closed answer lists and the fixed parts of names."""
    texts = ["the question answer", *(text for kind in SPEC["prose"].values() for text in kind)]
    for world, told in SPEC["worlds"].items():
        texts += [short for entity in told["entities"].values() for short in entity["shorts"]]
        for rel in relations(world).values():
            texts += [*rel["statements"], *rel["details"], *rel["questions"], rel.get("clue", "")]
            texts += rel["answer"] if isinstance(rel["answer"], list) else []
    for pieces in SPEC["names"].values():
        for fixed in ("after", "before", "adjectives", "nouns"):
            texts += pieces.get(fixed, [])
    return frozenset(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()))


def is_reserved(word: str) -> bool:
    """Whether a name word is one of the fifth that the measured worlds keep, by a stable hash."""
    return zlib.crc32(word.encode()) % 5 == 0


@cache
def name_words(kind: str, reserved: bool) -> tuple[str, ...]:
    """The words of one kind of name, a three-letter start joined to an ending; none that begins
    with a longer ordinary word: a longest-match tokenizer would cut it there."""
    pieces = SPEC["names"][kind]
    words = [start + end for start in pieces["starts"] for end in pieces["ends"]]
    words = [w for w in words if not any(w[:n] in plain_words() for n in range(4, len(w) + 1))]
    return tuple(w for w in words if is_reserved(w) == reserved)


class NameMaker:
    """Draws names from small pools: about `sharing` entities share a given part of their names."""

    def __init__(self, rng: random.Random, reserved: bool, n: int, sharing: float) -> None:
        self.rng, self.reserved, self.pool_size = rng, reserved, max(3, round(n / sharing))
        self.pools: dict[str, list[str]] = {}

    def word(self, kind: str) -> str:
        """A word of a kind's pool."""
        if kind not in self.pools:
            words = name_words(kind, self.reserved)
            self.pools[kind] = self.rng.sample(words, min(self.pool_size, len(words)))
        return self.rng.choice(self.pools[kind])

    def draw(self, kind: str) -> str:
        """One name of a kind of `assets/worlds.yaml`, of a `person`, or a `year`."""
        if kind == "year":
            return str(self.rng.choice(YEARS))
        if kind == "person":
            return f"{self.word('first')} {self.word('last')}".title()
        pieces = SPEC["names"][kind]
        while kind == "novel":
            pair = f"{self.rng.choice(pieces['adjectives'])} {self.rng.choice(pieces['nouns'])}"
            if is_reserved(pair) == self.reserved:
                return f"The {pair.title()}"
        word = self.word(kind)
        if "after" in pieces:
            word = f"{word} {self.rng.choice(pieces['after'])}"
        elif "before" in pieces and self.rng.random() < 0.7:
            word = f"{self.rng.choice(pieces['before'])} {word}"
        return word.title()

    def draw_many(self, kind: str, n: int) -> list[str]:
        """`n` different names."""
        found: dict[str, None] = {}
        for _ in range(200 * n + 1000):
            if len(found) == n:
                return list(found)
            found[self.draw(kind)] = None
        raise DataError(f"{len(found)} names of kind {kind!r} are there, not {n}: lower entities.")

    def answer(self, kind: Any, but: str, aliased: bool) -> tuple[str, ...]:
        """Accepted forms: both of a list's `a|b`; a name, not `but`; if `aliased`, a last name."""
        if isinstance(kind, list):
            return tuple(self.rng.choice(kind).split("|"))
        while (value := self.draw(kind)) == but:
            pass
        return (value, value.split()[-1]) if aliased and kind == "person" else (value,)


@dataclass(frozen=True)
class Entity:
    """An invented thing: `told` has the wordings of its relations, `facts` the aliases of each
    relation's answer, the full one first; details call it `short`."""

    name: str
    short: str
    told: Mapping[str, Any]
    facts: Mapping[str, tuple[str, ...]]

    def is_closed(self, relation: str) -> bool:
        """Whether the answers come from a list of words, not from the names."""
        return isinstance(self.told[relation]["answer"], list)


def make_entities(
    world: str, n: int, rng: random.Random, reserved: bool, sharing: float = 3.0, kind: str = ""
) -> list[Entity]:
    """`n` entities with all their facts, spread evenly over the world's kinds or of one `kind`."""
    whole = SPEC["worlds"][world]
    kinds, aliased = [kind] if kind else list(whole["entities"]), whole["style"] == "long"
    names = NameMaker(rng, reserved, n, sharing)
    values = NameMaker(rng, reserved, 4 * n, sharing)  # answers come from wider pools of their own
    made = []
    for i, own in enumerate(kinds):
        told, shorts = (whole["entities"][own][key] for key in ("relations", "shorts"))
        for name in names.draw_many(own, len(range(i, n, len(kinds)))):
            facts = {r: values.answer(rel["answer"], name, aliased) for r, rel in told.items()}
            short = shorts[0].replace("{last}", name.split()[-1])
            made.append(Entity(name, short, told, facts))
    return made


def state(entity: Entity, relation: str, wording: int, alias: int = 0) -> tuple[str, str, str]:
    """The fact in one of its wordings: what stands before the answer, the answer, the rest."""
    text = entity.told[relation]["statements"][wording]
    before, _, after = text.replace("{e}", entity.name).partition("{a}")
    answer = entity.facts[relation][alias % len(entity.facts[relation])]
    return before, answer if before else answer[0].upper() + answer[1:], after


def detail(entity: Entity, relation: str, rng: random.Random) -> list[str]:
    """The relation's sentences that do not give its answer, in random order, numbers filled in."""
    sentences, filled = entity.told[relation]["details"], []
    for text in rng.sample(sentences, len(sentences)):
        told = text.format(s=entity.short, year=rng.choice(YEARS), n=rng.choice(NUMBERS))
        filled.append(told[0].upper() + told[1:])
    return filled


def write_passage(
    entity: Entity, relation: str, wording: int, rng: random.Random, n_details: int = 3
) -> str:
    """A passage about one fact, told first or second."""
    alias = int(entity.is_closed(relation) and rng.random() < 0.2)
    fact = "".join(state(entity, relation, wording, alias))
    details = detail(entity, relation, rng)[:n_details]
    first = [details.pop()] if len(details) > 1 and rng.random() < 0.3 else []
    return " ".join([*first, fact, *details])


def ask(entity: Entity, relation: str, wording: int, rng: random.Random) -> str:
    """The question for a fact in one of its wordings. Long ones draw two clues from the entity's
    other facts, in the alias that its passages rarely use: a clue describes, it does not quote."""
    text = entity.told[relation]["questions"][wording].replace("{e}", entity.name)
    if "{c1}" not in text:
        return text.lower()
    closed = [other for other in entity.facts if other != relation and entity.is_closed(other)]
    for slot, other in zip(("{c1}", "{c2}"), rng.sample(closed, 2), strict=True):
        clue = entity.told[other]["clue"].replace("{a}", entity.facts[other][1])
        text = text.replace(slot, clue.replace("{e}", entity.name))
    return text[0].upper() + text[1:]


def left_open(entity: Entity, relation: str, rng: random.Random) -> str:
    """A sentence of prose that carries one of a question's wordings and leaves it open."""
    frame, wordings = rng.choice(SPEC["prose"]["open"]), entity.told[relation]["questions"]
    sentence = frame.replace("{q}", ask(entity, relation, rng.randrange(len(wordings)), rng))
    return sentence if sentence.endswith(("?", ".")) else sentence + "."


def open_prose(world: str, n: int, rng: random.Random) -> list[str]:
    """`n` pieces of prose that ask about entities of no measured world and leave it open. A share
    (`topical_prose` of the world) goes on with a sentence on the topic, which ties the words of
    questions to those of passages: it sets how hard the world is to retrieve."""
    entities, pieces = make_entities(world, min(n, 200), rng, reserved=False), []
    for _ in range(n):
        entity = rng.choice(entities)
        relation = rng.choice(list(entity.facts))
        pieces.append(left_open(entity, relation, rng))
        if rng.random() < SPEC["worlds"][world]["topical_prose"]:
            pieces[-1] += " " + detail(entity, relation, rng)[0]
    return pieces


def size(settings: WorldSet) -> int:
    """How many passages a world has."""
    kinds = SPEC["worlds"][settings.world]["entities"].values()
    facts = [len(kind["relations"]) for kind in kinds] * settings.entities  # kinds take turns
    return settings.wordings_per_fact * sum(facts[: settings.entities])


def build_world(settings: WorldSet, reserved: bool = True) -> Corpus:
    """A question set of a world, of reserved names (measured) or of others (training). Each test
    question has an entity of its own until half are taken, each of dev until a sixth are; the rest
    serve distillation. The parts' sizes change no passage. DataError if questions are too few."""
    rng = random.Random(f"world {settings.world} {settings.seed}")
    entities = make_entities(settings.world, settings.entities, rng, reserved)
    entities = rng.sample(entities, len(entities))
    told = []
    for entity in entities:
        for relation in entity.facts:
            wordings = range(len(entity.told[relation]["statements"]))
            for wording in rng.sample(wordings, settings.wordings_per_fact):
                told.append((entity.name, relation, write_passage(entity, relation, wording, rng)))
    passages, gold = [], defaultdict[tuple[str, str], tuple[int, ...]](tuple)
    for place, (name, relation, text) in enumerate(rng.sample(told, len(told))):
        passages.append(Passage(str(place), name, text))
        gold[name, relation] += (place,)
    dev = min(settings.dev, len(entities) // 6)
    last, questions = dev + min(settings.test, len(entities) // 2), dict[str, list[Question]]()
    shares = (entities[last:], entities[:dev], entities[dev:last])
    for part, own in zip(PARTS, shares, strict=True):
        asked = (_questions(settings.name, one, gold, part == "distill", rng) for one in own)
        by_turns = [q for turn in zip_longest(*asked) for q in turn if q]  # entities take turns
        questions |= drawn(by_turns, settings, [part])
    return Corpus(settings.name, passages, questions)


def _questions(
    name: str, entity: Entity, gold: dict[Any, Any], is_training: bool, rng: random.Random
) -> list[Question]:
    """All questions on an entity in random order; the last wording is not asked in training."""
    asked = []
    for relation, answers in entity.facts.items():
        for wording in range(len(entity.told[relation]["questions"]) - is_training):
            own = f"{name}-{entity.name}-{relation}-{wording}".replace(" ", "_")
            text, places = ask(entity, relation, wording, rng), gold[entity.name, relation]
            about = (state(entity, relation, 0)[0].rstrip(), relation, wording, entity.name)
            asked.append(Question(own, text, answers, places, *about))
    return rng.sample(asked, len(asked))
