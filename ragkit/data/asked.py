"""What a reader is asked: questions of one part, and the candidates of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question

Pair = tuple[Question, list[Passage]]


@dataclass(frozen=True)
class Asked:
    """Questions and their candidates: places of passages `[questions, k]`."""

    corpus: Corpus
    questions: list[Question]
    candidates: NDArray[np.int64]

    @classmethod
    def open(
        cls, inputs: Mapping[str, Path], part: str, most: int | None = None, k: int | None = None
    ) -> "Asked":
        """At most so many questions of a part, with k candidates each, from their stages: those of
        `candidates`, or of the `ranking`, which may be a stage of candidates or of Step 2."""
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        questions = corpus.questions[part][:most]
        folder = inputs["ranking"] if "ranking" in inputs else inputs["candidates"]
        files = [folder / f"{name}.safetensors" for name in ("ranking", "candidates")]
        found = load_file(files[0] if files[0].is_file() else files[1])[part]
        return cls(corpus, questions, found[: len(questions), :k])

    @property
    def passages(self) -> list[list[Passage]]:
        """The candidates as passages, best first, for each question."""
        return [[self.corpus.passages[place] for place in row] for row in self.candidates]

    @property
    def pairs(self) -> list[Pair]:
        """Each question with its candidates as passages."""
        return list(zip(self.questions, self.passages, strict=True))
