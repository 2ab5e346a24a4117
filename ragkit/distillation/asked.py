"""What a reader is asked: questions of one part, and the candidates of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question


@dataclass(frozen=True)
class Asked:
    """Questions and their candidates: places of passages `[questions, k]`."""

    corpus: Corpus
    questions: list[Question]
    candidates: NDArray[np.int64]

    @classmethod
    def open(cls, inputs: Mapping[str, Path], part: str, most: int, k: int) -> "Asked":
        """At most so many questions of a part, with k candidates each, from their stages."""
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        questions = corpus.questions[part][:most]
        found = load_file(inputs["candidates"] / "candidates.safetensors")[part]
        return cls(corpus, questions, found[: len(questions), :k])

    @property
    def passages(self) -> list[list[Passage]]:
        """The candidates as passages, best first, for each question."""
        return [[self.corpus.passages[place] for place in row] for row in self.candidates]
