"""The experiment, declared once: what the stages of a profile are made of, kind by kind (they stand
in `assets/kinds.yaml`; `wanted` lists a run's). Choices taken otherwise are further stages."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ragkit.data.corpus import passage_count, passage_settings
from ragkit.data.files import contents
from ragkit.data.worlds import size
from ragkit.distillation import targets
from ragkit.distillation.targets import CLOZES, ENCODER_DECODER, READERS, UNTAUGHT, teacher_of
from ragkit.experiment.provenance import finder_state, model_files
from ragkit.experiment.store import KINDS, Stage
from ragkit.profile import Profile, varied
from ragkit.settings import WorldSet, derived_seed

# The rankings of systems without Step 2; of no system, the initial one's.
UNLEARNT = dict.fromkeys(("", "closed book", "initial"), "candidates") | {"BM25": "bm25"}
# Of the reader's section, what matters where it only reads; the rest is Step 1's.
READING = ["model", "revision", "context", "dtype", "at_once", "answer_tokens", "layout"]
READING += ["chat", "answer"]


@dataclass(frozen=True)
class Of:
    """What a stage is of: a set, maybe a reader, its order (`targets.ROLES`), a target, a seed."""

    set_name: str
    which: str = ""
    order: str = ""
    target: str = ""
    seed: int = 0


class Graph:
    """All stages of one profile; `sets` by name, `targets` of the main table with what they are.
    Closeness is measured in the embeddings of the reader of `base`, by default the profile's."""

    def __init__(self, profile: Profile, note: str = "", base: Profile | None = None) -> None:
        self.profile, self.note, self.base = profile, note, base or profile
        self.sets = {one.name: one for one in profile.sets}
        self.has_clozes = all(isinstance(one, WorldSet) for one in profile.sets)
        self.trains_retriever = profile.retriever.model == "embedded"
        lacking: tuple[str, ...] = () if self.has_clozes else CLOZES
        lacking += () if profile.encoder_decoder else (ENCODER_DECODER,)
        names = targets.TARGETS.items()
        self.targets = {name: told for name, told in names if not name.startswith(lacking)}
        own = {"weights": model_files(profile.reader.model), "state": finder_state(profile.nouns)}
        own["base_weights"] = model_files(self.base.reader.model)
        self.common = profile.model_dump(mode="json") | own | {"shuffle_seed": profile.seed}
        for name in ("stage", "varied", "again"):
            setattr(self, name, cache(getattr(self, name)))  # each is made once

    def varied(self, variation: str) -> "Graph":
        """The graph with one choice taken otherwise."""
        return Graph(varied(self.profile, variation), f" ({variation})")

    def again(self, seed: int) -> "Graph":
        """The graph whose Step 1 runs with another seed: other training worlds, another order."""
        changed = self.profile.model_copy(update={"step1_seeds": (seed,)})
        return Graph(changed, f" (Step 1 seed {seed})")

    def passed_over(self, set_name: str) -> Iterator["Graph"]:
        """The graphs of a world's earlier draws, where its seed follows from today's rules."""
        one = self.sets[set_name]
        if isinstance(one, WorldSet) and one.seed == derived_seed(one.world, one.draw):
            for draw in range(one.draw):
                earlier = WorldSet(**dict(one) | {"seed": "rules", "draw": draw})
                changed = self.profile.model_copy(update={"sets": (earlier,)})
                yield Graph(changed, f" (draw {draw})")

    def readers(self) -> list[str]:
        """Every decoder that is looked at: before Step 1, on the way, and after it."""
        steps = [f"step {step}" for step in self.profile.reader.kept_steps]
        return [*self.asked()[::2], *steps, *self.asked()[1::2]]

    def asked(self) -> list[str]:
        """Both regimes' readers in every way that they are asked."""
        return [*READERS, *(CLOZES if self.has_clozes else ())]

    def seeds(self, target: str) -> tuple[int, ...]:
        """Those of Step 2 for a target: all in the main table, one for readers on the way."""
        return self.profile.distill.seeds[: None if target in self.targets else 1]

    def system(self, set_name: str, which: str, target: str = "") -> Of:
        """A reader with the passages that a target's first retriever finds, or the initial one."""
        seed = self.profile.distill.seeds[0] if target else 0
        return Of(set_name, which, target=target, seed=seed)

    def has_nouns(self, set_name: str) -> bool:
        """Whether a noun finder is at hand for a set; the embedded one knows worlds only."""
        in_world = isinstance(self.sets[set_name], WorldSet)
        return in_world if self.profile.nouns == "embedded" else bool(self.common["state"])

    def stage(self, kind: str, of: Of) -> Stage:
        """The stage of a kind; asking for it makes nothing."""
        seed = f"seed {of.seed}" if of.target or kind == "answers" else ""
        what = ", ".join(filter(None, (of.target, of.which, of.order, seed)))
        name = "/".join(filter(None, (kind, of.set_name, what))) + self.note
        maker, settings = f"ragkit.{KINDS[kind]['module']}:make_{kind}", self.settings(kind, of)
        roles = KINDS[kind].get("inputs", "").split()
        inputs = {role: one for role in roles if (one := self.input(role, of)) is not None}
        inputs |= self.looks(of) if kind == "step2" else {}
        machine = {"device": self.profile.device, "threads": self.profile.threads}
        units = {KINDS[kind]["unit"]: self.units(kind, of)}
        return Stage(kind, name, maker, settings, inputs, machine, units)

    def input(self, role: str, of: Of) -> Stage | None:
        """The stage that stands for a role of a kind's inputs; None where there is nothing."""
        after = Of(of.set_name)
        match role:
            case "nouns" if not self.has_nouns(of.set_name):
                return None
            case "step1" if of.which in UNTAUGHT:
                return None
            case "step1":
                after = replace(after, which=of.which if of.which == ENCODER_DECODER else "")
            case "ranking" if of.target not in UNLEARNT:
                return self.step2(of.set_name, of.target, of.seed)
            case "ranking":
                role = UNLEARNT[of.target]
            case "tokens":
                after = of
            case "contextual":
                after = replace(of, which="")
        return self.stage(role, after)

    def looks(self, of: Of) -> dict[str, Stage]:
        """A reader's looks that a target is made of, by role (`targets.ROLES`); controls: none."""
        which, signal = teacher_of(of.target) or ("", "")
        seen = Of(of.set_name, which)
        if signal not in targets.BY_ATTENTION:
            kinds = {"LOOP": "loop", "perplexity": "alone", "EMDR2": "alone"}
            return {kinds[signal]: self.stage(kinds[signal], seen)} if which else {}
        settings = targets.attention_of(of.target, self.profile.attention)
        orders = {o: replace(seen, order=o) for o in targets.LOOKS[settings.order]}
        looks = {order: self.stage("teacher", one) for order, one in orders.items()}
        if settings.heads == "chosen":
            looks["heads"] = self.stage("heads", Of(of.set_name, which, "rank"))
        return looks

    def settings(self, kind: str, of: Of) -> dict[str, Any]:
        """A kind's settings as JSON values."""
        one, number = self.sets[of.set_name], self.number(kind, of)
        known = vars(of) | self.common | {"set": one.model_dump(mode="json")}
        known |= {"world": getattr(one, "world", None), "closed_book": of.target == "closed book"}
        known |= {"questions": number, "answered": number, "part": KINDS[kind].get("part")}
        known["base"] = self.base.reader.model_dump(mode="json", include={*READING})
        if of.which == ENCODER_DECODER:
            same = {"answer": self.profile.reader.answer}  # closeness is to one answer
            known |= {"which": READERS[1], "reader": known["encoder_decoder"] | same}
        match kind:
            case "passages":
                known |= passage_settings(one)
            case "questions":
                known["contents"] = contents(getattr(one, "questions", None))
            case "retriever":
                model = self.profile.retriever.model
                known["weights"] = {} if self.trains_retriever else model_files(model)
            case "vectors":
                known["index"] = {key: known["index"][key] for key in ("dtype", "shard")}
            case "step1":
                known["seed"] = self.profile.step1_seeds[0]
                known["questions"] = None if known["world"] else self.profile.distill.questions
                known["weights"] = model_files(known["reader"]["model"])
            case "step2":
                own = {key: one for key, one in known["distill"].items() if key != "seeds"}
                known |= {"distill": own, "seed": of.seed}
        if kind != "step1":
            known["reader"] = {key: known["reader"][key] for key in READING}
        return {name: known[name] for name in KINDS[kind].get("settings", "").split()}

    def number(self, kind: str, of: Of) -> int:
        """How many questions a stage asks or looks at: of one part, or of all."""
        profile, one = self.profile, self.sets[of.set_name]
        if not (part := KINDS[kind].get("part")):
            return one.distill + one.dev + one.test
        most = {"distill": profile.distill.questions, "test": profile.indicators.questions}
        if KINDS[kind]["unit"] == "answers":
            most[part] = profile.evaluate.answered
        return min(most.get(part, one.dev), getattr(one, part))

    def units(self, kind: str, of: Of) -> int:
        """A stage's units of work."""
        match KINDS[kind]["unit"]:
            case "passages":
                one = self.sets[of.set_name]
                return size(one) if isinstance(one, WorldSet) else passage_count(one)
            case "crop steps":
                return self.profile.retriever.crop_steps if self.trains_retriever else 0
            case "prompts":
                reader = self.settings(kind, of)["reader"]
                return int(reader["steps"] * reader["batch"])
        times = {"premises": 4, "step2": self.profile.distill.epochs}
        return self.number(kind, of) * times.get(kind, 1)

    def step2(self, set_name: str, target: str, seed: int) -> Stage:
        """Step 2 for a target and seed."""
        return self.stage("step2", Of(set_name, target=target, seed=seed))
