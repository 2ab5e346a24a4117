"""What each stage does: every box of the data flow as a function that writes its result to a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from ragkit import corpus as corpora
from ragkit import distill, index, metrics, nouns, teacher, world
from ragkit.corpus import PARTS, Corpus, Passage, Question
from ragkit.profile import DistillSettings, FileSet, RetrieverSettings, WorldSet
from ragkit.reader import Reader, fine_tune, note_trimmed
from ragkit.retriever import Retriever, passage_text, train_by_cropping
from ragkit.speech import parts_of_speech
from ragkit.store import input_hash

DEPTH = 20  # passages kept of every ranking
TRAINING_WORLDS, TRAINING_ENTITIES, TRAINING_QUESTIONS = 8, 48, 576
TAGGED_ENTITIES, TAGGED_PASSAGES = 240, 120
SAME_KIND_SHARE = 0.3  # of Step 1's prompts: all passages state the same kind of fact about different entities


def make_corpus(settings: WorldSet | FileSet, folder: Path) -> None:
    corpora.build(settings).save(folder)


def make_retriever(corpus: Corpus, world_name: str | None, settings: RetrieverSettings, seed: int, folder: Path) -> None:
    """The initial retriever, the passages' vectors, and each part's candidates.

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
    vectors = retriever.encode([passage_text(p) for p in corpus.passages])
    arrays: dict[str, NDArray[Any]] = {"passages": vectors}
    for part in PARTS:
        queries = retriever.encode([q.text for q in corpus.questions[part]])
        arrays[part] = index.search(queries, vectors, min(DEPTH, len(vectors)))[0]
    save_file(arrays, folder / "vectors.safetensors")


class Lessons:
    """What Step 1 learns from: questions with retrieved passages, never those of the measured parts.

    In an embedded world: freshly drawn training worlds, searched by the initial retriever. On real text: the
    questions for distillation with their candidates.
    """

    def __init__(
        self, settings: WorldSet | FileSet, corpus: Corpus, retriever: Retriever, candidates: NDArray[np.int64], k: int, gold_share: float, seed: int
    ) -> None:
        self.k, self.gold_share = k, gold_share
        self.items: list[tuple[Question, list[Passage], list[Passage], list[Passage]]] = []  # question, found, gold, same kind
        if isinstance(settings, FileSet):
            for question, row in zip(corpus.questions["distill"], candidates, strict=True):
                self.add(question, corpus, row.tolist(), [])
            return
        for number in range(TRAINING_WORLDS):
            drawn = training_world(settings, 1000 * seed + number)
            questions = drawn.questions["distill"]
            queries = retriever.encode([q.text for q in questions])
            vectors = retriever.encode([passage_text(p) for p in drawn.passages])
            found = index.search(queries, vectors, k)[0]
            same_kind: dict[str, list[int]] = {}
            for q in questions:
                same_kind.setdefault(q.relation, []).append(q.gold[0])
            for q, row in zip(questions, found, strict=True):
                self.add(q, drawn, row.tolist(), sorted(set(same_kind[q.relation])))

    def add(self, question: Question, corpus: Corpus, found: list[int], same_kind: list[int]) -> None:
        def read(places: Any) -> list[Passage]:
            return [corpus.passages[i] for i in places]

        others = [i for i in same_kind if i not in question.gold]
        self.items.append((question, read(i for i in found[: self.k]), read(question.gold), read(others)))

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
    losses = fine_tune(reader, lessons.draw, folder, seed, report)
    reader.save(folder)
    (folder / "losses.json").write_text(json.dumps(losses), "utf8")


def make_teacher(reader: Reader, corpus: Corpus, candidates: NDArray[np.int64], n: int, k: int, folder: Path) -> None:
    questions = corpus.questions["distill"][:n]
    scores = teacher.look(reader, questions, [[corpus.passages[i] for i in row[:k]] for row in candidates[: len(questions)]])
    teacher.save(scores, folder)
    note_trimmed(int((scores["trimmed"] > 0).sum()), len(questions), folder)


def make_left_out(reader: Reader, corpus: Corpus, candidates: NDArray[np.int64], n: int, k: int, folder: Path) -> None:
    questions = corpus.questions["distill"][:n]
    scores = teacher.left_out_losses(reader, questions, [[corpus.passages[i] for i in row[:k]] for row in candidates[: len(questions)]])
    save_file({"loop": scores}, folder / "scores.safetensors")


def make_distilled(
    corpus: Corpus,
    retriever: Retriever,
    vectors: dict[str, NDArray[Any]],
    loss: distill.Loss,
    settings: DistillSettings,
    k: int,
    seed: int,
    folder: Path,
    report: distill.Report,
) -> None:
    """Step 2 for one target and seed: the test rankings, and the curve along the epochs measured on dev."""
    questions = corpus.questions["distill"][: settings.questions]
    candidates = torch.from_numpy(vectors["distill"][: len(questions), :k].copy())
    stored, texts = torch.from_numpy(vectors["passages"]), [passage_text(p) for p in corpus.passages]

    def vectors_of(chosen: Tensor) -> Tensor:
        if settings.side == "query":
            return stored[candidates[chosen]]
        places, back = candidates[chosen].unique(return_inverse=True)
        return retriever([texts[i] for i in places])[back]

    def find(now: Retriever, part: str, depth: int) -> NDArray[np.int64]:
        passages = vectors["passages"] if settings.side == "query" else now.encode(texts)
        return index.search(now.encode([q.text for q in corpus.questions[part]]), passages, depth)[0]

    def watch(now: Retriever) -> dict[str, float]:
        return {"hr": float(metrics.hits(find(now, "dev", k).tolist(), [q.gold for q in corpus.questions["dev"]], k).mean())}

    torch.manual_seed(seed)
    curve = distill.train(retriever, [q.text for q in questions], vectors_of, loss, settings, seed, folder, watch, report)
    save_file({"test": find(retriever, "test", min(DEPTH, len(texts)))}, folder / "ranking.safetensors")
    (folder / "curve.json").write_text(json.dumps(curve), "utf8")


def make_refreshed(
    corpus: Corpus,
    retriever: Retriever,
    vectors: dict[str, NDArray[Any]],
    loss: distill.Loss,
    settings: DistillSettings,
    k: int,
    seed: int,
    folder: Path,
    report: distill.Report,
) -> None:
    """A part of Step 2, then an index refresh: what `make_retriever` writes, for the retriever as it is now.

    Only the questions for distillation get new candidates; 'initial' stays what it was.
    """
    make_distilled(corpus, retriever, vectors, loss, settings, k, seed, folder, report)
    retriever.save(folder / "model")
    passages = vectors["passages"] if settings.side == "query" else retriever.encode([passage_text(p) for p in corpus.passages])
    found = index.search(retriever.encode([q.text for q in corpus.questions["distill"]]), passages, min(DEPTH, len(passages)))[0]
    save_file({**vectors, "passages": passages, "distill": found}, folder / "vectors.safetensors")


def make_answers(reader: Reader, questions: list[Question], found: list[list[Passage]], folder: Path) -> None:
    prompts = [reader.prompt(q, passages) for q, passages in zip(questions, found, strict=True)]
    note_trimmed(sum(p.trimmed > 0 for p in prompts), len(prompts), folder)
    answers = reader.answer(prompts)
    (folder / "answers.json").write_text(json.dumps(answers, ensure_ascii=False), "utf8")


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


def make_nouns(corpus: Corpus, settings: WorldSet | FileSet, model: str, seed: int, folder: Path) -> None:
    """Where the nouns of every question stand; in an embedded world also how often the finder is right on dev."""
    if model == "embedded" and isinstance(settings, WorldSet):
        finder = nouns.train_tagger(tagged_text(settings.world, seed), folder / "pipeline", seed)
    else:
        finder = nouns.load_nouns(model)
    asked = {part: [q.text for q in corpus.questions[part]] for part in PARTS}
    (folder / "spans.json").write_text(json.dumps({part: nouns.find_nouns(finder, texts) for part, texts in asked.items()}), "utf8")
    scores = nouns.score_tags(finder, asked["dev"], [parts_of_speech(text) for text in asked["dev"]]) if isinstance(settings, WorldSet) else {}
    (folder / "scores.json").write_text(json.dumps(scores), "utf8")


def model_hashes(name: str) -> dict[str, str]:
    """The files that make a local model what it is, by hash; empty for a hub name or an embedded retriever."""
    return {file.name: input_hash(file) for kind in ("*.safetensors", "*.json") for file in sorted(Path(name).glob(kind))}
