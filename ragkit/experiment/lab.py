"""The experiment as stages: every box of the data flow, made once, remembered, and opened from any notebook."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from contextlib import nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data import questions as corpora
from ragkit.data.passages import Passage
from ragkit.data.questions import Question
from ragkit.distillation import log as training_log
from ragkit.distillation import targets as distill
from ragkit.distillation import teacher
from ragkit.experiment.retrieval import SEARCH, Retrieval
from ragkit.experiment.stages import (
    Lessons,
    make_answers,
    make_distilled,
    make_fine_tuned,
    make_left_out,
    make_refreshed,
    make_teacher,
    model_hashes,
)
from ragkit.experiment.store import linked, write_json
from ragkit.indicators import metrics, nouns
from ragkit.models import device as fleet
from ragkit.models.reader import Reader, embedded_reader
from ragkit.profile import Profile, WorldSet, varied

log = logging.getLogger(__name__)

READERS = ("off-the-shelf", "fine-tuned")
UNTAUGHT = ("off-the-shelf", "weaker prompt")  # readers before Step 1: one model, asked in two ways
SIGNALS = (
    "attention",
    "perplexity",
    "LOOP",
    "EMDR2",
)  # what a reader can teach by: a target is named 'reader signal'
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


def teacher_of(target: str) -> tuple[str, str] | None:
    """The reader and the signal of a target; None for a control that needs no reader."""
    if target == "shuffled":
        return "fine-tuned", "attention"
    reader, _, signal = target.rpartition(" ")
    return (reader, signal) if signal in SIGNALS else None


class Lab(Retrieval):
    """One run: a profile, its folder, and its stages. Asking for a thing makes what is missing."""

    def __init__(self, profile: str | Profile = "tiny", runs: Path | str = "runs") -> None:
        super().__init__(profile, runs)
        self.style_scores = cache(self._style_scores)

    def varied(self, variation: str, set_name: str) -> Lab:
        """A lab with one choice taken otherwise."""
        name = variation.replace(": ", "-").replace(" ", "-")
        return self.beside(
            name,
            varied(self.profile, variation),
            set_name,
            (*SEARCH, "answers", "step1", "teacher", "nouns"),
        )

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
        taken = itertools.product(filter(None, (set_name, self.profile.twin(set_name))), kinds)
        with self.store.alone(f"beside-{name}", name) if fleet.is_main() else nullcontext():
            for one, kind in taken if fleet.is_main() else ():
                made, copy = (
                    folder / "stages" / kind / one for folder in (self.store.folder, home)
                )
                if made.is_dir() and not copy.exists():
                    aside = copy.with_name(f"{one}.new")
                    shutil.rmtree(aside, ignore_errors=True)
                    shutil.copytree(made, aside, copy_function=linked)
                    aside.rename(copy)
        fleet.wait()
        return Lab(profile.model_copy(update={"name": name}), home.parent)

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
        return Reader.load(
            str(folder if which == "fine-tuned" else folder / which.removeprefix("step ")), settings
        )

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
            given = (
                self.sets[set_name],
                self.corpus(set_name),
                self.retriever(set_name),
                self.candidates(set_name)["distill"],
            )
            lessons = Lessons(*given, self.profile.k, settings.gold_share, seed)
            reader = Reader.load(settings.model, settings, to_train=True)

            def reader_after(step: int) -> Reader:
                if not settings.shard:
                    return reader
                # one that is split over the processes looks at nothing by itself: it is read again from where it has just been kept
                place = folder / str(step) if step in settings.kept_steps else folder
                return Reader.load(str(place) if step else settings.model, settings)

            with training_log.Step1Log(
                folder, f"Step 1 {set_name}", settings, reader_after, self.probe(set_name, reader)
            ) as report:
                make_fine_tuned(reader, lessons, seed, folder, report)

        record = {**self.reader_record(), "k": self.profile.k, "seed": seed}
        self.candidates(set_name)
        return self.open(
            f"step1/{set_name}",
            make,
            record,
            [f"candidates/{set_name}"],
            [make_fine_tuned, Lessons],
        )

    def probe(self, set_name: str, reader: Reader) -> training_log.Probe:
        """Measures both indicators on the first dev questions, with closeness in the input embeddings of `reader`, the off-the-shelf one."""
        few = slice(training_log.QUESTIONS)
        try:
            spans = self.noun_spans(set_name, "dev")[few]
        except nouns.NounsError:
            spans = None
        questions, found = (
            self.corpus(set_name).questions["dev"][few],
            self.found(set_name, "dev")[few],
        )
        return training_log.Probe(
            reader, questions, found, spans, self.profile.attention, self.profile.indicators.share
        )

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
            **settings.model_dump(exclude={"at_once", "gradient_checkpointing", "shard"}),
            "weights": model_hashes(
                str(embedded_reader()) if settings.model == "embedded" else settings.model
            ),
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
        return {
            name: what
            for name, what in TARGETS.items()
            if self.has_clozes or not name.startswith("weaker prompt")
        }

    def _style_scores(self, set_name: str) -> dict[str, float]:
        """EM of the off-the-shelf reader on dev with a question prompt and, where there are clozes, a cloze prompt."""
        corpus = self.corpus(set_name)
        questions = corpus.questions["dev"][: self.profile.evaluate.answered]
        result = {}
        for style in ("question", "cloze") if self.has_clozes else ("question",):
            reader = Reader.load(self.profile.reader.model, self.profile.reader, style)
            answers = self.answers(
                set_name,
                f"off-the-shelf-{style}-dev",
                reader,
                questions,
                self.found(set_name, "dev"),
                [f"candidates/{set_name}"],
            )
            result[style] = float(
                np.mean(
                    [
                        metrics.exact_match(a, q.answers)
                        for a, q in zip(answers, questions, strict=True)
                    ]
                )
            )
        return result

    def answers(
        self,
        set_name: str,
        label: str,
        reader: Reader,
        questions: list[Question],
        found: list[list[Passage]],
        upstream: list[str],
    ) -> list[str]:
        """The reader's answers to the first questions from the given passages, as a stage; `upstream` names what made the reader and the passages."""
        found = found[: len(questions)]
        record = {
            "reader": self.reader_record(),
            "style": reader.style,
            "questions": len(questions),
            "k": self.profile.k,
        }
        code = [make_answers, Reader]
        folder = self.open(
            f"answers/{set_name}/{label}",
            lambda f: make_answers(reader, questions, found, f),
            record,
            upstream,
            code,
        )
        return json.loads((folder / "answers.json").read_text("utf8"))

    def teacher(self, set_name: str, which: str) -> dict[str, NDArray[np.float32]]:
        """All scores of one reader on the questions for distillation (see `ragkit.teacher.look`)."""
        return teacher.load(self.look(set_name, which, "teacher", make_teacher))

    def indicators_of(self, set_name: str, target: str) -> dict[str, float]:
        """What `probe` measured of the reader whose attention is the target; empty for other targets, and where attention was read off otherwise."""
        which, _, signal = target.rpartition(" ")
        file = (
            self.store.folder
            / "stages"
            / "teacher"
            / set_name
            / which.replace(" ", "-")
            / "indicators.json"
        )
        if (
            signal != "attention" or not file.is_file()
        ):  # a stage from before there was a log has none
            return {}
        seen = json.loads(file.read_text("utf8"))
        return (
            seen["indicators"] if seen["attention"] == self.profile.attention.model_dump() else {}
        )

    def step2_log(
        self, set_name: str, target: str, seed: int, epochs: int, folder: Path
    ) -> training_log.Step2Log:
        """What a Step 2 reports to."""
        settings, questions = self.profile.distill, len(self.asked(set_name)[0])
        title, batches = (
            f"Step 2 {set_name}, {target}, seed {seed}",
            -(-questions // settings.batch),
        )
        return training_log.Step2Log(
            folder, title, epochs, batches, settings.rate, self.indicators_of(set_name, target)
        )

    def left_out(self, set_name: str, which: str) -> NDArray[np.float64]:
        """LOOP's scores of one reader on the questions for distillation `[questions, k]`."""
        return load_file(self.look(set_name, which, "loop", make_left_out) / "scores.safetensors")[
            "loop"
        ].astype(np.float64)

    def look(self, set_name: str, which: str, kind: str, make: Any) -> Path:
        """The stage of one reader's look at the questions for distillation."""
        n, k = self.profile.distill.questions, self.profile.k
        record = {
            "reader": self.reader_record(),
            "which": which,
            "style": self.style(set_name, which),
            "questions": n,
            "k": k,
        }

        def make_it(folder: Path) -> None:
            reader, known = self.reader(set_name, which), {}
            if self.before is not None and kind == "teacher":
                known = {
                    "known": (self.before.asked(set_name)[1], self.before.teacher(set_name, which))
                }
            make(
                reader,
                self.corpus(set_name),
                self.candidates(set_name)["distill"],
                n,
                k,
                folder,
                **known,
            )
            if (
                kind == "teacher"
            ):  # for the logs of Step 2, of which a reader's look would take longer than each
                probe = self.probe(
                    set_name,
                    Reader.load(self.profile.reader.model, self.profile.reader, reader.style),
                )
                write_json(
                    folder / "indicators.json",
                    {"attention": self.profile.attention.model_dump(), "indicators": probe(reader)},
                )

        return self.open(
            f"{kind}/{set_name}/{which.replace(' ', '-')}",
            make_it,
            record,
            self.upstream_of(set_name, which),
            [make],
        )

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
            return (
                teacher.attention_scores(seen, self.profile.attention)
                if signal == "attention"
                else teacher.likelihood(seen)
            )
        if target == "answer string":
            return distill.answer_string_scores(
                candidates.tolist(), self.corpus(set_name).passages, [q.answers for q in questions]
            )
        return distill.oracle_scores(
            candidates.tolist(), self.corpus(set_name).golds(questions, candidates)
        )

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
            logs = torch.from_numpy(
                self.teacher(set_name, target.removesuffix(" EMDR2"))["answer_logs"]
            )
            return lambda chosen, scores: distill.emdr2_loss(logs[chosen], scores, theta)
        targets = torch.from_numpy(self.target(set_name, target)).float()
        divergence = (
            distill.kl_loss
            if self.profile.distill.direction == "target || retriever"
            else distill.reverse_kl_loss
        )
        return lambda chosen, scores: divergence(targets[chosen], scores, theta)

    def distilled(
        self, set_name: str, target: str, seed: int
    ) -> tuple[NDArray[np.int64], list[dict[str, float]]]:
        """Step 2: the test ranking `[questions, 20]` and the curve over epochs.

        With `index_refreshes` in the profile the curve is that of the last part, from the last refresh on.
        """
        if self.profile.index_refreshes:
            other, name = (
                self.refreshed(set_name, target, seed),
                self.step2_name(set_name, target, seed),
            )
            result = other.distilled(set_name, target, seed)
            self.elsewhere[name] = other.key(name)
            return result
        upstream = self.seen_by(set_name, target)
        record = {
            "distill": self.profile.distill.model_dump(exclude={"seeds"}),
            "attention": self.profile.attention.model_dump(),
            "seed": seed,
        }

        def make_it(folder: Path) -> None:
            made = (
                self.corpus(set_name),
                self.retriever(set_name),
                self.index(set_name),
                self.candidates(set_name)["distill"],
                self.loss(set_name, target),
            )
            with self.step2_log(
                set_name, target, seed, self.profile.distill.epochs, folder
            ) as report:
                make_distilled(*made, self.profile.distill, self.profile.k, seed, folder, report)

        code = [make_distilled, Lab.loss, Lab.target, Lab.scores]
        folder = self.open(self.step2_name(set_name, target, seed), make_it, record, upstream, code)
        return load_file(folder / "ranking.safetensors")["test"], json.loads(
            (folder / "curve.json").read_text("utf8")
        )

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
        if stale := [
            kind
            for kind in kept
            if other.store.key(f"{kind}/{set_name}") != self.store.key(f"{kind}/{set_name}")
        ]:
            for kind in stale if fleet.is_main() else []:  # copies of earlier ones
                shutil.rmtree(other.store.folder / "stages" / kind / set_name)
            fleet.wait()
            other = self.beside(name, changed, set_name, ("corpus", *kept))
        other.style_scores, other.before = self.style_scores, self
        other.opened |= {
            f"{kind}/{set_name}": other.store.folder / "stages" / kind / set_name for kind in kept
        }

        def make(folder: Path) -> None:
            made = (
                self.corpus(set_name),
                self.retriever(set_name),
                self.index(set_name),
                self.candidates(set_name)["distill"],
                self.loss(set_name, target),
            )
            with self.step2_log(set_name, target, seed, first, folder) as report:
                make_refreshed(
                    *made,
                    distilling.model_copy(update={"epochs": first}),
                    self.profile.k,
                    seed,
                    folder,
                    report,
                )

        stage = f"retriever/{set_name}"
        upstream = {name: self.store.key(name) for name in self.seen_by(set_name, target)}
        record = {
            "distill": distilling.model_dump(exclude={"seeds"}),
            "attention": self.profile.attention.model_dump(),
            "epochs": first,
            "seed": seed,
        }
        other.opened[stage] = other.store.stage(
            stage, make, record, upstream, [make_refreshed, Lab.loss, Lab.target, Lab.scores]
        )
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
