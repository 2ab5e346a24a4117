"""What the makers write, against what is worked out anew from the prompts and the models' files."""

import copy
import itertools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist
from spelt import pieced
from tiny_models import fid
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ragkit.attention import record
from ragkit.data.corpus import Passage, Question, write_passages
from ragkit.data.files import write_jsonl
from ragkit.errors import DataError
from ragkit.indicators import closeness, measures
from ragkit.indicators.measures import CONTROLS, SPACES, Tokens
from ragkit.models.fid import load_reader
from ragkit.models.reader import PART
from ragkit.models.retriever import embedded_tokenizer, train_by_cropping
from ragkit.settings import AttentionSettings, ReaderSettings, RetrieverSettings

PASSAGES = [
    Passage("0", "Orla Venn", "Orla Venn was born in Ulm. The family moved away in 1810."),
    Passage("1", "Old Tarholm", "Old Tarholm lies on the river Lyda."),
    Passage("2", "Ulm", "Ulm is a town."),
]
QUESTIONS = [
    Question("a", "where was orla venn born", ("Ulm",), (0,), cloze="Orla Venn was born in"),
    Question("b", "where does the river lyda lie", ("Old Tarholm",), (1,), cloze="Lyda is in"),
]
RANKING = np.array([[0, 2, 1], [1, 0, 2]])
FOUND = [[PASSAGES[i] for i in row[:2]] for row in RANKING]
WANTED = {"answer": (" Ulm", " Old Tarholm"), "nouns": (" orla venn", " river lyda")}
NOUNS = [[(10, 14), (15, 19)], [(15, 20), (21, 25)]]
READER = ReaderSettings()
SETTINGS = {
    "reader": READER.model_dump(mode="json"),
    "base": READER.model_dump(mode="json"),
    "retriever": RetrieverSettings().model_dump(mode="json"),
    "which": "off-the-shelf",
    "questions": 2,
    "k": 2,
    "seed": 0,
    "part": "test",
}


@pytest.fixture(scope="module")
def reader():
    return load_reader("embedded", READER)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, reader):
    """A folder a role, as finished stages leave them; the taught reader is a shaken one."""
    home = tmp_path_factory.mktemp("stages")
    roles = {
        role: home / role
        for role in ("passages", "questions", "candidates", "nouns", "retriever", "step1")
    }
    for folder in roles.values():
        folder.mkdir()
    write_passages(roles["passages"] / "passages.arrow", PASSAGES)
    for part in ("distill", "dev", "test"):
        write_jsonl(roles["questions"] / f"{part}.jsonl", map(asdict, QUESTIONS))
    save_file({"test": RANKING}, roles["candidates"] / "candidates.safetensors")
    (roles["nouns"] / "spans.json").write_text(json.dumps({"test": NOUNS}))
    retriever = train_by_cropping(
        PASSAGES, embedded_tokenizer(), RetrieverSettings(crop_steps=1, crop_batch=2), 0
    )
    retriever.save(roles["retriever"] / "model")
    taught = copy.deepcopy(reader)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in taught.model.parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0
    place = roles["step1"] / "fine-tuned"
    place.mkdir(exist_ok=True)
    taught.model.save_pretrained(place)
    taught.tokenizer.save_pretrained(place)
    return roles


def without(inputs, *roles):
    return {role: folder for role, folder in inputs.items() if role not in roles}


def test_tokens_hold_what_the_recorder_gives(reader):
    seen = closeness.look_at_tokens(reader, QUESTIONS, FOUND)
    for number, (question, passages) in enumerate(zip(QUESTIONS, FOUND, strict=True)):
        prompt = reader.prompt(question, passages, question.answers[0])
        ids, mask = reader.batch([prompt])
        mine, owner = seen.question == number, np.array(prompt.owner)
        titles = owner == PART["title"]
        shown = titles | (owner >= 0)
        assert seen.ids[mine].tolist() == np.array(prompt.ids)[shown].tolist()
        assert seen.title[mine].tolist() == titles[shown].tolist()
        # a title belongs to the passage whose text comes next
        following = [next(o for o in owner[place:] if o >= 0) for place in np.flatnonzero(shown)]
        assert seen.owner[mine].tolist() == following
        plain = seen.texts.question == number
        assert seen.texts.owner[plain].tolist() == owner[owner >= 0].tolist()
        places = prompt.answer_start - np.flatnonzero(shown)
        assert seen.from_end[mine].tolist() == places.tolist()
        rows = range(prompt.answer_start - 1, len(prompt.ids) - 2)  # predicting
        look = record(reader.model, ids, mask, torch.tensor([list(rows)]))
        every = (look.alpha[:, 0].mean(2) * look.norms[:, 0]).mean((0, 1)).numpy()
        ours = seen.attention(AttentionSettings(rows="predicting"))[mine]
        assert np.allclose(ours, every[shown], atol=1e-6)
        plain = look.alpha[:, 0].mean((0, 1, 2)).numpy()
        titles = plain[1:][owner[1:] == PART["title"]].sum()
        assert seen.mass[number, 1, measures.PLACES.index("titles")] == pytest.approx(titles, 1e-4)
    assert np.allclose(seen.mass.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_passage_without_a_title_shifts_no_others(reader, kind):
    one = fid() if kind == "encoder-decoder" else reader
    passages = [Passage("0", "", "Ulm is a town."), *PASSAGES[:2]]
    prompt = one.prompt(QUESTIONS[0], passages, "Ulm")
    places, owner, title = closeness.passage_tokens(prompt)
    for number, passage in enumerate(passages):
        own = np.array(prompt.ids)[places[title & (owner == number)]]
        told = one.tokenizer.decode(own).replace(":", "").split()
        assert "".join(told) == passage.title.lower().replace(" ", "")


def test_a_tokens_end_is_its_last_character(reader):
    """Also in a prompt that is cut; where a passage alone has other tokens, no place is told."""
    for one in (reader, load_reader("embedded", ReaderSettings(context=40))):
        seen = closeness.look_at_tokens(one, QUESTIONS, FOUND)
        for number, place, title in itertools.product((0, 1), (0, 1), (False, True)):
            passage = FOUND[number][place]
            text = f"{passage.title}:" if title else passage.text
            mine = (seen.question == number) & (seen.owner == place) & (seen.title == title)
            begins = [0, *(seen.ends[mine][:-1] + 1)]
            assert mine.any()
            for token, first, last in zip(seen.ids[mine], begins, seen.ends[mine], strict=True):
                piece = one.tokenizer.decode([int(token)]).strip().removeprefix("##")
                assert text[first : last + 1].strip().lower() == piece.lower()
    assert (seen.question == 0).sum() < len(reader.prompt(QUESTIONS[0], FOUND[0]).ids) - 20
    ids = seen.ids[(seen.question == 0) & (seen.owner == 0) & ~seen.title]
    assert closeness.last_characters(reader, "Another text.", ids).tolist() == [-1] * len(ids)


def test_tokens_are_put_together_to_words(reader):
    tokens = closeness.look_at_tokens(reader, QUESTIONS, FOUND)
    words = closeness.in_words(reader, tokens, QUESTIONS, FOUND, NOUNS)
    by_number = dict(
        zip(words.tokens.ids.tolist(), pieced(reader, tokens.ids.tolist()), strict=True)
    )
    assert len(set(by_number.values())) == len(by_number)
    told = [by_number[number] for number in words.tokens.ids.tolist()]
    assert told == pieced(reader, tokens.ids.tolist())
    assert words.wanted["answer"] == [
        [words.forms.index(one) for one in text.split()] for text in ("Ulm", "Old Tarholm")
    ]
    spelt = [[words.forms[i].lower() for i in row] for row in words.wanted["nouns"]]
    assert spelt == [["orla", "venn"], ["river", "lyda"]]
    assert "nouns" not in closeness.in_words(reader, tokens, QUESTIONS, FOUND, None).wanted


def byte_level(*merged):
    """A cased tokenizer that cuts bytes, with some words whole behind a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: place for place, sign in enumerate([*alphabet, "</s>"])}
    merges = []
    for word in merged:
        have = "\u0120" + word[0]
        merges.append(("\u0120", word[0]))
        vocabulary.setdefault(have, len(vocabulary))
        for sign in word[1:]:
            merges.append((have, sign))
            have += sign
            vocabulary.setdefault(have, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def test_a_word_is_one_however_it_is_written_and_cut():
    """' Paris' is one token, 'paris' and a first 'Paris' are five; in the text they are one word,
    and a full stop of 'J. Paris' is none that closeness is measured to."""
    tokenizer = byte_level("Paris")
    text = "Paris and paris, J. Paris."
    encoded = tokenizer(text, return_offsets_mapping=True)
    ends = np.array([end - 1 for _, end in encoded["offset_mapping"]])
    n = len(ends)
    assert n > 10
    tokens = Tokens(
        ids=np.array(encoded["input_ids"]), owner=np.zeros(n, int), title=np.zeros(n, bool),
        question=np.zeros(n, int), from_end=np.arange(n), ends=ends,
        contribution=np.ones((n, 1, 2, 1), "f4"), mass=np.ones((1, 1, 6), "f4"),
    )  # fmt: skip
    one = SimpleNamespace(tokenizer=tokenizer)
    asked, found = [Question("q", "who", ("J. Paris",), ())], [[Passage("0", "T", text)]]
    words = closeness.in_words(one, tokens, asked, found, None)
    named = [words.forms[number].lower() for number in words.tokens.ids]
    spans = [(text[:end].split() or [""])[-1] for end in ends + 1]
    for name, end, shown in zip(named, ends, spans, strict=True):
        assert name in text.lower()
        if shown.lower().strip(".,").startswith("paris") and text[end].isalnum():
            assert name == "paris"
    assert [words.forms[i] for i in words.wanted["answer"][0]] == ["J", "Paris"]
    assert measures.exact(words.tokens, words.wanted["answer"]).sum() == sum(
        name in ("paris", "j") for name in named
    )
    unknown = replace(tokens, ends=np.full(n, -1))
    alone = closeness.in_words(one, unknown, asked, found, None)
    assert [alone.forms[i] for i in alone.tokens.ids][-1] == "."


def test_nouns_become_tokens_by_their_characters(reader):
    text = QUESTIONS[0].text
    ids = np.array(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
    inside = closeness.within_spans(reader, text, NOUNS[0], ids)
    assert reader.tokenizer.decode(ids[inside]).replace(" ", "") == "orlavenn"
    assert not closeness.within_spans(reader, text, [], ids).any()


@pytest.mark.skipif(
    "RAGKIT_REAL_DATA" not in os.environ, reason="RAGKIT_REAL_DATA is not set: no Llama"
)
def test_nouns_are_found_where_a_text_is_cut_otherwise_at_its_beginning():
    """The small Llama's SentencePiece vocabulary has other tokens there than in the middle."""
    llama = str(Path(os.environ["RAGKIT_REAL_DATA"]) / "models" / "stories260k")
    one = load_reader(llama, ReaderSettings(model=llama, context=512))
    text = "who wrote the old song about a river"
    spans = [(text.index(word), text.index(word) + len(word)) for word in ("song", "river")]
    question = Question("q", text, ("Ulm",), (0,))
    prompt = one.prompt(question, PASSAGES, "Ulm")
    ids = np.array(prompt.ids)[np.array(prompt.owner) == PART["question"]]
    inside = closeness.within_spans(one, text, spans, ids)
    spelt = one.tokenizer.convert_ids_to_tokens(ids[inside].tolist())
    assert "".join(spelt).replace("▁", "") == "songriver"
    close = closeness.contextual_closeness(one, [question], [PASSAGES], [spans])
    assert np.isfinite(close["nouns"]).all()


def test_a_words_vector_is_the_mean_of_its_pieces():
    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model = torch.nn.Embedding.from_pretrained(torch.tensor([[9.0, 9.0], [1, 0], [0, 1]]))
    model.get_input_embeddings = lambda: model
    owner = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    one = SimpleNamespace(tokenizer=owner, model=model)
    expected = [[1, 0], [1 / 3, 2 / 3], [np.nan, np.nan]]
    assert np.allclose(closeness.space(["a", "bab", "z"], one), expected, equal_nan=True)


def test_contextual_closeness_is_that_of_the_last_hidden_states(reader):
    """With the question first: behind the passages they would not know what is asked."""
    close = closeness.contextual_closeness(reader, QUESTIONS, FOUND, NOUNS)
    seen = closeness.look_at_tokens(reader, QUESTIONS, FOUND)
    places = np.stack([getattr(seen, name) for name in closeness.PLACE], axis=1)
    assert np.array_equal(close["place"], places)
    first = copy.copy(reader)
    first.settings = READER.model_copy(update={"layout": "question first"})
    for number, (question, passages) in enumerate(zip(QUESTIONS, FOUND, strict=True)):
        prompt = first.prompt(question, passages, question.answers[0])
        owner = np.array(prompt.owner)
        assert owner.tolist().index(PART["question"]) < owner.tolist().index(0)
        out = reader.model(torch.tensor([prompt.ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0].detach().double().numpy()
        asked = owner == PART["question"]
        ids = np.array(prompt.ids)[asked]
        asked[asked] = closeness.within_spans(first, question.text, NOUNS[number], ids)
        words = {"answer": owner == PART["answer"], "nouns": asked}
        words["answer"][-1] = False  # the end token
        for goal, wanted in words.items():
            shown = (owner >= 0) | (owner == PART["title"])
            nearest = 1 - cdist(states[shown], states[wanted], "cosine").min(1)
            assert np.allclose(close[goal][seen.question == number], nearest, atol=1e-5)
    assert "nouns" not in closeness.contextual_closeness(reader, QUESTIONS, FOUND, None)


def make(folder, inputs, **changes):
    """Runs the makers of one reader; returns its tokens and its closeness."""
    settings = SETTINGS | changes
    for maker, role in (
        (closeness.make_tokens, "tokens"),
        (closeness.make_contextual, "contextual"),
        (closeness.make_closeness, "closeness"),
    ):
        (folder / role).mkdir()
        maker(folder / role, inputs, settings)
        inputs = inputs | {role: folder / role}
    return Tokens.load(folder / "tokens"), load_file(folder / "closeness" / "closeness.safetensors")


@pytest.mark.parametrize("which", ["off-the-shelf", "fine-tuned"])
def test_closeness_is_measured_in_every_space(tmp_path, inputs, reader, which):
    mine = inputs if which == "fine-tuned" else without(inputs, "step1")
    seen, made = make(tmp_path, mine, which=which)
    spaces = (*SPACES, *CONTROLS, "exact")
    assert set(made) == {f"{goal}/{space}" for goal in ("answer", "nouns") for space in spaces}
    weights = load_file(inputs["retriever"] / "model" / "model.safetensors")
    own = reader
    if which == "fine-tuned":
        own = load_reader(inputs["step1"] / which, READER)
    tables = {
        "input": reader.model.get_input_embeddings().weight,
        "own": own.model.get_input_embeddings().weight,
        "retriever": torch.tensor(next(v for n, v in weights.items() if "word_embeddings" in n)),
    }
    for goal, texts in WANTED.items():
        wanted = [reader.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        for number in range(2):
            here = seen.question == number
            groups, goals = pieced(reader, seen.ids[here].tolist()), pieced(reader, wanted[number])
            assert made[f"{goal}/exact"][here].tolist() == [one in goals for one in groups]
            assert made[f"{goal}/exact"][here].any()
            for space, table in tables.items():
                vectors = table.detach().double().numpy()
                own, to = (
                    np.stack([vectors[list(one)].mean(0) for one in some])
                    for some in (groups, goals)
                )
                nearest = 1 - cdist(own, to, "cosine").min(1)
                assert np.allclose(made[f"{goal}/{space}"][here], nearest, atol=1e-9)
        assert (made[f"{goal}/overlap"] == made[f"{goal}/exact"]).all()
        exact = made[f"{goal}/exact"] == 1
        assert np.allclose(made[f"{goal}/permuted"][exact], 1)
        assert not np.allclose(made[f"{goal}/permuted"], made[f"{goal}/input"])
        assert made[f"{goal}/input"].dtype == np.float64
    assert np.array_equal(made["answer/own"], made["answer/input"]) == (which == "off-the-shelf")
    words = json.loads((tmp_path / "tokens" / "words.json").read_text("utf8"))
    spelt = reader.tokenizer.convert_ids_to_tokens(seen.ids.tolist())
    assert words == dict(zip(map(str, seen.ids.tolist()), spelt, strict=True))


def test_without_nouns_there_is_only_the_answer(tmp_path, inputs):
    _, made = make(tmp_path, without(inputs, "nouns", "step1"))
    assert {name.split("/")[0] for name in made} == {"answer"}
    with pytest.raises(DataError, match="noun finder"):
        measures.load_closeness(tmp_path / "closeness", "nouns", "input")


def test_a_token_that_was_not_seen_in_context_has_no_closeness_there(tmp_path, inputs):
    """It is told by its place: question, passage, title or text, and last character."""
    mine = without(inputs, "step1")
    _, made = make(tmp_path, mine)
    arrays = load_file(tmp_path / "contextual" / "contextual.safetensors")
    arrays["place"][3, -1] += 1000
    (tmp_path / "other").mkdir()
    save_file(arrays, tmp_path / "other" / "contextual.safetensors")
    roles = {"tokens": tmp_path / "tokens", "contextual": tmp_path / "other"}
    closeness.make_closeness(tmp_path / "other", mine | roles, SETTINGS)
    again, _ = measures.load_closeness(tmp_path / "other", "answer", "contextual")
    assert np.flatnonzero(np.isnan(again)).tolist() == [3]
    assert np.allclose(np.delete(again, 3), np.delete(made["answer/contextual"], 3))


def test_an_encoder_decoder_has_no_contextual_closeness(tmp_path, inputs, monkeypatch):
    config = SimpleNamespace(is_encoder_decoder=True)
    two_sided = SimpleNamespace(model=SimpleNamespace(config=config))
    with monkeypatch.context() as changed:
        changed.setattr(closeness, "load_reader", lambda *_: two_sided)
        closeness.make_contextual(tmp_path, inputs, SETTINGS)
    mine = without(inputs, "step1")
    closeness.make_tokens(tmp_path, mine, SETTINGS)
    roles = {"tokens": tmp_path, "contextual": tmp_path}
    closeness.make_closeness(tmp_path, mine | roles, SETTINGS)
    made = load_file(tmp_path / "closeness.safetensors")
    assert {name.split("/")[1] for name in made} == {"exact", *SPACES, *CONTROLS} - {"contextual"}


def test_an_encoder_decoders_tokens_are_measured_in_the_off_the_shelf_decoders_space(
    tmp_path, inputs, reader
):
    """Its settings say which reader saw the tokens, and beside it which one's space is taken."""
    other = fid()
    step1 = tmp_path / "step1"
    for part in (other.model, other.tokenizer):
        part.save_pretrained(step1 / "fine-tuned")
    changes = {"which": "fine-tuned", "reader": ReaderSettings(model="elsewhere").model_dump()}
    mine = inputs | {"step1": step1}
    seen, made = make(tmp_path, mine, **changes)
    assert seen.contribution.shape[-1] == 3  # layers of its decoder
    vectors = {"input": reader, "own": other}
    words = closeness.in_words(other, seen, QUESTIONS, FOUND, None)
    for space, model in vectors.items():
        of_words = closeness.space(words.forms, model)
        expected = measures.closeness_to(words.tokens, words.wanted["answer"], of_words)
        assert np.allclose(made[f"answer/{space}"], expected)
