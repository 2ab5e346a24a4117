"""The stages from the question sets to what the readers see of the passages found.

Each method names one stage: its inputs, the settings that it depends on, its maker, its work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from ragkit.data.questions import question_settings
from ragkit.distillation.targets import TARGETS, UNTAUGHT
from ragkit.experiment.outside import finder_state, model_files, passage_count
from ragkit.experiment.store import Stage
from ragkit.profile import Profile, WorldSet, passage_settings

PROBED = 32  # questions of dev on which a probe measures the indicators
# Of the reader's section, what matters where it only reads; the rest is Step 1's.
READING = ("model", "revision", "context", "dtype", "at_once", "answer_tokens", "order")
Inputs = dict[str, Stage]
Made = TypeVar("Made")


def remembered(method: Callable[..., Made]) -> Callable[..., Made]:
    """A method of a graph that gives the same object for the same arguments."""

    @wraps(method)
    def once(self: Nodes, *arguments: Any) -> Made:
        asked = (method.__name__, *arguments)
        if asked not in self.made:
            self.made[asked] = method(self, *arguments)
        return self.made[asked]

    return once


class Nodes:
    """The stages from the question sets to what readers see; none is made by asking for it."""

    def __init__(self, profile: Profile, note: str = "") -> None:
        self.profile, self.note = profile, note
        self.made: dict[tuple[Any, ...], Any] = {}  # what `remembered` methods have given
        self.sets = {one.name: one for one in profile.sets}
        self.has_clozes = all(isinstance(one, WorldSet) for one in profile.sets)

    def readers(self) -> list[str]:
        """Every reader that is looked at: before Step 1, on the way, and after it."""
        steps = [f"step {step}" for step in self.profile.reader.kept_steps]
        return [*self.untaught, *steps, "fine-tuned"]

    @property
    def untaught(self) -> tuple[str, ...]:
        """The readers before Step 1: one model, asked in two ways where a set has clozes."""
        return UNTAUGHT if self.has_clozes else UNTAUGHT[:1]

    @property
    def targets(self) -> dict[str, str]:
        """The targets of the main table with what they are."""
        return {
            name: what
            for name, what in TARGETS.items()
            if self.has_clozes or not name.startswith("weaker prompt")
        }

    def has_nouns(self, set_name: str) -> bool:
        """Whether a noun finder is at hand for a set."""
        model = self.profile.nouns.model
        if model == "embedded":
            return isinstance(self.sets[set_name], WorldSet)
        return bool(finder_state(model))

    def stage(
        self, name: tuple[str, ...], maker: str, settings: Mapping[str, Any], inputs: Inputs,
        units: Mapping[str, float],
    ) -> Stage:  # fmt: skip
        machine = {
            "machine": self.profile.machine.model_dump(mode="json"),
            "threads": self.profile.threads,
        }
        whole = "/".join(part for part in name if part) + self.note
        return Stage(name[0], whole, f"ragkit.{maker}", settings, inputs, machine, units)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the profile as JSON values."""
        return getattr(self.profile, name).model_dump(mode="json")

    # From a question set to what the initial retriever finds

    @remembered
    def passages(self, set_name: str) -> Stage:
        settings = self.sets[set_name]
        payload, units = {"set": passage_settings(settings)}, {"passages": passage_count(settings)}
        return self.stage(("passages", set_name), "data.sets:make_passages", payload, {}, units)

    @remembered
    def questions(self, set_name: str) -> Stage:
        settings, inputs = self.sets[set_name], {"passages": self.passages(set_name)}
        payload, units = {"set": question_settings(settings)}, {"questions": self.asked(set_name)}
        maker = "data.sets:make_questions"
        return self.stage(("questions", set_name), maker, payload, inputs, units)

    def asked(self, set_name: str, part: str = "") -> int:
        """Questions of a part of a set, or of all."""
        settings = self.sets[set_name]
        parts = {name: getattr(settings, name) for name in ("distill", "dev", "test")}
        return parts[part] if part else sum(parts.values())

    @remembered
    def retriever(self, set_name: str) -> Stage:
        settings = self.section("retriever")
        trained = settings["model"] == "embedded"
        payload = {
            "retriever": settings,
            "seed": self.profile.seed,
            "world": getattr(self.sets[set_name], "world", None) if trained else None,
            "weights": {} if trained else model_files(settings["model"]),
        }
        inputs = {"passages": self.passages(set_name)} if trained else {}
        units = {"crop steps": settings["crop_steps"] if trained else 0}
        maker = "models.retriever:make_retriever"
        return self.stage(("retriever", set_name), maker, payload, inputs, units)

    @remembered
    def vectors(self, set_name: str, retriever: Stage | None = None) -> Stage:
        inputs = {
            "passages": self.passages(set_name),
            "retriever": retriever or self.retriever(set_name),
        }
        index = {name: self.section("index")[name] for name in ("dtype", "shard")}
        payload = {"retriever": self.section("retriever"), "index": index}
        units = {"passages": passage_count(self.sets[set_name])}
        maker = "models.index:make_vectors"
        return self.stage(("vectors", set_name), maker, payload, inputs, units)

    @remembered
    def index(self, set_name: str, retriever: Stage | None = None) -> Stage:
        payload = {"index": self.section("index"), "seed": self.profile.seed}
        inputs = {"vectors": self.vectors(set_name, retriever)}
        units = {"passages": passage_count(self.sets[set_name])}
        return self.stage(("index", set_name), "models.index:make_index", payload, inputs, units)

    def search_inputs(self, set_name: str, retriever: Stage | None = None) -> Inputs:
        """What a search needs: passages and questions, a retriever, and vectors with their index.

        They are those of the initial retriever as long as only the query side is trained.
        """
        indexed = retriever if self.profile.distill.side == "both" else None
        return {
            "passages": self.passages(set_name),
            "questions": self.questions(set_name),
            "retriever": retriever or self.retriever(set_name),
            "vectors": self.vectors(set_name, indexed),
            "index": self.index(set_name, indexed),
        }

    @remembered
    def candidates(self, set_name: str, retriever: Stage | None = None) -> Stage:
        payload = {"retriever": self.section("retriever"), "index": self.section("index")}
        inputs, units = self.search_inputs(set_name, retriever), {"questions": self.asked(set_name)}
        maker = "models.index:make_candidates"
        return self.stage(("candidates", set_name), maker, payload, inputs, units)

    @remembered
    def bm25(self, set_name: str) -> Stage:
        inputs = {"passages": self.passages(set_name), "questions": self.questions(set_name)}
        units = {"passages": passage_count(self.sets[set_name])}
        return self.stage(("bm25", set_name), "models.index:make_bm25", {}, inputs, units)

    @remembered
    def nouns(self, set_name: str) -> Stage:
        model = self.profile.nouns.model
        payload = {
            "nouns": model,
            "state": finder_state(model),
            "seed": self.profile.seed,
            "world": getattr(self.sets[set_name], "world", None),
        }
        inputs, units = {"questions": self.questions(set_name)}, {"questions": self.asked(set_name)}
        return self.stage(
            ("nouns", set_name), "indicators.nouns:make_nouns", payload, inputs, units
        )

    # Readers, and what they see and say

    def reader_settings(self) -> dict[str, Any]:
        """How a reader reads, with its files' hashes where it lies in a local folder."""
        reading = {name: self.section("reader")[name] for name in READING}
        return {"reader": reading, "weights": model_files(self.profile.reader.model)}

    def found_inputs(self, set_name: str, candidates: Stage | None = None) -> Inputs:
        """Questions with the passages that were found for them."""
        return {
            "passages": self.passages(set_name),
            "questions": self.questions(set_name),
            "candidates": candidates or self.candidates(set_name),
        }

    @remembered
    def style(self, set_name: str) -> Stage:
        answered = min(self.profile.evaluate.answered, self.asked(set_name, "dev"))
        payload = {
            **self.reader_settings(),
            "answered": answered,
            "k": self.profile.k,
            "clozes": self.has_clozes,
        }
        inputs, units = self.found_inputs(set_name), {"answers": answered * (1 + self.has_clozes)}
        return self.stage(("style", set_name), "models.answers:make_style", payload, inputs, units)

    @remembered
    def step1(self, set_name: str) -> Stage:
        profile, settings = self.profile, self.sets[set_name]
        payload = {
            **self.reader_settings(),
            "reader": self.section("reader"),
            "set": settings.model_dump(mode="json"),
            "retriever": self.section("retriever"),
            "k": profile.k,
            "seed": profile.step1_seeds[0],
        }
        inputs = self.found_inputs(set_name) | {"retriever": self.retriever(set_name)}
        units = {"prompts": profile.reader.steps * profile.reader.batch}
        return self.stage(("step1", set_name), "models.step1:make_step1", payload, inputs, units)

    def reader_inputs(self, set_name: str, which: str) -> Inputs:
        """Where a reader comes from: the way it is asked, or Step 1."""
        if which in UNTAUGHT:
            return {"style": self.style(set_name)}
        return {"step1": self.step1(set_name)}

    def looked(
        self, kind: str, set_name: str, which: str, n: int, candidates: Stage | None = None
    ) -> Stage:
        """A reader's look at the first n questions: kind `teacher`, `loop` or `tokens`."""
        room = "indicators.tokens" if kind == "tokens" else "distillation.teacher"
        payload = {**self.reader_settings(), "which": which, "questions": n, "k": self.profile.k}
        inputs = self.found_inputs(set_name, candidates) | self.reader_inputs(set_name, which)
        maker = f"{room}:make_{kind}"
        return self.stage((kind, set_name, which), maker, payload, inputs, {"questions": n})

    @remembered
    def teacher(self, set_name: str, which: str, candidates: Stage | None = None) -> Stage:
        n = min(self.profile.distill.questions, self.asked(set_name, "distill"))
        return self.looked("teacher", set_name, which, n, candidates)

    @remembered
    def loop(self, set_name: str, which: str, candidates: Stage | None = None) -> Stage:
        n = min(self.profile.distill.questions, self.asked(set_name, "distill"))
        return self.looked("loop", set_name, which, n, candidates)

    def indicated(self, set_name: str) -> int:
        """Test questions that the indicators look at."""
        return min(self.profile.indicators.questions, self.asked(set_name, "test"))

    @remembered
    def tokens(self, set_name: str, which: str) -> Stage:
        return self.looked("tokens", set_name, which, self.indicated(set_name))

    def noun_inputs(self, set_name: str) -> Inputs:
        return {"nouns": self.nouns(set_name)} if self.has_nouns(set_name) else {}

    @remembered
    def contextual(self, set_name: str) -> Stage:
        n = self.indicated(set_name)
        payload = {**self.reader_settings(), "questions": n, "k": self.profile.k}
        inputs = self.found_inputs(set_name) | self.noun_inputs(set_name)
        maker = "indicators.closeness:make_contextual"
        return self.stage(("contextual", set_name), maker, payload, inputs, {"questions": n})

    @remembered
    def closeness(self, set_name: str, which: str) -> Stage:
        n = self.indicated(set_name)
        payload = {
            **self.reader_settings(),
            "which": which,
            "questions": n,
            "k": self.profile.k,
            "retriever": self.section("retriever"),
            "seed": self.profile.seed,
        }
        inputs = self.found_inputs(set_name) | self.noun_inputs(set_name)
        inputs |= self.reader_inputs(set_name, which) | {"style": self.style(set_name)}
        inputs |= {
            "tokens": self.tokens(set_name, which),
            "contextual": self.contextual(set_name),
            "retriever": self.retriever(set_name),
        }
        maker = "indicators.closeness:make_closeness"
        return self.stage(("closeness", set_name, which), maker, payload, inputs, {"questions": n})

    @remembered
    def probe(self, set_name: str, which: str) -> Stage:
        payload = {
            **self.reader_settings(),
            "which": which,
            "questions": PROBED,
            "k": self.profile.k,
            "attention": self.section("attention"),
            "share": self.profile.indicators.share,
        }
        inputs = self.found_inputs(set_name) | self.noun_inputs(set_name)
        inputs |= {"style": self.style(set_name)} | self.reader_inputs(set_name, which)
        maker, units = "indicators.closeness:make_probe", {"questions": PROBED}
        return self.stage(("probe", set_name, which), maker, payload, inputs, units)
