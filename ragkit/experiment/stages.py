"""All stages of a profile: what the notebooks and the claims ask for, in the order of making."""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product, zip_longest

from ragkit.distillation.targets import READERS, UNTAUGHT
from ragkit.experiment.graph import CEILING, Graph, Of
from ragkit.experiment.store import Stage
from ragkit.settings import WorldSet

TAUGHT_BY = ("attention", "perplexity")  # the signals that every reader teaches by
BESIDE = ("LOOP", "EMDR2")  # and those that only the two regimes' readers do


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
    """All of them, each once, inputs before what is made of them, the sets by turns."""
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
