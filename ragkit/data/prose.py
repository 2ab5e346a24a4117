"""Prose of the embedded worlds that asks and leaves open: what retrievers learn words from."""

import random

from ragkit.data import worlds
from ragkit.data.worlds import Entity


def left_open(entity: Entity, relation: str, rng: random.Random) -> str:
    """A sentence of prose that carries one of a question's wordings and leaves it open."""
    frame = rng.choice(worlds.spec()["prose"]["open"])
    wording = rng.randrange(len(worlds.relations(entity.world)[entity.kind, relation]["questions"]))
    sentence = frame.replace("{q}", worlds.ask(entity, relation, wording, rng))
    return sentence if sentence.endswith(("?", ".")) else sentence + "."


def open_prose(world: str, n: int, rng: random.Random) -> list[str]:
    """`n` pieces of prose that ask about entities of no measured world and leave it open.

    A share of them (`topical_prose` of the world) goes on with a sentence on the topic: so text
    ties the words of questions to those of passages. It sets how hard the world is to retrieve.
    """
    entities = worlds.make_entities(world, min(n, 200), rng, reserved=False)
    pieces = []
    for _ in range(n):
        entity = rng.choice(entities)
        relation = rng.choice(list(entity.facts))
        piece = left_open(entity, relation, rng)
        if rng.random() < worlds.spec()["worlds"][world]["topical_prose"]:
            piece += " " + worlds.detail(entity, relation, rng)[0]
        pieces.append(piece)
    return pieces
