"""The embedded worlds: encyclopedia-like passages and questions about invented entities, by a seed.

`assets/worlds.yaml` holds the wordings and the pieces of names. Name words are split in two by a
hash: reserved words appear only in the worlds that the notebooks measure on, all others only in
training text, so that no reader has seen a name of the measured worlds.
"""

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

RESERVED_SHARE = 5  # one name word in five is kept for the measured worlds
YEARS = range(1710, 1960)
NUMBERS = range(2, 60)
Gold = dict[tuple[str, str], tuple[int, ...]]  # by entity's name and relation: places of passages


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
                texts += [*rel["statements"], *rel["details"], *rel["questions"]]
                texts += [rel.get("clue", ""), *(rel["answer"] if is_closed(rel) else [])]
    for pieces in spec()["names"].values():
        for fixed in ("after", "before", "adjectives", "nouns"):
            texts += pieces.get(fixed, [])
    cleaned = re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()
    return frozenset(re.findall(r"[a-z]+", cleaned)) | {"the", "question", "answer"}


def is_closed(relation: dict[str, Any]) -> bool:
    """Whether a relation's answers come from a list of words, not from the names."""
    return isinstance(relation["answer"], list)


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
        pieces = spec()["names"][kind]
        if kind == "novel":
            while True:
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


def make_entities(
    world: str, n: int, rng: random.Random, reserved: bool, sharing: float = 3.0, kind: str = ""
) -> list[Entity]:
    """`n` entities with all their facts, spread evenly over the world's kinds or of one `kind`."""
    kinds = [kind] if kind else list(spec()["worlds"][world]["entities"])
    names = NameMaker(rng, reserved, n, sharing)
    values = NameMaker(rng, reserved, 4 * n, sharing)  # answers come from wider pools of their own
    made = []
    for i, entity_kind in enumerate(kinds):
        rels = spec()["worlds"][world]["entities"][entity_kind]["relations"]
        for name in names.draw_many(entity_kind, len(range(i, n, len(kinds)))):
            facts = {relation: _answers(world, rels[relation], name, values) for relation in rels}
            made.append(Entity(world, entity_kind, name, facts))
    return made


def _answers(world: str, relation: dict[str, Any], name: str, values: NameMaker) -> tuple[str, ...]:
    """An answer's accepted forms: both of `a|b`; of a person in trivia also the last name."""
    kind = relation["answer"]
    if is_closed(relation):
        return tuple(values.rng.choice(kind).split("|"))
    while (value := values.draw(kind)) == name:
        pass
    long = kind == "person" and spec()["worlds"][world]["style"] == "long"
    return (value, value.split()[-1]) if long else (value,)


def state(entity: Entity, relation: str, wording: int, alias: int = 0) -> tuple[str, str, str]:
    """The fact in one of its wordings: what stands before the answer, the answer, the rest."""
    template = relations(entity.world)[entity.kind, relation]["statements"][wording]
    before, _, after = template.replace("{e}", entity.name).partition("{a}")
    answer = entity.facts[relation][alias % len(entity.facts[relation])]
    return before, answer if before else answer[0].upper() + answer[1:], after


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
) -> str:
    """A passage about one fact, told first or second."""
    closed = is_closed(relations(entity.world)[entity.kind, relation])
    fact = "".join(state(entity, relation, wording, alias=int(closed and rng.random() < 0.2)))
    details = detail(entity, relation, rng)[:n_details]
    first = [details.pop()] if len(details) > 1 and rng.random() < 0.3 else []
    return " ".join([*first, fact, *details])


def ask(entity: Entity, relation: str, wording: int, rng: random.Random) -> str:
    """The question for a fact in one of its wordings.

    Long questions draw two clues from the entity's other facts, in the alias that its passages
    rarely use: a clue describes, it does not quote.
    """
    rels = relations(entity.world)
    text = rels[entity.kind, relation]["questions"][wording].replace("{e}", entity.name)
    if "{c1}" not in text:
        return text.lower()
    closed = [r for r in entity.facts if r != relation and is_closed(rels[entity.kind, r])]
    for slot, other in zip(("{c1}", "{c2}"), rng.sample(closed, 2), strict=True):
        clue = rels[entity.kind, other]["clue"].replace("{a}", entity.facts[other][1])
        text = text.replace(slot, clue.replace("{e}", entity.name))
    return text[0].upper() + text[1:]


def cloze(entity: Entity, relation: str) -> str:
    """The beginning of a statement up to the answer: what a plain language model can complete."""
    return state(entity, relation, 0)[0].rstrip()


def build_world(settings: WorldSet, reserved: bool = True) -> Corpus:
    """A question set of a world, of reserved names (the measured sets) or of the others (training).

    Two thirds of the entities serve distillation, a sixth each dev and test. The sizes of the parts
    change no passage. Raises DataError if there are too few questions.
    """
    rng = random.Random(f"world {settings.world} {settings.seed}")
    made = make_entities(settings.world, settings.entities, rng, reserved)
    entities = rng.sample(made, len(made))
    passages, gold = _passages(entities, settings.wordings_per_fact, rng)
    sixth = len(entities) // 6
    about = {"distill": entities[2 * sixth :], "dev": entities[:sixth]}
    about["test"] = entities[sixth : 2 * sixth]
    questions: dict[str, list[Question]] = {}
    for part in PARTS:
        asked = _questions(settings.name, about[part], gold, part == "distill", rng)
        wanted = getattr(settings, part)
        if wanted > len(asked):
            raise DataError(
                f"set {settings.name}, part {part}: {wanted} questions asked for, {len(asked)} "
                "there. Lower distill, dev or test, or raise entities."
            )
        questions[part] = rng.sample(asked, len(asked))[:wanted]
    return Corpus(settings.name, passages, questions)


def _passages(
    entities: list[Entity], wordings: int, rng: random.Random
) -> tuple[list[Passage], Gold]:
    """Passages in random order, `wordings` to a fact, and the places that state each fact."""
    told = []
    for entity in entities:
        for relation in entity.facts:
            texts = relations(entity.world)[entity.kind, relation]["statements"]
            for wording in rng.sample(range(len(texts)), wordings):
                text = write_passage(entity, relation, wording, rng)
                told.append((entity.name, relation, text))
    passages, gold = [], Gold()
    for place, (name, relation, text) in enumerate(rng.sample(told, len(told))):
        passages.append(Passage(str(place), name, text))
        gold[name, relation] = (*gold.get((name, relation), ()), place)
    return passages, gold


def _questions(
    name: str, entities: list[Entity], gold: Gold, is_training: bool, rng: random.Random
) -> list[Question]:
    """All questions on these entities; the last wording of each is not asked in training."""
    asked = []
    for entity in entities:
        for relation, answers in entity.facts.items():
            places = gold[entity.name, relation]
            texts = relations(entity.world)[entity.kind, relation]["questions"]
            for wording in range(len(texts) - is_training):
                own = f"{name}-{entity.name}-{relation}-{wording}".replace(" ", "_")
                text = ask(entity, relation, wording, rng)
                kind = (cloze(entity, relation), relation, wording, entity.name)
                asked.append(Question(own, text, answers, places, *kind))
    return asked
