"""The plan of a run: the stages that it will make, what they need, and what is said where that does not fit."""

import gzip
import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, FalconConfig, GPT2Config, LlamaConfig, T5Config

from ragkit import memory, plan, plan_text, sizes
from ragkit.advice import advice
from ragkit.arithmetic import Operations, forward
from ragkit.hardware import Hardware
from ragkit.plan import Ground, Plan
from ragkit.profile import Profile, load_profile
from ragkit.sizes import SizeError, shape_of
from ragkit.stack import Stack

QUESTIONS = {"dataset": "google-research-datasets/nq_open", "config": "nq_open"}
WIKIPEDIA = {"dataset": "facebook/wiki_dpr", "rows": {"train": 21_015_300}}
A100 = Hardware("cuda", "A100", cores=16, memory=128e9, gpu_memory=80e9, free_disk=1e12)
LAPTOP = Hardware("cpu", "no GPU", cores=2, memory=16e9, gpu_memory=0.0, free_disk=100e9)
EVERY_UNIT = {  # a second each: what counts here is how plans compare
    unit: 1.0
    for unit in (
        "passages prepared", "crop steps", "passages encoded", "questions encoded", "vectors written", "vectors read", "vectors indexed", "vectors learnt from",
        "searches", "exact searches", "Step 1 steps", "Step 2 steps", "Step 2 steps, both sides", "questions looked at", "passages left out",
        "prompts recorded", "prompts read one by one", "answers", "closed-book answers", "taggers trained", "questions tagged", "notebooks started",
    )
}  # fmt: skip


def paper(**changes):
    """A profile of the paper's size; `changes` by section."""
    settings = {
        "name": "paper",
        "sets": [{"source": "hub", "name": "nq", "questions": QUESTIONS, "passages": WIKIPEDIA, "heldout": "validation", "test": 3610}],
        "machine": {"device": "cuda"},
        "retriever": {"model": "facebook/contriever", "normalise": False},
        "reader": {"model": "tiiuae/falcon-rw-1b", "context": 2048, "dtype": "bfloat16", "at_once": 8, "steps": 2000, "batch": 32},
        "index": {"kind": "ivfpq", "dtype": "float16"},
        "evaluate": {"bm25": False},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    return Profile.model_validate(settings)


def planned(profile, machine=A100):
    """A plan without measuring."""
    ground = Ground.of(profile)
    costs = {settings.name: EVERY_UNIT for settings in profile.sets}
    return ground, Plan(profile, machine, costs, sizes.downloads(profile), ground.needs(costs))


def test_the_stages_of_tiny_are_counted():
    profile = load_profile("tiny")
    _, made = planned(profile, LAPTOP)
    number = {kind: sum(need.stage.kind == kind for need in made.needs) for kind in plan_text.KINDS}
    readers, seeds = 2 + 5 + 1, 3  # two prompts before Step 1, five readers on the way, the last
    targets = 8 + 2 * readers + 4 - 4  # the main table's, two signals a reader, LOOP and EMDR2; four of the first are among the second
    assert number["teacher"] == number["tokens"] == 2 * readers
    assert number["step2"] == 2 * (targets * seeds + 1 + 2 * len(profile.choices.variations))  # the oracle with both sides trained, too
    assert number["answers"] == 2 * (2 + 2 * 4 + 2 + 2 + 1 + 8 * seeds)
    assert number["loop"] == 4
    assert {number[kind] for kind in ("corpus", "retriever", "vectors", "index", "candidates", "nouns", "step1", "contextual")} == {2}
    units = {need.stage.name: need.stage.units for need in made.needs if not need.stage.home}
    assert units["step1/trivia"]["Step 1 steps"] == 800
    assert units["teacher/trivia/step-50"] == {"questions looked at": 1500, "prompts recorded": 32}  # and 32 for the log of Step 2
    assert units["step2/trivia/oracle-0"]["Step 2 steps"] == 94  # 2 epochs of 47 batches
    assert units["vectors/almanac"]["passages encoded"] == 3024


def test_further_runs_and_refreshes_are_counted():
    profile = load_profile("tiny")
    more = profile.model_copy(update={"step1_seeds": (0, 1), "choices": profile.choices.model_copy(update={"variations": ("index refresh", "question first")})})
    _, made = planned(more, LAPTOP)
    again = [need.stage for need in made.needs if need.stage.home == "varied/step1-seed-1" and need.stage.set_name == "trivia"]
    taught = 6
    assert sum(stage.kind == "step2" for stage in again) == taught * 2 * 3
    assert sum(stage.kind == "teacher" for stage in again) == taught
    refreshed = [need.stage for need in made.needs if need.stage.home == "varied/index-refresh/varied/refreshed-fine-tuned-attention-0"]
    assert sorted(stage.kind for stage in refreshed if stage.set_name == "trivia") == ["candidates", "retriever", "step2", "teacher"]
    other_order = [need.stage.kind for need in made.needs if need.stage.home == "varied/question-first" and need.stage.set_name == "trivia"]
    assert sorted(other_order) == ["answers", "answers", "step1", "step2", "step2", "teacher", "teacher"]


def test_known_models_have_their_known_sizes():
    shapes = {name: shape_of(sizes.model_config(name, "reader.model"), head=name != "facebook/contriever") for name in sizes.known()["models"]}
    assert shapes["tiiuae/falcon-rw-1b"].parameters == 1_311_625_216
    assert shapes["HuggingFaceTB/SmolLM2-360M"].parameters == 361_821_120
    assert shapes["EleutherAI/pythia-410m"].parameters == 405_334_016
    assert shapes["facebook/contriever"].parameters == 109_482_240  # 438 MB in float32
    assert shape_of(GPT2Config(), head=True).parameters == 124_439_808


def test_training_takes_sixteen_bytes_a_weight():
    shape = shape_of(sizes.model_config("tiiuae/falcon-rw-1b", "reader.model"), head=True)
    assert memory.trained(shape, 4) == 16 * shape.parameters  # 21 GB for Falcon-RW-1B
    assert memory.trained(shape, 2) == 18 * shape.parameters  # and a copy in bfloat16
    assert memory.trained(shape, 4, lora_rank=16) < 0.6 * memory.trained(shape, 4)
    on_eight = memory.trained(shape, 2, parts=8)  # FSDP: an eighth of all states, and whole a moment what is computed with
    assert memory.trained(shape, 4) / 8 < on_eight < memory.trained(shape, 4) / 2
    assert on_eight >= 4.5 * shape.parameters  # it begins with the whole weights
    whole = memory.kept(shape, 8, 1000, 2)
    assert memory.kept(shape, 8, 1000, 2, checkpointing=True) < 0.2 * whole < whole


SAME = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL = {
    "falcon": FalconConfig(
        **SAME, alibi=True, multi_query=False, parallel_attn=False, new_decoder_architecture=False, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "llama": LlamaConfig(**SAME, num_key_value_heads=2, intermediate_size=176),
    "bert": BertConfig(**SAME, intermediate_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_what_a_training_step_keeps_is_what_autograd_keeps(name):
    config, texts, tokens = SMALL[name], 4, 96
    shape = shape_of(config, head=False)
    model = sizes.AutoModel.from_config(config).train()
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and tensor.is_floating_point():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(3, 100, (texts, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    kept = sum(storage.nbytes() for storage in found.values())
    assert out is not None
    assert 0.75 < memory.kept(shape, texts, tokens, 4) / kept < 1.34


def test_the_paper_in_full_precision_does_not_fit_a_small_disk():
    profile = paper(index={"kind": "exact", "dtype": "float32"})
    ground, made = planned(profile, LAPTOP)
    assert 64e9 < sum(need.disk for need in made.needs if need.stage.kind == "vectors") < 65e9  # 21 million x 768 x 4
    said = plan_text.text(ground, made)
    assert "does NOT fit" in said
    assert "index.dtype: float16" in said
    assert "most_passages" in said
    halved = planned(paper(index={"kind": "exact", "dtype": "float16"}), LAPTOP)[1]
    assert made.disk - halved.disk == pytest.approx(21_015_300 * 768 * 2)


def test_what_does_not_fit_on_the_gpu_is_named_with_what_helps():
    small = replace(A100, gpu_memory=32e9)
    ground, made = planned(paper(), small)
    short = {need.stage.kind for need in made.needs if made.fits(need) is False}
    assert short == {"step1"}
    found = [*advice(ground, made, "step1")]
    enough = {"reader.gradient_checkpointing: true", "reader.lora_rank: 16", "a quarter of reader.at_once"}
    assert enough <= {one.rsplit(":", 1)[0] for one in found if one.endswith("which fits")}
    assert "reader.lora_rank: 16" in plan_text.text(ground, made)
    assert all(made.fits(need) for made in [planned(paper(reader={"gradient_checkpointing": True}))[1]] for need in made.needs)
    assert not any("reader.shard" in one for one in found)
    on_four = planned(paper(machine={"processes": 4}), replace(small, gpu_memory=24e9))
    assert any(one.startswith("reader.shard: true") and one.endswith("which fits") for one in advice(*on_four, "step1"))


def test_where_no_setting_alone_is_enough_all_are_tried_together():
    ground, made = planned(paper(), replace(A100, gpu_memory=9.5e9))
    found = [*advice(ground, made, "step1")]
    assert not any(one.endswith("which fits") for one in found[:-1])
    assert found[-1].startswith("all of these together")


def test_without_the_gpu_that_is_asked_for_nothing_is_judged():
    ground, made = planned(paper(), LAPTOP)
    assert {made.fits(need) for need in made.needs} == {None}
    said = plan_text.text(ground, made)
    assert "there is none here" in said
    assert "by arithmetic alone" in said
    assert "H100" in said


def test_more_of_anything_takes_longer():
    base = planned(paper())[1]
    for changes in (
        {"step1_seeds": [0, 1]}, {"distill": {"epochs": 4}}, {"distill": {"seeds": [0, 1, 2, 3]}}, {"reader": {"steps": 4000}}, {"index_refreshes": 1},
        {"indicators": {"questions": 400}}, {"evaluate": {"answered": 500}}, {"reader": {"checkpoints": 7}},
    ):  # fmt: skip
        assert planned(paper(**changes))[1].wall > base.wall, changes
    assert planned(paper(machine={"processes": 4}))[1].wall < base.wall
    half = paper().sets[0].model_copy(update={"most_passages": 10_000_000})
    smaller = planned(paper().model_copy(update={"sets": (half,)}))[1]
    assert smaller.wall < base.wall
    assert smaller.disk < base.disk


def test_sets_over_the_same_passages_are_encoded_once():
    one = {**paper().sets[0].model_dump(), "name": "nq"}
    sets = [
        one,
        {**one, "name": "trivia"},
        {**one, "name": "fewer", "most_passages": 1000},
        {**one, "name": "others", "most_passages": 1000, "seed": 1},
    ]
    profile = paper(sets=sets)
    assert [profile.twin(s["name"]) for s in sets] == [None, "nq", None, None]
    embedded = paper(sets=sets, retriever={"model": "embedded"})
    assert embedded.twin("trivia") is None  # trained on each set's passages
    encoded = {need.stage.set_name: need for need in planned(profile)[1].needs if need.stage.kind == "vectors"}
    assert encoded["nq"].stage.units["passages encoded"] == 21_015_300
    assert not encoded["trivia"].stage.units
    assert (encoded["trivia"].disk, encoded["nq"].disk > 32e9) == (0, True)
    again = planned(paper(sets=sets, distill={"side": "both", "epochs": 2}, index_refreshes=1))[1]
    assert {need.stage.set_name for need in again.needs if need.stage.kind == "vectors" and need.stage.home and need.stage.units} >= {"nq", "trivia"}


def test_sets_side_by_side_take_less_than_one_after_another():
    _, made = planned(load_profile("tiny"), LAPTOP)
    assert made.side_by_side == 2
    assert made.wall < 0.6 * made.seconds_of_work
    one_core = replace(made, machine=replace(LAPTOP, cores=1))
    assert one_core.wall > 1.9 * made.wall


def test_downloads_are_listed_and_the_unknown_is_said():
    ground, made = planned(paper(sets=[{"source": "hub", "name": "x", "questions": {"dataset": "some/questions"}, "passages": WIKIPEDIA}]))
    assert {one.what: one.gb for one in made.downloads} == {
        "some/questions": None, "facebook/wiki_dpr": 7.6, "facebook/contriever": 0.438, "tiiuae/falcon-rw-1b": 2.62,
    }  # fmt: skip
    said = plan_text.text(ground, made)
    assert "unknown  some/questions" in said
    assert "At least 11 GB" in said
    assert "nothing: everything is here already" in plan_text.text(*planned(load_profile("tiny"), LAPTOP))


def test_what_is_assumed_is_said():
    pooled = [{"source": "hub", "name": "x", "questions": {"dataset": "some/pools"}, "pools": ["found"], "distill": 100, "dev": 10, "test": 10}]
    ground, made = planned(paper(sets=pooled))
    assert ground.sizes["x"].passages == 120 * 100
    assert "assumed: questions of 12 words; 100 passages of 100 words with each question" in " ".join(plan_text.text(ground, made).split())
    assert not planned(paper())[0].sizes["nq"].assumed


def test_an_encoder_decoder_is_refused(tmp_path):
    T5Config(num_layers=2, d_model=32).save_pretrained(tmp_path)
    with pytest.raises(SizeError, match="encoder-decoder"):
        Ground.of(paper(reader={"model": str(tmp_path)}))


def test_sizes_that_cannot_be_known_are_asked_for():
    with pytest.raises(SizeError, match=r"reader\.model: the shape of 'some/model' is not known here"):
        Ground.of(paper(reader={"model": "some/model"}))
    unknown = [{"source": "hub", "name": "x", "questions": QUESTIONS, "passages": {"dataset": "some/passages"}}]
    with pytest.raises(SizeError, match=r"passages\.rows\.train .*most_passages"):
        Ground.of(paper(sets=unknown))
    assert Ground.of(paper(sets=[{**unknown[0], "most_passages": 1000}])).sizes["x"].passages == 1000
    with pytest.raises(SizeError, match=r"there is no file nowhere\.tsv"):
        Ground.of(paper(sets=[{"source": "files", "name": "x", "passages": "nowhere.tsv", "questions": "q.jsonl"}]))


@pytest.mark.parametrize("ending", ["tsv", "tsv.gz"])
def test_the_passages_of_a_file_are_counted_from_its_beginning(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(sizes, "LOOKED_AT", 5000)
    path, rng = tmp_path / f"passages.{ending}", random.Random(0)
    rows = (f"{i}\t{' '.join(str(rng.random()) for _ in range(20))}\ttitle\n" for i in range(20_000))
    text = ("id\ttext\ttitle\n" + "".join(rows)).encode()
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    size = Ground.of(paper(sets=[{"source": "files", "name": "x", "passages": str(path), "questions": "q.jsonl"}])).sizes["x"]
    assert size.passages == pytest.approx(20_000, rel=0.1)
    assert size.passage_words == 20


def test_the_text_fits_a_narrow_terminal():
    for ground, made in (planned(load_profile("tiny"), LAPTOP), planned(paper(), LAPTOP), planned(paper(), A100)):
        said = plan_text.text(ground, made)
        assert max(map(len, said.splitlines())) <= plan_text.WIDE
        assert all(kind in said for kind in ("corpus", "step1", "step2", "notebooks"))


def test_a_plan_is_kept_and_a_damaged_one_is_refused(tmp_path):
    _, made = planned(load_profile("smoke"), LAPTOP)
    with pytest.raises(plan.PlanError, match="There is no plan"):
        plan.read_costs(made.profile, tmp_path)
    kept = json.loads(made.save(tmp_path).read_text())
    assert kept["profile"]["name"] == "smoke"
    assert kept["wall"] == made.wall
    assert plan.read_costs(made.profile, tmp_path) == made.costs
    with pytest.raises(plan.PlanError, match="of another profile"):
        plan.read_costs(load_profile("tiny"), tmp_path)
    (tmp_path / plan.FILE).write_text("{")
    with pytest.raises(plan.PlanError, match="damaged"):
        plan.read_costs(made.profile, tmp_path)


def test_a_stack_stands_for_the_whole_model():
    config = LlamaConfig(vocab_size=5000, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512)
    shape = shape_of(config, head=True)
    stack = Stack(config, shape, "cpu", "float32", mixed=True)
    assert sum(p.numel() for p in stack.model.parameters()) < shape.parameters / 2
    short, long = stack.a_text(64, 8), stack.a_text(512, 8)
    assert 0 < short < long
    assert stack.a_text(64, 8, backward=True) > short
    assert stack.a_token_more(4, 64) > 0
    assert stack.a_weight_trained() > 0


def test_operations_follow_the_weights():
    shape = shape_of(sizes.model_config("tiiuae/falcon-rw-1b", "reader.model"), head=True)
    assert forward(shape, 1000) == pytest.approx(2 * 1.21e9 * 1000, rel=0.1)
    ground = Ground.of(paper())
    units = Operations(ground.profile, ground.sizes["nq"], ground.reader, ground.retriever).by_unit()
    assert units["Step 1 steps"] == 32 * 3 * units["prompts recorded"]
    assert units["questions looked at"] > units["prompts recorded"]


def test_a_wrong_profile_ends_in_a_sentence(ragkit):
    wrong = ragkit("plan", "--profile", "tinny")
    assert wrong.returncode == 2
    assert "Did you mean 'tiny'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
