"""The experiment, declared once: what a stage of a profile is made of, for every kind (`kinds`).

Running, planning, the manifest, the report and the notebooks all walk these stages. A choice taken
otherwise (`Graph.varied`), another seed of Step 1 (`Graph.again`) and an index refresh are further
stages of it: those that they do not touch have the same key, and are the same stages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ragkit.data.questions import passage_settings, question_settings
from ragkit.distillation.targets import TARGETS, UNTAUGHT, teacher_of
from ragkit.experiment.kinds import KINDS
from ragkit.experiment.outside import finder_state, model_files, passage_count
from ragkit.experiment.store import Stage
from ragkit.profile import Profile, varied
from ragkit.settings import WorldSet

CEILING = "both sides"  # the variation under which the oracle shows how far Step 2 can go
PROBED = 32  # questions of dev on which a probe measures the indicators
# Of the reader's section, what matters where it only reads; the rest is Step 1's.
READING = ("model", "revision", "context", "dtype", "at_once", "answer_tokens", "order")
EMBEDDED = "embedded"


@dataclass(frozen=True)
class Of:
    """What one stage is of: a set, and where its kind asks for it a reader, a target, a seed.

    `start` is the stage whose retriever Step 2 goes on from after an index refresh (None: the
    initial one); `epochs` and `keep` belong to a part of Step 2.
    """

    set_name: str
    which: str = ""
    target: str = ""
    seed: int = 0
    start: Stage | None = None
    epochs: int = 0
    keep: bool = False


class Graph:
    """All stages of one profile."""

    def __init__(self, profile: Profile, note: str = "") -> None:
        self.profile, self.note = profile, note
        self.sets = {one.name: one for one in profile.sets}
        self.has_clozes = all(isinstance(one, WorldSet) for one in profile.sets)
        self.made: dict[Any, Any] = {}  # stages and other graphs by what was asked for

    def _once(self, asked: Any, make: Callable[[], Any]) -> Any:
        if asked not in self.made:
            self.made[asked] = make()
        return self.made[asked]

    def varied(self, variation: str) -> "Graph":
        """The graph with one choice taken otherwise."""
        changed = varied(self.profile, variation)
        return self._once(variation, lambda: Graph(changed, f" ({variation})"))

    def again(self, seed: int) -> "Graph":
        """The graph whose Step 1 runs with another seed: other training worlds, another order."""
        if seed == self.profile.step1_seeds[0]:
            return self
        changed = self.profile.model_copy(update={"step1_seeds": (seed,)})
        return self._once(seed, lambda: Graph(changed, f" (Step 1 seed {seed})"))

    def readers(self) -> list[str]:
        """Every reader that is looked at: before Step 1, on the way, and after it."""
        before = UNTAUGHT if self.has_clozes else UNTAUGHT[:1]
        steps = [f"step {step}" for step in self.profile.reader.kept_steps]
        return [*before, *steps, "fine-tuned"]

    @property
    def targets(self) -> dict[str, str]:
        """The targets of the main table with what they are."""
        has = self.has_clozes
        return {t: what for t, what in TARGETS.items() if has or not t.startswith(UNTAUGHT[1])}

    def has_nouns(self, set_name: str) -> bool:
        """Whether a noun finder is at hand for a set."""
        if self.profile.nouns.model == EMBEDDED:
            return isinstance(self.sets[set_name], WorldSet)
        return bool(finder_state(self.profile.nouns.model))

    # One stage

    def stage(self, kind: str, of: Of) -> Stage:
        """The stage of a kind; asking for it makes nothing."""
        return self._once((kind, of), lambda: self._stage(kind, of))

    def _stage(self, kind: str, of: Of) -> Stage:
        inputs: dict[str, Stage] = {}
        for role in KINDS[kind].inputs:
            inputs |= self.input(role, kind, of)
        settings = {name: self.setting(name, kind, of) for name in KINDS[kind].settings}
        profile, what = self.profile, ", ".join(filter(None, (of.target, of.which)))
        if kind in ("step2", "answers"):
            what += f", seed {of.seed}" + (f", first {of.epochs}" if of.keep else "")
        if of.start is not None:
            what = f"{what} after {of.start.name.split('/')[2].removesuffix(self.note)}".strip()
        name = "/".join(filter(None, (kind, of.set_name, what))) + self.note
        machine = {"machine": profile.machine.model_dump(mode="json"), "threads": profile.threads}
        units = {KINDS[kind].unit: self.units(kind, of)}
        return Stage(kind, name, f"ragkit.{KINDS[kind].maker}", settings, inputs, machine, units)

    def input(self, role: str, kind: str, of: Of) -> dict[str, Stage]:
        """The stages that stand for a role of a kind's inputs; none where there is nothing."""
        here = Of(of.set_name)
        if role == "crops":  # a retriever is trained on the passages, or comes from elsewhere
            trained = self.profile.retriever.model == EMBEDDED
            return {"passages": self.stage("passages", here)} if trained else {}
        if role == "by":
            made = "style" if of.which in UNTAUGHT else "step1"
            return {made: self.stage(made, here)}
        if role == "nouns":
            return {"nouns": self.stage("nouns", here)} if self.has_nouns(of.set_name) else {}
        if role == "look":
            return self.look(of)
        if role == "ranking":
            return {"ranking": self.ranking(of)}
        if role == "retriever" and of.start is not None:
            return {"retriever": of.start}
        if role in (
            "vectors",
            "index",
        ):  # stay the initial retriever's if only the query side learns
            learnt = self.profile.distill.side == "both" or kind in ("vectors", "index")
            return {role: self.stage(role, replace(here, start=of.start if learnt else None))}
        if role == "candidates":
            return {role: self.stage(role, replace(here, start=of.start))}
        return {role: self.stage(role, replace(here, which=of.which) if role == "tokens" else here)}

    def look(self, of: Of) -> dict[str, Stage]:
        """A reader's look that a target is made of; none for a control."""
        if (taught := teacher_of(of.target)) is None:
            return {}
        which, signal = taught
        kind = "loop" if signal == "LOOP" else "teacher"
        return {"look": self.stage(kind, Of(of.set_name, which, start=of.start))}

    def ranking(self, of: Of) -> Stage:
        """What a system finds: `closed book`, `BM25`, `initial` or a target."""
        if of.target in ("closed book", "initial"):
            return self.stage("candidates", Of(of.set_name))
        if of.target == "BM25":
            return self.stage("bm25", Of(of.set_name))
        return self.step2(of.set_name, of.target, of.seed)

    def setting(self, name: str, kind: str, of: Of) -> Any:
        """A setting of a kind as a JSON value."""
        profile, settings = self.profile, self.sets[of.set_name]
        match name:
            case "set" if kind == "passages":
                return passage_settings(settings)
            case "set" if kind == "questions":
                return question_settings(settings)
            case "set":
                return settings.model_dump(mode="json")
            case "reader" if kind != "step1":
                return {key: self.section("reader")[key] for key in READING}
            case "index" if kind == "vectors":
                return {key: self.section("index")[key] for key in ("dtype", "shard")}
            case "distill":
                whole = self.section("distill") | {"epochs": of.epochs}
                return {key: value for key, value in whole.items() if key != "seeds"}
            case "weights":
                model = profile.retriever.model if kind == "retriever" else profile.reader.model
                trained = kind == "retriever" and model == EMBEDDED
                return {} if trained else model_files(model)
            case "world":
                elsewhere = kind == "retriever" and profile.retriever.model != EMBEDDED
                return None if elsewhere else getattr(settings, "world", None)
            case "nouns":
                return profile.nouns.model
            case "state":
                return finder_state(profile.nouns.model)
            case "seed":
                own = {"step1": profile.step1_seeds[0], "step2": of.seed}
                return own.get(kind, profile.seed)
            case "shuffle_seed":
                return profile.seed
            case "k":
                return profile.k
            case "share":
                return profile.indicators.share
            case "clozes":
                return self.has_clozes
            case "closed_book":
                return of.target == "closed book"
            case "which" | "target" | "keep":
                return getattr(of, name)
            case "questions" | "answered":
                return self.number(kind, of)
        return self.section(name)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the profile as JSON values."""
        return self._once(
            ("section", name), lambda: getattr(self.profile, name).model_dump(mode="json")
        )

    def number(self, kind: str, of: Of) -> int:
        """How many questions a stage asks or looks at."""
        profile, settings = self.profile, self.sets[of.set_name]
        match kind:
            case "teacher" | "loop" | "step2":
                return min(profile.distill.questions, settings.distill)
            case "tokens" | "contextual" | "closeness":
                return min(profile.indicators.questions, settings.test)
            case "style" | "premises":
                return min(profile.evaluate.answered, settings.dev)
            case "answers":
                return min(profile.evaluate.answered, settings.test)
            case "probe":
                return PROBED
        return settings.distill + settings.dev + settings.test

    def units(self, kind: str, of: Of) -> int:
        """A stage's units of work."""
        profile, unit = self.profile, KINDS[kind].unit
        if unit == "passages":
            return passage_count(self.sets[of.set_name])
        if unit == "crop steps":
            return profile.retriever.crop_steps if profile.retriever.model == EMBEDDED else 0
        if unit == "prompts":
            return profile.reader.steps * profile.reader.batch
        times = {"style": 1 + self.has_clozes, "premises": 4, "step2": of.epochs}
        return self.number(kind, of) * times.get(kind, 1)

    def step2(self, set_name: str, target: str, seed: int) -> Stage:
        """Step 2 for a target and seed; with index refreshes it is the last of several parts.

        At a refresh the retriever as it is looks for new candidates, and the reader looks at them.
        """
        of = Of(set_name, target=target, seed=seed, epochs=self.profile.distill.epochs)
        for left in range(self.profile.index_refreshes, 0, -1):
            part = of.epochs // (left + 1)
            start = self.stage("step2", replace(of, epochs=part, keep=True))
            of = replace(of, epochs=of.epochs - part, start=start)
        return self.stage("step2", of)
