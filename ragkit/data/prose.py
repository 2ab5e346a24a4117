"""Prose of the embedded worlds: what their readers and retrievers learn from first."""

from __future__ import annotations

import random
from typing import Literal

from ragkit.data import worlds
from ragkit.data.passages import block
from ragkit.data.worlds import Entity

# Text told for the first time, text around, and a fact's answer told again.
Span = tuple[str, Literal["given", "frame", "answer"]]


def told_again(entity: Entity, relation: str, wording: int) -> list[Span]:
    """A statement of a fact that the page has already told, its answer marked."""
    before, answer, after = worlds.state(entity, relation, wording)
    return [(" " + before, "frame"), (answer, "answer"), (after, "frame")]


def register_page(rng: random.Random, n: int, sharing: float, wordings: int) -> list[Span]:
    """A page for pretraining: a register `name: answer.` of one kind of fact, then its entries.

    Each comes again three times as an entry, or once and in `wordings` sentences, in any order. The
    shortest text in which a reader must look up *whose* fact is meant.
    """
    world = rng.choice(list(worlds.spec()["worlds"]))
    kind, relation = rng.choice(list(worlds.relations(world)))
    entities = worlds.make_entities(world, n, rng, reserved=False, sharing=sharing, kind=kind)
    spans: list[Span] = [(rng.choice(worlds.spec()["prose"]["register"]), "given")]
    spans += [(f" {e.name}: {e.facts[relation][0]}.", "given") for e in entities]
    spans.append(("\n" + rng.choice(worlds.spec()["prose"]["digest"]), "frame"))
    again: list[list[Span]] = []
    for entity in entities:
        answer = entity.facts[relation][0]
        entry: list[Span] = [(f" {entity.name}: ", "frame"), (answer, "answer"), (".", "frame")]
        again += [entry] * (1 if wordings else 3)
        again += [told_again(entity, relation, w) for w in rng.sample(range(5), wordings)]
    return spans + [span for sentence in rng.sample(again, len(again)) for span in sentence]


def passages_page(
    rng: random.Random, n: int, n_details: int, sharing: float, restated: int, n_open: int
) -> list[Span]:
    """A page for pretraining: `n` passages, then `restated` of their facts again in other words.

    `n_open` sentences hold a question's wording and leave it open, so that a reader has met its
    words; no question stands with its answer.
    """
    world = rng.choice(list(worlds.spec()["worlds"]))
    draw = rng.choice((*["same_relation"] * 3, "same_entity", "mixed"))
    kind, relation = rng.choice(list(worlds.relations(world)))
    only = kind if draw != "mixed" else ""
    entities = worlds.make_entities(world, n, rng, reserved=False, sharing=sharing, kind=only)
    facts = []
    for entity in entities:
        owner = entities[0] if draw == "same_entity" and rng.random() < 0.6 else entity
        told = relation if draw == "same_relation" else rng.choice(list(owner.facts))
        facts.append((owner, told))
    paragraphs = []
    unused: dict[tuple[str, str], list[tuple[Entity, str, int]]] = {}
    for entity, rel in facts:
        wording = rng.randrange(5)
        text = worlds.write_passage(entity, rel, wording, rng, n_details)
        paragraphs.append(block(entity.name, text))
        others = [(entity, rel, other) for other in range(5) if other != wording]
        unused.setdefault((entity.name, rel), others)
    other = [one for wordings in unused.values() for one in wordings]
    sentences = [told_again(*one) for one in rng.sample(other, min(restated, len(other)))]
    for _ in range(n_open):
        sentence = " " + left_open(*rng.choice(facts), rng)
        sentences.insert(rng.randint(0, len(sentences)), [(sentence, "frame")])
    opening: list[Span] = [("\n".join(paragraphs), "given")]
    opening.append(("\n" + rng.choice(worlds.spec()["prose"]["digest"]), "frame"))
    return opening + [span for sentence in sentences for span in sentence]


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
