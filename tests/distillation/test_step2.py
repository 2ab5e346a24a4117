"""Step 2: losses against independent ones, a training, its maker."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from logs import read_log
from safetensors.numpy import load_file, save_file
from sentence_transformers.losses import DistillKLDivLoss
from sentence_transformers.util import pairwise_dot_score

from ragkit.data.corpus import Asked, Corpus, Passage, Question, write_passages
from ragkit.data.files import write_jsonl
from ragkit.distillation import step2
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.index import make_vectors
from ragkit.models.retriever import embedded_tokenizer, train_by_cropping
from ragkit.settings import AttentionSettings, DistillSettings, IndexSettings, RetrieverSettings


def test_kl_is_that_of_sentence_transformers():
    queries, vectors = torch.randn(4, 8, requires_grad=True), torch.randn(4, 5, 8)
    target, theta = torch.randn(4, 5).softmax(-1), 0.3
    theirs = DistillKLDivLoss(None, pairwise_dot_score, student_temperature=theta)
    columns = [queries, *vectors.unbind(1)]
    expected = theirs.compute_loss_from_embeddings(columns, target.log()) / theta**2
    ours = step2.kl_loss(target, torch.einsum("qd,qkd->qk", queries, vectors), theta)
    assert torch.isclose(ours, expected, rtol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x, queries)[0] for x in (ours, expected)))


@pytest.mark.parametrize("loss", [step2.kl_loss, step2.reverse_kl_loss])
def test_gradients_are_those_of_finite_differences_and_spare_the_target(loss):
    target = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss(target, s, 0.3), scores)
    target.requires_grad_()
    loss(target, scores, 0.3).backward()
    assert target.grad is None


def test_the_gradient_of_kl_is_what_the_retriever_says_minus_the_target():
    target, scores = torch.tensor([[0.5, 0.5, 0.0]]), torch.randn(1, 3, requires_grad=True)
    step2.kl_loss(target, scores, 0.3).backward()
    assert torch.allclose(scores.grad, ((scores / 0.3).softmax(-1) - target) / 0.3, atol=1e-6)


def test_the_reverse_divergence_agrees_with_torch():
    target, scores = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.2]])
    p, q = (torch.distributions.Categorical(probs=x) for x in ((scores / 0.5).softmax(-1), target))
    expected = float(torch.distributions.kl_divergence(p, q))
    assert float(step2.reverse_kl_loss(target, scores, 0.5)) == pytest.approx(expected, abs=1e-6)


def test_emdr2_by_hand_with_answers_of_unequal_length():
    nan, theta = math.nan, 0.5
    logs = torch.tensor([[[-0.1, nan], [-2.0, nan]], [[-0.5, -1.0], [-0.2, -3.0]]])
    scores = torch.tensor([[0.1, 0.3], [0.5, 0.0]], requires_grad=True)
    expected = 0.0
    for question, length in ((0, 1), (1, 2)):
        weights = [math.exp(float(s) / theta) for s in scores[question].detach()]
        for token in range(length):
            given = [math.exp(float(one[token])) for one in logs[question]]
            mixed = sum(w * p for w, p in zip(weights, given, strict=True)) / sum(weights)
            expected -= math.log(mixed) / length / 2
    loss = step2.emdr2_loss(logs, scores, theta)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    loss.backward()
    posterior = (scores / theta).softmax(-1)[0] * logs[0, :, 0].exp()
    pull = ((scores / theta).softmax(-1)[0] - posterior / posterior.sum()) / theta / 2
    assert torch.allclose(scores.grad[0], pull, atol=1e-6)  # towards the posterior
    assert scores.grad.isfinite().all()


class Table(torch.nn.Module):
    """A stand-in for a retriever: one free vector a question."""

    settings = RetrieverSettings()

    def __init__(self, n):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.zeros(n, 3))

    def forward(self, texts):
        return self.vectors[[int(text) for text in texts]]


class TableLesson(step2.Lesson):
    """Six questions of three candidates each, whose vectors are the axes."""

    def hr(self):
        return float(self.retriever.vectors.detach().sum())


def trained(folder, epochs, start=0.0):
    """The rows of the log of a table of six questions that Step 2 moves."""
    torch.manual_seed(0)
    table, target = Table(6), torch.softmax(torch.arange(18.0).reshape(6, 3) % 5, -1)
    with torch.no_grad():
        table.vectors.fill_(start)
    questions = [Question(str(i), str(i), ("a",), ()) for i in range(6)]
    asked = Asked(Corpus("c", [], {}), questions, np.zeros((6, 3), dtype=np.int64))
    loss_of = lambda chosen, scores: step2.kl_loss(target[chosen], scores, 0.5)  # noqa: E731
    axes = SimpleNamespace(take=lambda places: np.tile(np.eye(3, dtype="f4"), (len(places), 1, 1)))
    lesson = TableLesson(table, asked, axes, "query", loss_of)
    chosen = DistillSettings(epochs=epochs, batch=2, rate=0.01)
    return step2.train(lesson, chosen, 0, folder)


def test_step2_lowers_the_loss_and_logs_it(tmp_path):
    rows = trained(tmp_path, 60)
    assert [row["epoch"] for row in rows[:4]] == [0, 0.5, 1, 1.5]
    assert rows[-1]["loss"] < 0.2 * rows[1]["loss"]
    logged = read_log(tmp_path)
    assert logged[1:] == rows[1:]
    assert set(logged[0]) == {"epoch", "loss", "hr", "rate", "seconds"}
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_a_loss_that_is_not_a_number_is_refused(tmp_path):
    with pytest.raises(RetrieverError, match=r"not a number before epoch 0.5. Lower distill.rate"):
        trained(tmp_path, 1, start=float("inf"))


NAMES = ("ulm", "orla", "lyda", "tarholm", "venn", "brom")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders of finished stages: six passages, a question each in every part, a retriever."""
    home = tmp_path_factory.mktemp("stages")
    folders = {name: home / name for name in ("data", "retriever", "vectors", "candidates")}
    for folder in folders.values():
        folder.mkdir()
    passages = [Passage(str(i), name, f"{name} is an old port.") for i, name in enumerate(NAMES)]
    write_passages(folders["data"] / "passages.arrow", passages)
    questions = [Question(n, f"what is {n}", (n,), (i,)) for i, n in enumerate(NAMES)]
    for part in ("distill", "dev", "test"):
        write_jsonl(folders["data"] / f"{part}.jsonl", map(asdict, questions))
    retriever = RetrieverSettings(normalise=True, crop_steps=2, crop_batch=4)
    train_by_cropping(passages, embedded_tokenizer(), retriever, 0).save(
        folders["retriever"] / "model"
    )
    found = np.stack([np.roll(np.arange(6), -i) for i in range(6)])
    save_file({"distill": found}, folders["candidates"] / "candidates.safetensors")
    given = {"passages": folders["data"], "questions": folders["data"], **folders}
    settings = {"retriever": retriever.model_dump(), "index": IndexSettings().model_dump()}
    make_vectors(folders["vectors"], given, settings)
    return {**given, "index": folders["vectors"]}, settings


def asked_for(settings, **changed):
    distill = {"epochs": 20, "batch": 2, "rate": 3e-3, **changed.pop("distill", {})}
    return {
        **settings,
        "target": "oracle",
        "distill": DistillSettings(**distill).model_dump(mode="json", exclude={"seeds"}),
        "attention": AttentionSettings().model_dump(),
        **{"k": 3, "seed": 0, "shuffle_seed": 0, **changed},
    }


def read(folder):
    curve = json.loads((folder / "curve.json").read_text("utf8"))
    return load_file(folder / "ranking.safetensors")["test"], curve


@pytest.mark.parametrize("distill", [{}, {"side": "both", "direction": "retriever || target"}])
def test_the_maker_teaches_a_retriever_to_find_what_the_oracle_says(inputs, tmp_path, distill):
    given, settings = inputs
    step2.make_step2(tmp_path, given, asked_for(settings, distill=distill))
    ranking, curve = read(tmp_path)
    assert ranking.shape == (6, 6)
    assert np.array_equal(ranking[:, 0], np.arange(6))
    assert set(curve[0]) == {"epoch", "loss", "hr"}
    assert curve[-1]["hr"] == 1 >= curve[0]["hr"]
    assert len(curve) == len(read_log(tmp_path)) == 41


def test_a_killed_maker_makes_the_same(inputs, tmp_path, monkeypatch):
    given, settings = inputs
    alone = tmp_path / "alone"
    alone.mkdir()
    logs = np.log(np.random.default_rng(0).uniform(0.1, 1, (6, 3, 2))).astype(np.float32)
    save_file({"answer_logs": logs}, alone / "scores.safetensors")
    chosen = asked_for(settings, target="fine-tuned EMDR2", distill={"epochs": 2})
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    step2.make_step2(tmp_path / "whole", {**given, "alone": alone}, chosen)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(device, "write", killed)  # at the very end
        with pytest.raises(KeyboardInterrupt):
            step2.make_step2(tmp_path / "cut", {**given, "alone": alone}, chosen)
    step2.make_step2(tmp_path / "cut", {**given, "alone": alone}, chosen)
    for whole, cut in zip(read(tmp_path / "whole"), read(tmp_path / "cut"), strict=True):
        assert str(whole) == str(cut)
