"""The experiment as stages: every box of the data flow, made once, remembered, and opened from any notebook."""

from __future__ import annotations

import json
import logging
import random
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit import corpus as corpora
from ragkit import distill, index, metrics, nouns, teacher
from ragkit.corpus import Corpus, Passage, Question
from ragkit.profile import DistillSettings, FileSet, Profile, WorldSet, load_profile
from ragkit.reader import Reader, embedded_reader
from ragkit.retriever import Retriever, passage_text
from ragkit.stages import DEPTH, Lessons, make_answers, make_corpus, make_distilled, make_fine_tuned, make_nouns, make_retriever, make_teacher, model_hashes
from ragkit.store import Store

log = logging.getLogger(__name__)

READERS = ("off-the-shelf", "fine-tuned")
TARGETS = {
    "off-the-shelf attention": "the pretrained reader's attention (the paper's first regime)",
    "off-the-shelf attention, weaker prompt": "the same reader, asked with the prompt that it answers worse",
    "fine-tuned attention": "the attention of the reader after Step 1 (the paper's second regime)",
    "fine-tuned perplexity": "how likely the fine-tuned reader finds the answer given each passage alone",
    "uniform": "control: every passage the same",
    "shuffled": "control: the fine-tuned attention, permuted within each question",
    "answer string": "control: the passages that contain the answer as text",
    "oracle": "control: the gold passages",
}
TEACHERS = {
    "off-the-shelf attention": "off-the-shelf",
    "off-the-shelf attention, weaker prompt": "off-the-shelf-weaker",
    "fine-tuned attention": "fine-tuned",
    "fine-tuned perplexity": "fine-tuned",
    "shuffled": "fine-tuned",
}  # whose scores a target is made from


class Lab:
    """One run: a profile, its folder, and its stages. Asking for a thing makes what is missing."""

    def __init__(self, profile: str | Profile = "tiny", runs: Path | str = "runs") -> None:
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        self.store = Store(Path(runs) / self.profile.name)
        self.opened: dict[str, Path] = {}

    @cached_property
    def sets(self) -> dict[str, WorldSet | FileSet]:
        return {s.name: s for s in self.profile.sets}

    def open(self, name: str, make: Any, settings: Any, upstream: list[str], code: list[Any]) -> Path:
        """A stage's folder; within one session it is checked once."""
        if name not in self.opened:
            keys = {other: self.store.key(other) for other in upstream}
            self.opened[name] = self.store.stage(name, make, settings, keys, code)
        return self.opened[name]

    def corpus(self, set_name: str) -> Corpus:
        """Passages and questions of a set."""
        settings = self.sets[set_name]
        name = f"corpus/{set_name}"
        record = {**settings.model_dump(), "contents": corpora.input_hashes(settings)}
        made = Corpus.load(set_name, self.open(name, lambda f: make_corpus(settings, f), record, [], [make_corpus]))
        index.check_k(self.profile.k, len(made.passages))
        return made

    def _retriever_folder(self, set_name: str) -> Path:
        corpus, settings, seed = self.corpus(set_name), self.profile.retriever, self.profile.seed
        world_name = getattr(self.sets[set_name], "world", None)
        record = {**settings.model_dump(), "seed": seed, "weights": model_hashes(settings.model)}
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

    def vectors(self, set_name: str) -> dict[str, NDArray[Any]]:
        """`passages` `[passages, d]`, and the initial candidates of each part `[questions, 20]`."""
        return load_file(self._retriever_folder(set_name) / "vectors.safetensors")

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
        rows = self.vectors(set_name)[part] if ranking is None else ranking
        return [[corpus.passages[i] for i in row[: self.profile.k]] for row in rows]

    def reader(self, set_name: str, which: str) -> Reader:
        """The reader before Step 1 (`off-the-shelf`, or `off-the-shelf-weaker` with its weaker prompt) or after it (`fine-tuned`)."""
        settings = self.profile.reader
        if which != "fine-tuned":
            scores = self.style_scores(set_name)
            style = (min if which == "off-the-shelf-weaker" else max)(scores, key=lambda name: scores[name])
            return Reader.load(settings.model, settings, style)
        name = f"step1/{set_name}"

        def make(folder: Path) -> None:
            lessons = Lessons(self.sets[set_name], self.corpus(set_name), self.retriever(set_name), self.vectors(set_name)["distill"], self.profile)
            make_fine_tuned(Reader.load(settings.model, settings), lessons, self.profile.seed, folder)

        record = {**self.reader_record(), "k": self.profile.k, "seed": self.profile.seed}
        self._retriever_folder(set_name)
        folder = self.open(name, make, record, [f"retriever/{set_name}"], [make_fine_tuned, Lessons])
        return Reader.load(str(folder), settings)

    def reader_record(self) -> dict[str, Any]:
        """What a stage that uses the reader depends on: its settings, and its weights where they lie in a local folder."""
        settings = self.profile.reader
        return {**settings.model_dump(), "weights": model_hashes(str(embedded_reader()) if settings.model == "embedded" else settings.model)}

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
        return {name: what for name, what in TARGETS.items() if self.has_clozes or not name.endswith("weaker prompt")}

    def style_scores(self, set_name: str) -> dict[str, float]:
        """EM of the off-the-shelf reader on dev with a question prompt and, where there are clozes, a cloze prompt."""
        corpus = self.corpus(set_name)
        questions = corpus.questions["dev"][: self.profile.evaluate.answered]
        result = {}
        for style in ("question", "cloze") if self.has_clozes else ("question",):
            reader = Reader.load(self.profile.reader.model, self.profile.reader, style)
            answers = self.answers(set_name, f"off-the-shelf-{style}-dev", reader, questions, self.found(set_name, "dev"), f"retriever/{set_name}")
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
        reader, corpus = self.reader(set_name, which), self.corpus(set_name)
        n, k = self.profile.distill.questions, self.profile.k
        record = {"reader": self.reader_record(), "style": reader.style, "questions": n, "k": k}
        upstream = [f"retriever/{set_name}"] + ([f"step1/{set_name}"] if which == "fine-tuned" else [])
        make = lambda f: make_teacher(reader, corpus, self.vectors(set_name)["distill"], n, k, f)  # noqa: E731
        return teacher.load(self.open(f"teacher/{set_name}/{which}", make, record, upstream, [make_teacher]))

    def target(self, set_name: str, name: str) -> NDArray[np.float64]:
        """A target of `targets` for the questions for distillation `[questions, k]`."""
        share, k = self.profile.distill.entropy, self.profile.k
        corpus = self.corpus(set_name)
        questions = corpus.questions["distill"][: self.profile.distill.questions]
        candidates = self.vectors(set_name)["distill"][: len(questions), :k].tolist()
        if "attention" in name:
            scores = self.teacher(set_name, TEACHERS[name])
            return distill.from_scores(teacher.attention_scores(scores, self.profile.attention), share)
        if name == "fine-tuned perplexity":
            return distill.from_scores(self.teacher(set_name, "fine-tuned")["likelihood"].astype(np.float64), share)
        if name == "uniform":
            return distill.uniform(len(questions), k)
        if name == "shuffled":
            return distill.shuffled(self.target(set_name, "fine-tuned attention"), self.profile.seed)
        if name == "answer string":
            texts = [p.text for p in corpus.passages]
            return distill.from_scores(distill.answer_string_scores(candidates, texts, [q.answers for q in questions]), share)
        return distill.from_scores(distill.oracle_scores(candidates, [q.gold for q in questions]), share)

    def distilled(self, set_name: str, target: str, seed: int) -> tuple[NDArray[np.int64], list[dict[str, float]]]:
        """Step 2: the test ranking `[questions, 20]` and the curve over epochs."""
        upstream = [f"retriever/{set_name}"]
        if target in TEACHERS:
            self.teacher(set_name, TEACHERS[target])
            upstream.append(f"teacher/{set_name}/{TEACHERS[target]}")
        record = {
            "distill": self.profile.distill.model_dump(exclude={"seeds"}),
            "attention": self.profile.attention.model_dump(),
            "seed": seed,
        }
        folder = self.open(
            self.step2_name(set_name, target, seed), lambda f: make_distilled(*self.step2_inputs(set_name, target), seed, f), record, upstream,
            [make_distilled, distill.from_scores, distill.shuffled, distill.oracle_scores, distill.answer_string_scores],
        )  # fmt: skip
        return load_file(folder / "ranking.safetensors")["test"], json.loads((folder / "curve.json").read_text("utf8"))

    def step2_inputs(self, set_name: str, target: str) -> tuple[Corpus, Retriever, dict[str, NDArray[Any]], NDArray[np.float64], DistillSettings, int]:
        """What Step 2 needs, opened only when it must run."""
        made = (self.corpus(set_name), self.retriever(set_name), self.vectors(set_name), self.target(set_name, target))
        return *made, self.profile.distill, self.profile.k

    @staticmethod
    def step2_name(set_name: str, target: str, seed: int) -> str:
        return f"step2/{set_name}/{target.replace(',', '').replace(' ', '-')}-{seed}"

    def retrieval_rows(self, set_name: str) -> dict[tuple[str, int], NDArray[np.int64]]:
        """Test rankings by (system, seed): BM25, the initial retriever, and each target's distilled retrievers."""
        corpus = self.corpus(set_name)
        texts = [passage_text(p) for p in corpus.passages]
        rows = {("BM25", 0): index.bm25([q.text for q in corpus.questions["test"]], texts, min(DEPTH, len(texts)))}
        rows["initial", 0] = self.vectors(set_name)["test"]
        for target in self.targets:
            for seed in self.profile.distill.seeds:
                rows[target, seed] = self.distilled(set_name, target, seed)[0]
        return rows

    def per_question(self, set_name: str) -> pd.DataFrame:
        """Retrieval of every test question by every system: columns system, seed, question, HR@1, HR@5, HR@20, MRR."""
        questions = self.corpus(set_name).questions["test"]
        golds = [q.gold for q in questions]
        frames = []
        for (system, seed), ranking in self.retrieval_rows(set_name).items():
            found = ranking.tolist()
            columns = {f"HR@{k}": metrics.hits(found, golds, k) for k in metrics.CUTS} | {"MRR": metrics.reciprocal_ranks(found, golds)}
            frames.append(pd.DataFrame({"set": set_name, "system": system, "seed": seed, "question": range(len(questions)), **columns}))
        return pd.concat(frames, ignore_index=True)

    def answer_rows(self, set_name: str) -> pd.DataFrame:
        """EM and F1 of test questions: columns system, reader, seed, question, EM, F1.

        Each regime answers with its own reader; BM25 and the controls answer with the fine-tuned one.
        """
        questions = self.corpus(set_name).questions["test"][: self.profile.evaluate.answered]
        cases: list[tuple[str, str, int, list[list[Passage]], str]] = []
        for which in READERS:
            cases.append(("closed book", which, 0, [[] for _ in questions], f"retriever/{set_name}"))
        rankings = self.retrieval_rows(set_name)
        for (system, seed), ranking in rankings.items():
            upstream = self.step2_name(set_name, system, seed) if system in TARGETS else f"retriever/{set_name}"
            readers = READERS if system == "initial" else READERS[:1] if system.startswith("off-the-shelf") else READERS[1:]
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
        initial = metrics.hits(self.vectors(set_name)["dev"].tolist(), [q.gold for q in dev], self.profile.k)
        rows: list[tuple[str, float]] = [(f"initial HR@{self.profile.k}", float(initial.mean()))]
        questions = dev[: self.profile.evaluate.answered]
        rng = random.Random(self.profile.seed)
        with_gold, same_kind, permuted = [], [], []
        for q, passages in zip(questions, found[: len(questions)], strict=True):
            gold = corpus.passages[q.gold[0]] if q.gold else passages[0]
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
                upstream = f"step1/{set_name}" if which == "fine-tuned" else f"retriever/{set_name}"
                answers = self.answers(set_name, f"premise-{which}-{case}".replace(",", "").replace(" ", "-"), reader, questions, given, upstream)
                results[case] = float(np.mean([metrics.exact_match(a, q.answers) for a, q in zip(answers, questions, strict=True)]))
            rows += [(f"{which}: EM, {case}", value) for case, value in results.items()]
        return pd.DataFrame(rows, columns=["premise", "value"]).assign(set=set_name)
