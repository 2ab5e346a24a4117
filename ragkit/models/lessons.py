"""What Step 1 learns from: questions with passages, never those of the measured parts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ragkit.data.passages import Passage, passage_text
from ragkit.data.questions import Corpus, Question
from ragkit.data.worlds import build_world
from ragkit.models.index import Index
from ragkit.models.retriever import Retriever
from ragkit.settings import WorldSet

TRAINING_WORLDS, TRAINING_ENTITIES, TRAINING_QUESTIONS = 8, 48, 576
SAME_KIND_SHARE = 0.3  # of the draws: all passages state one kind of fact of different entities


@dataclass(frozen=True)
class Lesson:
    """A question, the passages found for it, its gold ones, and others of the same kind of fact."""

    question: Question
    found: list[Passage]
    gold: list[Passage]
    same_kind: list[Passage]


class Lessons:
    """Questions with k passages each."""

    def __init__(self, lessons: Sequence[Lesson], k: int, gold_share: float) -> None:
        self.lessons, self.k, self.gold_share = lessons, k, gold_share

    def draw(self, rng: random.Random) -> tuple[Question, list[Passage]]:
        """A question and k passages in random order; a gold one is put among them in `gold_share`
        of the draws.
        """
        lesson = rng.choice(self.lessons)
        gold, same_kind, k = lesson.gold, lesson.same_kind, self.k
        if gold and len(same_kind) >= k - 1 and rng.random() < SAME_KIND_SHARE:
            passages = [rng.choice(gold), *rng.sample(same_kind, k - 1)]
        else:
            passages = list(lesson.found)
            missed = gold and not any(p in gold for p in passages)
            if missed and rng.random() < self.gold_share:
                passages[rng.randrange(len(passages))] = rng.choice(gold)
        return lesson.question, rng.sample(passages, len(passages))


def corpus_lessons(corpus: Corpus, candidates: Sequence[Sequence[int]], k: int) -> list[Lesson]:
    """The questions for distillation with the first k of their candidates."""
    by_kind: dict[str, set[int]] = {}
    for q in corpus.questions["distill"]:
        if q.relation:
            by_kind.setdefault(q.relation, set()).add(q.gold[0])

    def read(places: Sequence[int]) -> list[Passage]:
        return [corpus.passages[i] for i in places]

    lessons = []
    for q, row in zip(corpus.questions["distill"], candidates, strict=True):
        others = [i for i in sorted(by_kind.get(q.relation, ())) if i not in q.gold]
        gold = corpus.gold(q, list(row))
        lessons.append(Lesson(q, read(row[:k]), read(gold), read(others)))
    return lessons


def world_lessons(settings: WorldSet, retriever: Retriever, k: int, seed: int) -> list[Lesson]:
    """Lessons of freshly drawn training worlds, searched by the initial retriever."""
    lessons: list[Lesson] = []
    for number in range(TRAINING_WORLDS):
        corpus = training_world(settings, 1000 * seed + number)
        queries = retriever.encode([q.text for q in corpus.questions["distill"]])
        encoded = retriever.encode([passage_text(p) for p in corpus.passages], "passage")
        lessons += corpus_lessons(corpus, Index(encoded).search(queries, k).tolist(), k)
    return lessons


def training_world(settings: WorldSet, seed: int) -> Corpus:
    """A small redrawn world for Step 1: other names than the frozen one, no held-out wording."""
    sizes = {"entities": TRAINING_ENTITIES, "distill": TRAINING_QUESTIONS, "dev": 1, "test": 1}
    fresh = settings.model_copy(update={"seed": seed, **sizes})
    return build_world(fresh, reserved=False)
