"""What each stage does: every box of the data flow as a function that writes its result to a folder."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.data import questions as corpora
from ragkit.distillation import targets as distill
from ragkit.models import device as fleet
from ragkit.models import index
from ragkit.indicators import metrics
from ragkit.indicators import nouns
from ragkit.distillation import teacher
from ragkit.models import vectors
from ragkit.data import worlds as world
from ragkit.data.questions import PARTS, PASSAGES, Corpus, Question
from ragkit.models.index import Index
from ragkit.data.passages import Passage
from ragkit.profile import DistillSettings, IndexSettings, QuestionSet, RetrieverSettings, WorldSet
from ragkit.models.reader import Reader, fine_tune, note_trimmed
from ragkit.models.retriever import Retriever, passage_text, train_by_cropping
from ragkit.data.speech import parts_of_speech
from ragkit.experiment.store import input_hash, linked, write_arrays, write_json
from ragkit.models.vectors import Vectors

log = logging.getLogger(__name__)
DEPTH = 20  # passages kept of every ranking
RECALL_QUESTIONS = 200  # of dev, searched exactly too, to see what an approximate index misses
TRAINING_WORLDS, TRAINING_ENTITIES, TRAINING_QUESTIONS = 8, 48, 576
TAGGED_ENTITIES, TAGGED_PASSAGES = 240, 120
SAME_KIND_SHARE = 0.3  # of Step 1's prompts: all passages state the same kind of fact about different entities


def make_corpus(settings: QuestionSet, folder: Path, same: Path | None = None) -> None:
    """The questions with their passages; these are taken from the folder `same` where another set has them already."""
    if fleet.is_main():
        if same:
            (folder / PASSAGES).unlink(missing_ok=True)
            linked(same / PASSAGES, folder / PASSAGES)
        corpora.build(settings, folder, bool(same))


def make_retriever(corpus: Corpus, world_name: str | None, settings: RetrieverSettings, seed: int, folder: Path) -> None:
    """The initial retriever.

    The embedded one is trained on the passages and, in a world, on as much prose that holds the words of questions:
    a word it never met would be noise in every vector, which a retriever pretrained on the web does not suffer from.
    """
    if settings.model == "embedded":
        passages = list(corpus.passages)
        if world_name:
            prose = world.open_prose(world_name, len(passages), random.Random(f"prose {seed}"))
            passages += [Passage("", "", sentence) for sentence in prose]
        retriever = train_by_cropping(passages, settings, seed)
    else:
        retriever = Retriever.load(settings.model, settings)
    retriever.save(folder / "model")


def make_vectors(corpus: Corpus, retriever: Retriever, settings: IndexSettings, folder: Path) -> None:
    """The passages' vectors, shard by shard; a killed stage goes on with the first shard that is missing."""
    done = fleet.agreed(vectors.shards(folder) if fleet.is_main() else None)
    for number, start in enumerate(range(0, len(corpus.passages), settings.shard)):
        if number in done:
            continue
        texts = [passage_text(p) for p in corpus.passages[start : start + settings.shard]]
        made = retriever.encode(texts).astype(settings.dtype)
        if fleet.is_main():
            fleet.done["passages"] += len(texts)
            vectors.write_shard(folder, number, made)
            log.info("vectors: %d of %d passages", start + len(texts), len(corpus.passages))
    fleet.wait()


def make_index(passages: Vectors, settings: IndexSettings, seed: int, folder: Path) -> None:
    if fleet.is_main():
        index.build(passages, settings, folder, seed)


def make_candidates(corpus: Corpus, retriever: Retriever, passages: Index, folder: Path) -> None:
    """The first passages for every question by the initial retriever; for an approximate index also how many of the true ones it finds."""
    encoded = {part: retriever.encode([q.text for q in corpus.questions[part]]) for part in PARTS}
    if fleet.is_main():
        depth = min(DEPTH, len(corpus.passages))
        write_arrays(folder / "candidates.safetensors", {part: passages.search(queries, depth)[0] for part, queries in encoded.items()})
        fleet.done["questions"] += sum(map(len, encoded.values()))
        sample = encoded["dev"][:RECALL_QUESTIONS]
        cuts = [] if passages.settings.kind == "exact" else [k for k in (5, depth) if k <= depth]
        write_json(folder / "recall.json", {f"recall@{k}": index.recall(passages, sample, k) for k in cuts})


class Lessons:
    """What Step 1 learns from: questions with retrieved passages, never those of the measured parts.

    In an embedded world: freshly drawn training worlds, searched by the initial retriever. On real text: the
    questions for distillation with their candidates.
    """

    def __init__(
        self, settings: QuestionSet, corpus: Corpus, retriever: Retriever, candidates: NDArray[np.int64], k: int, gold_share: float, seed: int
    ) -> None:
        self.k, self.gold_share = k, gold_share
        self.items: list[tuple[Question, list[Passage], list[Passage], list[Passage]]] = []  # question, found, gold, same kind
        if not isinstance(settings, WorldSet):
            for question, row in zip(corpus.questions["distill"], candidates, strict=True):
                self.add(question, corpus, row.tolist(), [])
            return
        for number in range(TRAINING_WORLDS):
            drawn = training_world(settings, 1000 * seed + number)
            questions = drawn.questions["distill"]
            queries = retriever.encode([q.text for q in questions])
            encoded = retriever.encode([passage_text(p) for p in drawn.passages])
            found = index.search(queries, encoded, k)[0]
            same_kind: dict[str, list[int]] = {}
            for q in questions:
                same_kind.setdefault(q.relation, []).append(q.gold[0])
            for q, row in zip(questions, found, strict=True):
                self.add(q, drawn, row.tolist(), sorted(set(same_kind[q.relation])))

    def add(self, question: Question, corpus: Corpus, found: list[int], same_kind: list[int]) -> None:
        def read(places: Any) -> list[Passage]:
            return [corpus.passages[i] for i in places]

        others = [i for i in same_kind if i not in question.gold]
        self.items.append((question, read(found[: self.k]), read(corpus.gold(question, found)), read(others)))

    def draw(self, rng: random.Random) -> tuple[Question, list[Passage]]:
        """A question and k passages in random order; a gold one is put among them in `gold_share` of the draws."""
        question, found, gold, same_kind = rng.choice(self.items)
        k = self.k
        if gold and len(same_kind) >= k - 1 and rng.random() < SAME_KIND_SHARE:
            passages = [rng.choice(gold), *rng.sample(same_kind, k - 1)]
        else:
            passages = list(found)
            if gold and not any(p in gold for p in passages) and rng.random() < self.gold_share:
                passages[rng.randrange(len(passages))] = rng.choice(gold)
        return question, rng.sample(passages, len(passages))


def training_world(settings: WorldSet, seed: int) -> Corpus:
    """A small redrawn world for Step 1: other names than the frozen one, no held-out wording."""
    fresh = settings.model_copy(update={"seed": seed, "entities": TRAINING_ENTITIES, "distill": TRAINING_QUESTIONS, "dev": 1, "test": 1})
    return corpora.build_world(fresh, reserved=False)


def make_fine_tuned(reader: Reader, lessons: Lessons, seed: int, folder: Path, report: Callable[[list[float], float], None]) -> None:
    write_json(folder / "losses.json", fine_tune(reader, lessons.draw, folder, seed, report))


Known = tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]  # candidates `[questions, k]` and a reader's scores of them


def make_teacher(reader: Reader, corpus: Corpus, candidates: NDArray[np.int64], n: int, k: int, folder: Path, known: Known | None = None) -> None:
    """One look of a reader at every question's candidates; those that it saw before, in the same order, are taken from `known`."""
    questions = corpus.questions["distill"][:n]
    found = candidates[: len(questions), :k]
    new = np.ones(len(questions), dtype=bool) if known is None else (found != known[0]).any(1)
    scores = {} if known is None else known[1]
    if new.any():
        places = np.flatnonzero(new)
        seen = teacher.look(reader, [questions[i] for i in places], [[corpus.passages[i] for i in found[place]] for place in places])
        scores = seen if known is None else teacher.replaced(known[1], seen, places)
    teacher.save(scores, folder)
    note_trimmed(int((scores["trimmed"] > 0).sum()), len(questions), folder)


def make_left_out(reader: Reader, corpus: Corpus, candidates: NDArray[np.int64], n: int, k: int, folder: Path) -> None:
    questions = corpus.questions["distill"][:n]
    scores = teacher.left_out_losses(reader, questions, [[corpus.passages[i] for i in row[:k]] for row in candidates[: len(questions)]])
    write_arrays(folder / "scores.safetensors", {"loop": scores})


def make_distilled(
    corpus: Corpus,
    retriever: Retriever,
    passages: Index,
    candidates: NDArray[np.int64],
    loss: distill.Loss,
    settings: DistillSettings,
    k: int,
    seed: int,
    folder: Path,
    report: distill.Report,
) -> None:
    """Step 2 for one target and seed: the test rankings, and the curve along the epochs measured on dev.

    `candidates` are those of the questions for distillation `[questions, at least k]`; `passages` searches the initial
    retriever's vectors, which stay valid as long as only the query side is trained.
    """
    questions = corpus.questions["distill"][: settings.questions]
    places, depth = candidates[: len(questions), :k], min(DEPTH, len(corpus.passages))

    def vectors_of(now: Retriever, chosen: Tensor) -> Tensor:
        if settings.side == "query":
            return torch.from_numpy(passages.vectors.take(places[chosen.numpy()])).to(fleet.device())
        unique, back = np.unique(places[chosen.numpy()], return_inverse=True)
        return now([passage_text(corpus.passages[i]) for i in unique])[torch.from_numpy(back.reshape(len(chosen), k)).to(fleet.device())]

    def find(now: Retriever, part: str, depth: int) -> NDArray[np.int64]:
        queries = now.encode([q.text for q in corpus.questions[part]])
        if settings.side == "query":
            return fleet.agreed(passages.search(queries, depth)[0] if fleet.is_main() else None)
        return index.search(queries, now.encode([passage_text(p) for p in corpus.passages]), depth)[0]

    def watch(now: Retriever) -> dict[str, float]:
        found = find(now, "dev", k)
        return {"hr": float(metrics.hits(found.tolist(), corpus.golds(corpus.questions["dev"], found), k).mean())}

    torch.manual_seed(seed)
    curve = distill.train(retriever, [q.text for q in questions], vectors_of, loss, settings, seed, folder, watch, report)
    write_arrays(folder / "ranking.safetensors", {"test": find(retriever, "test", depth)})
    write_json(folder / "curve.json", curve)


def make_refreshed(
    corpus: Corpus,
    retriever: Retriever,
    passages: Index,
    candidates: NDArray[np.int64],
    loss: distill.Loss,
    settings: DistillSettings,
    k: int,
    seed: int,
    folder: Path,
    report: distill.Report,
) -> None:
    """A part of Step 2, then what `make_retriever` writes, for the retriever as it is now."""
    make_distilled(corpus, retriever, passages, candidates, loss, settings, k, seed, folder, report)
    retriever.save(folder / "model")


def make_answers(reader: Reader, questions: list[Question], found: list[list[Passage]], folder: Path) -> None:
    prompts = [reader.prompt(q, passages) for q, passages in zip(questions, found, strict=True)]
    note_trimmed(sum(p.trimmed > 0 for p in prompts), len(prompts), folder)
    write_json(folder / "answers.json", reader.answer(prompts))


def tagged_text(world_name: str, seed: int) -> list[nouns.Labelled]:
    """Labelled questions and passages about entities of no measured world, for the embedded noun finder.

    Every wording of a question is among them, the held-out one too: a tagger knows its language, only names are new to it.
    """
    rng = random.Random(f"tagged {world_name} {seed}")
    texts, passages = [], []
    for entity in world.make_entities(world_name, TAGGED_ENTITIES, rng, reserved=False, sharing=1.0):
        for relation in entity.facts:
            rel = world.relations(world_name)[entity.kind, relation]
            texts.append(world.ask(entity, relation, rng.randrange(len(rel["questions"])), rng))
            passages.append(world.write_passage(entity, relation, rng.randrange(len(rel["statements"])), rng)[0])
    return [nouns.labelled(text, parts_of_speech(text)) for text in texts + rng.sample(passages, TAGGED_PASSAGES)]


def make_nouns(corpus: Corpus, settings: QuestionSet, model: str, seed: int, folder: Path) -> None:
    """Where the nouns of every question stand; in an embedded world also how often the finder is right on dev."""
    if not fleet.is_main():
        return
    if model == "embedded" and isinstance(settings, WorldSet):
        finder = nouns.train_tagger(tagged_text(settings.world, seed), folder / "pipeline", seed)
    else:
        finder = nouns.load_nouns(model)
    asked = {part: [q.text for q in corpus.questions[part]] for part in PARTS}
    write_json(folder / "spans.json", {part: nouns.find_nouns(finder, texts) for part, texts in asked.items()})
    scores = nouns.score_tags(finder, asked["dev"], [parts_of_speech(text) for text in asked["dev"]]) if isinstance(settings, WorldSet) else {}
    write_json(folder / "scores.json", scores)


def model_hashes(name: str) -> dict[str, str]:
    """The files that make a local model what it is, by hash; empty for a hub name or an embedded retriever."""
    return {file.name: input_hash(file) for kind in ("*.safetensors", "*.json") for file in sorted(Path(name).glob(kind))}
