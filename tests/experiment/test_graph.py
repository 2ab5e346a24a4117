"""The graph: what an edit makes anew, in stages and notebooks, and by what reason."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ragkit
from ragkit.data.corpus import Passage, Question, write_passages
from ragkit.data.files import write_jsonl
from ragkit.distillation.targets import SYSTEMS
from ragkit.experiment.graph import READING, Graph, Of
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.experiment.run import notebooks_of
from ragkit.experiment.store import difference
from ragkit.experiment.wanted import answered
from ragkit.experiment.wanted import stages as stages_of
from ragkit.profile import VARIATIONS, load_profile

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = {path.stem[:2] for path in (ROOT / "notebooks").glob("*.ipynb")}
JUDGED = {"04", "05", "06", "07", "08", "09", "10"}  # notebooks that reach the claims
COMPUTE = {"02", "03", "04", "07"}  # those that load a model, or reach what does
READERS = {"step1", "premises", "answers", "teacher", "heads", "alone", "loop", "tokens",
           "contextual", "closeness", "foretellers"}  # fmt: skip
SCRIPT = """
import json, sys
from importlib import metadata
from pathlib import Path
installed = json.loads(sys.argv[1])
known = metadata.version
metadata.version = lambda name: installed.get(name) or known(name)
import ragkit
assert Path(ragkit.__file__).parent == Path.cwd() / "ragkit"
from test_graph import told
print(json.dumps(told()))
assert not {"torch", "transformers", "datasets", "spacy"} & sys.modules.keys()
"""


def told(*changes):
    """All stages of smoke by name, and by number what notebooks depend on but the stages that they
    are all made of, as JSON values."""
    with tempfile.TemporaryDirectory() as runs:
        lab = Lab(changed_profile("smoke", changes), runs)
        notebooks = notebooks_of(lab, Path(ragkit.__file__).parent.parent / "notebooks")
        records = {one.name[:2]: one.record | {"inputs": {}} for one in notebooks}
    stages = {}
    for one in stages_of(lab.graph):
        stages[one.name] = {"kind": one.kind, "key": one.key, "record": one.record}
    return json.loads(json.dumps([stages, records]))


class Copy:
    """A copy of the package and the notebooks that a test may edit."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("ragkit", "notebooks", "figures"):  # some notebooks open published tables
            ignored = shutil.ignore_patterns("__pycache__", "*.svg", "*.png")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)

    def read(self, **installed):
        """What a new process says of the copy, with other versions of some libraries."""
        path = os.pathsep.join([str(self.folder), str(Path(__file__).parent)])
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(installed)], cwd=self.folder,
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-2000:]
        return json.loads(ended.stdout)

    def edit(self, file, old, new):
        """Replaces one piece of a file by another."""
        path = self.folder / "ragkit" / file
        text = path.read_text("utf8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new), "utf8")


@pytest.fixture(scope="module")
def before():
    """Stages and notebooks of the package as it is."""
    return told()


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def kinds_of(stages, names):
    return {stages[name]["kind"] for name in names}


def anew(before, after):
    """Names of the stages and numbers of the notebooks that differ."""
    assert before[0].keys() == after[0].keys()
    stages = {name for name, one in after[0].items() if one["key"] != before[0][name]["key"]}
    return stages, {n for n, record in after[1].items() if record != before[1][n]}


def below(stages, kinds):
    """Stages of some kinds and all that is made of them, by their records."""
    found = {}
    for name, one in stages.items():  # inputs come first
        made_of = {key for _, key in one["record"]["inputs"].values()}
        if one["kind"] in kinds or made_of & set(found.values()):
            found[name] = one["key"]
    return set(found)


def reason(old, new, name):
    """Why a stage is made anew."""
    return difference(old[0][name]["record"], new[0][name]["record"])


def reasons(old, new):
    """Why each notebook that differs would be run again."""
    return {difference(old[1][n], new[1][n]) for n in new[1] if old[1][n] != new[1][n]}


@pytest.mark.parametrize(
    ("file", "old", "new", "kinds", "notebooks"),
    [
        ("assets/claims.yaml", "line: 0.3 ", "line: 0.4 ", set(), JUDGED),
        ("assets/paper_values.yaml", "\n{}", "\nC1: {value: +3.1, page: 5}", set(), JUDGED),
        ("assets/worlds.yaml", "names:\n", "# data\nnames:\n", {"passages"}, NOTEBOOKS),
        ("models/reader.py", '"title": -4', '"title": -5', READERS, COMPUTE),
        ("models/step1.py", "import logging\n", "import logging\nNEW = 1\n", {"step1"}, set()),
        ("indicators/measures.py", '("permuted", "overlap")', '("overlap", "permuted")',
         {"tokens", "contextual", "closeness"}, JUDGED | {"02", "03", "11", "A1"}),
    ],
)  # fmt: skip
def test_an_edit_reruns_what_reaches_it(before, copy, file, old, new, kinds, notebooks):
    """Stages of some kinds and what is made of them; of notebooks, which are made of all stages,
    besides those whose own code reaches the edit."""
    copy.edit(file, old, new)
    after = copy.read()
    stages, reran = anew(before, after)
    assert (stages, reran) == (below(before[0], kinds), notebooks)
    name = file if file.endswith("yaml") else f"ragkit.{file[:-3].replace('/', '.')}"
    assert f"{name} changed" in reasons(before, after) or not notebooks
    whys = {reason(before, after, stage) for stage in stages}
    assert {why for why in whys if not why.endswith(" was made anew")} <= {f"{name} changed"}
    assert f"{name} changed" in whys or not kinds


def test_a_readers_weights_count_and_its_model_card_does_not(before, copy):
    folder = copy.folder / "ragkit" / "assets" / "reader"
    (folder / "README.md").write_text("# Reworded")
    assert copy.read() == before
    with open(folder / "model.safetensors", "ab") as weights:
        weights.write(b" ")
    after = copy.read()
    beside = re.compile("step1/.*/encoder-decoder")  # whose own weights are others
    expected = {name for name in below(before[0], READERS) if not beside.match(name)}
    assert anew(before, after) == (expected, set())
    changed = reason(before, after, "teacher/almanac/off-the-shelf, rank")
    assert changed.startswith("settings.weights.model.safetensors ")


def test_docstrings_and_comments_rerun_nothing(before, copy):
    for file in sorted((copy.folder / "ragkit").rglob("*.py")):
        text = file.read_text("utf8")
        file.write_text(text.replace('"""', '"""Reworded. ', 1) + "\n# a closing comment\n", "utf8")
    assert copy.read() == before


def test_a_library_reruns_everything_and_is_named(before, copy):
    after = copy.read(torch="9.9")
    assert anew(before, after) == (set(after[0]), NOTEBOOKS)
    assert reason(before, after, "passages/almanac").startswith("versions.torch 2")
    assert all(one.startswith("versions.torch") for one in reasons(before, after))


def test_a_profile_key_there_and_back_again(before):
    there = told("distill.entropy=0.6")
    stages, notebooks = anew(before, there)
    systems = {"tokens", "contextual", "closeness"}  # with the passages that are found now
    assert kinds_of(before[0], stages) == {"step2", "answers"} | systems
    assert notebooks == NOTEBOOKS
    assert reasons(before, there) == {"settings.profile.distill.entropy 0.5 -> 0.6"}
    assert told("distill.entropy=0.5") == before  # another run's name, the same keys


def keys(*changes):
    return {stage.name: stage.key for stage in stages_of(Graph(load_profile("smoke", changes)))}


def test_settings_that_change_no_result_change_no_key():
    free = ["reader.at_once=3", "retriever.at_once=5", "reader.gradient_checkpointing=true"]
    assert keys() == keys(*free)
    assert set(keys("threads=2").values()).isdisjoint(keys().values())


def test_two_profiles_share_what_they_have_in_common():
    one, two = keys(), keys("sets.1.seed=99")
    assert {n for n in one if one[n] == two.get(n)} == {n for n in one if "/almanac" in n}


def test_the_draws_passed_over_are_searched_and_no_more():
    rules = ["sets.0.seed=rules", "sets.1.seed=rules"]
    one, three = keys(*rules), keys(*rules, "sets.0.draw=2")
    search = ("passages", "questions", "retriever", "vectors", "index", "candidates")
    added = {f"{kind}/almanac (draw {draw})" for kind in search for draw in (0, 1)}
    assert three.keys() - one.keys() == added
    assert all(three[f"{kind}/almanac (draw 0)"] == one[f"{kind}/almanac"] for kind in search[:1])
    assert len(set(three.values())) == len(three)
    old = keys("sets.0.draw=2")  # a seed that does not follow from today's rules has no others
    assert old.keys() == one.keys()


@pytest.mark.parametrize("profile", ["smoke", "tiny", "full", "small", "paper"])
def test_inputs_come_first_names_are_unique_and_makers_exist(profile):
    stages = stages_of(Graph(load_profile(profile)))
    seen = set()
    for stage in stages:
        assert {one.key for one in stage.inputs.values()} <= seen, stage.name
        seen.add(stage.key)
        assert sum(stage.units.values()) >= 0
        json.dumps(stage.settings)
    assert len({stage.name for stage in stages}) == len(seen) == len(stages)
    for module, function in {tuple(stage.maker.split(":")) for stage in stages}:
        source = Path(importlib.util.find_spec(module).origin).read_text("utf8")
        assert re.search(rf"^(def {function}\(|{function} = make_)", source, re.MULTILINE)


def test_variations_and_seeds_share_what_they_do_not_touch():
    graph = Graph(load_profile("smoke"))
    own = {stage.key for stage in stages_of(graph)}

    def kinds(other):
        """Kinds of which a stage is shared, and of which one is another."""
        made = stages_of(other)
        return [{one.kind for one in made if (one.key in own) is same} for same in (True, False)]

    search = {"passages", "questions", "retriever", "vectors", "index", "bm25", "nouns"}
    shared, changed = kinds(graph.again(7))
    assert shared >= search | {"candidates", "contextual", "teacher", "step2", "answers"}
    assert changed >= {"step1", "teacher", "heads", "alone", "tokens", "step2", "answers"}
    assert not changed & search
    assert "step1" not in shared
    for variation in VARIATIONS:
        shared, changed = kinds(graph.varied(variation))
        assert shared >= search
        assert "step2" in changed
        assert not changed & (search - {"vectors", "index"})  # refreshed where both sides learn


def test_each_run_of_step_1_is_judged_by_its_own_reader():
    graph = Graph(load_profile("smoke"))
    for system in ("closed book", "initial", "BM25", "fine-tuned attention"):
        of = Of("almanac", "fine-tuned", target=system)
        one, two = (g.stage("answers", of) for g in (graph, graph.again(1)))
        assert one.key != two.key
        assert two.inputs["step1"] is graph.again(1).stage("step1", Of("almanac"))
    untaught = Of("almanac", "off-the-shelf", target="closed book")
    assert graph.stage("answers", untaught).key == graph.again(1).stage("answers", untaught).key


# What targets and systems are made of


def looks(graph, target):
    """The looks that Step 2 for a target takes, by role: kind, order, part, and the reader."""
    inputs = graph.stage("step2", Of("almanac", target=target)).inputs
    found = {role: one for role, one in inputs.items() if "which" in one.settings}
    names = ("order", "part", "which")
    return {r: (one.kind, *map(one.settings.get, names)) for r, one in found.items()}


@pytest.mark.parametrize("which", ["off-the-shelf", "fine-tuned cloze", "step 10"])
def test_each_target_takes_the_looks_that_it_needs(which):
    graph = Graph(load_profile("smoke"))

    def look(order, kind="teacher", part="distill"):
        return {order if kind == "teacher" else kind: (kind, order, part, which)}

    both = look("rank") | look("reversed")
    alone = {"alone": ("alone", None, "distill", which)}
    assert looks(graph, f"{which} attention") == look("rank")
    assert looks(graph, f"{which} balanced") == both
    assert looks(graph, f"{which} chosen heads") == look("rank") | look("rank", "heads", "dev")
    assert looks(graph, f"{which} perplexity") == looks(graph, f"{which} EMDR2") == alone
    assert looks(graph, f"{which} LOOP") == {"loop": ("loop", None, "distill", which)}
    expected = {"calibrated": look("rank") | look("empty"), "levelled": look("shuffled")}
    expected |= {"reversed": look("reversed"), "shuffled": look("shuffled")}
    for order, needed in expected.items():
        varied = graph.varied(f"order: {order}")
        assert looks(varied, f"{which} attention") == needed
        assert looks(varied, f"{which} balanced") == both  # which says its order itself
    chosen = Graph(load_profile("smoke", ["attention.heads=chosen"]))
    assert looks(chosen, f"{which} balanced") == both | look("rank", "heads", "dev")
    for control in ("uniform", "answer string", "oracle"):
        assert looks(graph, control) == {}
    assert looks(graph, "shuffled") == looks(graph, "fine-tuned attention")


def test_an_order_taken_otherwise_shares_the_looks_that_are_there():
    graph = Graph(load_profile("smoke"))
    for order, role, of in [
        ("reversed", "reversed", graph.step2("almanac", "fine-tuned balanced", 0).inputs),
        ("levelled", "shuffled", graph.varied("order: shuffled").step2(
            "almanac", "fine-tuned attention", 0).inputs),
    ]:  # fmt: skip
        varied = graph.varied(f"order: {order}").step2("almanac", "fine-tuned attention", 0)
        assert varied.inputs[role].key == of[role].key
    made = {stage.key for stage in stages_of(graph)}
    for order in ("rank", "reversed", "shuffled", "empty"):  # of both regimes, for notebook 03
        for which in ("off-the-shelf", "fine-tuned"):
            assert graph.stage("teacher", Of("almanac", which, order)).key in made


def test_prompt_and_training_are_crossed():
    """Four readers of two sets of weights; where there are no clozes, two."""
    graph = Graph(load_profile("smoke"))
    crossed = ["off-the-shelf", "fine-tuned", "off-the-shelf cloze", "fine-tuned cloze"]
    assert graph.asked() == crossed
    assert graph.readers() == [crossed[0], crossed[2], "step 10", crossed[1], crossed[3]]
    for which in crossed:
        for kind in ("teacher", "premises", "tokens", "answers"):
            stage = graph.stage(kind, Of("almanac", which, "rank", target="initial"))
            assert stage.settings["which"] == which
            assert ("step1" in stage.inputs) is which.startswith("fine-tuned")
    kinds = {(one.kind, one.settings.get("which")) for one in stages_of(graph)}
    assert {("premises", which) for which in crossed} <= kinds
    real = Graph(load_profile("paper"))
    assert real.asked() == crossed[:2]
    assert not [name for name in (*real.targets, *real.readers()) if "cloze" in name]
    assert "off-the-shelf balanced" in real.targets


def test_all_seeds_in_the_main_table_and_one_for_readers_on_the_way():
    graph = Graph(load_profile("smoke", ["distill.seeds=[0, 1, 2]"]))
    assert graph.seeds("fine-tuned cloze attention") == (0, 1, 2)
    assert graph.seeds("oracle") == (0, 1, 2)
    for target in ("step 10 attention", "off-the-shelf perplexity", "fine-tuned LOOP"):
        assert graph.seeds(target) == (0,)
    made = Counter(one.settings["target"] for one in stages_of(graph)
                   if one.kind == "step2" and one.name.startswith("step2/almanac")
                   and not one.name.endswith(")"))  # fmt: skip
    assert {made[target] for target in graph.targets} == {3}
    assert {n for target, n in made.items() if target not in graph.targets} == {1}
    along = {f"{which} {by}" for which in graph.readers() for by in ("attention", "perplexity")}
    assert along <= made.keys()


def test_each_system_reads_what_its_own_retriever_finds():
    graph = Graph(load_profile("smoke", ["distill.seeds=[4, 5]"]))
    made = {stage.key for stage in stages_of(graph)}
    for which, target in SYSTEMS.values():
        of = graph.system("almanac", which, target)
        close = graph.stage("closeness", of)
        assert close.key in made
        found = graph.step2("almanac", target, 4) if target else graph.stage(
            "candidates", Of("almanac"))  # fmt: skip
        parts = [close, close.inputs["tokens"], close.inputs["contextual"]]
        assert [one.inputs["ranking"] for one in parts] == [found] * 3
        assert close.inputs["tokens"].settings["which"] == close.settings["which"]
        assert "which" not in close.inputs["contextual"].settings  # one for all readers
        assert close.inputs["tokens"].inputs.get("step1") is close.inputs.get("step1")
    three = [graph.stage("closeness", graph.system("almanac", "fine-tuned", f"{target} attention"))
             for target in ("off-the-shelf", "fine-tuned", "fine-tuned cloze")]  # fmt: skip
    assert len({one.key for one in three} | {one.name for one in three}) == 6


@pytest.fixture(scope="module")
def with_another_kind(tmp_path_factory):
    """A graph with an encoder-decoder, of which only the files' hashes count here."""
    folder = tmp_path_factory.mktemp("encoder-decoder")
    (folder / "config.json").write_text("{}")
    changes = [f"encoder_decoder.model={folder}", "encoder_decoder.steps=7",
               "encoder_decoder.context=99", "encoder_decoder.batch=3"]  # fmt: skip
    return Graph(load_profile("smoke", changes)), folder


def test_an_encoder_decoder_has_a_step_1_of_its_own(with_another_kind):
    graph, folder = with_another_kind
    usual, own = (graph.stage("step1", Of("almanac", which)) for which in ("", "encoder-decoder"))
    assert own.settings["reader"] == graph.profile.encoder_decoder.model_dump(mode="json")
    assert set(own.settings["weights"]) == {"config.json"}
    assert set(usual.settings["weights"]) > {"model.safetensors"}
    assert (own.units, usual.units) == ({"prompts": 21}, {"prompts": 160})
    assert own.inputs == usual.inputs
    names = {one.name for one in stages_of(graph)}
    assert {own.name, usual.name} == {"step1/almanac/encoder-decoder", "step1/almanac"} <= names
    again = graph.again(1).stage("step1", Of("almanac", "encoder-decoder"))
    assert again.settings["seed"] == 1
    of = graph.system("almanac", "encoder-decoder", "encoder-decoder attention")
    for kind in ("teacher", "heads", "alone", "tokens", "closeness", "answers", "premises"):
        stage = graph.stage(kind, replace(of, order="rank"))
        assert stage.inputs["step1"] is own
        assert stage.settings["which"] == "fine-tuned"  # as its Step 1 calls it
        assert stage.settings["reader"]["model"] == str(folder)
        assert stage.settings["reader"]["context"] == 99
        assert set(stage.settings["reader"]) == {*READING}
    close = graph.stage("closeness", of)  # in the space of the off-the-shelf decoder
    assert close.settings["base"]["model"] == "embedded"
    assert close.inputs["contextual"].settings["base"] == close.settings["base"]
    assert set(close.settings["weights"]) > {"model.safetensors"}


def test_an_encoder_decoder_teaches_and_answers_beside_the_regimes(with_another_kind):
    graph, _ = with_another_kind
    taught = [target for target in graph.targets if target.startswith("encoder-decoder")]
    assert taught == ["encoder-decoder attention", "encoder-decoder chosen heads"]
    assert "encoder-decoder" not in [*graph.readers(), *graph.asked()]
    rows = list(answered(graph))
    assert ("initial", "encoder-decoder", 0) in rows
    assert {which for system, which, _ in rows if system in taught} == {"encoder-decoder"}
    without = Graph(load_profile("smoke", ["encoder_decoder=null"]))
    assert set(graph.targets) - set(without.targets) == set(taught)
    assert not [one.name for one in stages_of(without) if "encoder-decoder" in one.name]
    keys = {one.key for one in stages_of(graph)}
    assert {one.key for one in stages_of(without)} <= keys  # nothing else hangs on it


def test_each_reader_answers_for_the_retrievers_that_it_taught():
    graph = Graph(load_profile("smoke", ["distill.seeds=[4, 5]", "encoder_decoder=null"]))
    rows = list(answered(graph))
    assert len(rows) == len(set(rows))
    by_target = {target: [(which, seed) for system, which, seed in rows if system == target]
                 for target in graph.targets}  # fmt: skip
    for which in ("off-the-shelf", "fine-tuned"):
        assert by_target[f"{which} attention"] == [(which, 4), (which, 5)]
        assert by_target[f"{which} balanced"] == [(which, 4)]
        assert by_target[f"{which} cloze attention"] == [(f"{which} cloze", 4)]
    for target in ("uniform", "shuffled", "answer string", "oracle", "fine-tuned perplexity"):
        assert by_target[target] == [("fine-tuned", 4)]
    for system in ("initial", "closed book"):
        readers = [which for name, which, _ in rows if name == system]
        assert readers == (graph.asked() if system == "initial" else graph.asked()[:2])
    few = list(answered(graph, ["off-the-shelf attention"]))
    assert [which for name, which, _ in few if name == "initial"] == graph.asked()[:2]
    assert {target for target, _, _ in few} & set(graph.targets) == {"off-the-shelf attention"}
    made = {one.key for one in stages_of(graph)}
    for system, which, seed in rows:
        of = Of("almanac", which, target=system, seed=seed)
        assert graph.stage("answers", of).key in made
        assert graph.stage("answers", of).settings["closed_book"] is (system == "closed book")


def test_a_lab_asks_with_the_answer_that_the_stages_score(tmp_path, monkeypatch):
    texts = ("It lies in old Ulm.", "No.", "The Lyda.")
    passages = [Passage(str(i), "a", text) for i, text in enumerate(texts)]
    write_passages(tmp_path / "passages.arrow", passages)
    question = Question("q", "where does it lie", ("Lyda", "Ulm"), ())
    for part in ("distill", "dev", "test"):
        write_jsonl(tmp_path / f"{part}.jsonl", [asdict(question)])
    found = dict.fromkeys(("distill", "dev", "test"), np.array([[0, 1, 2, 2, 2]]))
    save_file(found, tmp_path / "candidates.safetensors")
    monkeypatch.setattr(Lab, "open", lambda *_: tmp_path)
    first = {}
    for answer in ("first", "found"):
        lab = Lab(changed_profile("smoke", [f"reader.answer={answer}", "k=2"]), tmp_path)
        first[answer] = {qs[0].answers[0] for qs in lab.corpus("almanac").questions.values()}
        stage = lab.graph.stage("teacher", Of("almanac", "encoder-decoder", "rank"))
        assert stage.settings["reader"]["answer"] == answer
    assert first == {"first": {"Lyda"}, "found": {"Ulm"}}  # of the k found, not of all


def test_a_lab_makes_nothing_by_being_opened_and_shares_its_store(tmp_path):
    lab = Lab("smoke", tmp_path)
    assert len(stages_of(lab.graph)) > 100
    assert not list(lab.folder.glob("stages/*"))
    for graph in (lab.graph.varied("reverse KL"), lab.graph.again(1)):
        other = lab.with_graph(graph)
        assert other.store is lab.store
        assert {one.key for one in stages_of(other.graph)} - {
            one.key for one in stages_of(lab.graph)
        }
