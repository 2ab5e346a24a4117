"""Reads QED (Lamm et al. 2020): NQ questions, each with a Wikipedia passage in which people linked
the question's noun phrases.

One JSON object a line. `question_text` (lower case) and `paragraph_text` (cut into tokens by
spaces: "the world 's"); all `start` and `end` are characters in them.
`annotation.explanation_type` is `single_sentence`, `multi_sentence` or `none`; only the first
kind, three quarters of the lines, has the rest: `referential_equalities`, a list of pairs of a
`question_reference` and the `sentence_reference` that means the same (its places are in the whole
paragraph), and `answer`, a list whose `paragraph_reference` is the answer. `bridge` is false
where the two phrases name the same thing, else the preposition that would join them ("in": the
passage speaks of the season, the question of an episode in it); such a reference may have no
words in the passage at all: start and end are then -1. `original_nq_answers` is a list of
answers, each a list of spans, one from each annotator.

Only lines 0, 2, 4, ... (counted from 0) are read: the odd ones are kept for another use.
"""

import json
from dataclasses import dataclass
from pathlib import Path

Span = tuple[int, int]


@dataclass(frozen=True)
class Explained:
    """`links` pairs a span of the question with that of the passage that means the same.

    `implied` holds the spans of the question whose counterpart has no words in the passage.
    """

    question: str
    passage: str
    links: list[tuple[Span, Span]]
    implied: list[Span]
    answers: list[Span]


def place(reference: dict) -> Span:
    return reference["start"], reference["end"]


def read_qed(path: Path) -> list[Explained]:
    """The examples of the even lines that have links or answers (`single_sentence`)."""
    found = []
    for line in path.read_text("utf8").splitlines()[::2]:
        row = json.loads(line)
        note = row["annotation"]
        if note["explanation_type"] != "single_sentence":
            continue
        pairs = [
            (place(pair["question_reference"]), place(pair["sentence_reference"]))
            for pair in note["referential_equalities"]
        ]
        links = [(asked, said) for asked, said in pairs if said[0] >= 0]
        implied = [asked for asked, said in pairs if said[0] < 0]
        answers = [place(answer["paragraph_reference"]) for answer in note["answer"]]
        texts = row["question_text"], row["paragraph_text"]
        found.append(Explained(*texts, links, implied, answers))
    return found
