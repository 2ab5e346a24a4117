"""The experiment, declared once: every stage of a profile with its inputs, settings and maker.

Running, planning, the manifest, the report and the notebooks all read this list. A choice taken
otherwise (`Graph.varied`), another seed of Step 1 (`Graph.again`) and an index refresh are further
stages of it: those that they do not touch have the same key, and are the same stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest

from ragkit.distillation.targets import READERS, UNTAUGHT, teacher_of
from ragkit.experiment.nodes import Inputs, Nodes, remembered
from ragkit.experiment.store import Stage
from ragkit.profile import WorldSet, varied

TAUGHT_BY = ("attention", "perplexity")  # the signals that every reader teaches by
BESIDE = ("LOOP", "EMDR2")  # and those that only the two regimes' readers do
CEILING = "both sides"  # the variation under which the oracle shows how far Step 2 can go


class Graph(Nodes):
    """All stages of one profile."""

    @remembered
    def varied(self, variation: str) -> Graph:
        """The graph with one choice taken otherwise."""
        return Graph(varied(self.profile, variation), f" ({variation})")

    @remembered
    def again(self, seed: int) -> Graph:
        """The graph whose Step 1 runs with another seed: other training worlds, another order."""
        if seed == self.profile.step1_seeds[0]:
            return self
        changed = self.profile.model_copy(update={"step1_seeds": (seed,)})
        return Graph(changed, f" (Step 1 seed {seed})")

    @remembered
    def premises(self, set_name: str, which: str) -> Stage:
        answered = min(self.profile.evaluate.answered, self.asked(set_name, "dev"))
        payload = {
            **self.reader_settings(),
            "which": which,
            "answered": answered,
            "k": self.profile.k,
            "seed": self.profile.seed,
        }
        inputs = self.found_inputs(set_name) | self.reader_inputs(set_name, which)
        maker, units = "models.answers:make_premises", {"answers": 4 * answered}
        return self.stage(("premises", set_name, which), maker, payload, inputs, units)

    @remembered
    def answers(self, set_name: str, system: str, which: str, seed: int) -> Stage:
        """Answers from what a system found: `closed book`, `BM25`, `initial` or a target."""
        answered = min(self.profile.evaluate.answered, self.asked(set_name, "test"))
        payload = {
            **self.reader_settings(),
            "which": which,
            "answered": answered,
            "k": self.profile.k,
            "closed_book": system == "closed book",
        }
        if system in ("closed book", "initial"):
            ranking = self.candidates(set_name)
        else:
            found_by = system == "BM25"
            ranking = self.bm25(set_name) if found_by else self.step2(set_name, system, seed)
        inputs = {
            "passages": self.passages(set_name),
            "questions": self.questions(set_name),
            "ranking": ranking,
        } | self.reader_inputs(set_name, which)
        name = ("answers", set_name, f"{system}, {which} reader, seed {seed}")
        maker, units = "models.answers:make_answers", {"answers": answered}
        return self.stage(name, maker, payload, inputs, units)

    def look(self, set_name: str, target: str, candidates: Stage) -> Inputs:
        """The reader's look that a target is made of; none for a control."""
        taught = teacher_of(target)
        if taught is None:
            return {}
        which, signal = taught
        looked = self.loop if signal == "LOOP" else self.teacher
        return {"look": looked(set_name, which, candidates)}

    @remembered
    def step2(self, set_name: str, target: str, seed: int) -> Stage:
        """Step 2 for a target and seed; with index refreshes it is the last of several parts.

        At a refresh the retriever as it is looks for new candidates, and the reader looks at them.
        """
        retriever, epochs = None, self.profile.distill.epochs
        for left in range(self.profile.index_refreshes, 0, -1):
            part = epochs // (left + 1)
            retriever = self.part(set_name, (target, seed), part, retriever, True)
            epochs -= part
        return self.part(set_name, (target, seed), epochs, retriever, False)

    @remembered
    def part(
        self, set_name: str, what: tuple[str, int], epochs: int, start: Stage | None, keep: bool
    ) -> Stage:
        """Some epochs of Step 2, from the initial retriever or from what an earlier part made."""
        profile, (target, seed) = self.profile, what
        distill = {name: one for name, one in self.section("distill").items() if name != "seeds"}
        payload = {
            "target": target,
            "distill": distill | {"epochs": epochs},
            "attention": self.section("attention"),
            "retriever": self.section("retriever"),
            "index": self.section("index"),
            "k": profile.k,
            "seed": seed,
            "shuffle_seed": profile.seed,
            "keep": keep,
        }
        candidates = self.candidates(set_name, start)
        inputs = self.search_inputs(set_name, start) | {"candidates": candidates}
        inputs |= self.look(set_name, target, candidates)
        n = min(profile.distill.questions, self.asked(set_name, "distill"))
        name = ("step2", set_name, f"{target}, seed {seed}" + (f", first {epochs}" if keep else ""))
        maker, units = "distillation.step2:make_step2", {"questions": n * epochs}
        return self.stage(name, maker, payload, inputs, units)

    def trained_targets(self) -> list[str]:
        """Every target that Step 2 is run for: the main table's, and each reader's signals."""
        signals = [f"{which} {signal}" for signal in TAUGHT_BY for which in self.readers()]
        beside = [f"{which} {signal}" for signal in BESIDE for which in READERS]
        return list(dict.fromkeys([*self.targets, *signals, *beside]))

    def answered(self, set_name: str) -> Iterator[Stage]:
        """Answers from every system that stands in the main table."""
        for which in READERS:
            yield self.answers(set_name, "closed book", which, 0)
            yield self.answers(set_name, "initial", which, 0)
        if self.profile.evaluate.bm25:
            yield self.answers(set_name, "BM25", "fine-tuned", 0)
        for target in self.targets:
            for seed in self.profile.distill.seeds:
                yield self.answers(set_name, target, regime_of(target), seed)

    def of_set(self, set_name: str) -> Iterator[Stage]:
        """What the notebooks ask of one set, under the first seed of Step 1."""
        yield self.style(set_name)
        yield self.step1(set_name)
        yield from self.noun_inputs(set_name).values()
        if self.profile.evaluate.bm25:
            yield self.bm25(set_name)
        for which in self.readers():
            yield self.teacher(set_name, which)
            yield self.closeness(set_name, which)
            yield self.probe(set_name, which)
        for which in READERS:
            yield self.loop(set_name, which)
            yield self.premises(set_name, which)
        for target in self.trained_targets():
            for seed in self.profile.distill.seeds:
                yield self.step2(set_name, target, seed)
        yield from self.answered(set_name)
        if isinstance(self.sets[set_name], WorldSet) and self.profile.distill.side == "query":
            first = self.profile.distill.seeds[0]
            yield self.varied(CEILING).step2(set_name, "oracle", first)
        for variation in self.profile.choices.variations:
            other = self.varied(variation)
            for which in READERS:
                yield other.step2(set_name, f"{which} attention", self.profile.distill.seeds[0])
        for seed in self.profile.step1_seeds[1:]:
            yield from self.again(seed).of_further_run(set_name)

    def of_further_run(self, set_name: str) -> Iterator[Stage]:
        """What another seed of Step 1 makes anew for the claims."""
        with_nouns = self.has_nouns(set_name)  # without nouns no claim asks for readers on the way
        readers = self.readers() if with_nouns else list(READERS)
        for which in readers:
            yield self.closeness(set_name, which)
            for signal in TAUGHT_BY if with_nouns else TAUGHT_BY[:1]:
                for seed in self.profile.distill.seeds:
                    yield self.step2(set_name, f"{which} {signal}", seed)
        yield self.answers(set_name, "closed book", "fine-tuned", 0)
        for system in ("initial", *(["BM25"] if self.profile.evaluate.bm25 else [])):
            yield self.answers(set_name, system, "fine-tuned", 0)
        for seed in self.profile.distill.seeds:
            yield self.answers(set_name, "fine-tuned attention", "fine-tuned", seed)

    def stages(self) -> list[Stage]:
        """All of them, each once, inputs before what is made of them, the sets by turns."""
        turns = zip_longest(*(self.of_set(name) for name in self.sets))
        return in_order(stage for stage in chain(*turns) if stage is not None)


def regime_of(target: str) -> str:
    """The reader that answers for a target's retriever: each regime its own, controls the tuned."""
    return READERS[0] if target.startswith(UNTAUGHT) else READERS[1]


def in_order(wanted: Iterable[Stage]) -> list[Stage]:
    """Stages with all that they are made of, each once, inputs first."""
    found: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.key not in found:
            for one in stage.inputs.values():
                add(one)
            found.setdefault(stage.key, stage)

    for stage in wanted:
        add(stage)
    return list(found.values())
