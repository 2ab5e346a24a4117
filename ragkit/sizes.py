"""How large the things are that a profile names: sets of questions, passages, models. Nothing is fetched.

Local files and folders are looked at; for names of the hub there is a table of known sizes with sources (`assets/hub_sizes.yaml`). What
neither can tell is said to be unknown, and stops the plan where it cannot do without.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig

from ragkit import RagkitError
from ragkit.corpus import PARTS, build_world
from ragkit.profile import HubSet, HubTable, Profile, QuestionSet, ReaderSettings, RetrieverSettings, WorldSet
from ragkit.reader import embedded_reader
from ragkit.retriever import EMBEDDED_HIDDEN, EMBEDDED_LAYERS
from ragkit.stages import TRAINING_ENTITIES
from ragkit.vocabulary import build_tokenizer

TOKENS_A_WORD = 1.4  # of English prose in a vocabulary of 30,000 to 150,000 pieces, signs included
BYTES_A_WORD = 6.5  # of a passage on disk: its letters, a space, its share of title and id
QUESTION_WORDS, PASSAGE_WORDS, POOL = 12, 100, 100  # where nothing says how long texts are, and how many passages stand beside a question
LOOKED_AT = 20_000  # lines of a file from which its length is told


class SizeError(RagkitError):
    """A profile names something whose size cannot be known here; the message says what to state."""


@dataclass(frozen=True)
class SetSize:
    """How large a question set is; words are means. `training_passages` are those of one of Step 1's redrawn worlds, `assumed` says what is not known."""

    passages: int
    questions: dict[str, int]
    passage_words: float
    question_words: float
    training_passages: int = 0
    assumed: tuple[str, ...] = ()

    @property
    def passage_tokens(self) -> float:
        return self.passage_words * TOKENS_A_WORD

    @property
    def question_tokens(self) -> float:
        return self.question_words * TOKENS_A_WORD

    @property
    def bytes_on_disk(self) -> float:
        """Of all passages, as text in Arrow."""
        return self.passages * self.passage_words * BYTES_A_WORD


@dataclass(frozen=True)
class Download:
    """Something that a run fetches; `gb` None where it is not known. `unpacked` is what `datasets` makes of it on disk beside it, in GB."""

    what: str
    gb: float | None
    source: str
    unpacked: float = 0.0

    @property
    def bytes_on_disk(self) -> float:
        return ((self.gb or 0.0) + self.unpacked) * 1e9


@cache
def known() -> dict[str, dict[str, Any]]:
    """The parsed `assets/hub_sizes.yaml`."""
    return yaml.safe_load(resources.files("ragkit").joinpath("assets/hub_sizes.yaml").read_text("utf8"))


def known_table(table: HubTable) -> dict[str, Any]:
    """What is known of a table; empty if nothing is."""
    tables = known()["tables"]
    return tables.get(f"{table.dataset}: {table.config}", tables.get(table.dataset, {}))


def rows_of(table: HubTable, split: str) -> int | None:
    """Rows of a table's split, by the profile, by its files where it is a local folder, or by what is known; None if nothing says."""
    if split in table.rows or not Path(table.dataset).is_dir():
        return table.rows.get(split, known_table(table).get("rows", {}).get(split))
    pattern = table.files.format(split=split) if table.files else f"**/*{split}*.parquet"
    return sum(parquet.read_metadata(file).num_rows for file in Path(table.dataset).glob(pattern) if file.suffix == ".parquet") or None


def gigabytes_of(table: HubTable, splits: Sequence[str]) -> float | None:
    """What is fetched of a table: where its files are named those of some splits, else all; None where it is not known."""
    known_gb = known_table(table).get("gb", {})
    wanted = splits if table.files else list(known_gb)
    return sum(known_gb[split] for split in set(wanted)) if wanted and set(wanted) <= set(known_gb) else None


def set_size(settings: QuestionSet) -> SetSize:
    """How large a set is. Raises SizeError if its number of passages cannot be known without fetching it."""
    questions = {part: int(getattr(settings, part)) for part in PARTS}
    if isinstance(settings, WorldSet):
        made = build_world(settings)
        passage_words, question_words = (mean_words(one.text for one in some) for some in (made.passages, made.questions["test"]))
        smaller = build_world(settings.model_copy(update={"entities": TRAINING_ENTITIES, "distill": 1, "dev": 1, "test": 1}), reserved=False)
        return SetSize(len(made.passages), questions, passage_words, question_words, len(smaller.passages))
    if not isinstance(settings, HubSet):
        lines, words = table_lines(settings, settings.passages)
        return SetSize(lines, questions, words, QUESTION_WORDS, assumed=(f"questions of {QUESTION_WORDS} words",))
    table = known_table(settings.questions)
    assumed: tuple[str, ...] = () if "words" in table else (f"questions of {QUESTION_WORDS} words",)
    if settings.pools:
        pool = int(table.get("pool", POOL))
        assumed += (f"{pool} passages of {PASSAGE_WORDS} words with each question, no passage with two",)
        return SetSize(sum(questions.values()) * pool, questions, PASSAGE_WORDS, table.get("words", QUESTION_WORDS), assumed=assumed)
    lines, passage_words = passages_of(settings)
    if not isinstance(settings.passages, HubTable) or "words" not in known_table(settings.passages):
        assumed += (f"passages of {passage_words:.0f} words",)
    return SetSize(min(lines, settings.most_passages or lines), questions, passage_words, table.get("words", QUESTION_WORDS), assumed=assumed)


def passages_of(settings: HubSet) -> tuple[int, float]:
    """Passages and their words in a table or file that a hub set takes them from."""
    source = settings.passages
    if isinstance(source, HubTable):
        rows = rows_of(source, settings.passage_split) or settings.most_passages
        if rows is None:
            raise SizeError(
                f"Set {settings.name}: how many passages {source.dataset} holds is not known here. Write the number under "
                f"passages.rows.{settings.passage_split} in the profile (its page at the hub says it), or limit it by most_passages."
            )
        return rows, float(known_table(source).get("words", PASSAGE_WORDS))
    if source is not None and not Path(source).is_file() and settings.most_passages:
        return settings.most_passages, float(PASSAGE_WORDS)
    return table_lines(settings, str(source))


def mean_words(texts: Any) -> float:
    lengths = [len(text.split()) for text in texts]
    return sum(lengths) / len(lengths)


def table_lines(settings: QuestionSet, file: str) -> tuple[int, float]:
    """Lines of a TSV below its header and words of its text column, told from its beginning and its size."""
    path = Path(file)
    if not path.is_file():
        raise SizeError(f"Set {settings.name}: there is no file {file}, so how many passages it holds is not known. Fetch it, or mend the path in the profile.")
    lines, words = 0, 0
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as text:
        text.readline()
        for line in text:
            lines += 1
            words += len(line.split(b"\t")[1].split()) if line.count(b"\t") > 1 else len(line.split())
            if lines == LOOKED_AT:
                lines = round(lines * path.stat().st_size / max(1, raw.tell()))
                return lines, words / LOOKED_AT
    if not lines:
        raise SizeError(f"Set {settings.name}: {file} holds no passages. Fetch it again, or mend the path in the profile.")
    return lines, words / lines


@dataclass(frozen=True)
class Shape:
    """A transformer: what its memory and its work follow from.

    `widened` is the width of a feed-forward block, `gated` whether that has three matrices (SwiGLU), `biased` whether attention adds a bias of
    its own for every head (ALiBi), so that a mask of heads x tokens x tokens is made.
    """

    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    size: int
    widened: int
    gated: bool
    biased: bool
    vocabulary: int
    block_weights: int  # of all layers
    linear_sides: int  # inputs and outputs of all linear layers of a block together

    @property
    def adapter_weights(self) -> int:
        """Weights of adapters of rank 1 in every linear layer."""
        return self.layers * self.linear_sides


def reader_config(settings: ReaderSettings) -> Any:
    """The configuration of a reader. Raises SizeError for a hub name that is not known here, and for an encoder-decoder."""
    config = model_config(str(embedded_reader()) if settings.model == "embedded" else settings.model, "reader.model")
    if config.is_encoder_decoder:
        raise SizeError(f"reader.model: {settings.model} is an encoder-decoder; such a reader can be run, but only decoders can be planned for.")
    return config


def retriever_config(settings: RetrieverSettings) -> Any:
    """The configuration of a retriever; the embedded one has none on disk."""
    if settings.model != "embedded":
        return model_config(settings.model, "retriever.model")
    return BertConfig(
        vocab_size=len(build_tokenizer()), hidden_size=EMBEDDED_HIDDEN, num_hidden_layers=EMBEDDED_LAYERS, num_attention_heads=4,
        intermediate_size=2 * EMBEDDED_HIDDEN, max_position_embeddings=settings.passage_tokens,
    )  # fmt: skip


def model_config(name: str, key: str) -> Any:
    """A configuration from a local folder or from the table of known models."""
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name)
    if Path(name).is_dir():
        raise SizeError(f"{key}: the folder {name} holds no config.json, so it is no model. Save or fetch it again.")
    if name not in known()["models"]:
        raise SizeError(
            f"{key}: the shape of {name!r} is not known here. Known are {', '.join(known()['models'])}. "
            "Fetch its config.json into a folder and name that folder, or add it to ragkit/assets/hub_sizes.yaml."
        )
    given = dict(known()["models"][name]["config"])
    return AutoConfig.for_model(given.pop("model_type"), **given)


def bare_model(config: Any, head: bool) -> nn.Module:
    """The model of a configuration on torch's meta device: shapes without numbers."""
    kind = AutoModelForCausalLM if head else AutoModel
    with torch.device("meta"):
        return kind.from_config(config)


def blocks_of(model: nn.Module, config: Any) -> nn.ModuleList:
    """The list of a model's transformer layers."""
    number = config.get_text_config(decoder=True).num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number)


def shape_of(config: Any, head: bool) -> Shape:
    """What a configuration makes; `head` counts the output layer too, which a retriever has not."""
    model, text = bare_model(config, head), config.get_text_config(decoder=True)
    block = blocks_of(model, config)[0]
    linear = [list(weight.shape) for weight in block.parameters() if weight.dim() == 2]
    inner = next((value for key in ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim") if (value := getattr(text, key, None))), None)
    hidden, heads = text.hidden_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or (getattr(text, "num_kv_heads", None) or heads)
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()), layers=text.num_hidden_layers, hidden=hidden, heads=heads, kv_heads=kv_heads, size=size,
        widened=inner or 4 * hidden,
        gated=any(name.endswith("gate_proj") for name, _ in block.named_modules()), biased=bool(getattr(text, "alibi", False)),
        vocabulary=text.vocab_size, block_weights=text.num_hidden_layers * sum(p.numel() for p in block.parameters()), linear_sides=sum(map(sum, linear)),
    )  # fmt: skip


def downloads(profile: Profile) -> list[Download]:
    """What a run of the profile would fetch from the hub, each thing once."""
    found: dict[str, Download] = {}
    unknown = "not in ragkit/assets/hub_sizes.yaml; its page at the hub says it"
    for settings in profile.sets:
        if not isinstance(settings, HubSet):
            continue
        for table, splits in ((settings.questions, (settings.train, settings.heldout)), (settings.passages, (settings.passage_split,))):
            if isinstance(table, HubTable) and not Path(table.dataset).exists():
                what = table.dataset + (f" ({table.config})" if table.config else "")
                texts = sum(rows_of(table, split) or 0 for split in set(splits)) * (known_table(table).get("pool", POOL) if settings.pools else 1)
                passages = settings.pools or table is settings.passages
                unpacked = texts * PASSAGE_WORDS * BYTES_A_WORD / 1e9 if passages else 0.0
                found[what] = Download(what, gigabytes_of(table, splits), known_table(table).get("source", unknown), unpacked)
    for name in (profile.retriever.model, profile.reader.model):
        if name != "embedded" and not Path(name).is_dir():
            entry = known()["models"].get(name, {})
            found[name] = Download(name, entry.get("gb"), entry.get("source", unknown))
    return list(found.values())
