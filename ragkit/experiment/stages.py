"""All stages of a profile: what the notebooks and the claims ask for, in the order of making."""

from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest

from ragkit.distillation.targets import READERS, UNTAUGHT
from ragkit.experiment.graph import CEILING, Graph, Of
from ragkit.experiment.store import Stage
from ragkit.settings import WorldSet

TAUGHT_BY = ("attention", "perplexity")  # the signals that every reader teaches by
BESIDE = ("LOOP", "EMDR2")  # and those that only the two regimes' readers do


def trained_targets(graph: Graph) -> list[str]:
    """Every target that Step 2 is run for: the main table's, and each reader's signals."""
    signals = [f"{which} {signal}" for signal in TAUGHT_BY for which in graph.readers()]
    beside = [f"{which} {signal}" for signal in BESIDE for which in READERS]
    return list(dict.fromkeys([*graph.targets, *signals, *beside]))


def answered(graph: Graph, targets: Iterable[str] | None = None) -> Iterator[tuple[str, str, int]]:
    """System, reader and seed of all answers in the main table, or for some targets only."""
    for which in READERS:
        yield "closed book", which, 0
    if graph.profile.evaluate.bm25:
        yield "BM25", "fine-tuned", 0
    for which in READERS:
        yield "initial", which, 0
    for target in targets or graph.targets:
        for seed in graph.profile.distill.seeds:
            yield target, regime_of(target), seed


def of_set(graph: Graph, name: str) -> Iterator[Stage]:
    """What the notebooks ask of one set, under the first seed of Step 1."""
    seeds = graph.profile.distill.seeds
    for kind in ("style", "step1", *(["bm25"] if graph.profile.evaluate.bm25 else [])):
        yield graph.stage(kind, Of(name))
    for which in graph.readers():
        yield from (
            graph.stage(kind, Of(name, which)) for kind in ("teacher", "closeness", "probe")
        )
    for which in READERS:
        yield from (graph.stage(kind, Of(name, which)) for kind in ("loop", "premises"))
    for target in trained_targets(graph):
        yield from (graph.step2(name, target, seed) for seed in seeds)
    for system, which, seed in answered(graph):
        yield graph.stage("answers", Of(name, which, system, seed))
    if isinstance(graph.sets[name], WorldSet) and graph.profile.distill.side == "query":
        yield graph.varied(CEILING).step2(name, "oracle", seeds[0])
    for variation in graph.profile.choices.variations:
        other = graph.varied(variation)
        yield from (other.step2(name, f"{which} attention", seeds[0]) for which in READERS)
    for seed in graph.profile.step1_seeds[1:]:
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


def stages(graph: Graph) -> list[Stage]:
    """All of them, each once, inputs before what is made of them, the sets by turns."""
    turns = zip_longest(*(of_set(graph, name) for name in graph.sets))
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
