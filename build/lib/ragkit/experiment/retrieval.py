"""The first half of a run as stages: question sets, the initial retriever, its vectors and index, and the candidates that it finds."""

from __future__ import annotations

from ragkit.errors import NounsError

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ragkit.data import questions as corpora
from ragkit.models import device as fleet
from ragkit.models import index
from ragkit.indicators import nouns
from ragkit.data.questions import Corpus
from ragkit.models.index import Index
from ragkit.data.passages import Passage
from ragkit.profile import Profile, QuestionSet, WorldSet, load_profile
from ragkit.models.retriever import Retriever
from ragkit.experiment.stages import make_candidates, make_corpus, make_index, make_nouns, make_retriever, make_vectors, model_hashes
from ragkit.experiment.store import Store, link_stage
from ragkit.models.vectors import Vectors

SEARCH = ("corpus", "retriever", "vectors", "index", "candidates")  # the stages from the question set to the initial candidates


class Retrieval:
    """One run: a profile, its folder, and its stages up to the candidates. Asking for a thing makes what is missing."""

    def __init__(self, profile: str | Profile = "tiny", runs: Path | str = "runs") -> None:
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        fleet.start(self.profile.machine, self.profile.threads)
        self.store = Store(Path(runs) / self.profile.name)
        self.opened: dict[str, Path] = {}
        self.elsewhere: dict[str, str] = {}  # keys of stages that lie in another run's folder
        self.before: Any = None  # the run before an index refresh, whose looks at the same candidates are kept
        self.corpora: dict[str, Corpus] = {}

    @cached_property
    def sets(self) -> dict[str, QuestionSet]:
        return {s.name: s for s in self.profile.sets}

    def open(self, name: str, make: Any, settings: Any, upstream: list[str], code: list[Any]) -> Path:
        """A stage's folder; within one session it is checked once."""
        if name not in self.opened:
            keys = {other: self.key(other) for other in upstream}
            self.opened[name] = self.store.stage(name, make, settings, keys, code)
        return self.opened[name]

    def key(self, name: str) -> str:
        """The key of a stage that is made, wherever it lies."""
        return self.elsewhere.get(name) or self.store.key(name)

    def corpus(self, set_name: str) -> Corpus:
        """Passages and questions of a set."""
        if set_name not in self.corpora:
            settings, twin = self.sets[set_name], self.profile.twin(set_name)
            if twin:
                self.corpus(twin)
            same = [f"corpus/{twin}"] if twin else []
            record = {**settings.model_dump(), "contents": corpora.input_hashes(settings)}
            folder = self.open(f"corpus/{set_name}", lambda f: make_corpus(settings, f, *(self.opened[one] for one in same)), record, same, [make_corpus])
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

    def twin(self, set_name: str) -> str | None:
        """The set whose vectors and index serve this one too; none once its retriever has learnt."""
        return None if self.before else self.profile.twin(set_name)

    def vectors(self, set_name: str) -> Vectors:
        """The initial retriever's vectors of all passages."""
        folder, settings, twin = self._retriever_folder(set_name), self.profile.index, self.twin(set_name)
        if twin:
            self.vectors(twin)

        def make(place: Path) -> None:
            if twin:
                link_stage(self.opened[f"vectors/{twin}"], place)
            else:
                make_vectors(self.corpus(set_name), Retriever.load(str(folder / "model"), self.profile.retriever), settings, place)

        upstream = [f"retriever/{set_name}", *([f"vectors/{twin}"] if twin else [])]
        return Vectors(self.open(f"vectors/{set_name}", make, settings.model_dump(include={"dtype", "shard"}), upstream, [make_vectors]))

    def index(self, set_name: str) -> Index:
        """What searches them."""
        vectors, settings, seed, twin = self.vectors(set_name), self.profile.index, self.profile.seed, self.twin(set_name)
        record = settings.model_dump(exclude={"dtype", "shard", "probes", "candidates"}) if settings.kind != "exact" else {"kind": "exact"}
        if twin:
            self.index(twin)

        def make(place: Path) -> None:
            if twin:
                link_stage(self.opened[f"index/{twin}"], place)
            else:
                make_index(vectors, settings, seed, place)

        upstream = [f"vectors/{set_name}", *([f"index/{twin}"] if twin else [])]
        return index.open_index(vectors, settings, self.open(f"index/{set_name}", make, record | {"seed": seed}, upstream, [make_index]))

    def candidates(self, set_name: str) -> dict[str, NDArray[np.int64]]:
        """The first 20 passages of each question, by part `[questions, 20]`, as the initial retriever finds them."""
        passages, record = self.index(set_name), self.profile.index.model_dump(include={"kind", "probes", "candidates"})

        def make(folder: Path) -> None:
            make_candidates(self.corpus(set_name), self.retriever(set_name), passages, folder)

        folder = self.open(f"candidates/{set_name}", make, record, [f"retriever/{set_name}", f"index/{set_name}"], [make_candidates])
        return load_file(folder / "candidates.safetensors")

    def example(self, set_name: str, part: str) -> int:
        """The place of the first question of a part that finds a gold passage and others, for a close look; 0 if there is none."""
        k = self.profile.k
        rows, questions = self.candidates(set_name)[part][:, :k], self.corpus(set_name).questions[part]
        found = (len(set(row.tolist()) & set(self.corpus(set_name).gold(q, row.tolist()))) for q, row in zip(questions, rows, strict=True))
        return next((place for place, golds in enumerate(found) if 0 < golds < k), 0)

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
