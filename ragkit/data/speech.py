"""Gold parts of speech of the embedded worlds' texts, for the generator's wordings are labelled.

`assets/parts_of_speech.yaml` labels them by hand with the tags of Universal Dependencies (UPOS).
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import yaml

from ragkit.data import worlds
from ragkit.errors import SpeechError
from ragkit.settings import asset

LABELS = asset("parts_of_speech.yaml")
NOUN_TAGS = ("NOUN", "PROPN")
WORD = re.compile(r"[A-Za-z]+|\d+|\S")
Tagged = tuple[int, int, str]  # where a word starts and ends, and its part of speech


@cache
def labels() -> dict[str, Any]:
    """The parsed `assets/parts_of_speech.yaml`."""
    return yaml.safe_load(LABELS.read_text("utf8"))


def closed_answers() -> dict[str, list[str]]:
    """The words of each closed list of answers, by relation."""
    found = {}
    for world in worlds.spec()["worlds"]:
        for (_, relation), rel in worlds.relations(world).items():
            if isinstance(rel["answer"], list):
                found[relation] = "|".join(rel["answer"]).split("|")
    return found


def names() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The tags of every name word and of the fixed words beside it, from the generator's pieces."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for kind, pieces in worlds.spec()["names"].items():
        if kind == "novel":  # ordinary words: only capitals tell a title from a crooked bridge
            for pair in itertools.product(pieces["adjectives"], pieces["nouns"]):
                found["The", *(word.title() for word in pair)] = ("DET", "PROPN", "PROPN")
            continue
        for word in (*worlds.name_words(kind, True), *worlds.name_words(kind, False)):
            found[word,] = ("PROPN",)
            found |= {(before, word): ("PROPN", "PROPN") for before in pieces.get("before", [])}
            found |= {(word, after): ("PROPN", "PROPN") for after in pieces.get("after", [])}
    return found


@cache
def lexicon() -> dict[tuple[str, ...], tuple[str, ...]]:
    """One to three words, lower-case except titles of novels, and their tags."""
    answers = closed_answers()
    found = names()
    for relation, words in answers.items():
        found |= {(word,): (labels()["answers"][relation],) for word in words}
    for tag, words in labels()["words"].items():
        found |= {(word,): (tag,) for word in words}
    for phrase, tags in labels()["phrases"].items():
        slots = {f"{{{relation}}}": words for relation, words in answers.items()}
        choices = [slots.get(word, [word]) for word in phrase.split()]
        found |= dict.fromkeys(itertools.product(*choices), tuple(tags.split()))
    return found


def parts_of_speech(text: str) -> list[Tagged]:
    """Start, end and UPOS of every word and punctuation mark of a text of the embedded worlds.

    The longest entry that fits counts: "Old Albmere" is a name, "old streets" is not. Raises
    SpeechError for a word that the worlds do not hold.
    """
    found = list(WORD.finditer(text))
    words = [match.group() for match in found]
    tags: list[str] = []
    while len(tags) < len(words):
        tags += tags_at(words, len(tags), text)
    return [(*match.span(), tag) for match, tag in zip(found, tags, strict=True)]


def tags_at(words: list[str], place: int, text: str) -> tuple[str, ...]:
    """The tags of the longest entry that begins at a place."""
    if words[place].isdigit():
        return ("NUM",)
    for length in (3, 2, 1):
        here = tuple(words[place : place + length])
        tags = lexicon().get(here) or lexicon().get(tuple(word.lower() for word in here))
        if tags:
            return tags
    raise SpeechError(
        f"{words[place]!r} in {text!r} is no word of the embedded worlds. A new wording's words "
        "belong into assets/parts_of_speech.yaml."
    )


def gold_nouns(text: str) -> list[tuple[int, int]]:
    """Where the nouns of a text of the embedded worlds stand, proper nouns included."""
    return [(start, end) for start, end, tag in parts_of_speech(text) if tag in NOUN_TAGS]
