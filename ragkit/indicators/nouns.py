"""The nouns of questions, by an installed spaCy pipeline or one trained on labelled text."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import spacy
from spacy.language import Language
from spacy.pipeline.tagger import DEFAULT_TAGGER_MODEL as TAGGER
from spacy.tokens import Doc
from spacy.training import Example
from spacy.util import fix_random_seed, minibatch

from ragkit.data import worlds
from ragkit.data.corpus import PARTS
from ragkit.data.files import read_jsonl, write_json
from ragkit.data.speech import NOUN_TAGS, parts_of_speech
from ragkit.errors import NounsError
from ragkit.models import device

DEPTH = 2  # spaCy's own tagger is 4 deep and trains at a third of the speed
EPOCHS, BATCH, DROPOUT = 4, 64, 0.3  # like the depth, chosen on the news half of PUD
TAGGED_ENTITIES, TAGGED_PASSAGES = 240, 120
Labelled = tuple[list[str], list[str]]  # the words of a text and their UPOS


def load_nouns(model: str) -> Language:
    """An installed spaCy package by name, or a pipeline's folder. Raises NounsError where it cannot
    be opened, or sets no parts of speech."""
    try:
        pipeline = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
        if pipeline("where is the town").has_annotation("POS"):
            return pipeline
        parts = ", ".join(pipeline.pipe_names) or "none"
        why = f"sets no parts of speech (it has: {parts})."
    except Exception as error:  # damage shows in a dozen ways, and a package runs its own code
        why = f"cannot be opened: {str(error).splitlines()[0]}."
        for inner in Path(model).glob("*/config.cfg"):
            why += f" Give the folder inside it, {str(inner.parent)!r}."
    told = "Install one (python -m spacy download en_core_web_sm, which needs the network) or save "
    told += "one to a folder (to_disk); name it under nouns in the profile (judge: --nouns)."
    raise NounsError(f"The spaCy pipeline {model!r} {why} {told}")


def find_nouns(model: Language, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Start and end, in characters, of the nouns of each text, proper nouns included."""
    return [
        [(word.idx, word.idx + len(word)) for word in doc if word.pos_ in NOUN_TAGS]
        for doc in model.pipe(texts)
    ]


def train_tagger(texts: list[Labelled], folder: Path, seed: int) -> Language:
    """A small pipeline that learns parts of speech from labelled texts, saved to a folder: a
    morphologizer, for spaCy's `tagger` sets the fine-grained tag only. spaCy draws from the shared
    random states of Python and NumPy, which are set here."""
    fix_random_seed(seed)
    model, rng = spacy.blank("en"), random.Random(seed)
    network = TAGGER | {"tok2vec": TAGGER["tok2vec"] | {"depth": DEPTH}}
    model.add_pipe("morphologizer", config={"model": network})
    gold = [(Doc(model.vocab, words), Doc(model.vocab, words, pos=tags)) for words, tags in texts]
    examples = [Example(*pair) for pair in gold]
    optimizer = model.initialize(lambda: examples)
    for _ in range(EPOCHS):
        for batch in minibatch(rng.sample(examples, len(examples)), BATCH):
            model.update(batch, sgd=optimizer, drop=DROPOUT)
    model.to_disk(folder)
    return model


def tagged_text(world: str, seed: int) -> list[Labelled]:
    """Labelled questions and passages about entities of no measured world, for the embedded finder.
    Every wording is among them, the held-out one too: only names are new to a tagger."""
    rng = random.Random(f"tagged {world} {seed}")
    texts, passages = [], []
    for entity in worlds.make_entities(world, TAGGED_ENTITIES, rng, reserved=False, sharing=1.0):
        for relation, rel in entity.told.items():
            texts.append(worlds.ask(entity, relation, rng.randrange(len(rel["questions"])), rng))
            wording = rng.randrange(len(rel["statements"]))
            passages.append(worlds.write_passage(entity, relation, wording, rng))
    labelled = []
    for text in texts + rng.sample(passages, TAGGED_PASSAGES):
        tagged = parts_of_speech(text)
        labelled.append(([text[a:b] for a, b, _ in tagged], [tag for _, _, tag in tagged]))
    return labelled


def make_nouns(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`spans.json`: where the nouns of every question of each part stand."""
    if not device.is_main():
        return
    model, world, seed = settings["nouns"], settings["world"], settings["seed"]
    if model == "embedded" and world:
        finder = train_tagger(tagged_text(world, seed), folder / "pipeline", seed)
    else:
        finder = load_nouns(model)
    spans = {}
    for part in PARTS:
        rows = read_jsonl(inputs["questions"] / f"{part}.jsonl")
        spans[part] = find_nouns(finder, [row["text"] for _, row in rows])
    write_json(folder / "spans.json", spans)
