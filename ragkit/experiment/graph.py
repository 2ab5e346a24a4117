"""The experiment, declared once: what the stages of a profile are made of, kind by kind.

The kinds stand in `assets/kinds.yaml`. Running, planning, the manifest, the report and the
notebooks all walk these stages. A choice taken otherwise (`Graph.varied`), another seed of Step 1
(`Graph.again`) and an index refresh are further stages; what they do not touch is the same stage.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from ragkit.data.corpus import passage_settings
from ragkit.data.files import contents
from ragkit.data.worlds import SPEC, relations
from ragkit.distillation.targets import READERS, TARGETS, UNTAUGHT, teacher_of
from ragkit.experiment.provenance import finder_state, model_files
from ragkit.experiment.store import KINDS, Stage
from ragkit.profile import Profile, varied
from ragkit.settings import QuestionSet, WorldSet, derived_seed

CEILING = "both sides"  # the variation under which the oracle shows how far Step 2 can go
TAUGHT_BY = ("attention", "perplexity")  # the signals that every reader teaches by
BESIDE = ("LOOP", "EMDR2")  # and those that only the two regimes' readers do
POOL, ROW, ROW_GZ = 50, 650, 220  # about: passages of a question's pool; bytes of one in a TSV
PROBED = 32  # questions of dev on which a probe measures the indicators
UNLEARNT = {"closed book": "candidates", "initial": "candidates", "BM25": "bm25"}  # their rankings
# Of the reader's section, what matters where it only reads; the rest is Step 1's.
READING = ("model", "revision", "context", "dtype", "at_once", "answer_tokens", "order")


@dataclass(frozen=True)
class Of:
    """What one stage is of: a set, and where its kind asks for it a reader, a target, a seed.
    `start` is the stage whose retriever Step 2 goes on from after an index refresh (None: the
    initial one); `epochs` and `keep` belong to a part of Step 2."""

    set_name: str
    which: str = ""
    target: str = ""
    seed: int = 0
    start: Stage | None = None
    epochs: int = 0
    keep: bool = False


def passage_count(settings: QuestionSet) -> int:
    """How many passages a set has, or about how many, before it is read."""
    if isinstance(settings, WorldSet):
        kinds = [*SPEC["worlds"][settings.world]["entities"]] * settings.entities
        facts = [kind for kind, _ in relations(settings.world)]  # the kinds take turns
        return settings.wordings_per_fact * sum(map(facts.count, kinds[: settings.entities]))
    if isinstance(settings.passages, str):
        file = Path(settings.passages)
        size = file.stat().st_size if file.is_file() else 0
        return size // (ROW_GZ if file.suffix == ".gz" else ROW)
    if settings.passages is None:
        return POOL * (settings.distill + settings.dev + settings.test)
    return settings.passages.rows.get(settings.passage_split, 0)


class Graph:
    """All stages of one profile; `sets` by name, `targets` of the main table with what they are."""

    def __init__(self, profile: Profile, note: str = "") -> None:
        self.profile, self.note = profile, note
        self.sets = {one.name: one for one in profile.sets}
        self.has_clozes = all(isinstance(one, WorldSet) for one in profile.sets)
        self.trains_retriever = profile.retriever.model == "embedded"
        untaught = () if self.has_clozes else UNTAUGHT[1:]  # which are asked by clozes
        self.targets = {t: what for t, what in TARGETS.items() if not t.startswith(untaught)}
        weights, share = model_files(profile.reader.model), profile.indicators.share
        self.common = profile.model_dump(mode="json") | {"weights": weights, "share": share}
        self.common |= {"state": finder_state(profile.nouns)}
        self.common |= {"clozes": self.has_clozes, "shuffle_seed": profile.seed}
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
        """Every reader that is looked at: before Step 1, on the way, and after it."""
        steps = [f"step {step}" for step in self.profile.reader.kept_steps]
        return [*UNTAUGHT[: 1 + self.has_clozes], *steps, "fine-tuned"]

    def has_nouns(self, set_name: str) -> bool:
        """Whether a noun finder is at hand for a set; the embedded one knows worlds only."""
        in_world = isinstance(self.sets[set_name], WorldSet)
        return in_world if self.profile.nouns == "embedded" else bool(self.common["state"])

    def stage(self, kind: str, of: Of) -> Stage:
        """The stage of a kind; asking for it makes nothing."""
        seed = f"seed {of.seed}" if kind in ("step2", "answers") else ""
        part = f"first {of.epochs}" if of.keep else ""
        what = ", ".join(filter(None, (of.target, of.which, seed, part)))
        if of.start is not None:
            what = f"{what} after {of.start.name.split('/')[2].removesuffix(self.note)}".strip()
        name = "/".join(filter(None, (kind, of.set_name, what))) + self.note
        maker, settings = f"ragkit.{KINDS[kind]['module']}:make_{kind}", self.settings(kind, of)
        by = "style" if of.which in UNTAUGHT else "step1"
        roles = KINDS[kind].get("inputs", "").replace("by", by).split()
        inputs = {role: one for role in roles if (one := self.input(role, kind, of)) is not None}
        machine = {"device": self.profile.device, "threads": self.profile.threads}
        units = {KINDS[kind]["unit"]: self.units(kind, of)}
        return Stage(kind, name, maker, settings, inputs, machine, units)

    def input(self, role: str, kind: str, of: Of) -> Stage | None:
        """The stage that stands for a role of a kind's inputs; None where there is nothing."""
        after = Of(of.set_name)
        match role:
            case "nouns" if not self.has_nouns(of.set_name):
                return None
            case "look":
                return self.look(of)
            case "ranking" if of.target not in UNLEARNT:
                return self.step2(of.set_name, of.target, of.seed)
            case "ranking":
                role = UNLEARNT[of.target]
            case "retriever" if of.start is not None:
                return of.start
            case "vectors" | "index" | "candidates":
                # Where only the query side learns, Step 2 goes on with the first vectors and index.
                if role == "candidates" or kind == "index" or self.profile.distill.side == "both":
                    after = replace(after, start=of.start)
            case "tokens":
                after = replace(after, which=of.which)
        return self.stage(role, after)

    def look(self, of: Of) -> Stage | None:
        """A reader's look that a target is made of; None for a control."""
        which, signal = teacher_of(of.target) or ("", "")
        kind = "loop" if signal == "LOOP" else "teacher"
        return self.stage(kind, Of(of.set_name, which, start=of.start)) if which else None

    def settings(self, kind: str, of: Of) -> dict[str, Any]:
        """A kind's settings as JSON values."""
        one, number = self.sets[of.set_name], self.number(kind, of)
        known = vars(of) | self.common | {"set": one.model_dump(mode="json")}
        known |= {"world": getattr(one, "world", None), "closed_book": of.target == "closed book"}
        known |= {"questions": number, "answered": number}
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
            case "step2":
                own = {key: one for key, one in known["distill"].items() if key != "seeds"}
                known |= {"distill": own | {"epochs": of.epochs}, "seed": of.seed}
        if kind != "step1":
            known["reader"] = {key: known["reader"][key] for key in READING}
        return {name: known[name] for name in KINDS[kind].get("settings", "").split()}

    def number(self, kind: str, of: Of) -> int:
        """How many questions a stage asks or looks at: of one part, or of all."""
        profile, one = self.profile, self.sets[of.set_name]
        if not (part := KINDS[kind].get("part")):
            return one.distill + one.dev + one.test
        most = {"distill": profile.distill.questions, "test": profile.indicators.questions}
        answers = KINDS[kind]["unit"] == "answers"
        limit = profile.evaluate.answered if answers else most.get(part, PROBED)
        return min(limit, getattr(one, part))

    def units(self, kind: str, of: Of) -> int:
        """A stage's units of work."""
        match KINDS[kind]["unit"]:
            case "passages":
                return passage_count(self.sets[of.set_name])
            case "crop steps":
                return self.profile.retriever.crop_steps if self.trains_retriever else 0
            case "prompts":
                return self.profile.reader.steps * self.profile.reader.batch
        times = {"style": 1 + self.has_clozes, "premises": 4, "step2": of.epochs}
        return self.number(kind, of) * times.get(kind, 1)

    def step2(self, set_name: str, target: str, seed: int) -> Stage:
        """Step 2 for a target and seed; with index refreshes it is the last of several parts. At a
        refresh the retriever as it is looks for new candidates, and the reader looks at them."""
        of = Of(set_name, target=target, seed=seed, epochs=self.profile.distill.epochs)
        for left in range(self.profile.index_refreshes, 0, -1):
            part = of.epochs // (left + 1)
            start = self.stage("step2", replace(of, epochs=part, keep=True))
            of = replace(of, epochs=of.epochs - part, start=start)
        return self.stage("step2", of)


def answered(graph: Graph, targets: Iterable[str] | None = None) -> Iterator[tuple[str, str, int]]:
    """System, reader and seed of all answers in the main table, or for some targets only. Each
    regime's reader answers for its own retrievers, the fine-tuned one for those of controls."""
    for which in READERS:
        yield "closed book", which, 0
    if graph.profile.evaluate.bm25:
        yield "BM25", "fine-tuned", 0
    for which in READERS:
        yield "initial", which, 0
    for target, seed in product(targets or graph.targets, graph.profile.distill.seeds):
        yield target, READERS[0] if target.startswith(UNTAUGHT) else READERS[1], seed


def of_set(graph: Graph, name: str) -> Iterator[Stage]:
    """What the notebooks ask of one set, under the first seed of Step 1."""
    profile, seeds = graph.profile, graph.profile.distill.seeds
    for kind in ("style", "step1", *(["bm25"] if profile.evaluate.bm25 else [])):
        yield graph.stage(kind, Of(name))
    for earlier in graph.passed_over(name):
        yield earlier.stage("candidates", Of(name))
    looks = [*product(graph.readers(), ("teacher", "closeness", "probe"))]
    for which, kind in [*looks, *product(READERS, ("loop", "premises"))]:
        yield graph.stage(kind, Of(name, which))
    taught = [f"{which} {signal}" for signal in TAUGHT_BY for which in graph.readers()]
    taught += [f"{which} {signal}" for signal in BESIDE for which in READERS]
    for target, seed in product(dict.fromkeys([*graph.targets, *taught]), seeds):
        yield graph.step2(name, target, seed)
    for system, which, seed in answered(graph):
        yield graph.stage("answers", Of(name, which, system, seed))
    if isinstance(graph.sets[name], WorldSet) and profile.distill.side == "query":
        yield graph.varied(CEILING).step2(name, "oracle", seeds[0])
    for variation, which in product(profile.variations, READERS):
        yield graph.varied(variation).step2(name, f"{which} attention", seeds[0])
    for seed in profile.step1_seeds[1:]:
        yield from of_further_run(graph.again(seed), name)


def of_further_run(graph: Graph, name: str) -> Iterator[Stage]:
    """What another seed of Step 1 makes anew for the claims."""
    with_nouns = graph.has_nouns(name)  # without nouns no claim asks for readers on the way
    for which in graph.readers() if with_nouns else READERS:
        yield graph.stage("closeness", Of(name, which))
        for signal in TAUGHT_BY if with_nouns else TAUGHT_BY[:1]:
            for seed in graph.profile.distill.seeds:
                yield graph.step2(name, f"{which} {signal}", seed)
    for system, which, seed in answered(graph, ["fine-tuned attention"]):
        if which == "fine-tuned":
            yield graph.stage("answers", Of(name, which, system, seed))


@cache
def stages(graph: Graph) -> list[Stage]:
    """All stages of a profile, each once, inputs before what is made of them, the sets by turns."""
    found: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.key not in found:
            for one in stage.inputs.values():
                add(one)
            found[stage.key] = stage

    for turn in zip_longest(*(of_set(graph, name) for name in graph.sets)):
        for stage in filter(None, turn):
            add(stage)
    return list(found.values())
