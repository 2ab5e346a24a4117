"""Gold parts of speech: every wording is labelled, names by their pieces only."""

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from ud import read_conllu

from ragkit.data import speech
from ragkit.data import worlds as world
from ragkit.data.corpus import Corpus
from ragkit.data.speech import NOUN_TAGS, parts_of_speech
from ragkit.errors import DataError
from ragkit.settings import WorldSet, asset

WORLDS = ("almanac", "trivia")
REAL_DATA = os.environ.get("RAGKIT_REAL_DATA", "")


def tagged(text: str) -> str:
    return " ".join(f"{text[start:end]}/{tag}" for start, end, tag in parts_of_speech(text))


def every_wording() -> list[str]:
    """All wordings of both worlds and of the prose around passages, their slots empty."""
    found = [frame for frames in world.SPEC["prose"].values() for frame in frames]
    for name in WORLDS:
        for rel in world.relations(name).values():
            found += rel["statements"] + rel["details"] + rel["questions"] + [rel.get("clue", "")]
        for entity in world.SPEC["worlds"][name]["entities"].values():
            found += entity["shorts"]
    return [re.sub(r"\{\w+\}", " ", wording) for wording in found]


def small(name: str) -> Corpus:
    sizes = {"entities": 36, "distill": 100, "dev": 40, "test": 40}
    return world.build_world(WorldSet(source="world", name=name, world=name, seed=7, **sizes))


def test_every_word_of_every_wording_is_labelled():
    for wording in every_wording():
        spans = parts_of_speech(wording)
        assert "".join(wording[start:end] for start, end, _ in spans) == wording.replace(" ", "")


def test_every_label_is_used_and_no_word_has_two():
    words = [word for words in speech.LABELS["words"].values() for word in words]
    assert len(words) == len(set(words))
    assert set(re.findall(r"[a-z]+|[.,?:]", " ".join(every_wording()).lower())) >= set(words)
    sentences = [" ".join(re.findall(r"[a-z]+", wording.lower())) for wording in every_wording()]
    for phrase in speech.LABELS["phrases"]:
        assert any(re.sub(r" \{\w+\}", "", phrase) in sentence for sentence in sentences), phrase
    assert set(speech.LABELS["answers"]) == set(speech.closed_answers())


def test_tags_are_universal():
    upos = "ADJ ADP ADV AUX CCONJ DET NOUN NUM PART PRON PROPN PUNCT SCONJ VERB"
    assert {tag for tags in speech.lexicon().values() for tag in tags} <= set(re.split(" ", upos))
    assert all(len(words) == len(tags) for words, tags in speech.lexicon().items())


@pytest.mark.parametrize("name", WORLDS)
def test_all_texts_of_a_world_are_labelled(name):
    """A passage as its sentences are."""
    made = small(name)
    for passage in made.passages:
        assert parts_of_speech(passage.title)
        sentences = re.findall(r"[^.]+\.", passage.text)
        alone = [tag for sentence in sentences for _, _, tag in parts_of_speech(sentence)]
        assert [tag for _, _, tag in parts_of_speech(passage.text)] == alone
    for question in (q for part in made.questions.values() for q in part):
        assert {tag for _, _, tag in parts_of_speech(question.text)} & set(NOUN_TAGS)
        assert parts_of_speech(question.cloze)
    for piece in world.open_prose(name, 300, random.Random(1)):
        assert parts_of_speech(piece)


LABELLED = """
which/DET company/NOUN did/AUX belina/PROPN ashvik/PROPN work/VERB for/ADP

what/PRON did/AUX belina/PROPN ashvik/PROPN do/VERB for/ADP a/DET living/NOUN

what/DET year/NOUN did/AUX the/DET station/NOUN of/ADP old/PROPN albmere/PROPN open/VERB

what/PRON did/AUX port/PROPN bormere/PROPN export/VERB

in/ADP what/DET town/NOUN did/AUX belina/PROPN ashvik/PROPN first/ADV see/VERB the/DET light/NOUN

Ashvik/PROPN learned/VERB the/DET work/NOUN in/ADP 7/NUM years/NOUN ./PUNCT

Ashvik/PROPN kept/VERB a/DET map/NOUN of/ADP the/DET old/ADJ streets/NOUN ./PUNCT

The/DET chief/ADJ export/NOUN of/ADP Old/PROPN Albmere/PROPN was/AUX barley/NOUN ./PUNCT

Merchants/NOUN came/VERB to/ADP Old/PROPN Albmere/PROPN to/PART buy/VERB barley/NOUN ./PUNCT

Old/PROPN Albmere/PROPN grew/VERB rich/ADJ by/SCONJ selling/VERB barley/NOUN ./PUNCT

The/DET trade/NOUN of/ADP Belina/PROPN Ashvik/PROPN was/AUX that/PRON of/ADP a/DET weaver/NOUN
./PUNCT

Readers/NOUN of/ADP the/DET novel/NOUN still/ADV look/VERB for/ADP the/DET crooked/ADJ bridge/NOUN
./PUNCT

The/DET Crooked/PROPN Bridge/PROPN was/AUX brought/VERB out/ADP by/ADP Abrco/PROPN Press/PROPN
./PUNCT

In/ADP which/PRON a/DET nun/NOUN recounts/VERB the/DET events/NOUN and/CCONJ pictured/VERB
with/ADP a/DET fox/NOUN ,/PUNCT the/DET novel/NOUN The/DET Paper/PROPN Clock/PROPN happens/VERB
in/ADP which/DET town/NOUN ?/PUNCT

Name/VERB the/DET profession/NOUN of/ADP the/DET one/NOUN who/PRON recounts/VERB The/DET
Iron/PROPN Tide/PROPN ./PUNCT

In/ADP which/DET town/NOUN could/AUX one/PRON visit/VERB the/DET offices/NOUN of/ADP Basco/PROPN
Works/PROPN ?/PUNCT

Without/ADP copper/NOUN Basco/PROPN Works/PROPN could/AUX not/PART work/VERB ./PUNCT

In/ADP scarlet/ADJ paint/NOUN the/DET name/NOUN of/ADP Basco/PROPN Stores/PROPN was/AUX
written/VERB on/ADP every/DET door/NOUN ./PUNCT

The/DET porters/NOUN of/ADP Basco/PROPN Trading/PROPN dressed/VERB in/ADP scarlet/NOUN ./PUNCT

One/NUM thing/NOUN is/AUX left/VERB open/ADJ :/PUNCT what/PRON was/AUX the/DET job/NOUN of/ADP
belina/PROPN ashvik/PROPN ./PUNCT
"""


@pytest.mark.parametrize("labelled", LABELLED.strip().split("\n\n"))
def test_words_whose_tag_depends_on_their_place(labelled):
    words = [word.rpartition("/") for word in labelled.split()]
    text = re.sub(r" ([.,?:])", r"\1", " ".join(word for word, _, _ in words))
    assert tagged(text).split() == labelled.split()


def test_names_are_known_from_their_pieces_alone():
    text = asset("parts_of_speech.yaml").read_text("utf8").lower()
    listed = set(re.findall(r"[a-z]+", text.split("\nanswers:")[1]))
    for kind in ("first", "last", "town", "river", "company", "press", "medal"):
        for reserved in (True, False):
            words = world.name_words(kind, reserved)
            assert not listed & set(words)
            assert {tag for word in words for _, _, tag in parts_of_speech(word)} == {"PROPN"}


def test_an_unknown_word_is_named():
    with pytest.raises(DataError, match=r"'zeppelin' in 'where was the zeppelin born'"):
        parts_of_speech("where was the zeppelin born")
    with pytest.raises(DataError, match="'!'"):
        parts_of_speech("where was belina ashvik born!")
    assert parts_of_speech("") == []


def test_spans_point_at_words():
    text = "which trade did belina ashvik follow"
    nouns = [text[start:end] for start, end, tag in parts_of_speech(text) if tag in NOUN_TAGS]
    assert nouns == ["trade", "belina", "ashvik"]


@pytest.mark.skipif(
    not REAL_DATA, reason="RAGKIT_REAL_DATA is not set: no treebank to compare with"
)
def test_labels_agree_with_the_treebanks():
    """No word that treebanks hold often has a label that they never give it."""
    seen: dict[str, Counter[str]] = {}
    for file in ("en_ewt-ud-dev.conllu", "en_pud-ud-test.conllu"):
        for sentence in read_conllu(Path(REAL_DATA) / "ud" / file):
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                seen.setdefault(word.lower(), Counter())[tag] += 1
    compared, strange = 0, {}
    labels = speech.LABELS["words"]
    for tag, word in ((label, one) for label in labels for one in labels[label]):
        if word in seen and seen[word].total() >= 5:
            compared += 1
            if tag not in seen[word]:
                strange[word] = (tag, dict(seen[word]))
    assert compared > 200
    assert strange == {}
