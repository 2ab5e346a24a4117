"""What a reader is asked and a retriever taught: the questions for distillation."""

from __future__ import annotations

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
    """The questions for distillation and their candidates: places of passages `[questions, k]`."""

    corpus: Corpus
    questions: list[Question]
    candidates: NDArray[np.int64]

    @classmethod
    def open(cls, inputs: Mapping[str, Path], most: int, k: int) -> Asked:
        """At most so many questions with k candidates each, from the folders of their stages."""
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        found = load_file(inputs["candidates"] / "candidates.safetensors")["distill"]
        questions = corpus.questions["distill"][:most]
        return cls(corpus, questions, found[: len(questions), :k])

    def passages(self) -> list[list[Passage]]:
        """The candidates as passages, best first, for each question."""
        return [[self.corpus.passages[place] for place in row] for row in self.candidates]
