"""Gold parts of speech of the embedded worlds' texts, for the generator's wordings are labelled.
`assets/parts_of_speech.yaml` labels them by hand with the tags of Universal Dependencies (UPOS)."""

import itertools
import re
from functools import cache
from typing import Any

import yaml

from ragkit.data.worlds import SPEC, name_words, relations
from ragkit.errors import DataError
from ragkit.settings import asset

LABELS: dict[str, Any] = yaml.safe_load(asset("parts_of_speech.yaml").read_text("utf8"))
NOUN_TAGS = ("NOUN", "PROPN")
Tagged = tuple[int, int, str]  # where a word starts and ends, and its part of speech


def closed_answers() -> dict[str, list[str]]:
    """The words of each closed list of answers, by relation."""
    told = {name: rel for world in SPEC["worlds"] for (_, name), rel in relations(world).items()}
    lists = {name: rel["answer"] for name, rel in told.items() if isinstance(rel["answer"], list)}
    return {name: "|".join(words).split("|") for name, words in lists.items()}


@cache
def lexicon() -> dict[tuple[str, ...], tuple[str, ...]]:
    """All runs of one to three words of the worlds with their tags, lower-case but for novels."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for kind, pieces in SPEC["names"].items():
        if kind == "novel":  # ordinary words: only capitals tell a title from a crooked bridge
            for pair in itertools.product(pieces["adjectives"], pieces["nouns"]):
                found["The", *(word.title() for word in pair)] = ("DET", "PROPN", "PROPN")
            continue
        for word in (*name_words(kind, True), *name_words(kind, False)):
            found[word,] = ("PROPN",)
            found |= {(before, word): ("PROPN", "PROPN") for before in pieces.get("before", [])}
            found |= {(word, after): ("PROPN", "PROPN") for after in pieces.get("after", [])}
    for relation, words in closed_answers().items():
        found |= {(word,): (LABELS["answers"][relation],) for word in words}
    for tag, words in LABELS["words"].items():
        found |= {(word,): (tag,) for word in words}
    slots = {f"{{{relation}}}": words for relation, words in closed_answers().items()}
    for phrase, tags in LABELS["phrases"].items():
        choices = [slots.get(word, [word]) for word in phrase.split()]
        found |= dict.fromkeys(itertools.product(*choices), tuple(tags.split()))
    return found


def parts_of_speech(text: str) -> list[Tagged]:
    """Start, end and UPOS of each word and punctuation mark of a text of the worlds; DataError for
    a word that is not theirs. The longest entry counts: "Old Albmere" is a name, "old" is not."""
    found = list(re.finditer(r"[A-Za-z]+|\d+|\S", text))
    words, tags = [match.group() for match in found], list[str]()
    while (place := len(tags)) < len(words):
        runs = [tuple(words[place : place + length]) for length in (3, 2, 1)]
        known = (lexicon().get(run) or lexicon().get(tuple(map(str.lower, run))) for run in runs)
        number = ("NUM",) if words[place].isdigit() else ()
        if not (fitting := next(filter(None, known), number)):
            told = f"{words[place]!r} in {text!r} is no word of the embedded worlds. Those of a new"
            raise DataError(f"{told} wording belong into assets/parts_of_speech.yaml.")
        tags += fitting
    return [(*match.span(), tag) for match, tag in zip(found, tags, strict=True)]


def noun_places(text: str) -> list[tuple[int, int]]:
    """Start and end, in characters, of the nouns of a text of the embedded worlds, proper nouns
    included. Raises DataError for a word that the worlds do not hold."""
    return [(start, end) for start, end, tag in parts_of_speech(text) if tag in NOUN_TAGS]
