"""The work of a run, without doing it: every stage that the notebooks will ask for, with its units of work.

What `ragkit.workers.make_set` and the notebooks make is listed here under the same names, so that a plan can be held against a
finished run; a test does so. A stage's cost grows with its units: passages encoded, prompts recorded, steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ragkit import nouns
from ragkit.analysis import BESIDE, TAUGHT_BY
from ragkit.corpus import PARTS
from ragkit.distill import LOOKS
from ragkit.lab import READERS, TARGETS, UNTAUGHT, teacher_of
from ragkit.profile import Profile, QuestionSet, WorldSet, varied
from ragkit.sizes import SetSize
from ragkit.stages import RECALL_QUESTIONS, TRAINING_QUESTIONS, TRAINING_WORLDS
from ragkit.training_log import QUESTIONS as PROBED

CASES = ("gold among the passages", "the same, permuted", "no passages", "same kind of fact, other entities")  # the premises'; the last in worlds only
NOTEBOOKS = 10  # 00 to 09
Units = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """A stage that a run makes; `home` is the folder of its lab below the run's own (empty for the run itself)."""

    home: str
    kind: str
    set_name: str
    what: str = ""
    units: Units = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in the store of its lab."""
        return "/".join(part for part in (self.kind, self.set_name, self.what) if part)


def slug(text: str) -> str:
    """A reader, target or case as it stands in a stage's name."""
    return text.replace(",", "").replace(" ", "-")


def taught(profile: Profile) -> list[str]:
    """The readers that Step 1 makes, in order."""
    return [*(f"step {step}" for step in profile.reader.kept_steps), "fine-tuned"]


def step2(profile: Profile, size: SetSize, epochs: int) -> Units:
    """Step 2 over some epochs: its steps, and what `watch` and the test ranking search for."""
    n = min(profile.distill.questions, size.questions["distill"])
    both, looks = profile.distill.side == "both", LOOKS * epochs + 1
    asked = looks * size.questions["dev"] + size.questions["test"]
    kind = "Step 2 steps, both sides" if both else "Step 2 steps"
    units: Units = {kind: epochs * math.ceil(n / profile.distill.batch), "questions encoded": asked}
    if both:  # the vectors are new at every look: they are searched exactly
        return units | {"exact searches": asked, "passages encoded": (looks + 1) * size.passages}
    return units | searched(profile, size, asked, looks + 1)


def searched(profile: Profile, size: SetSize, asked: int, calls: int) -> Units:
    """Searches in the stored vectors: an exact one reads them all at every call."""
    if profile.index.kind == "exact":
        return {"exact searches": asked, "vectors read": calls * size.passages}
    return {"searches": asked}


@dataclass(frozen=True)
class SetWork:
    """The stages of one set of a profile."""

    profile: Profile
    settings: QuestionSet
    size: SetSize

    @property
    def in_world(self) -> bool:
        return isinstance(self.settings, WorldSet)

    @property
    def is_twin(self) -> bool:
        """Whether passages, vectors and index are those of an earlier set."""
        return self.profile.twin(self.settings.name) is not None

    @property
    def has_clozes(self) -> bool:
        """Whether every set of the run can also ask by the beginning of a statement: as `Lab.has_clozes`."""
        return all(isinstance(s, WorldSet) for s in self.profile.sets)

    @property
    def untaught(self) -> tuple[str, ...]:
        """The readers before Step 1."""
        return UNTAUGHT if self.has_clozes else UNTAUGHT[:1]

    @property
    def has_nouns(self) -> bool:
        """Whether a noun finder is at hand for this set, so that Indicator 2 is computed."""
        try:
            nouns.check_model(self.profile.nouns.model, self.in_world)
        except nouns.NounsError:
            return False
        return True

    def stage(self, kind: str, what: str, units: Units, home: str = "") -> Stage:
        return Stage(home, kind, self.settings.name, slug(what), {unit: amount for unit, amount in units.items() if amount})

    def read(self, kind: str, which: str, home: str = "") -> Stage:
        """A reader's look at the questions for distillation."""
        n, k = min(self.profile.distill.questions, self.size.questions["distill"]), self.profile.k
        units: Units = {"questions looked at": n, "prompts recorded": self.probed} if kind == "teacher" else {"passages left out": n * k}
        return self.stage(kind, which, units, home)

    def answered(self, what: str, part: str = "test", closed: bool = False, home: str = "") -> Stage:
        n = min(self.profile.evaluate.answered, self.size.questions[part])
        return self.stage("answers", what, {"closed-book answers" if closed else "answers": n}, home)

    def step1(self, profile: Profile, home: str = "") -> Stage:
        looks = len({0, *profile.reader.kept_steps, profile.reader.steps})
        units: Units = {"Step 1 steps": profile.reader.steps, "prompts recorded": looks * self.probed}
        if self.in_world:
            passages, asked = TRAINING_WORLDS * self.size.training_passages, TRAINING_WORLDS * TRAINING_QUESTIONS
            units |= {"passages prepared": passages, "passages encoded": passages, "questions encoded": asked}
        return self.stage("step1", "", units, home)

    def tokens(self, which: str, home: str = "") -> Stage:
        return self.stage("tokens", which, {"prompts recorded": self.indicated}, home)

    @property
    def probed(self) -> int:
        """Questions of dev on which a log measures the indicators."""
        return min(PROBED, self.size.questions["dev"])

    @property
    def indicated(self) -> int:
        """Questions that the indicators look at."""
        return min(self.profile.indicators.questions, self.size.questions["test"])

    def search(self, home: str = "", stored: bool = True) -> Iterator[Stage]:
        """From a retriever to the first candidates; `stored` leaves out what makes and indexes the passages' vectors."""
        profile, size, asked = self.profile, self.size, sum(self.size.questions.values())
        if not stored:
            new = 0 if self.is_twin and not home else size.passages
            yield self.stage("vectors", "", {"passages encoded": new, "vectors written": new}, home)
            learnt = min(new, profile.index.trained_on) if profile.index.kind == "ivfpq" else 0
            yield self.stage("index", "", {"vectors learnt from": learnt, "vectors indexed": 0 if profile.index.kind == "exact" else new}, home)
        units: Units = {"questions encoded": asked} | searched(profile, size, asked, len(PARTS))
        if profile.index.kind != "exact":  # how many of the true ones it finds, at two depths
            units |= {"exact searches": 2 * RECALL_QUESTIONS, "vectors read": 2 * size.passages}
        yield self.stage("candidates", "", units, home)

    def distilled(self, profile: Profile, target: str, seed: int, home: str = "") -> Iterator[Stage]:
        """Step 2 for one target, with the profile's index refreshes: each finds new candidates, and the reader looks at them.

        It looks again only at questions whose candidates changed; all are counted, since how many do is not known before.
        """
        epochs, what = profile.distill.epochs, f"{target}-{seed}"
        if not profile.index_refreshes:
            yield self.stage("step2", what, step2(profile, self.size, epochs), home)
            return
        first = epochs // (profile.index_refreshes + 1)
        rest = profile.distill.model_copy(update={"epochs": epochs - first})
        changed = profile.model_copy(update={"index_refreshes": profile.index_refreshes - 1, "distill": rest})
        inner = "/".join(part for part in (home, "varied", f"refreshed-{slug(target)}-{seed}") if part)
        yield self.stage("retriever", "", step2(profile, self.size, first), inner)
        yield from self.search(inner, stored=profile.distill.side == "query")
        if read_by := teacher_of(target):
            yield self.read("loop" if read_by[1] == "LOOP" else "teacher", read_by[0], inner)
        yield from self.distilled(changed, target, seed, inner)

    def first_run(self) -> Iterator[Stage]:
        """What the profile asks for with the first seed of Step 1."""
        profile, size = self.profile, self.size
        yield self.stage("corpus", "", {"passages prepared": 0 if self.is_twin else size.passages})
        yield self.stage("retriever", "", {"crop steps": profile.retriever.crop_steps if profile.retriever.model == "embedded" else 0})
        yield from self.search(stored=False)
        yield self.step1(profile)
        if self.has_nouns:
            tagged = {"questions tagged": sum(size.questions.values())}
            yield self.stage("nouns", "", {"taggers trained": profile.nouns.model == "embedded", **tagged})
        yield self.stage("contextual", "", {"prompts read one by one": self.indicated})
        readers = [*self.untaught, *taught(profile)]
        for which in readers:
            yield self.read("teacher", which)
            yield self.tokens(which)
        for which in READERS:
            yield self.read("loop", which)
        targets = [target for target in TARGETS if self.has_clozes or not target.startswith("weaker prompt")]
        signals = [f"{which} {signal}" for signal in TAUGHT_BY for which in readers] + [f"{which} {signal}" for signal in BESIDE for which in READERS]
        for target in dict.fromkeys([*targets, *signals]):
            for seed in profile.distill.seeds:
                yield from self.distilled(profile, target, seed)
        if self.in_world and profile.distill.side == "query":
            yield from self.distilled(varied(profile, "both sides"), "oracle", profile.distill.seeds[0], "varied/both-sides")
        yield from self.answers(targets)

    def answers(self, targets: list[str]) -> Iterator[Stage]:
        """Answers of both regimes' readers, as `Lab.premises` and `Lab.answer_rows` ask for them."""
        yield from self.style()
        for which in READERS:
            for case in CASES if self.in_world else CASES[:-1]:
                yield self.answered(f"premise-{which}-{case}", "dev", closed=case == "no passages")
            yield self.answered(f"closed book-{which}-0", closed=True)
            yield self.answered(f"initial-{which}-0")
        if self.profile.evaluate.bm25:
            yield self.answered("BM25-fine-tuned-0")
        for target in targets:
            for seed in self.profile.distill.seeds:
                yield self.answered(f"{target}-{READERS[0] if target.startswith(UNTAUGHT) else READERS[1]}-{seed}")

    def style(self, home: str = "") -> Iterator[Stage]:
        """The answers that decide with which prompt the off-the-shelf reader is asked."""
        for style in ("question", "cloze") if self.has_clozes else ("question",):
            yield self.answered(f"off-the-shelf-{style}-dev", "dev", home=home)

    def variation(self, name: str) -> Iterator[Stage]:
        """One choice taken otherwise: Step 2 of both regimes, and what the choice touches before it."""
        profile, home = varied(self.profile, name), f"varied/{name.replace(': ', '-').replace(' ', '-')}"
        if profile.reader != self.profile.reader:
            yield from self.style(home)
            yield self.step1(profile, home)
            for which in READERS:
                yield self.read("teacher", which, home)
        for which in READERS:
            yield from self.distilled(profile, f"{which} attention", profile.distill.seeds[0], home)

    def further_run(self, seed: int) -> Iterator[Stage]:
        """What another seed of Step 1 makes anew: everything that its readers touch and a claim needs."""
        profile, home = self.profile, f"varied/step1-seed-{seed}"
        yield self.step1(profile, home)
        readers = taught(profile) if self.has_nouns else ["fine-tuned"]  # without nouns no claim asks for the readers between
        for which in readers:
            yield self.read("teacher", which, home)
            yield self.tokens(which, home)
        refreshed = self.untaught if profile.index_refreshes else ()  # with refreshes even what no Step 1 touches lies in folders of its own
        for which in (*refreshed, *readers):
            for signal in TAUGHT_BY if self.has_nouns else TAUGHT_BY[:1]:
                for one in profile.distill.seeds:
                    yield from self.distilled(profile, f"{which} {signal}", one, home)
        yield self.answered("closed book-fine-tuned-0", closed=True, home=home)
        for system in ("initial", *(["BM25"] if profile.evaluate.bm25 else [])):
            yield self.answered(f"{system}-fine-tuned-0", home=home)
        for one in profile.distill.seeds:
            yield self.answered(f"fine-tuned attention-fine-tuned-{one}", home=home)

    def stages(self) -> list[Stage]:
        """All of them, each once."""
        every = [*self.first_run()]
        every += [stage for name in self.profile.choices.variations for stage in self.variation(name)]
        every += [stage for seed in self.profile.step1_seeds[1:] for stage in self.further_run(seed)]
        return list({(stage.home, stage.name): stage for stage in every}.values())


def notebooks(profile: Profile) -> Stage:
    """The notebooks' own work, once the stages are made: to start, indicators of every reader, bootstrap intervals.

    About how often each is computed was counted in notebooks 05 to 09: twice for both regimes' readers under every single choice in 08, in the four
    spaces in 09, for every reader once in 06, 07 and, in each run of Step 1, in 09.
    """
    readers, sets, runs = len(taught(profile)) + len(UNTAUGHT), len(profile.sets), len(profile.step1_seeds)
    tables = 2 * (2 + runs) * readers + 16 * runs + 80
    return Stage("", "notebooks", "", "", {"notebooks started": NOTEBOOKS, "indicators": sets * tables, "intervals": sets * (250 + 50 * runs)})
