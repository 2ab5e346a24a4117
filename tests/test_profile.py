"""Profiles: what is wrong is named."""

import pytest

from ragkit.profile import ProfileError, load_profile, shipped

GOOD = "name: mine\nsets: [{source: world, name: a, world: almanac, seed: 1}]\n"


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_load(name):
    assert load_profile(name).name == name


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("distil: {epochs: 2}\n", ["distil", "distill"]),
        ("distill: {epoch: 2}\n", ["distill.epoch", "epochs"]),
        ("distill: {epochs: many}\n", ["distill.epochs"]),
        ("distill: {epochs: 0}\n", ["distill.epochs", "greater than or equal to 1"]),
        ("k: 1\n", ["k:", "greater than or equal to 2"]),
        ("attention: {rows: first}\n", ["attention.rows", "last_prompt"]),
        ("reader: [1\n", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, extra, words):
    with pytest.raises(ProfileError) as caught:
        load_profile(write(tmp_path, GOOD + extra))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_profile_gets_the_nearest_name():
    with pytest.raises(ProfileError, match="Did you mean 'tiny'"):
        load_profile("tinny")


def test_two_sets_of_one_name_are_refused(tmp_path):
    text = "name: mine\nsets: [{source: world, name: a, world: almanac, seed: 1}, {source: world, name: a, world: trivia, seed: 1}]\n"
    with pytest.raises(ProfileError, match="share a name"):
        load_profile(write(tmp_path, text))
