"""The stages that the notebooks of a run ask for."""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product, zip_longest

from ragkit.distillation import targets
from ragkit.distillation.targets import READERS, teacher_of
from ragkit.experiment.graph import Graph, Of
from ragkit.experiment.store import Stage
from ragkit.settings import WorldSet

CEILING = "both sides"  # the variation by which the oracle shows how far Step 2 can go
TAUGHT_BY = ("attention", "perplexity")  # the signals that every reader teaches by


def answered(graph: Graph, chosen: Iterable[str] | None = None) -> Iterator[tuple[str, str, int]]:
    """System, reader and seed of all answers in the main table, or for some targets: each reader's
    for retrievers that it taught (both regimes': all seeds), the fine-tuned one's for controls."""
    for which in READERS:
        yield "closed book", which, 0
    if graph.profile.evaluate.bm25:
        yield "BM25", READERS[1], 0
    teachers = {t: (teacher_of(t) or READERS[1:])[0] for t in chosen or graph.targets}
    for which in dict.fromkeys([*READERS, *teachers.values()]):
        yield "initial", which, 0
    for target, which in teachers.items():
        repeated = which in READERS and target.endswith(" attention")
        for seed in graph.seeds(target)[: None if repeated else 1]:
            yield target, which, seed


def of_set(graph: Graph, name: str) -> Iterator[Stage]:
    """What the notebooks ask of one set, under the first seed of Step 1."""
    profile, first = graph.profile, graph.profile.distill.seeds[0]
    for kind in ("step1", *(["bm25"] if profile.evaluate.bm25 else [])):
        yield graph.stage(kind, Of(name))
    for which in graph.readers():
        yield graph.stage("heads", Of(name, which, "rank"))
    taught = [f"{which} {signal}" for signal in profile.beside for which in READERS]
    yield from of_run(graph, name, [*graph.targets, *taught])
    if profile.encoder_decoder:  # the fifth system of the paper's figure
        found = graph.system(name, *targets.SYSTEMS["encoder-decoder distillation"])
        yield graph.stage("closeness", found)
    for order, which in product(profile.orders, graph.asked()):  # notebook 03
        yield from (graph.stage("teacher", Of(name, which, one)) for one in targets.LOOKS[order])
    yield from (earlier.stage("candidates", Of(name)) for earlier in graph.passed_over(name))
    if isinstance(graph.sets[name], WorldSet) and profile.distill.side == "query":
        yield graph.varied(CEILING).step2(name, "oracle", first)
    for variation, which in product(profile.variations, READERS):
        yield graph.varied(variation).step2(name, f"{which} attention", first)
    for seed in profile.step1_seeds[1:]:
        yield from of_run(graph.again(seed), name, [f"{which} attention" for which in READERS])


def of_run(graph: Graph, name: str, chosen: Iterable[str]) -> Iterator[Stage]:
    """What the claims ask of one run of Step 1, and these targets."""
    for which in graph.readers():
        yield graph.stage("closeness", Of(name, which))
    for which in graph.asked():
        yield graph.stage("premises", Of(name, which))
        yield graph.stage("closeness", graph.system(name, which, f"{which} attention"))
    along = [f"{which} {signal}" for signal in TAUGHT_BY for which in graph.readers()]
    for target in dict.fromkeys([*chosen, *along]):
        for seed in graph.seeds(target):
            yield graph.step2(name, target, seed)
    for system, which, seed in answered(graph, [t for t in chosen if t in graph.targets]):
        yield graph.stage("answers", Of(name, which, target=system, seed=seed))


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
