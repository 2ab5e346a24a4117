"""How a notebook opens the experiment: a run, and its stages as the things that they hold. Asking
for one makes what is missing. Nothing here loads torch; `models` opens the models."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.corpus import Asked, Corpus, Passage, Question
from ragkit.distillation import targets
from ragkit.errors import NounsError, ProfileError
from ragkit.experiment.graph import Graph, Of
from ragkit.experiment.store import Stage, Store, fingerprint
from ragkit.profile import Profile, load_profile

TAKEN = ("course", "bench")  # folders below `runs/` that are no runs
FIGURES = "RAGKIT_FIGURES"  # names the folder that a notebook's figures go to
Places = NDArray[np.int64]  # of passages
Curve = list[dict[str, float]]  # of Step 2: a row a look at dev


def changed_profile(name_or_path: str, changes: Sequence[str]) -> Profile:
    """A profile with changes made, under a name of its own: its run replaces no other."""
    profile = load_profile(name_or_path, changes)
    if changes:
        named = f"{profile.name}-{fingerprint(sorted(changes))[:6]}"
        profile = profile.model_copy(update={"name": named})
    if profile.name in TAKEN:
        why = "that folder below the runs is taken. Give it another name."
        raise ProfileError(f"A profile cannot be named {profile.name!r}: {why}")
    return profile


def read_json(file: Path) -> Any:
    """What a stage's JSON file holds."""
    return json.loads(file.read_text("utf8"))


class Lab:
    """One run: profile, folder, store and graph, with `sets`, `targets`, `readers`; figures and
    tables go to `figures`. `status` says what happened to each stage opened (`Store.status`)."""

    def __init__(self, profile: str | Profile = "tiny", runs: Path | str = "runs") -> None:
        self.profile = profile if isinstance(profile, Profile) else changed_profile(profile, ())
        self.runs, self.folder = Path(runs), Path(runs) / self.profile.name
        self.base = self.profile.name.partition("-")[0]  # without what names a change of it
        self.figures = Path(os.environ.get(FIGURES) or self.folder / "figures")
        self.store, self.graph = Store(self.folder), Graph(self.profile)
        self.status, self.sets = self.store.status, self.graph.sets
        self.targets, self.readers = self.graph.targets, self.graph.readers
        self.corpora: dict[str, Corpus] = {}

    def open(self, kind: str, set_name: str, which: str = "") -> Path:
        """The folder of a kind of stage of a set, and of a reader; made if it is missing."""
        return self.open_stage(self.graph.stage(kind, Of(set_name, which)))

    def open_stage(self, stage: Stage) -> Path:
        """A stage's folder, made if it is missing."""
        return self.store.open(stage)

    def with_graph(self, graph: Graph) -> "Lab":
        """This lab's store and sets with another graph: `graph.varied(...)`, `graph.again(...)`."""
        other = copy.copy(self)
        other.graph, other.profile = graph, graph.profile
        return other

    def corpus(self, set_name: str) -> Corpus:
        """Passages and questions of a set; first that answer by which the reader is scored."""
        key = self.graph.stage("questions", Of(set_name)).key  # `with_graph` may be of another draw
        if key not in self.corpora:
            places = (self.open(kind, set_name) for kind in ("passages", "questions"))
            corpus = self.corpora[key] = Corpus.load(set_name, *places)
            if self.profile.reader.answer == "found":
                for part, rows in self.candidates(set_name).items():
                    asked = Asked(corpus, corpus.questions[part], rows[:, : self.profile.k])
                    corpus.questions[part] = asked.scored(vars(self.profile.reader)).questions
        return self.corpora[key]

    def candidates(self, set_name: str, by: str = "candidates") -> dict[str, Places]:
        """By part, each question's first 20 passages `[n, 20]`, the initial ones or by `bm25`."""
        return load_file(self.open(by, set_name) / "candidates.safetensors")

    def found(self, set_name: str, part: str) -> list[list[Passage]]:
        """The k passages of each question of a part, by the initial retriever."""
        passages, rows = self.corpus(set_name).passages, self.candidates(set_name)[part]
        return [[passages[i] for i in row[: self.profile.k]] for row in rows]

    def example(self, set_name: str, part: str) -> int:
        """The first question (of distill: that a teacher reads) with gold and others; or 0."""
        corpus, k, most = self.corpus(set_name), self.profile.k, self.profile.distill.questions
        rows = self.candidates(set_name)[part][: most if part == "distill" else None, :k].tolist()
        for place, (question, row) in enumerate(zip(corpus.questions[part], rows, strict=False)):
            if 0 < len(set(row) & set(corpus.gold(question, row))) < k:
                return place
        return 0

    def noun_spans(self, set_name: str, part: str) -> list[list[tuple[int, int]]]:
        """Start and end of the nouns of a part's questions, in characters; NounsError without."""
        if not self.graph.has_nouns(set_name):
            told = f"No noun finder for the questions of {set_name}: {self.profile.nouns!r} is not "
            told += "here, or knows the embedded worlds only. Name a spaCy pipeline (python -m "
            raise NounsError(f"{told}spacy download en_core_web_sm) or its folder under nouns.")
        return read_json(self.open("nouns", set_name) / "spans.json")[part]

    def look(self, set_name: str, which: str, order: str = "rank") -> dict[str, NDArray[Any]]:
        """`teacher.look` of distill's questions in an order, or dev's in rank order (`heads`)."""
        kind, shown = ("heads", "rank") if order == "heads" else ("teacher", order)
        stage = self.graph.stage(kind, Of(set_name, which, shown))
        return load_file(self.open_stage(stage) / "scores.safetensors")

    def asked(self, set_name: str) -> tuple[list[Question], Places]:
        """The questions for distillation and their candidates `[questions, k]`."""
        n, k = self.profile.distill.questions, self.profile.k
        questions = self.corpus(set_name).questions["distill"][:n]
        return questions, self.candidates(set_name)["distill"][: len(questions), :k]

    def scores(self, set_name: str, target: str) -> NDArray[np.float64]:
        """What a target is made of `[questions, k]`: a reader's scores, or a control's."""
        looks = self.graph.looks(Of(set_name, target=target))
        folders = {role: self.open_stage(stage) for role, stage in looks.items()}
        asked = Asked(self.corpus(set_name), *self.asked(set_name))
        return targets.scores_of(target, targets.read_looks(folders), asked, self.profile.attention)

    def target(self, set_name: str, target: str) -> NDArray[np.float64]:
        """A target's distributions over the candidates `[questions, k]`."""
        distill, seed = self.profile.distill, self.profile.seed
        return targets.target_of(target, self.scores(set_name, target), distill, seed)

    def distilled(self, set_name: str, target: str, seed: int) -> tuple[Places, Curve]:
        """Step 2: the test ranking `[questions, 20]`, and the curve over epochs."""
        folder = self.open_stage(self.graph.step2(set_name, target, seed))
        ranking = load_file(folder / "ranking.safetensors")["test"]
        return ranking, read_json(folder / "curve.json")
