"""The nouns of questions: in the embedded worlds by their own labels; in real text by a spaCy
pipeline, installed or from a folder (`make nouns` trains one on a treebank)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import spacy
from spacy.language import Language

from ragkit.data.corpus import PARTS
from ragkit.data.files import read_jsonl
from ragkit.data.speech import NOUN_TAGS, noun_places
from ragkit.errors import NounsError
from ragkit.models import device


def load_nouns(model: str) -> Language:
    """An installed spaCy package by name, or a pipeline's folder. Raises NounsError where it cannot
    be opened, or sets no parts of speech. One from outside is taken as it is: whether it copes with
    questions without capitals, as NaturalQuestions are, was decided by those who trained it."""
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
    told = "Install one (python -m spacy download en_core_web_sm, which needs the network) or make "
    told += "one (make nouns, from a treebank); name it or its folder under nouns in the profile "
    raise NounsError(f"The spaCy pipeline {model!r} {why} {told}(judge: --nouns).")


def find_nouns(model: Language, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Start and end, in characters, of the nouns of each text, proper nouns included."""
    docs = ([word for word in doc if word.pos_ in NOUN_TAGS] for doc in model.pipe(texts))
    return [[(word.idx, word.idx + len(word)) for word in doc] for doc in docs]


def make_nouns(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`spans.json`: where the nouns of every question of each part stand."""
    in_world = settings["nouns"] == "embedded" and settings["world"]
    finder, spans = None if in_world else load_nouns(settings["nouns"]), {}
    for part in PARTS:
        texts = [row["text"] for _, row in read_jsonl(inputs["questions"] / f"{part}.jsonl")]
        spans[part] = find_nouns(finder, texts) if finder else list(map(noun_places, texts))
    device.write(folder, {"spans.json": spans})
