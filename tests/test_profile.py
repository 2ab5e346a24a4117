"""Profiles: what is wrong is named."""

import pytest

from ragkit import settings
from ragkit.errors import ProfileError
from ragkit.profile import SHIPPED, VARIATIONS, Profile, load_profile, save_profile, varied

GOOD = "name: mine\nsets: [{source: world, name: a, world: almanac, seed: 1}]\n"


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
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
        ("k: 21\n", ["k:", "less than or equal to 20"]),
        ("attention: {order: ranked}\n", ["attention.order", "balanced", "levelled"]),
        ("attention: {heads: some}\n", ["attention.heads", "chosen"]),
        ("attention: {chosen: 0}\n", ["attention.chosen", "greater than or equal to 1"]),
        ("distill: {standardise: 1}\n", ["distill.standardise", "boolean"]),
        ("encoder_decoder: {steps: 0}\n", ["encoder_decoder.steps"]),
        ("encoder_decoder: {step: 9}\n", ["encoder_decoder.step: unknown key", "'steps'"]),
        ("reader: [1\n", ["not valid YAML"]),
        ("reader: {rate: .inf}\n", ["reader.rate", "finite"]),
        ("reader: {rate: .nan}\n", ["reader.rate"]),
        ("distill: {seeds: [1, 2, 1]}\n", ["distill.seeds: 1 stands there twice"]),
        ("reader: 5\n", ["reader:"]),
        ("reader: {entropie: 0.5}\n", ["reader.entropie: unknown key", "'entropy'"]),
        ("reader: {order: question first}\n", ["reader.order: unknown key."]),
        ("distill: {entropy: 1.0}\n", ["distill.entropy: Input should be less than 1"]),
        ("distill: {entropy: 0.0}\n", ["distill.entropy: Input should be greater than 0"]),
        ("indicators: {share: 1.0}\n", ["indicators.share", "less than 1"]),
        ("index: {kind: ivfpq}\n", ["index.kind: unknown key"]),
        ("index: {factry: Flat}\n", ["index.factry", "'factory'"]),
        ("variations: [reverse kl]\n", ["no variation 'reverse kl'", "reverse KL"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, extra, words):
    with pytest.raises(ProfileError) as caught:
        load_profile(write(tmp_path, GOOD + extra))
    for word in words:
        assert word in str(caught.value)


def test_a_key_of_another_section_is_not_its_own_nearest(tmp_path):
    with pytest.raises(ProfileError) as caught:
        load_profile(write(tmp_path, GOOD + "reader: {order: question first}\n"))
    assert "'order'" not in str(caught.value)


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_variation_takes_one_choice_otherwise_than_every_shipped_profile(name):
    for profile in map(load_profile, SHIPPED):
        other = varied(profile, name)
        changed = [key for key, value in profile if value != getattr(other, key)]
        assert changed == list(VARIATIONS[name])
        assert Profile.model_validate(other.model_dump(mode="json")) == other


def test_the_paper_is_read_by_default():
    """Choices of the recovered figure and of ATLAS; what is ours stands beside, by name."""
    profile = load_profile("tiny")
    assert profile.attention.model_dump() == {
        "rows": "predicting", "norm": True, "layers": "all", "heads": "all", "chosen": 4,
        "pooling": "sum", "order": "rank",
    }  # fmt: skip
    assert profile.indicators.share == 0.05
    assert profile.distill.standardise
    assert profile.encoder_decoder.model == "embedded encoder-decoder"
    assert load_profile("tiny", ["encoder_decoder=null"]).encoder_decoder is None
    for real in ("small", "paper"):  # the embedded one knows the embedded worlds only
        assert load_profile(real).encoder_decoder is None


def test_an_unknown_profile_gets_the_nearest_name():
    with pytest.raises(ProfileError, match="Did you mean 'tiny'"):
        load_profile("tinny")


def test_two_sets_of_one_name_are_refused(tmp_path):
    text = GOOD.replace("}]", "}, {source: world, name: a, world: trivia, seed: 1}]")
    with pytest.raises(ProfileError, match="sets: 'a' stands there twice"):
        load_profile(write(tmp_path, text))


def test_a_seed_follows_from_the_rules_the_world_and_the_draw(tmp_path, monkeypatch):
    given = GOOD.replace("seed: 1", "seed: rules")
    path = write(tmp_path, given)
    rules = (settings.ASSETS / "claims.yaml").read_text("utf8")
    monkeypatch.setattr(settings, "ASSETS", tmp_path)

    def seed(text, *changes):
        (tmp_path / "claims.yaml").write_text(text, "utf8")
        return load_profile(path, changes).sets[0].seed

    first = seed(rules)
    assert first == settings.derived_seed("almanac", 0)
    assert seed(f"# reworded\n{rules}") == first
    others = [seed(rules, "sets.0.draw=1"), seed(rules, "sets.0.world=trivia")]
    others.append(seed(f"{rules}\nC9: {{claim: a, rule: b}}\n"))
    assert len({first, *others}) == 4
    seed(rules)
    saved = tmp_path / "saved.yaml"
    save_profile(load_profile(path, ["sets.0.draw=2"]), saved)
    was = settings.derived_seed("almanac", 2)
    seed("C1: {claim: another}")  # a saved profile keeps its number, and it no longer agrees
    (kept,) = load_profile(str(saved)).sets
    assert (kept.seed, kept.draw) == (was, 2)
    assert kept.seed != settings.derived_seed("almanac", 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [("rule", "sets.0.world.seed"), ("rules, draw: -1", "sets.0.world.draw: Input should be gre")],
)
def test_another_word_is_no_seed(tmp_path, given, words):
    with pytest.raises(ProfileError, match=words):
        load_profile(write(tmp_path, GOOD.replace("seed: 1", f"seed: {given}")))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    with pytest.raises(ProfileError, match="expected keys with values"):
        load_profile(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="UTF-8"):
        load_profile(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "''"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ProfileError, match="  name: "):
        load_profile(write(tmp_path, GOOD.replace("name: mine", f"name: {name}")))


def test_relative_paths_start_from_the_profiles_folder(tmp_path, monkeypatch):
    (tmp_path / "data" / "bert").mkdir(parents=True)
    sets = (
        "name: mine\nsets: [{source: files, name: a, passages: p.tsv, questions: /abs/q.jsonl}]\n"
    )
    (tmp_path / "data" / "mine.yaml").write_text(
        sets + "retriever: {model: bert}\nnouns: bert\nreader: {model: tiiuae/falcon-rw-1b}\n"
    )
    monkeypatch.chdir(tmp_path)
    profile = load_profile("data/mine.yaml")
    (files,) = profile.sets
    assert (files.passages, files.questions) == (str(tmp_path / "data" / "p.tsv"), "/abs/q.jsonl")
    assert profile.retriever.model == profile.nouns == str(tmp_path / "data" / "bert")
    assert profile.reader.model == "tiiuae/falcon-rw-1b"


def test_changes_are_made_before_validation(tmp_path):
    profile = load_profile("smoke", ["sets.0.distill=20", "reader.answer_tokens=null", "k=3"])
    assert (profile.sets[0].distill, profile.reader.answer_tokens, profile.k) == (20, None, 3)
    save_profile(profile, tmp_path / "saved.yaml")
    assert load_profile(str(tmp_path / "saved.yaml")) == profile
    for change, words in (
        ("k", "is no change"),
        ("sets.9.distill=1", "'sets.9.distill=1' is no change"),
        ("reader.bach=1", "reader.bach: unknown key. The nearest valid key is 'batch'"),
        ("variations=[]", "variations: .* at least 1 item"),
        ("reader.rate=1e-4", r"reader\.rate: .* valid number \(YAML .* write 1\.0e-4\)"),
    ):
        with pytest.raises(ProfileError, match=words):
            load_profile("smoke", [change])


def test_paths_of_hub_tables_start_from_the_profiles_folder(tmp_path):
    (tmp_path / "table").mkdir()
    for passages, found in (("p.tsv", str(tmp_path / "p.tsv")), ("{dataset: a/b}", "a/b")):
        path = write(
            tmp_path,
            "name: mine\nsets: [{source: hub, name: a, questions: {dataset: table}, "
            f"passages: {passages}}}]\n",
        )
        (one,) = load_profile(path).sets
        assert one.questions.dataset == str(tmp_path / "table")
        assert getattr(one.passages, "dataset", one.passages) == found
