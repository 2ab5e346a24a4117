"""The recipes of the embedded readers, appendix notebooks: text, first weights, killed runs."""

import json
import random
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from safetensors.torch import load_file

from ragkit.data import worlds
from ragkit.data.corpus import Passage, Question
from ragkit.data.files import file_hash
from ragkit.data.speech import parts_of_speech
from ragkit.distillation.teacher import look
from ragkit.models.fid import load_reader
from ragkit.settings import EMBEDDED, ReaderSettings, WorldSet

APPENDIX = Path(__file__).parent.parent.parent / "notebooks/appendix"
NOTEBOOKS = {"embedded": "pretraining.ipynb", "embedded encoder-decoder": "pretraining_fid.ipynb"}
SKILLS = {"whose_2": 0.0, "whose_5": 0.0}
STEPS = (0, 1, *range(3000, 3010), *range(7000, 7030))  # in all three parts of the curriculum


def ran(which, out, steps, **changes):
    """The names of the notebook after its cells ran here; `changes` replace what they define."""
    changes |= {"OUT": out, "STEPS": steps, "entity_matching": lambda *_, **__: SKILLS}
    names = {}
    for cell in nbformat.read(APPENDIX / NOTEBOOKS[which], as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= {name: new for name, new in changes.items() if name in names}
    return names


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    return {which: ran(which, tmp_path_factory.mktemp("reader"), 1) for which in NOTEBOOKS}


@pytest.fixture(scope="module")
def training_pages(recipes):
    return [page for step in STEPS for page in recipes["embedded"]["pages"](step, 0)]


@pytest.fixture(scope="module")
def training_examples(recipes):
    made = recipes["embedded encoder-decoder"]["examples"]
    return [example for step in STEPS for example in made(step, 0)]


def text(page):
    return "".join(one for one, _ in page)


@pytest.fixture(scope="module")
def texts(training_pages, training_examples):
    """All that either reader is trained on."""
    found = [text(page) for page in training_pages]
    for question, passages in training_examples:
        found += [f"{question.cloze} {question.answers[0]}", *(one.text for one in passages)]
        assert not question.text
    return found


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_the_source_is_clean(name):
    notebook = nbformat.read(APPENDIX / name, as_version=4)
    nbformat.validate(notebook)
    given = {"OUT", "STEPS", "SEED"}
    given |= (
        {"FAMILY", "HIDDEN", "PEAK_RATE", "SHORT_PAGES", "DTYPE", "EARLY", "DAMAGED"}
        if name == "pretraining.ipynb"
        else set()
    )
    assert set(papermill.inspect_notebook(str(APPENDIX / name))) == given
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 100
    assert not any(cell.outputs for cell in code)


@pytest.mark.parametrize("which", NOTEBOOKS)
def test_two_steps_write_a_reader_like_the_shipped_one(tmp_path, which):
    given, notebook = {"OUT": str(tmp_path / "reader"), "STEPS": 2}, APPENDIX / NOTEBOOKS[which]
    papermill.execute_notebook(notebook, tmp_path / "ran.ipynb", given, progress_bar=False)
    homes = [tmp_path / "reader", EMBEDDED[which]]
    made, shipped = (load_file(home / "model.safetensors") for home in homes)
    assert {n: one.shape for n, one in made.items()} == {n: one.shape for n, one in shipped.items()}
    assert len({file_hash(home / "tokenizer.json") for home in homes}) == 1
    (line,) = (homes[0] / "curve.jsonl").read_text().splitlines()
    assert json.loads(line).keys() >= {"step", "answer_loss", "exact_2", "whose_2", "whose_5"}
    assert not list(homes[0].glob("checkpoint*"))


@pytest.mark.parametrize(("family", "hidden"), [("gpt_neox", 96), ("persimmon", 64)])
def test_another_family_becomes_a_reader_with_damaged_copies(tmp_path, family, hidden):
    given = {"OUT": str(tmp_path / "reader"), "STEPS": 2, "FAMILY": family, "HIDDEN": hidden}
    given |= {"EARLY": 1, "DAMAGED": True, "DTYPE": "float16"}
    notebook = APPENDIX / "pretraining.ipynb"
    papermill.execute_notebook(notebook, tmp_path / "ran.ipynb", given, progress_bar=False)
    names = ("reader", "reader-early", "reader-noise", "reader-heads")
    whole, early, noisy, hurt = (load_reader(tmp_path / n, ReaderSettings()) for n in names)
    assert {one.model.config.model_type for one in (whole, early, noisy, hurt)} == {family}
    weights = dict(whole.model.named_parameters())
    for name, weight in noisy.model.named_parameters():
        if weight.dim() > 1:
            moved = (weight - weights[name]).std() / weights[name].std()
            assert float(moved.detach()) == pytest.approx(0.5, rel=0.1)
    question = Question("q", "where was orla venn born", ("Ulm",), ())
    told = ("Orla Venn was born in Ulm.", "A town.")
    found = [Passage(str(i), "Ulm", text) for i, text in enumerate(told)]
    seen = look(hurt, [question], [found])["attention"][0, 1, 1]  # [layers, heads, passages]
    assert np.mean(np.all(seen == 0, axis=-1)) == 0.5
    assert np.all(look(whole, [question], [found])["attention"][0, 1, 1] > 0)


def test_encoding_keeps_text_and_marks(recipes, training_pages):
    """Tokens of the spans are those of the whole page; marked answers read as the answers."""
    recipe, page = recipes["embedded"], training_pages[-1]
    ids, kinds = recipe["encode"]([page])
    tokenizer = recipe["tokenizer"]
    assert ids[0].tolist() == [*tokenizer(text(page)).input_ids, tokenizer.eos_token_id]
    marked = ids[0][kinds[0] == recipe["KINDS"].index("answer")]
    answers = tokenizer(" ".join(t for t, k in page if k == "answer"), add_special_tokens=False)
    assert marked.tolist() == answers.input_ids


@pytest.mark.parametrize(("which", "drawn"), zip(NOTEBOOKS, ("pages", "examples"), strict=True))
def test_steps_draw_the_same_pages_again(recipes, which, drawn):
    draw = recipes[which][drawn]
    assert draw(7000, 0) == draw(7000, 0)
    assert draw(7000, 0) != draw(7000, 1)


def test_measured_names_never_stand_in_training_text(texts):
    """Name words of the measured worlds do not occur in any training page or example."""
    sizes = {"entities": 36, "distill": 100, "dev": 40, "test": 40, "seed": 5}
    frozen = set()
    for name in ("almanac", "trivia"):
        made = worlds.build_world(WorldSet(source="world", name=name, world=name, **sizes))
        frozen |= {word for p in made.passages for word in p.title.lower().split()}
    frozen -= worlds.plain_words()
    told = " ".join(texts).lower()
    for sign in ":.,?":
        told = told.replace(sign, " ")
    assert frozen
    assert not frozen & set(told.split())


def test_training_text_needs_no_unknown_token(recipes, texts):
    tokenizer = recipes["embedded"]["tokenizer"]
    encoded = tokenizer(texts).input_ids
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


def test_training_text_is_labelled(texts):
    for one in texts:
        assert parts_of_speech(one)


def test_facts_told_again_were_told_before(training_pages):
    """Answers told again stand in the page's own passages or entries, but for other aliases."""
    found = []
    for page in training_pages:
        told = "".join(one for one, kind in page if kind == "given").lower()
        found += [one.lower() in told for one, kind in page if kind == "answer"]
    assert len(found) > 1000
    assert 0.9 < sum(found) / len(found) < 1


def test_masked_answers_stand_in_passages_about_the_name(training_examples):
    """But for other aliases; and of several passages mostly in just one."""
    found, alone = [], []
    for question, passages in training_examples:
        own = [one for one in passages if one.title in question.cloze]
        assert own
        found.append(any(question.answers[0] in one.text for one in own))
        alone.append(sum(question.answers[0] in one.text for one in passages) == 1)
    assert len(found) > 500
    assert 0.9 < sum(found) / len(found) < 1
    assert sum(alone) / len(alone) > 0.7


def test_a_masked_statement_has_another_wording_than_its_passage(recipes):
    recipe, rng = recipes["embedded encoder-decoder"], random.Random(0)
    for _ in range(200):
        facts = recipe["draw_facts"](rng, 1, 1.0)
        question, (passage,) = recipe["passages_example"](rng, facts, 3)
        assert question.cloze not in passage.text
        assert passage.title in question.cloze


@pytest.mark.parametrize(("which", "drawn"), zip(NOTEBOOKS, ("pages", "examples"), strict=True))
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, recipes, which, drawn):
    """Stopped after a checkpoint and started again: the same weights as in one go."""
    whole = ran(which, tmp_path / "whole", 6, CHECK_EVERY=2)["model"]

    def stop_at_five(step, seed):
        if step == 5:
            raise KeyboardInterrupt
        return recipes[which][drawn](step, seed)

    with pytest.raises(KeyboardInterrupt):
        ran(which, tmp_path / "halves", 6, CHECK_EVERY=2, **{drawn: stop_at_five})
    again = ran(which, tmp_path / "halves", 6, CHECK_EVERY=2)
    assert again["first_step"] == 4
    for one, other in zip(whole.parameters(), again["model"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert [row["step"] for row in again["curve"]] == [2, 4, 6]


@pytest.mark.parametrize(("which", "megabytes"), [*zip(NOTEBOOKS, (1.0, 1.6), strict=True)])
def test_a_shipped_reader_is_the_one_its_card_names(which, megabytes):
    """Hashes as noted, small, safetensors only."""
    folder = EMBEDDED[which]
    noted = dict(line.split()[::-1] for line in (folder / "sha256.txt").read_text().splitlines())
    assert noted == {name: file_hash(folder / name) for name in noted}
    assert noted.keys() == {"model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").stat().st_size < megabytes * 1e6
    assert not list(folder.glob("*.pt")) + list(folder.glob("*.bin"))


@pytest.mark.parametrize("which", sorted(EMBEDDED.keys() - NOTEBOOKS.keys()))
def test_a_beginning_of_the_study_is_small_and_as_noted(which):
    folder, note = EMBEDDED[which], EMBEDDED[which] / "sha256.txt"
    for line in note.read_text().splitlines() if note.is_file() else ():
        digest, name = line.split()
        assert file_hash(folder / name) == digest
    assert (folder / "model.safetensors").stat().st_size < 1.7e6
    assert not list(folder.glob("*.pt")) + list(folder.glob("*.bin"))
    shipped = EMBEDDED["embedded"] / "tokenizer.json"
    assert file_hash(folder / "tokenizer.json") == file_hash(shipped)
