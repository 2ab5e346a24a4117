"""The sections of a profile: every setting with its type, its range and its default."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

ASSETS = Path(__file__).parent / "assets"
REFERENCES = ASSETS.parents[1] / "figures"  # runs made the reference: `full`, others below it
# The readers that ship, by name; the keys of stages hold the hashes of their files.
EMBEDDED = {"embedded": ASSETS / "reader", "embedded encoder-decoder": ASSETS / "encoder_decoder"}
EMBEDDED |= {path.name: path for path in sorted((ASSETS / "starts").iterdir())}  # notebook 11's
# Settings that change no result, so that a stage made under others is used again.
FREE = frozenset({"at_once", "gradient_checkpointing"})


def asset(name: str) -> Path:
    """A file or folder of the package's assets, named by a literal: stage keys follow these."""
    return ASSETS / name


def reference(profile: str) -> Path:
    """Where the reference run of a shipped profile is kept, in a checkout."""
    return REFERENCES if profile == "full" else REFERENCES / profile


def different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses values, or sets by their names, of which one stands twice."""
    names = [getattr(value, "name", value) for value in values]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands there twice; each needs its own")
    return values


def placed(name: str, info: ValidationInfo) -> str:
    """A path from the profile's folder, made absolute; what is not there is a name of the hub."""
    if (folder := info.context) is None:
        return name
    is_name = name in EMBEDDED or not (folder / name).exists()
    can_be = info.field_name in ("model", "dataset", "nouns")
    return name if is_name and can_be else str(folder / name)


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Within = Annotated[float, Field(gt=0, lt=1)]  # a share that is neither nothing nor all
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # it becomes a folder's name
Place = Annotated[str, Field(min_length=1), AfterValidator(placed)]
Seeds = Annotated[tuple[int, ...], Field(min_length=1, strict=False), AfterValidator(different)]
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
Rows = Literal["last_prompt", "predicting", "consuming"]
Pooling = Literal["sum", "mean"]
Layers = Literal["all", "first", "middle", "last"]
Order = Literal["rank", "reversed", "shuffled", "balanced", "calibrated", "levelled"]
Beside = Literal["LOOP", "EMDR2"]
ROWS, POOLINGS, LAYERS, ORDERS = map(get_args, (Rows, Pooling, Layers, Order))


class Section(BaseModel):
    """Part of a profile: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AnySet(Section):
    """A question set; the seed draws its three parts, of these sizes."""

    name: Name
    seed: int = 0
    distill: Count = 2000
    dev: Count = 500
    test: Count = 500


def derived_seed(world: str, draw: int, file: str = "claims") -> int:
    """The seed of a world that is measured by rules: a hash of theirs in a file of the assets, as
    parsed, so that who writes them cannot know the world, and who changes them gets another."""
    # Not by `asset()`: no stage depends on the rules but through the seed in its settings.
    rules = yaml.safe_load((ASSETS / f"{file}.yaml").read_text("utf8"))
    text = json.dumps([rules, world, draw], sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10**8


class WorldSet(AnySet):
    """A question set of an embedded world. Its three parts share no entity."""

    source: Literal["world"]
    world: Literal["almanac", "trivia"]
    seed: int  # of the world too; `rules` and `foretelling` stand for `derived_seed`'s number
    draw: Annotated[int, Field(ge=0)] = 0  # which of these; earlier ones were passed over
    entities: Count = 420
    wordings_per_fact: Annotated[int, Field(ge=1, le=5)] = 2

    @model_validator(mode="before")
    @classmethod
    def seed_follows_from_rules(cls, values: Any) -> Any:
        files = {"rules": "claims", "foretelling": "foretelling"}
        if isinstance(values, dict) and (file := files.get(str(values.get("seed")))):
            drawn = derived_seed(values.get("world", ""), values.get("draw", 0), file)
            return values | {"seed": drawn}
        return values


class FileSet(AnySet):
    """A DPR-format TSV of passages and a file of questions; paths start from the profile."""

    source: Literal["files"]
    passages: Place
    questions: Place


class HubTable(Section):
    """A table of the hub, or of a folder in its layout: parquet or JSONL, named splits."""

    dataset: Place
    config: str | None = None
    files: str | None = None  # a pattern of those to read; {split} stands for the split
    revision: str = "main"  # pin a commit
    licence: str = "not stated"  # for the data card
    columns: dict[str, str] = {}  # our names for columns to the table's own
    rows: dict[str, Count] = {}  # that each split must have


class HubSet(AnySet):
    """Questions of a table of the hub, with passages of another one or of their own pools."""

    source: Literal["hub"]
    questions: HubTable
    train: str = "train"  # the split that `distill` and `dev` come from
    heldout: str = "validation"  # that of `test`; it may be the same
    passages: HubTable | Place | None = None  # `id`, `text` and `title`; a text: a DPR-format TSV
    passage_split: str = "train"
    pools: tuple[str, ...] = Field(default=(), strict=False)  # columns of lists of passages

    @model_validator(mode="after")
    def passages_come_from_one_place(self) -> "HubSet":
        if (self.passages is None) == (not self.pools):
            raise ValueError("give either 'passages' (a table or a path) or 'pools' (columns)")
        return self


QuestionSet = WorldSet | FileSet | HubSet
Sets = Annotated[
    tuple[Annotated[QuestionSet, Field(discriminator="source")], ...],
    Field(min_length=1, strict=False),
    AfterValidator(different),
]


class RetrieverSettings(Section):
    """The retriever, and how it is trained where it is the embedded one."""

    model: Place = "embedded"  # trained here by random cropping; or a folder or hub name
    revision: str = "main"  # of a hub model: pin a commit
    normalise: bool | None = None  # to unit length; as its folder says; embedded: true
    passage_tokens: Count = 256
    dtype: Precision = "float32"  # of the computations; training keeps float32 weights
    at_once: Count = 128  # texts in one pass: less needs less memory
    vocabulary: Count = 16000  # word pieces that the embedded one learns from real text
    crop_steps: Count = 600
    crop_batch: Count = 64
    crop_rate: Positive = 1e-3


class IndexSettings(Section):
    """How passages are searched; what an approximate index finds is scored again exactly."""

    factory: Annotated[str, Field(min_length=1)] = "Flat"  # of faiss.index_factory
    dtype: Literal["float32", "float16"] = "float32"  # of the vectors kept on disk
    shard: Count = 100_000  # passages encoded at a time
    trained_on: Count = 650_000  # vectors that the index learns from: 39 a cell or more
    probes: Count = 64  # cells searched for a query
    candidates: Count = 400  # scored again


class ReaderSettings(Section):
    """A reader, and from `steps` on Step 1, its fine-tuning."""

    model: Place = "embedded"  # or a folder, a GGUF file (unpacked to `dtype`), a hub name
    revision: str = "main"  # of a hub model: pin a commit
    context: Count = 1024
    dtype: Precision = "float32"  # of the computations; Step 1 keeps float32 weights
    at_once: Count = 16  # prompts in one pass: less needs less memory
    gradient_checkpointing: bool = False  # Step 1 computes activations twice, to keep fewer
    lora_rank: Annotated[int, Field(ge=0)] = 0  # of Step 1's adapters; 0 trains every weight
    answer_tokens: Count | None = 8  # null: as many as the set's own answers need
    layout: Literal["passages first", "question first"] = "passages first"
    chat: bool = False  # asked in a user's turn of its own chat template, as instruct models learn
    # Of several, the answer that attention, losses and Step 1 use: the first, or that which stands
    # in most of the passages found (`corpus.found_first`).
    answer: Literal["first", "found"] = "first"
    steps: Count = 800
    batch: Count = 8
    rate: Positive = 1e-3  # at its peak, of all weights; adapters learn at ten times of it
    gold_share: Share = 0.8
    label_noise: Share = 0.0  # of the draws of Step 1: the answer of another question
    wrong_passages: Share = 0.0  # of the draws: the passages of another question
    checkpoints: Annotated[int, Field(ge=0, le=10)] = 5  # readers kept at steps/2, steps/4, ...

    @property
    def peak(self) -> float:
        """The peak rate of what learns. Source: Schulman et al. (2025), 'LoRA Without Regret'."""
        return self.rate * (10.0 if self.lora_rank else 1.0)

    @property
    def kept_steps(self) -> list[int]:
        """Steps of Step 1 after which the reader is kept, in order."""
        return sorted({self.steps // 2**n for n in range(1, self.checkpoints + 1)} - {0})


class AttentionSettings(Section):
    """How rows of attention become passage scores. Our choice: the paper's is not known."""

    rows: Rows = "predicting"
    norm: bool = True
    layers: Layers = "all"
    heads: Literal["all", "chosen"] = "all"  # chosen: on dev, by the answer string, of all layers
    chosen: Count = 4  # so many then
    pooling: Pooling = "sum"
    order: Order = "rank"  # of the passages in the prompt: see `targets.ordered`


class DistillSettings(Section):
    """Step 2: the retriever learns KL(target || retriever) with the target detached."""

    seeds: Seeds = (0, 1, 2)
    questions: Count = 1500
    epochs: Count = 2
    batch: Count = 32
    rate: Positive = 2e-4
    entropy: Within = 0.5  # mean of a target, as a share of log(k): it fixes the temperatures
    standardise: bool = True  # a target's scores within each question, before the temperature
    retriever_temperature: Positive = 0.1
    direction: Literal["target || retriever", "retriever || target"] = "target || retriever"
    side: Literal["query", "both"] = "query"  # both: passages are encoded again


class IndicatorSettings(Section):
    """How the indicators are read from attention; every choice is varied in notebook 08."""

    questions: Count = 200
    share: Within = 0.05  # of a question's passage tokens: the 'closest'
    space: Literal["input", "own", "retriever", "contextual"] = "input"


class EvaluateSettings(Section):
    """How much of the test part is used."""

    answered: Count = 250
    bm25: bool = True  # it needs all passages in memory
    bootstrap: Count = 2000
