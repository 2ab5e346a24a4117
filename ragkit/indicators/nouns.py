"""The nouns of questions, by an installed spaCy pipeline or one trained on labelled text."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.util import fix_random_seed, minibatch

from ragkit.data import worlds
from ragkit.data.files import read_jsonl, write_json
from ragkit.data.questions import PARTS
from ragkit.data.speech import NOUN_TAGS, Tagged, parts_of_speech
from ragkit.errors import NounsError
from ragkit.models import device

# of the tagger: spaCy's own default is 4 deep and trains at a third of the speed
WIDTH, DEPTH, ROWS = 96, 2, 2000
EPOCHS, BATCH, DROPOUT = 4, 64, 0.3  # like the depth, chosen on the news half of PUD
TAGGED_ENTITIES, TAGGED_PASSAGES = 240, 120
HOW_TO_GET_ONE = (
    "Install one (python -m spacy download en_core_web_sm, which needs the network) or save one to "
    "a folder with spaCy's to_disk, and name it under nouns.model in the profile (judge: --nouns)."
)
Labelled = tuple[list[str], list[str]]  # the words of a text and their UPOS


def load_nouns(model: str) -> Language:
    """An installed spaCy package by name, or a pipeline's folder.

    Raises NounsError where there is none, it cannot be opened, or it sets no parts of speech.
    """
    if model == "embedded":
        why = "The embedded noun finder knows the embedded worlds only, and this is real text."
        raise NounsError(f"{why} {HOW_TO_GET_ONE}")
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
    raise NounsError(f"The spaCy pipeline {model!r} {why} {HOW_TO_GET_ONE}")


def find_nouns(model: Language, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Start and end, in characters, of the nouns of each text, proper nouns included."""
    return [
        [(word.idx, word.idx + len(word)) for word in doc if word.pos_ in NOUN_TAGS]
        for doc in model.pipe(texts)
    ]


def train_tagger(texts: list[Labelled], folder: Path, seed: int) -> Language:
    """A small pipeline that learns parts of speech from labelled texts, saved to a folder.

    A morphologizer, for spaCy's `tagger` would set the fine-grained tag only. spaCy draws from the
    shared random states of Python and NumPy, which are set here.
    """
    fix_random_seed(seed)
    words_to_vectors = {
        "@architectures": "spacy.HashEmbedCNN.v2", "width": WIDTH, "depth": DEPTH,
        "embed_size": ROWS, "window_size": 1, "maxout_pieces": 3, "subword_features": True,
        "pretrained_vectors": None,
    }  # fmt: skip
    tagger = {"@architectures": "spacy.Tagger.v2", "tok2vec": words_to_vectors}
    model = spacy.blank("en")
    model.add_pipe("morphologizer", config={"model": tagger})
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


def tagged_text(world: str, seed: int) -> list[Labelled]:
    """Labelled questions and passages about entities of no measured world, for the embedded finder.

    Every wording of a question is among them, the held-out one too: a tagger knows its language,
    only names are new to it.
    """
    rng = random.Random(f"tagged {world} {seed}")
    texts, passages = [], []
    for entity in worlds.make_entities(world, TAGGED_ENTITIES, rng, reserved=False, sharing=1.0):
        for relation in entity.facts:
            rel = worlds.relations(world)[entity.kind, relation]
            texts.append(worlds.ask(entity, relation, rng.randrange(len(rel["questions"])), rng))
            wording = rng.randrange(len(rel["statements"]))
            passages.append(worlds.write_passage(entity, relation, wording, rng))
    labelled = []
    for text in texts + rng.sample(passages, TAGGED_PASSAGES):
        tagged = parts_of_speech(text)
        labelled.append(([text[a:b] for a, b, _ in tagged], [tag for _, _, tag in tagged]))
    return labelled


def score_tags(model: Language, texts: list[str], gold: list[list[Tagged]]) -> dict[str, float]:
    """How well a pipeline agrees with gold parts of speech, some of which are nouns.

    `accuracy` is the share of the gold words that it cuts out and tags alike; `precision`, `recall`
    and `F1` are of the nouns, proper nouns included, by their place.
    """
    known = {(i, *word) for i, tagged in enumerate(gold) for word in tagged}
    guessed = set()
    for i, doc in enumerate(model.pipe(texts)):
        guessed |= {(i, word.idx, word.idx + len(word), word.pos_) for word in doc}
    found, true = ({word[:3] for word in w if word[3] in NOUN_TAGS} for w in (guessed, known))
    both = len(found & true)
    return {
        "accuracy": len(guessed & known) / len(known),
        "precision": both / max(len(found), 1),
        "recall": both / len(true),
        "F1": 2 * both / (len(found) + len(true)),
    }


def make_nouns(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """`spans.json`: where the nouns of every question of each part stand; `scores.json`: in an
    embedded world how often the finder is right on dev (`score_tags`), else nothing."""
    if not device.is_main():
        return
    model, world, seed = settings["nouns"], settings["world"], settings["seed"]
    if model == "embedded" and world:
        finder = train_tagger(tagged_text(world, seed), folder / "pipeline", seed)
    else:
        finder = load_nouns(model)
    texts = {}
    for part in PARTS:
        rows = read_jsonl(inputs["questions"] / f"{part}.jsonl")
        texts[part] = [row["text"] for _, row in rows]
    write_json(folder / "spans.json", {part: find_nouns(finder, texts[part]) for part in PARTS})
    gold = [parts_of_speech(text) for text in texts["dev"]] if world else []
    write_json(folder / "scores.json", score_tags(finder, texts["dev"], gold) if world else {})
