"""How a notebook opens the experiment: a run, and its stages as the things that they hold.

Asking for a thing makes what is missing. Nothing here loads torch until a model is asked for.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data.asked import Asked
from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.distillation import targets
from ragkit.distillation.targets import Scores
from ragkit.errors import NounsError, ProfileError
from ragkit.experiment.graph import Graph, Of
from ragkit.experiment.stages import stages
from ragkit.experiment.store import Stage, Store
from ragkit.profile import Profile, load_profile
from ragkit.settings import QuestionSet

TAKEN = ("course", "lab", "bench")  # folders below `runs/` that are no runs
OPENED = "RAGKIT_OPENED"  # names a file that takes down which stages a notebook opens
FIGURES = "RAGKIT_FIGURES"  # names the folder that a notebook's figures go to


def changed_profile(name_or_path: str, changes: Sequence[str]) -> Profile:
    """A profile with changes made, under a name of its own: its run replaces no other."""
    profile = load_profile(name_or_path, changes)
    if changes:
        digest = hashlib.sha256(json.dumps(sorted(changes)).encode()).hexdigest()[:6]
        profile = profile.model_copy(update={"name": f"{profile.name}-{digest}"})
    if profile.name in TAKEN:
        raise ProfileError(
            f"A profile cannot be named {profile.name!r}: that folder below the runs is taken. "
            "Give it another name."
        )
    return profile


class Lab:
    """One run: a profile, its folder, and its graph; `graph` may be one of the profile's others."""

    def __init__(
        self, profile: str | Profile = "tiny", runs: Path | str = "runs", graph: Graph | None = None
    ) -> None:
        asked = profile if isinstance(profile, Profile) else changed_profile(profile, ())
        self.graph = graph or Graph(asked)
        self.profile, self.runs = self.graph.profile, Path(runs)
        self.folder = self.runs / asked.name
        self.store = Store(self.folder)
        self.corpora: dict[str, Corpus] = {}

    @property
    def sets(self) -> dict[str, QuestionSet]:
        """The question sets by name."""
        return self.graph.sets

    @property
    def figures(self) -> Path:
        """Where figures and tables go."""
        return Path(os.environ.get(FIGURES) or self.folder / "figures")

    @property
    def status(self) -> dict[str, str]:
        """What happened to each stage that this process opened: `reused`, or `ran: ` and why."""
        return self.store.status

    @property
    def targets(self) -> dict[str, str]:
        """The targets of the main table, with what they are."""
        return self.graph.targets

    def readers(self) -> list[str]:
        """Every reader that is looked at, from before Step 1 to after it."""
        return self.graph.readers()

    def open(self, kind: str, set_name: str, which: str = "") -> Path:
        """The folder of a kind of stage of a set, and of a reader; made if it is missing."""
        return self.open_stage(self.graph.stage(kind, Of(set_name, which)))

    def open_stage(self, stage: Stage) -> Path:
        """A stage's folder, made if it is missing."""
        folder = self.store.open(stage)
        if noted := os.environ.get(OPENED):
            with open(noted, "a", encoding="utf8") as file:
                file.write(f"{json.dumps([stage.name, stage.key])}\n")
        return folder

    def varied(self, variation: str) -> "Lab":
        """The lab with one choice taken otherwise; it shares this one's stages."""
        return self._of(self.graph.varied(variation))

    def again(self, step1_seed: int) -> "Lab":
        """The lab whose Step 1 runs with another seed."""
        return self._of(self.graph.again(step1_seed))

    def _of(self, graph: Graph) -> "Lab":
        if graph is self.graph:
            return self
        other = Lab(self.profile.model_copy(update={"name": self.folder.name}), self.runs, graph)
        other.store = self.store
        return other

    # Questions, and what is found for them

    def corpus(self, set_name: str) -> Corpus:
        """Passages and questions of a set."""
        if set_name not in self.corpora:
            places = (self.open(kind, set_name) for kind in ("passages", "questions"))
            self.corpora[set_name] = Corpus.load(set_name, *places)
        return self.corpora[set_name]

    def candidates(self, set_name: str) -> dict[str, NDArray[np.int64]]:
        """The first 20 passages of each question by the initial retriever, by part `[n, 20]`."""
        return load_file(self.open("candidates", set_name) / "candidates.safetensors")

    def bm25(self, set_name: str) -> NDArray[np.int64]:
        """The first 20 passages of each test question by BM25 `[n, 20]`."""
        return load_file(self.open("bm25", set_name) / "candidates.safetensors")["test"]

    def found(
        self, set_name: str, part: str, ranking: NDArray[np.int64] | None = None
    ) -> list[list[Passage]]:
        """The k passages of each question of a part, by the initial retriever or a ranking."""
        passages = self.corpus(set_name).passages
        rows = self.candidates(set_name)[part] if ranking is None else ranking
        return [[passages[i] for i in row[: self.profile.k]] for row in rows]

    def example(self, set_name: str, part: str) -> int:
        """The first question of a part that finds a gold passage and others; 0 if there is none."""
        corpus, k = self.corpus(set_name), self.profile.k
        rows = self.candidates(set_name)[part][:, :k].tolist()
        for place, (question, row) in enumerate(zip(corpus.questions[part], rows, strict=True)):
            if 0 < len(set(row) & set(corpus.gold(question, row))) < k:
                return place
        return 0

    def noun_spans(self, set_name: str, part: str) -> list[list[tuple[int, int]]]:
        """Start and end, in characters, of the nouns of each question of a part.

        Raises NounsError, which says why, where no noun finder is at hand for this set.
        """
        spans = read_json(self._nouns(set_name) / "spans.json")[part]
        return [[(start, end) for start, end in question] for question in spans]

    def _nouns(self, set_name: str) -> Path:
        if not self.graph.has_nouns(set_name):
            model = self.profile.nouns.model
            why = (
                "the embedded one knows the embedded worlds only"
                if model == "embedded"
                else f"{model!r} is neither an installed spaCy package nor a pipeline's folder"
            )
            raise NounsError(
                f"No noun finder for the questions of {set_name}: {why}. Install one (python -m "
                "spacy download en_core_web_sm) and name it under nouns.model, or name a folder."
            )
        return self.open("nouns", set_name)

    # Models

    def start(self) -> None:
        """Takes the profile's device and threads for this process."""
        from ragkit.models import device  # it loads torch: only who asks for a model waits

        device.start(self.profile.machine, self.profile.threads)

    def retriever(self, set_name: str) -> Any:
        """The initial retriever (`ragkit.models.retriever.Retriever`)."""
        from ragkit.models.retriever import Retriever

        self.start()
        folder = self.open("retriever", set_name) / "model"
        return Retriever.load(str(folder), self.profile.retriever)

    def vectors(self, set_name: str) -> Any:
        """The initial retriever's vectors of all passages (`ragkit.models.index.Index`)."""
        from ragkit.models.index import Index

        return Index.open(self.open("vectors", set_name))

    def reader(self, set_name: str, which: str) -> Any:
        """One of `readers()` (`ragkit.models.reader.Reader`)."""
        from ragkit.models.fid import open_reader

        self.start()
        made = "style" if which in targets.UNTAUGHT else "step1"
        reading = self.graph.setting("reader", "tokens", Of(set_name, which))
        place = {kind: self.open(kind, set_name) for kind in ("passages", "questions", made)}
        return open_reader(place, {"reader": reading, "which": which})

    def style(self, set_name: str, which: str) -> str:
        """How a reader is asked: `question` or `cloze`."""
        if which not in targets.UNTAUGHT:
            return "question"
        return read_json(self.open("style", set_name) / "style.json")[which]

    # What readers see, and what is taught with it

    def teacher(self, set_name: str, which: str) -> dict[str, NDArray[np.float32]]:
        """All scores of one reader on the questions for distillation."""
        return load_file(self.open("teacher", set_name, which) / "scores.safetensors")

    def left_out(self, set_name: str, which: str) -> NDArray[np.float64]:
        """LOOP's scores of one reader on the questions for distillation `[questions, k]`."""
        scores = load_file(self.open("loop", set_name, which) / "scores.safetensors")
        return scores["loop"].astype(np.float64)

    def probes(self, set_name: str) -> dict[str, dict[str, float]]:
        """Both indicators of every reader on a few dev questions."""
        folders = {which: self.open("probe", set_name, which) for which in self.readers()}
        return {which: read_json(folder / "indicators.json") for which, folder in folders.items()}

    def asked(self, set_name: str) -> tuple[list[Question], NDArray[np.int64]]:
        """The questions for distillation and their candidates `[questions, k]`."""
        n, k = self.profile.distill.questions, self.profile.k
        questions = self.corpus(set_name).questions["distill"][:n]
        return questions, self.candidates(set_name)["distill"][: len(questions), :k]

    def _stored(self, set_name: str, target: str) -> Scores | None:
        """The stored scores of the reader that a target is made of; None for a control."""
        look = self.graph.look(Of(set_name, target=target))
        return load_file(self.open_stage(look["look"]) / "scores.safetensors") if look else None

    def scores(self, set_name: str, target: str) -> NDArray[np.float64]:
        """What a target is made of `[questions, k]`: a reader's scores, or a control's."""
        asked = Asked(self.corpus(set_name), *self.asked(set_name))
        stored = self._stored(set_name, target)
        return targets.scores_of(target, stored, asked, self.profile.attention)

    def target(self, set_name: str, target: str) -> NDArray[np.float64]:
        """A target's distributions over the candidates `[questions, k]`."""
        asked = Asked(self.corpus(set_name), *self.asked(set_name))
        stored, profile = self._stored(set_name, target), self.profile
        entropy, seed = profile.distill.entropy, profile.seed
        return targets.target_of(target, stored, asked, profile.attention, entropy, seed)

    def distilled(
        self, set_name: str, target: str, seed: int
    ) -> tuple[NDArray[np.int64], list[dict[str, float]]]:
        """Step 2: the test ranking `[questions, 20]`, and the curve over epochs.

        With index refreshes the curve is that of the last part.
        """
        folder = self.open_stage(self.graph.step2(set_name, target, seed))
        ranking = load_file(folder / "ranking.safetensors")["test"]
        return ranking, read_json(folder / "curve.json")

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage of the run, inputs first."""
        return stages(self.graph)


def read_json(file: Path) -> Any:
    """What a stage's JSON file holds."""
    return json.loads(file.read_text("utf8"))
