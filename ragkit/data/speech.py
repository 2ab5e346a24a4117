"""Gold parts of speech of the embedded worlds' texts, for the generator's wordings are labelled.

`assets/parts_of_speech.yaml` labels them by hand with the tags of Universal Dependencies (UPOS).
"""

import itertools
import re
from functools import cache
from typing import Any

import yaml

from ragkit.data import worlds
from ragkit.errors import DataError
from ragkit.settings import asset

NOUN_TAGS = ("NOUN", "PROPN")
Tagged = tuple[int, int, str]  # where a word starts and ends, and its part of speech
Lexicon = dict[tuple[str, ...], tuple[str, ...]]  # one to three words, and their tags


@cache
def labels() -> dict[str, Any]:
    """The parsed `assets/parts_of_speech.yaml`."""
    return yaml.safe_load(asset("parts_of_speech.yaml").read_text("utf8"))


def closed_answers() -> dict[str, list[str]]:
    """The words of each closed list of answers, by relation."""
    found = {}
    for world in worlds.spec()["worlds"]:
        for (_, relation), rel in worlds.relations(world).items():
            if worlds.is_closed(rel):
                found[relation] = "|".join(rel["answer"]).split("|")
    return found


def names() -> Lexicon:
    """Every name word and the fixed words beside it, from the generator's pieces."""
    found: Lexicon = {}
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
def lexicon() -> Lexicon:
    """All words of the worlds, lower-case except titles of novels."""
    found, slots = names(), {}
    for relation, words in closed_answers().items():
        slots[f"{{{relation}}}"] = words
        found |= {(word,): (labels()["answers"][relation],) for word in words}
    for tag, words in labels()["words"].items():
        found |= {(word,): (tag,) for word in words}
    for phrase, tags in labels()["phrases"].items():
        choices = [slots.get(word, [word]) for word in phrase.split()]
        found |= dict.fromkeys(itertools.product(*choices), tuple(tags.split()))
    return found


def parts_of_speech(text: str) -> list[Tagged]:
    """Start, end and UPOS of every word and punctuation mark of a text of the embedded worlds.

    The longest entry that fits counts: "Old Albmere" is a name, "old streets" is not. Raises
    DataError for a word that the worlds do not hold.
    """
    found = list(re.finditer(r"[A-Za-z]+|\d+|\S", text))
    words = [match.group() for match in found]
    tags: list[str] = []
    while len(tags) < len(words):
        known = _tags_at(words, len(tags))
        if not known:
            raise DataError(
                f"{words[len(tags)]!r} in {text!r} is no word of the embedded worlds. A new "
                "wording's words belong into assets/parts_of_speech.yaml."
            )
        tags += known
    return [(*match.span(), tag) for match, tag in zip(found, tags, strict=True)]


def _tags_at(words: list[str], place: int) -> tuple[str, ...]:
    """The tags of the longest entry that begins at a place; none if there is none."""
    if words[place].isdigit():
        return ("NUM",)
    for length in (3, 2, 1):
        here = tuple(words[place : place + length])
        lower = tuple(word.lower() for word in here)
        if tags := lexicon().get(here) or lexicon().get(lower):
            return tags
    return ()
