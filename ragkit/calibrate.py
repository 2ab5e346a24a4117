"""What a unit of work costs on this machine: about a minute of measuring, and nothing is fetched.

The embedded models are timed at their real work, which is overhead more than arithmetic; of large models a few random layers are (see
`ragkit.stack`). Every number is the fastest of some repetitions, so that what else the machine does counts as little as can be; a run beside
other work takes longer than planned.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import torch

from ragkit import corpus as corpora
from ragkit import fleet, indicators, metrics, nouns, stages, teacher
from ragkit.corpus import Question
from ragkit.memory import WIDTH, Lengths
from ragkit.passages import Passage
from ragkit.profile import IndexSettings, Profile, QuestionSet, RetrieverSettings, WorldSet
from ragkit.reader import Reader
from ragkit.retriever import passage_text, train_by_cropping
from ragkit.sizes import SetSize, Shape, reader_config, retriever_config
from ragkit.stack import Stack, fastest, reader_costs, retriever_costs, seconds
from ragkit.work import SetWork

log = logging.getLogger(__name__)
Costs = dict[str, float]  # seconds of a unit, by the unit
ASKED = 32  # questions on which the embedded models are timed
ENCODED = 512  # passages
FEW_STEPS = 8  # of a training
SEARCHED = 20_000  # vectors on which the search is timed
LINKED = 2_000  # vectors with which a graph is begun
TAGGED_SHARE = 8  # one in so many labelled texts trains the tagger that is timed
ROUNDS = 10  # of k-means, FAISS's default for the cells of an inverted file
CODE_LOOKED_UP = 1e-9  # seconds of one table look-up, of which a code of n bytes needs n
FETCHED = 2e-5  # seconds until a vector is read from a disk in place (NVMe; a page that was read before costs less)
KERNEL = 1.6  # a notebook that does next to nothing takes so many times what importing the package takes


def sample_of(settings: QuestionSet, k: int) -> tuple[list[Question], list[list[Passage]], list[Passage]]:
    """Questions with k passages each, and passages, like those of a set; of real text the almanac's stand for them."""
    world = settings if isinstance(settings, WorldSet) else WorldSet(source="world", name="sample", world="almanac", seed=0)
    made = corpora.build_world(world)
    rng = random.Random(0)
    questions = rng.sample(made.questions["distill"], min(ASKED, len(made.questions["distill"])))
    passages = rng.sample(list(made.passages), min(ENCODED, len(made.passages)))
    return questions, [rng.sample(passages, k) for _ in questions], passages


def embedded_reader_costs(profile: Profile, questions: list[Question], found: list[list[Passage]]) -> Costs:
    """The embedded reader timed at its real work."""
    settings, n = profile.reader, len(questions)
    reader = Reader.load("embedded", settings)
    blank: list[list[tuple[int, int]]] = [[] for _ in questions]
    costs = {
        "prompts recorded": fastest(lambda: indicators.look_at_tokens(reader, questions, found)) / n,
        "questions looked at": fastest(lambda: teacher.look(reader, questions, found)) / n,
        "passages left out": fastest(lambda: teacher.left_out_losses(reader, questions, found)) / (n * profile.k),
        "prompts read one by one": fastest(lambda: indicators.contextual_closeness(reader, questions, found, blank)) / n,
        "answers": fastest(lambda: reader.answer([reader.prompt(q, passages) for q, passages in zip(questions, found, strict=True)])) / n,
        "closed-book answers": fastest(lambda: reader.answer([reader.prompt(q, []) for q in questions])) / n,
    }
    optimizer = torch.optim.AdamW(reader.model.parameters(), lr=0.0)
    rng = random.Random(0)
    reader.model.train()

    def step() -> None:
        drawn = [rng.randrange(n) for _ in range(settings.batch)]
        reader.losses([reader.prompt(questions[i], found[i], questions[i].answers[0]) for i in drawn]).mean().backward()
        torch.nn.utils.clip_grad_norm_(reader.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return costs | {"Step 1 steps": middle(step)}


def middle(step: Any) -> float:
    """Seconds of a typical step: the median, for steps differ by the lengths drawn."""
    return float(np.median([seconds(step) for _ in range(FEW_STEPS)]))


def embedded_retriever_costs(profile: Profile, questions: list[Question], passages: list[Passage]) -> Costs:
    """The embedded retriever timed at its real work."""
    settings, asked = profile.retriever, [q.text for q in questions]

    def cropped(steps: int) -> float:
        few = RetrieverSettings(**settings.model_dump() | {"crop_steps": steps})
        return fastest(lambda: train_by_cropping(passages, few, 0), 2)

    costs = {"crop steps": (cropped(FEW_STEPS + 1) - cropped(1)) / FEW_STEPS}
    retriever = train_by_cropping(passages, RetrieverSettings(**settings.model_dump() | {"crop_steps": 1}), 0)
    texts = [passage_text(p) for p in passages]
    costs["passages encoded"] = fastest(lambda: retriever.encode(texts)) / len(texts)
    many = (asked * math.ceil(settings.at_once / len(asked)))[: settings.at_once]
    costs["questions encoded"] = fastest(lambda: retriever.encode(many)) / len(many)
    batch, k = profile.distill.batch, profile.k
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=0.0)

    def step(both: bool) -> None:
        retriever.train()
        queries = retriever((asked * batch)[:batch])
        scored = retriever((texts * batch)[: batch * k]).view(batch, k, -1) if both else torch.zeros(batch, k, queries.shape[1])
        torch.einsum("qd,qkd->qk", queries, scored).log_softmax(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(retriever.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return costs | {"Step 2 steps": middle(lambda: step(False)), "Step 2 steps, both sides": middle(lambda: step(True))}


def search_costs(index: IndexSettings, n: int, d: int, a_byte_written: float) -> Costs:
    """Seconds of writing, reading and indexing a vector and of a search among n of them.

    Random vectors do: the work does not hang on what they say. Vectors that fill more than half of the memory come from the disk every time.
    """
    rng = np.random.default_rng(0)
    few, depth, width = min(n, SEARCHED), min(n, 20), WIDTH[index.dtype]
    vectors = rng.standard_normal((few, d), dtype=np.float32)
    asked = vectors[:64]
    exact = fastest(lambda: faiss.knn(asked, vectors, depth, metric=faiss.METRIC_INNER_PRODUCT)) / len(asked) * n / few
    in_memory = n * d * width < psutil.virtual_memory().total / 2
    read = fastest(lambda: vectors.astype(np.float16).astype(np.float32)) / few if in_memory else d * width * a_byte_written
    costs = {"vectors written": d * width * a_byte_written, "exact searches": exact, "vectors read": read}
    if index.kind == "hnsw":
        graph: Any = faiss.IndexHNSWSQ(d, faiss.ScalarQuantizer.QT_8bit, index.links, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]
        graph.hnsw.efConstruction = graph.hnsw.efSearch = index.effort
        graph.train(vectors)
        added = seconds(lambda: graph.add(vectors[:LINKED])) / min(few, LINKED)
        deeper = math.log(max(n, 10)) / math.log(min(few, LINKED))  # a greedy walk through n vectors is about log n long
        costs |= {"vectors indexed": read + added * deeper, "searches": fastest(lambda: graph.search(asked, depth)) / len(asked) * deeper}
    if index.kind == "ivfpq":
        lists = rng.standard_normal((index.lists, d), dtype=np.float32)
        assigned = fastest(lambda: faiss.knn(vectors[:256], lists, 1, metric=faiss.METRIC_INNER_PRODUCT)) / min(few, 256)
        a_table = assigned * 256 / index.lists  # a code book of 256 entries is as a quantiser with as many cells
        scanned = index.probes * (n / index.lists * index.code_bytes * CODE_LOOKED_UP + a_table)
        again = index.candidates * (FETCHED if not in_memory else read)
        costs |= {"vectors indexed": read + assigned + a_table, "vectors learnt from": ROUNDS * assigned, "searches": assigned + scanned + again}
    return costs


def written_byte(folder: Path) -> float:
    """Seconds of a byte written to the disk that a folder stands on."""
    data, took = os.urandom(1 << 20), []
    for _ in range(3):
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()  # the time that goes by: writing is waiting
            for _ in range(64):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - started)
    return min(took) / (64 << 20)


def prepared_passage(settings: QuestionSet, size: SetSize, a_byte_written: float) -> float:
    """Seconds of a passage from where it comes to disk."""
    if isinstance(settings, WorldSet):
        return fastest(lambda: corpora.build_world(settings), 2) / size.passages
    text = io.StringIO()
    csv.writer(text, delimiter="\t").writerows([str(i), "word " * round(size.passage_words), "a title"] for i in range(2000))

    def read() -> None:
        text.seek(0)
        [Passage(*row) for row in csv.reader(text, delimiter="\t")]

    return 2 * fastest(read) / 2000 + size.bytes_on_disk / size.passages * a_byte_written


def noun_costs(profile: Profile, settings: QuestionSet, questions: list[Question]) -> Costs:
    """The embedded noun finder trained on few texts, or the one that the profile names at work."""
    asked = [q.text for q in questions]
    if profile.nouns.model != "embedded":
        finder = nouns.load_nouns(profile.nouns.model)
        return {"questions tagged": fastest(lambda: nouns.find_nouns(finder, asked)) / len(asked)}
    assert isinstance(settings, WorldSet)
    labelled = stages.tagged_text(settings.world, 0)
    few = labelled[::TAGGED_SHARE]
    with tempfile.TemporaryDirectory() as folder:
        trained = seconds(lambda: nouns.train_tagger(few, Path(folder), 0))
        finder = nouns.load_nouns(folder)
    return {"taggers trained": trained * len(labelled) / len(few), "questions tagged": fastest(lambda: nouns.find_nouns(finder, asked)) / len(asked)}


def notebook_costs(profile: Profile, lengths: Lengths) -> Costs:
    """A notebook's start (a process that imports what notebooks do), one reader's indicator, one bootstrap interval."""
    command = [sys.executable, "-c", "import ragkit.analysis, ragkit.plots"]
    started = fastest(lambda: subprocess.run(command, check=True), 2)
    n, tokens = profile.indicators.questions, round(lengths.prompt(profile.k))
    rng = np.random.default_rng(0)
    attention, close = rng.random(n * tokens), rng.random(n * tokens)
    question, exact = np.repeat(np.arange(n), tokens), rng.random(n * tokens) < 0.05
    values = rng.random(n)
    return {
        "notebooks started": KERNEL * started,
        "indicators": fastest(lambda: indicators.indicator(attention, close, question, exact, profile.indicators.share)),
        "intervals": fastest(lambda: metrics.interval(values, resamples=profile.evaluate.bootstrap)),
    }


def cut_token(reader: Reader, questions: list[Question], found: list[list[Passage]]) -> float:
    """Seconds of cutting a text into tokens and finding whose they are, a token."""
    pairs = list(zip(questions, found, strict=True))
    tokens = sum(len(reader.prompt(q, passages).ids) for q, passages in pairs)
    return fastest(lambda: [reader.prompt(q, passages) for q, passages in pairs]) / tokens


def calibrate(profile: Profile, sizes: dict[str, SetSize], reader: Shape, retriever: Shape, device: str, folder: Path) -> dict[str, Costs]:
    """Seconds of a unit of work, by set and unit; `folder` stands on the disk that the run will write to."""
    fleet.start(profile.machine.model_copy(update={"device": device}), profile.threads)
    a_byte = written_byte(folder)
    stacks: dict[str, Stack] = {}
    in_place_of_gpu = device != profile.machine.device  # 16-bit numbers are a GPU's: here they would be slower than float32
    if profile.reader.model != "embedded":
        config, dtype = reader_config(profile.reader), "float32" if in_place_of_gpu else profile.reader.dtype
        stacks["reader"] = Stack(config, reader, device, dtype, mixed=False)
        stacks["training"] = Stack(config, reader, device, dtype, mixed=True)
    if profile.retriever.model != "embedded":
        dtype = "float32" if in_place_of_gpu else profile.retriever.dtype
        stacks["retriever"] = Stack(retriever_config(profile.retriever), retriever, device, dtype, mixed=True)
    costs: dict[str, Costs] = {}
    notebooks = notebook_costs(profile, Lengths.of(profile, sizes[profile.sets[0].name]))
    for settings in profile.sets:
        log.info("measuring for set %s", settings.name)
        size = sizes[settings.name]
        lengths = Lengths.of(profile, size)
        questions, found, passages = sample_of(settings, profile.k)
        cut = cut_token(Reader.load("embedded", profile.reader.model_copy(update={"context": 4096})), questions, found)
        mine = {"passages prepared": prepared_passage(settings, size, a_byte)}
        mine |= search_costs(profile.index, size.passages, retriever.hidden, a_byte)
        if SetWork(profile, settings, size).has_nouns:
            mine |= noun_costs(profile, settings, questions)
        mine |= (
            reader_costs(profile, lengths, stacks["reader"], stacks["training"], cut)
            if "reader" in stacks
            else embedded_reader_costs(profile, questions, found)
        )
        mine |= retriever_costs(profile, lengths, stacks["retriever"], cut) if "retriever" in stacks else embedded_retriever_costs(profile, questions, passages)
        costs[settings.name] = mine | notebooks
    return costs
