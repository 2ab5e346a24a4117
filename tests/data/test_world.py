"""The embedded worlds: reproducible, sound, and without leaks."""

import random
from collections import Counter

import pytest

from ragkit.data import worlds as world
from ragkit.data.corpus import PARTS, Corpus, passage_settings
from ragkit.data.text import holds_answer
from ragkit.errors import DataError
from ragkit.models.retriever import embedded_tokenizer
from ragkit.models.step1 import WORLD
from ragkit.profile import load_profile
from ragkit.settings import WorldSet

WORLDS = ("almanac", "trivia")


def small(name: str, seed: int = 5) -> Corpus:
    sizes = {"entities": 36, "distill": 100, "dev": 40, "test": 40}
    return world.build_world(WorldSet(source="world", name=name, world=name, seed=seed, **sizes))


@pytest.mark.parametrize("name", WORLDS)
def test_one_seed_gives_one_world(name):
    """Twelve passages on every entity; gold passages hold the answer and name the entity."""
    made = small(name)
    assert made == small(name)
    assert made != small(name, seed=6)
    titles = [p.title for p in made.passages]
    assert {titles.count(t) for t in titles} == {12}
    for part in made.questions.values():
        for question in part:
            assert len(question.gold) == 2
            for place in question.gold:
                assert holds_answer(made.passages[place].text, question.answers), question
                assert made.passages[place].title == question.entity


def test_sizes_of_the_parts_change_no_passage():
    one = WorldSet(source="world", name="a", world="trivia", seed=1, entities=12)
    few, many = (one.model_copy(update=dict.fromkeys(PARTS, n)) for n in (1, 40))
    assert world.build_world(few).passages == world.build_world(many).passages
    assert passage_settings(few) == passage_settings(many)
    with pytest.raises(DataError, match="Lower distill, dev or test"):
        world.build_world(many.model_copy(update={"distill": 9000}))


@pytest.mark.parametrize(
    ("profile", "wanted"),
    [("tiny", {"distill": 140, "dev": 70, "test": 210}), ("smoke", {"distill": 14, "dev": 6})],
)
def test_entities_take_turns_and_half_of_them_are_for_test(profile, wanted):
    """No entity is asked about again before all of its part were."""
    for settings in load_profile(profile).sets:
        owners = {}
        for part, asked in world.build_world(settings).questions.items():
            assert len(asked) == getattr(settings, part)
            entities = [question.entity for question in asked]
            owners[part] = set(entities)
            for n in range(1, len(asked) + 1):
                turns = set(Counter(entities[:n]).values())
                assert max(turns) <= -(-n // len(owners[part]))
            assert len(owners[part]) == wanted.get(part, 20)
        assert sum(map(len, owners.values())) == len(set.union(*owners.values()))


def test_few_test_questions_leave_the_other_entities_to_distillation():
    """As the worlds of Step 1, which test nobody."""
    chosen = {"source": "world", "name": "a", "world": "almanac", "seed": 1}
    asked = world.build_world(WorldSet(**chosen | WORLD), reserved=False).questions
    assert [len({q.entity for q in asked[part]}) for part in PARTS] == [46, 1, 1]


def test_held_out_wordings_are_not_in_the_distillation_part():
    for name in WORLDS:
        made = small(name)
        last = {len(rel["questions"]) - 1 for rel in world.relations(name).values()}
        assert last == {3}
        assert {q.wording for q in made.questions["distill"]} == {0, 1, 2}
        assert 3 in {q.wording for q in made.questions["test"]}


@pytest.mark.parametrize("kind", ["first", "last", "town", "river", "company", "press", "medal"])
def test_every_name_word_is_two_tokens(kind):
    tokenizer = embedded_tokenizer()
    for reserved in (True, False):
        for word in world.name_words(kind, reserved):
            pieces = tokenizer.tokenize(word)
            assert len(pieces) == 2, (word, pieces)
            assert word == pieces[0] + pieces[1].removeprefix("##")


def test_a_question_in_training_text_is_left_open():
    """Prose with a question's wording never goes on with its answer."""
    sentences = world.open_prose("almanac", 50, random.Random(0))
    starts = tuple(frame.split("{")[0] for frame in world.SPEC["prose"]["open"])
    assert all(sentence.startswith(starts) for sentence in sentences)
