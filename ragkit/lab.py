"""The experiment as stages: every box of the data flow, made once, remembered, and opened from any notebook."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit import corpus as corpora
from ragkit import distill, fleet, index, metrics, nouns, teacher
from ragkit.corpus import Corpus, Question
from ragkit.index import Index
from ragkit.passages import Passage
from ragkit.profile import Profile, QuestionSet, WorldSet, load_profile, varied
from ragkit.reader import Reader, embedded_reader
from ragkit.retriever import Retriever, passage_text
from ragkit.stages import (
    DEPTH,
    Lessons,
    make_answers,
    make_candidates,
    make_corpus,
    make_distilled,
    make_fine_tuned,
    make_index,
    make_left_out,
    make_nouns,
    make_refreshed,
    make_retriever,
    make_teacher,
    make_vectors,
    model_hashes,
)
from ragkit.store import Store
from ragkit.vectors import Vectors

log = logging.getLogger(__name__)

SEARCH = ("corpus", "retriever", "vectors", "index", "candidates")  # the stages from the question set to the initial candidates
READERS = ("off-the-shelf", "fine-tuned")
UNTAUGHT = ("off-the-shelf", "weaker prompt")  # readers before Step 1: one model, asked in two ways
SIGNALS = ("attention", "perplexity", "LOOP", "EMDR2")  # what a reader can teach by: a target is named 'reader signal'
TARGETS = {
    "off-the-shelf attention": "the pretrained reader's attention (the paper's first regime)",
    "weaker prompt attention": "the same reader, asked with the prompt that it answers worse",
    "fine-tuned attention": "the attention of the reader after Step 1 (the paper's second regime)",
    "fine-tuned perplexity": "how likely the fine-tuned reader finds the answer given each passage alone",
    "uniform": "control: every passage the same",
    "shuffled": "control: the fine-tuned attention, permuted within each question",
    "answer string": "control: the passages that contain the answer as text",
    "oracle": "control: the gold passages",
}


def linked(source: str, copy: str) -> None:
    """A second name for a file of a stage, which is never changed in place; a copy where the disk knows no links."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)


def teacher_of(target: str) -> tuple[str, str] | None:
    """The reader and the signal of a target; None for a control that needs no reader."""
    if target == "shuffled":
        return "fine-tuned", "attention"
    reader, _, signal = target.rpartition(" ")
    return (reader, signal) if signal in SIGNALS else None


class Lab:
    """One run: a profile, its folder, and its stages. Asking for a thing makes what is missing."""

    def __init__(self, profile: str | Profile = "tiny", runs: Path | str = "runs") -> None:
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        fleet.start(self.profile.machine, self.profile.threads)
        self.store = Store(Path(runs) / self.profile.name)
        self.opened: dict[str, Path] = {}
        self.corpora: dict[str, Corpus] = {}
        self.style_scores = cache(self._style_scores)
        self.before: Lab | None = None  # the lab before an index refresh, whose looks at the same candidates are kept

    @cached_property
    def sets(self) -> dict[str, QuestionSet]:
        return {s.name: s for s in self.profile.sets}

    def varied(self, variation: str, set_name: str) -> Lab:
        """A lab with one choice taken otherwise."""
        name = variation.replace(": ", "-").replace(" ", "-")
        return self.beside(name, varied(self.profile, variation), set_name, (*SEARCH, "answers", "step1", "teacher"))

    def again(self, step1_seed: int, set_name: str) -> Lab:
        """A lab whose Step 1 is run with another seed: other training worlds, in another order."""
        changed = self.profile.model_copy(update={"step1_seeds": (step1_seed,)})
        kinds = (*SEARCH, "answers", "teacher", "tokens", "contextual", "nouns", "loop", "step2")
        return self.beside(f"step1-seed-{step1_seed}", changed, set_name, kinds)

    def beside(self, name: str, profile: Profile, set_name: str, kinds: tuple[str, ...]) -> Lab:
        """A lab of a changed profile, in a folder of its own below this run's.

        It begins with this lab's stages (the very files, where the disk can link them): only what the change touches is made anew.
        """
        home = self.store.folder / "varied" / name
        for kind in kinds:
            made, copy = (folder / "stages" / kind / set_name for folder in (self.store.folder, home))
            if fleet.is_main() and made.is_dir() and not copy.exists():
                aside = copy.with_name(f"{set_name}.new")
                shutil.rmtree(aside, ignore_errors=True)
                shutil.copytree(made, aside, copy_function=linked)
                aside.rename(copy)
        fleet.wait()
        return Lab(profile.model_copy(update={"name": name}), home.parent)

    def open(self, name: str, make: Any, settings: Any, upstream: list[str], code: list[Any]) -> Path:
        """A stage's folder; within one session it is checked once."""
        if name not in self.opened:
            keys = {other: self.store.key(other) for other in upstream}
            self.opened[name] = self.store.stage(name, make, settings, keys, code)
        return self.opened[name]

    def corpus(self, set_name: str) -> Corpus:
        """Passages and questions of a set."""
        if set_name not in self.corpora:
            settings = self.sets[set_name]
            record = {**settings.model_dump(), "contents": corpora.input_hashes(settings)}
            folder = self.open(f"corpus/{set_name}", lambda f: make_corpus(settings, f), record, [], [make_corpus])
            self.corpora[set_name] = Corpus.load(set_name, folder)
            index.check_k(self.profile.k, len(self.corpora[set_name].passages))
        return self.corpora[set_name]

    def _retriever_folder(self, set_name: str) -> Path:
        corpus, settings, seed = self.corpus(set_name), self.profile.retriever, self.profile.seed
        world_name = getattr(self.sets[set_name], "world", None)
        record = {**settings.model_dump(exclude={"at_once"}), "seed": seed, "weights": model_hashes(settings.model)}
        return self.open(
            f"retriever/{set_name}",
            lambda f: make_retriever(corpus, world_name, settings, seed, f),
            record,
            [f"corpus/{set_name}"],
            [make_retriever],
        )

    def retriever(self, set_name: str) -> Retriever:
        """The initial retriever."""
        return Retriever.load(str(self._retriever_folder(set_name) / "model"), self.profile.retriever)

    def vectors(self, set_name: str) -> Vectors:
        """The initial retriever's vectors of all passages."""
        folder, settings = self._retriever_folder(set_name), self.profile.index

        def make(place: Path) -> None:
            make_vectors(self.corpus(set_name), Retriever.load(str(folder / "model"), self.profile.retriever), settings, place)

        return Vectors(self.open(f"vectors/{set_name}", make, settings.model_dump(include={"dtype", "shard"}), [f"retriever/{set_name}"], [make_vectors]))

    def index(self, set_name: str) -> Index:
        """What searches them."""
        vectors, settings = self.vectors(set_name), self.profile.index
        record = settings.model_dump(exclude={"dtype", "shard", "probes", "candidates"}) if settings.kind != "exact" else {"kind": "exact"}
        seed = self.profile.seed
        folder = self.open(
            f"index/{set_name}", lambda f: make_index(vectors, settings, seed, f), record | {"seed": seed}, [f"vectors/{set_name}"], [make_index]
        )
        return index.open_index(vectors, settings, folder)

    def candidates(self, set_name: str) -> dict[str, NDArray[np.int64]]:
        """The first 20 passages of each question, by part `[questions, 20]`, as the initial retriever finds them."""
        passages, record = self.index(set_name), self.profile.index.model_dump(include={"kind", "probes", "candidates"})

        def make(folder: Path) -> None:
            make_candidates(self.corpus(set_name), self.retriever(set_name), passages, folder)

        folder = self.open(f"candidates/{set_name}", make, record, [f"retriever/{set_name}", f"index/{set_name}"], [make_candidates])
        return load_file(folder / "candidates.safetensors")

    def recall(self, set_name: str) -> dict[str, float]:
        """How many of the exact first passages an approximate index finds; empty for the exact one."""
        self.candidates(set_name)
        return json.loads((self.store.folder / "stages" / "candidates" / set_name / "recall.json").read_text("utf8"))

    def _nouns_folder(self, set_name: str) -> Path:
        corpus, settings, model, seed = self.corpus(set_name), self.sets[set_name], self.profile.nouns.model, self.profile.seed
        nouns.check_model(model, isinstance(settings, WorldSet))
        record = {"model": model, "state": nouns.state(model), "seed": seed}
        return self.open(f"nouns/{set_name}", lambda f: make_nouns(corpus, settings, model, seed, f), record, [f"corpus/{set_name}"], [make_nouns])

    def noun_spans(self, set_name: str, part: str) -> list[list[tuple[int, int]]]:
        """Start and end, in characters, of the nouns of each question of a part; some questions have none.

        Raises NounsError, which says why, where there is no pipeline for this set.
        """
        spans = json.loads((self._nouns_folder(set_name) / "spans.json").read_text("utf8"))
        return [[(start, end) for start, end in question] for question in spans[part]]

    def noun_scores(self, set_name: str) -> dict[str, float]:
        """How often the noun finder is right on dev (see `ragkit.nouns.score_tags`); empty where there is no gold, as in real text."""
        return json.loads((self._nouns_folder(set_name) / "scores.json").read_text("utf8"))

    def found(self, set_name: str, part: str, ranking: NDArray[np.int64] | None = None) -> list[list[Passage]]:
        """The k passages of each question of a part, by the initial retriever or a ranking."""
        corpus = self.corpus(set_name)
        rows = self.candidates(set_name)[part] if ranking is None else ranking
        return [[corpus.passages[i] for i in row[: self.profile.k]] for row in rows]

    def readers(self) -> list[str]:
        """Every reader that is judged: before Step 1 (with its weaker prompt too, where it has two), on the way, and after it."""
        before = UNTAUGHT if self.has_clozes else UNTAUGHT[:1]
        return [*before, *(f"step {step}" for step in self.profile.reader.kept_steps), "fine-tuned"]

    def reader(self, set_name: str, which: str) -> Reader:
        """One of `readers()`."""
        settings = self.profile.reader
        if which in UNTAUGHT:
            return Reader.load(settings.model, settings, self.style(set_name, which))
        folder = self.step1(set_name)
        return Reader.load(str(folder if which == "fine-tuned" else folder / which.removeprefix("step ")), settings)

    def style(self, set_name: str, which: str) -> str:
        """How a reader is asked: as it answers better on dev, the weaker prompt as it answers worse; after Step 1 by questions."""
        if which not in UNTAUGHT:
            return "question"
        scores = self.style_scores(set_name)
        return (min if which == "weaker prompt" else max)(scores, key=lambda name: scores[name])

    def step1(self, set_name: str) -> Path:
        """The folder of the reader after Step 1, and of those on the way in folders below it."""
        settings, seed = self.profile.reader, self.profile.step1_seeds[0]

        def make(folder: Path) -> None:
            given = (self.sets[set_name], self.corpus(set_name), self.retriever(set_name), self.candidates(set_name)["distill"])
            lessons = Lessons(*given, self.profile.k, settings.gold_share, seed)
            make_fine_tuned(Reader.load(settings.model, settings, to_train=True), lessons, seed, folder)

        record = {**self.reader_record(), "k": self.profile.k, "seed": seed}
        self.candidates(set_name)
        return self.open(f"step1/{set_name}", make, record, [f"candidates/{set_name}"], [make_fine_tuned, Lessons])

    def upstream_of(self, set_name: str, which: str) -> list[str]:
        """The stages that a look of a reader at the initial candidates depends on, made if they are missing."""
        self.candidates(set_name)
        if which in UNTAUGHT:
            return [f"candidates/{set_name}"]
        self.step1(set_name)
        return [f"candidates/{set_name}", f"step1/{set_name}"]

    def reader_record(self) -> dict[str, Any]:
        """What a stage that uses the reader depends on: its settings that change a result, and its weights where they lie in a local folder."""
        settings = self.profile.reader
        return {
            **settings.model_dump(exclude={"at_once", "gradient_checkpointing"}),
            "weights": model_hashes(str(embedded_reader()) if settings.model == "embedded" else settings.model),
        }

    def inputs(self) -> dict[str, Any]:
        """Hashes of everything a run reads from outside its own folder."""
        sets = {name: corpora.input_hashes(settings) for name, settings in self.sets.items()}
        return {
            "sets": sets,
            "retriever": model_hashes(self.profile.retriever.model),
            "reader": self.reader_record()["weights"],
            "nouns": nouns.state(self.profile.nouns.model),
        }

    @cached_property
    def has_clozes(self) -> bool:
        """Whether every set can also ask by the beginning of a statement: the embedded worlds can, real text cannot."""
        return all(isinstance(s, WorldSet) for s in self.sets.values())

    @cached_property
    def targets(self) -> dict[str, str]:
        """The targets of this run: TARGETS, without the weaker prompt where there is only one."""
        return {name: what for name, what in TARGETS.items() if self.has_clozes or not name.startswith("weaker prompt")}

    def _style_scores(self, set_name: str) -> dict[str, float]:
        """EM of the off-the-shelf reader on dev with a question prompt and, where there are clozes, a cloze prompt."""
        corpus = self.corpus(set_name)
        questions = corpus.questions["dev"][: self.profile.evaluate.answered]
        result = {}
        for style in ("question", "cloze") if self.has_clozes else ("question",):
            reader = Reader.load(self.profile.reader.model, self.profile.reader, style)
            answers = self.answers(set_name, f"off-the-shelf-{style}-dev", reader, questions, self.found(set_name, "dev"), f"candidates/{set_name}")
            result[style] = float(np.mean([metrics.exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)]))
        return result

    def answers(self, set_name: str, label: str, reader: Reader, questions: list[Question], found: list[list[Passage]], upstream: str) -> list[str]:
        """The reader's answers to the first questions from the given passages, as a stage."""
        found = found[: len(questions)]
        record = {"reader": self.reader_record(), "style": reader.style, "questions": len(questions), "k": self.profile.k}
        code = [make_answers, Reader]
        folder = self.open(f"answers/{set_name}/{label}", lambda f: make_answers(reader, questions, found, f), record, [upstream], code)
        return json.loads((folder / "answers.json").read_text("utf8"))

    def teacher(self, set_name: str, which: str) -> dict[str, NDArray[np.float32]]:
        """All scores of one reader on the questions for distillation (see `ragkit.teacher.look`)."""
        return teacher.load(self.look(set_name, which, "teacher", make_teacher))

    def left_out(self, set_name: str, which: str) -> NDArray[np.float64]:
        """LOOP's scores of one reader on the questions for distillation `[questions, k]`."""
        return load_file(self.look(set_name, which, "loop", make_left_out) / "scores.safetensors")["loop"].astype(np.float64)

    def look(self, set_name: str, which: str, kind: str, make: Any) -> Path:
        """The stage of one reader's look at the questions for distillation."""
        n, k = self.profile.distill.questions, self.profile.k
        record = {"reader": self.reader_record(), "which": which, "style": self.style(set_name, which), "questions": n, "k": k}

        def make_it(folder: Path) -> None:
            known = {}
            if self.before is not None and kind == "teacher":
                known = {"known": (self.before.asked(set_name)[1], self.before.teacher(set_name, which))}
            make(self.reader(set_name, which), self.corpus(set_name), self.candidates(set_name)["distill"], n, k, folder, **known)

        return self.open(f"{kind}/{set_name}/{which.replace(' ', '-')}", make_it, record, self.upstream_of(set_name, which), [make])

    def asked(self, set_name: str) -> tuple[list[Question], NDArray[np.int64]]:
        """The questions for distillation and their candidates `[questions, k]`."""
        questions = self.corpus(set_name).questions["distill"][: self.profile.distill.questions]
        return questions, self.candidates(set_name)["distill"][: len(questions), : self.profile.k]

    def scores(self, set_name: str, target: str) -> NDArray[np.float64]:
        """What a target is made of `[questions, k]`: a reader's scores, or a control's."""
        questions, candidates = self.asked(set_name)
        if taught := teacher_of(target):
            which, signal = taught
            if signal == "LOOP":
                return self.left_out(set_name, which)
            seen = self.teacher(set_name, which)
            return teacher.attention_scores(seen, self.profile.attention) if signal == "attention" else teacher.likelihood(seen)
        if target == "answer string":
            return distill.answer_string_scores(candidates.tolist(), self.corpus(set_name).passages, [q.answers for q in questions])
        return distill.oracle_scores(candidates.tolist(), self.corpus(set_name).golds(questions, candidates))

    def target(self, set_name: str, name: str) -> NDArray[np.float64]:
        """A target's distributions over the candidates of the questions for distillation `[questions, k]`."""
        if name == "uniform":
            return distill.uniform(*self.asked(set_name)[1].shape)
        made = distill.from_scores(self.scores(set_name, name), self.profile.distill.entropy)
        return distill.shuffled(made, self.profile.seed) if name == "shuffled" else made

    def loss(self, set_name: str, target: str) -> distill.Loss:
        """What Step 2 minimises: EMDR2's own loss, or the divergence from a target."""
        theta = self.profile.distill.retriever_temperature
        if target.endswith("EMDR2"):
            logs = torch.from_numpy(self.teacher(set_name, target.removesuffix(" EMDR2"))["answer_logs"])
            return lambda chosen, scores: distill.emdr2_loss(logs[chosen], scores, theta)
        targets = torch.from_numpy(self.target(set_name, target)).float()
        divergence = distill.kl_loss if self.profile.distill.direction == "target || retriever" else distill.reverse_kl_loss
        return lambda chosen, scores: divergence(targets[chosen], scores, theta)

    def distilled(self, set_name: str, target: str, seed: int) -> tuple[NDArray[np.int64], list[dict[str, float]]]:
        """Step 2: the test ranking `[questions, 20]` and the curve over epochs.

        With `index_refreshes` in the profile the curve is that of the last part, from the last refresh on.
        """
        if self.profile.index_refreshes:
            return self.refreshed(set_name, target, seed).distilled(set_name, target, seed)
        upstream = self.seen_by(set_name, target)
        record = {
            "distill": self.profile.distill.model_dump(exclude={"seeds"}),
            "attention": self.profile.attention.model_dump(),
            "seed": seed,
        }

        def make_it(folder: Path) -> None:
            made = (self.corpus(set_name), self.retriever(set_name), self.index(set_name), self.candidates(set_name)["distill"], self.loss(set_name, target))
            make_distilled(*made, self.profile.distill, self.profile.k, seed, folder)

        code = [make_distilled, Lab.loss, Lab.target, Lab.scores]
        folder = self.open(self.step2_name(set_name, target, seed), make_it, record, upstream, code)
        return load_file(folder / "ranking.safetensors")["test"], json.loads((folder / "curve.json").read_text("utf8"))

    def refreshed(self, set_name: str, target: str, seed: int) -> Lab:
        """A lab in which the first part of Step 2 is done: its retriever goes on from there, with the candidates that it finds now."""
        left, distilling = self.profile.index_refreshes, self.profile.distill
        first = distilling.epochs // (left + 1)
        rest = distilling.model_copy(update={"epochs": distilling.epochs - first})
        changed = self.profile.model_copy(update={"index_refreshes": left - 1, "distill": rest})
        # Step 1 is over: it sees no new candidates. The passages' vectors change only if their side is trained
        kept = ["step1", *(["vectors", "index"] if distilling.side == "query" else [])]
        self.step1(set_name)
        self.index(set_name)
        name = f"refreshed-{target.replace(' ', '-')}-{seed}"
        other = self.beside(name, changed, set_name, ("corpus", *kept))
        if stale := [kind for kind in kept if other.store.key(f"{kind}/{set_name}") != self.store.key(f"{kind}/{set_name}")]:
            for kind in stale if fleet.is_main() else []:  # copies of earlier ones
                shutil.rmtree(other.store.folder / "stages" / kind / set_name)
            fleet.wait()
            other = self.beside(name, changed, set_name, ("corpus", *kept))
        other.style_scores, other.before = self.style_scores, self
        other.opened |= {f"{kind}/{set_name}": other.store.folder / "stages" / kind / set_name for kind in kept}

        def make(folder: Path) -> None:
            made = (self.corpus(set_name), self.retriever(set_name), self.index(set_name), self.candidates(set_name)["distill"], self.loss(set_name, target))
            make_refreshed(*made, distilling.model_copy(update={"epochs": first}), self.profile.k, seed, folder)

        stage = f"retriever/{set_name}"
        upstream = {name: self.store.key(name) for name in self.seen_by(set_name, target)}
        record = {"distill": distilling.model_dump(exclude={"seeds"}), "attention": self.profile.attention.model_dump(), "epochs": first, "seed": seed}
        other.opened[stage] = other.store.stage(stage, make, record, upstream, [make_refreshed, Lab.loss, Lab.target, Lab.scores])
        return other

    def seen_by(self, set_name: str, target: str) -> list[str]:
        """The stages that Step 2 for a target depends on, made if they are missing."""
        if not (taught := teacher_of(target)):
            self.candidates(set_name)
            return [f"candidates/{set_name}"]
        which, signal = taught
        kind, make = ("loop", make_left_out) if signal == "LOOP" else ("teacher", make_teacher)
        self.look(set_name, which, kind, make)
        return [f"candidates/{set_name}", f"{kind}/{set_name}/{which.replace(' ', '-')}"]

    @staticmethod
    def step2_name(set_name: str, target: str, seed: int) -> str:
        return f"step2/{set_name}/{target.replace(' ', '-')}-{seed}"

    def retrieval_rows(self, set_name: str, targets: Iterable[str] | None = None) -> dict[tuple[str, int], NDArray[np.int64]]:
        """Test rankings by (system, seed): BM25 if the profile has it, the initial retriever, the distilled ones of the targets (default: all)."""
        rows = {}
        if self.profile.evaluate.bm25:
            corpus = self.corpus(set_name)
            texts = [passage_text(p) for p in corpus.passages]
            rows["BM25", 0] = index.bm25([q.text for q in corpus.questions["test"]], texts, min(DEPTH, len(texts)))
        rows["initial", 0] = self.candidates(set_name)["test"]
        for target in self.targets if targets is None else targets:
            for seed in self.profile.distill.seeds:
                rows[target, seed] = self.distilled(set_name, target, seed)[0]
        return rows

    def per_question(self, set_name: str, targets: Iterable[str] | None = None) -> pd.DataFrame:
        """Retrieval of every test question by every system (see `retrieval_rows`): columns system, seed, question, HR@1, HR@5, HR@20, MRR."""
        corpus = self.corpus(set_name)
        questions, frames = corpus.questions["test"], []
        for (system, seed), ranking in self.retrieval_rows(set_name, targets).items():
            found, golds = ranking.tolist(), corpus.golds(questions, ranking)
            columns = {f"HR@{k}": metrics.hits(found, golds, k) for k in metrics.CUTS} | {"MRR": metrics.reciprocal_ranks(found, golds)}
            frames.append(pd.DataFrame({"set": set_name, "system": system, "seed": seed, "question": range(len(questions)), **columns}))
        return pd.concat(frames, ignore_index=True)

    def answer_rows(self, set_name: str, targets: Iterable[str] | None = None) -> pd.DataFrame:
        """EM and F1 of test questions under every system (see `retrieval_rows`): columns system, reader, seed, question, EM, F1.

        Each regime answers with its own reader; BM25 and the controls answer with the fine-tuned one.
        """
        questions = self.corpus(set_name).questions["test"][: self.profile.evaluate.answered]
        cases: list[tuple[str, str, int, list[list[Passage]], str]] = []
        for which in READERS:
            cases.append(("closed book", which, 0, [[] for _ in questions], f"candidates/{set_name}"))
        rankings = self.retrieval_rows(set_name, targets)
        for (system, seed), ranking in rankings.items():
            upstream = self.step2_name(set_name, system, seed) if system in TARGETS else f"candidates/{set_name}"
            readers = READERS if system == "initial" else READERS[:1] if system.startswith(UNTAUGHT) else READERS[1:]
            for which in readers:
                cases.append((system, which, seed, self.found(set_name, "test", ranking), upstream))
        loaded, frames = {which: self.reader(set_name, which) for which in READERS}, []
        for system, which, seed, found, upstream in cases:
            answers = self.answers(set_name, f"{system}-{which}-{seed}".replace(",", "").replace(" ", "-"), loaded[which], questions, found, upstream)
            scored = {
                "EM": [metrics.exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)],
                "F1": [metrics.f1(a, q.answers) for a, q in zip(answers, questions, strict=True)],
            }
            frames.append(pd.DataFrame({"set": set_name, "system": system, "reader": which, "seed": seed, "question": range(len(answers)), **scored}))
        return pd.concat(frames, ignore_index=True)

    def premises(self, set_name: str) -> pd.DataFrame:
        """The premises on dev: can this reader read, and is there room for the retriever to improve?"""
        corpus, found = self.corpus(set_name), self.found(set_name, "dev")
        dev = corpus.questions["dev"]
        ranking = self.candidates(set_name)["dev"]
        golds = corpus.golds(dev, ranking)
        initial = metrics.hits(ranking.tolist(), golds, self.profile.k)
        rows: list[tuple[str, float]] = [(f"initial HR@{self.profile.k}", float(initial.mean()))]
        questions = dev[: self.profile.evaluate.answered]
        rng = random.Random(self.profile.seed)
        with_gold, same_kind, permuted = [], [], []
        for q, passages, places in zip(questions, found[: len(questions)], golds[: len(questions)], strict=True):
            gold = corpus.passages[places[0]] if places else passages[0]
            rest = [p for p in passages if p.id != gold.id][: self.profile.k - 1]
            with_gold.append(rng.sample([gold, *rest], len(rest) + 1))
            permuted.append(rng.sample(with_gold[-1], len(with_gold[-1])))
            others = [corpus.passages[o.gold[0]] for o in dev if q.relation and o.relation == q.relation and o.entity != q.entity]
            chosen = rng.sample(others, min(len(others), self.profile.k - 1))
            same_kind.append(rng.sample([gold, *chosen], len(chosen) + 1))
        for which in READERS:
            reader, results = self.reader(set_name, which), {}
            cases: dict[str, list[list[Passage]]] = {
                "gold among the passages": with_gold,
                "the same, permuted": permuted,
                "no passages": [[] for _ in questions],
            }
            if questions[0].relation:
                cases["same kind of fact, other entities"] = same_kind
            for case, given in cases.items():
                upstream = f"step1/{set_name}" if which == "fine-tuned" else f"candidates/{set_name}"
                answers = self.answers(set_name, f"premise-{which}-{case}".replace(",", "").replace(" ", "-"), reader, questions, given, upstream)
                results[case] = float(np.mean([metrics.exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)]))
            rows += [(f"{which}: EM, {case}", value) for case, value in results.items()]
        return pd.DataFrame(rows, columns=["premise", "value"]).assign(set=set_name)
