"""The recipe of the embedded reader, an appendix notebook: text, first weights, killed runs."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from safetensors.torch import load_file

from ragkit.data import worlds
from ragkit.data.files import file_hash
from ragkit.data.speech import parts_of_speech
from ragkit.settings import EMBEDDED, WorldSet

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks/appendix/pretraining.ipynb"
SKILLS = {"whose_2": 0.0, "whose_5": 0.0}


def ran(out, steps, **changes):
    """The names of the notebook after its cells ran here; `changes` replace what they define."""
    changes |= {"OUT": out, "STEPS": steps, "entity_matching": lambda *_, **__: SKILLS}
    names = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= {name: new for name, new in changes.items() if name in names}
    return names


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("reader"), 1)


@pytest.fixture(scope="module")
def training_pages(recipe):
    """Pages of all three parts of the curriculum."""
    steps = (0, 1, *range(3000, 3010), *range(7000, 7030))
    return [page for step in steps for page in recipe["pages"](step, 0)]


def text(page):
    return "".join(one for one, _ in page)


def test_the_source_is_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert set(papermill.inspect_notebook(str(NOTEBOOK))) == {"OUT", "STEPS", "SEED"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 100
    assert not any(cell.outputs for cell in code)


def test_two_steps_write_a_reader_like_the_shipped_one(tmp_path):
    given = {"OUT": str(tmp_path / "reader"), "STEPS": 2}
    papermill.execute_notebook(NOTEBOOK, tmp_path / "ran.ipynb", given, progress_bar=False)
    homes = [tmp_path / "reader", EMBEDDED["embedded"]]
    made, shipped = (load_file(home / "model.safetensors") for home in homes)
    assert {n: one.shape for n, one in made.items()} == {n: one.shape for n, one in shipped.items()}
    assert len({file_hash(home / "tokenizer.json") for home in homes}) == 1
    (line,) = (homes[0] / "curve.jsonl").read_text().splitlines()
    assert json.loads(line).keys() >= {"step", "answer_loss", "exact_2", "whose_2", "whose_5"}
    assert not list(homes[0].glob("checkpoint*"))


def test_encoding_keeps_text_and_marks(recipe, training_pages):
    """Tokens of the spans are those of the whole page; marked answers read as the answers."""
    tokenizer, page = recipe["tokenizer"], training_pages[-1]
    ids, kinds = recipe["encode"]([page])
    assert ids[0].tolist() == [*tokenizer(text(page)).input_ids, tokenizer.eos_token_id]
    marked = ids[0][kinds[0] == recipe["KINDS"].index("answer")]
    answers = tokenizer(" ".join(t for t, k in page if k == "answer"), add_special_tokens=False)
    assert marked.tolist() == answers.input_ids


def test_steps_draw_the_same_pages_again(recipe):
    pages = recipe["pages"]
    assert pages(7000, 0) == pages(7000, 0)
    assert pages(7000, 0) != pages(7000, 1)


def test_measured_names_never_stand_in_training_text(training_pages):
    """Name words of the measured worlds do not occur in any training page."""
    sizes = {"entities": 36, "distill": 100, "dev": 40, "test": 40, "seed": 5}
    frozen = set()
    for name in ("almanac", "trivia"):
        made = worlds.build_world(WorldSet(source="world", name=name, world=name, **sizes))
        frozen |= {word for p in made.passages for word in p.title.lower().split()}
    frozen -= worlds.plain_words()
    told = " ".join(map(text, training_pages)).lower()
    for sign in ":.,?":
        told = told.replace(sign, " ")
    assert frozen
    assert not frozen & set(told.split())


def test_training_pages_need_no_unknown_token(recipe, training_pages):
    tokenizer = recipe["tokenizer"]
    encoded = tokenizer([text(page) for page in training_pages]).input_ids
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


def test_training_pages_are_labelled(training_pages):
    for page in training_pages:
        assert parts_of_speech(text(page))


def test_facts_told_again_were_told_before(training_pages):
    """Answers told again stand in the page's own passages or entries, but for other aliases."""
    found = []
    for page in training_pages:
        told = "".join(one for one, kind in page if kind == "given").lower()
        found += [one.lower() in told for one, kind in page if kind == "answer"]
    assert len(found) > 1000
    assert 0.9 < sum(found) / len(found) < 1


def test_a_killed_run_goes_on_with_the_same_result(tmp_path, recipe):
    """Stopped after a checkpoint and started again: the same weights as in one go."""
    whole = ran(tmp_path / "whole", 6, CHECK_EVERY=2)["model"]

    def stop_at_five(step, seed):
        if step == 5:
            raise KeyboardInterrupt
        return recipe["pages"](step, seed)

    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path / "halves", 6, CHECK_EVERY=2, pages=stop_at_five)
    again = ran(tmp_path / "halves", 6, CHECK_EVERY=2)
    assert again["first_step"] == 4
    for one, other in zip(whole.parameters(), again["model"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert [row["step"] for row in again["curve"]] == [2, 4, 6]


def test_the_shipped_reader_is_the_one_its_card_names():
    """Hash as noted, under 20 MB, safetensors only."""
    folder = EMBEDDED["embedded"]
    for line in (folder / "sha256.txt").read_text().splitlines():
        digest, name = line.split()
        assert file_hash(folder / name) == digest
    assert (folder / "model.safetensors").stat().st_size < 20e6
    assert not list(folder.glob("*.pt")) + list(folder.glob("*.bin"))
