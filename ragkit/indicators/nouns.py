"""The nouns of questions through spaCy: by an installed pipeline, or by a small one trained here on labelled text."""

from __future__ import annotations

import random
from importlib import metadata
from pathlib import Path
from typing import Any

import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.util import fix_random_seed, is_package, minibatch

from ragkit.data.speech import LABELS, NOUN_TAGS, Tagged
from ragkit.errors import NounsError
from ragkit.experiment.store import contents, input_hash

WIDTH, DEPTH, ROWS = (
    96,
    2,
    2000,
)  # of the tagger: spaCy's own default is 4 deep and trains at a third of the speed
EPOCHS, BATCH, DROPOUT = 4, 64, 0.3  # like the depth, chosen on the news half of PUD
HOW_TO_GET_ONE = (
    "Install one (python -m spacy download en_core_web_sm, which needs the network) and write its name under nouns.model in the profile, "
    "or write the folder of a pipeline saved with spaCy's to_disk."
)
Labelled = tuple[list[str], list[str]]  # the words of a text and their UPOS


def state(model: str) -> dict[str, str]:
    """What a noun finder depends on: labels, a package's version, or a folder's files by hash; empty where there is none."""
    found: dict[str, str] = {}
    if model == "embedded":
        found = {LABELS.name: input_hash(LABELS)}
    elif is_package(model):
        found = {model: metadata.version(model)}
    elif Path(model).is_dir():
        found = contents(Path(model))
    return found and {"spacy": spacy.__version__, **found}


def check_model(model: str, in_world: bool) -> None:
    """Raises NounsError where a set's profile names no usable noun finder: none is there, or the embedded one would meet real text."""
    if model == "embedded" and not in_world:
        raise NounsError(
            f"The embedded noun finder knows the words of the embedded worlds only, and these questions are real text. {HOW_TO_GET_ONE}"
        )
    if not state(model):
        raise NounsError(
            f"There is no spaCy pipeline {model!r}, neither an installed package nor a folder with files. {HOW_TO_GET_ONE}"
        )


def load_nouns(model: str) -> Language:
    """An installed spaCy package by name, or a pipeline's folder.

    Raises NounsError where there is none, it cannot be opened, or it sets no parts of speech.
    """
    check_model(model, in_world=False)
    try:
        pipeline = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
        example = pipeline("where is the town")
    except Exception as error:  # damaged files and missing parts show in a dozen ways, and a package runs code of its own
        raise NounsError(
            f"The spaCy pipeline {model!r} cannot be opened ({str(error).splitlines()[0]}). {HOW_TO_GET_ONE}"
        ) from error
    if not example.has_annotation("POS"):
        parts = ", ".join(pipeline.pipe_names) or "none"
        raise NounsError(
            f"The spaCy pipeline {model!r} sets no parts of speech (its components: {parts}). {HOW_TO_GET_ONE}"
        )
    return pipeline


def find_nouns(model: Language, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Start and end, in characters, of the nouns of each text, proper nouns included; a text without any gets an empty list."""
    return [
        [(word.idx, word.idx + len(word)) for word in doc if word.pos_ in NOUN_TAGS]
        for doc in model.pipe(texts)
    ]


def train_tagger(texts: list[Labelled], folder: Path, seed: int) -> Language:
    """A small pipeline that learns parts of speech from labelled texts, saved to a folder with spaCy's `to_disk`.

    It is a morphologizer on word vectors of its own: spaCy's `tagger` would set the fine-grained tag only. spaCy draws from
    the shared random states of Python and NumPy, which are set here.
    """
    fix_random_seed(seed)
    words_to_vectors = {
        "@architectures": "spacy.HashEmbedCNN.v2", "width": WIDTH, "depth": DEPTH, "embed_size": ROWS,
        "window_size": 1, "maxout_pieces": 3, "subword_features": True, "pretrained_vectors": None,
    }  # fmt: skip
    model = spacy.blank("en")
    model.add_pipe(
        "morphologizer",
        config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": words_to_vectors}},
    )
    examples = [
        Example(Doc(model.vocab, words), Doc(model.vocab, words, pos=tags)) for words, tags in texts
    ]
    optimizer = model.initialize(lambda: examples)
    rng = random.Random(seed)
    for _ in range(EPOCHS):
        for batch in minibatch(rng.sample(examples, len(examples)), BATCH):
            model.update(batch, sgd=optimizer, drop=DROPOUT)
    model.to_disk(folder)
    return model


def labelled(text: str, tagged: list[Tagged]) -> Labelled:
    """Words and tags of a text whose words are known by their place."""
    return [text[start:end] for start, end, _ in tagged], [tag for _, _, tag in tagged]


def score_tags(model: Language, texts: list[str], gold: list[list[Tagged]]) -> dict[str, float]:
    """How well a pipeline agrees with gold parts of speech.

    `accuracy` is the share of the gold words that it cuts out and tags alike; `precision`, `recall` and `F1` are of the
    nouns, proper nouns included, by their place. Raises ValueError where a share has nothing to be a share of.
    """
    words = right = found = true = both = 0
    for doc, tagged in zip(model.pipe(texts), gold, strict=True):
        guessed: dict[Any, str] = {(word.idx, word.idx + len(word)): word.pos_ for word in doc}
        known: dict[Any, str] = {(start, end): tag for start, end, tag in tagged}
        nouns, gold_nouns = (
            {place for place, tag in tags.items() if tag in NOUN_TAGS} for tags in (guessed, known)
        )
        words, right = (
            words + len(known),
            right + sum(guessed.get(place) == tag for place, tag in known.items()),
        )
        found, true, both = (
            found + len(nouns),
            true + len(gold_nouns),
            both + len(nouns & gold_nouns),
        )
    if not true:
        raise ValueError("there are no nouns among the gold parts of speech")
    return {
        "accuracy": right / words,
        "precision": both / max(found, 1),
        "recall": both / true,
        "F1": 2 * both / (found + true),
    }
