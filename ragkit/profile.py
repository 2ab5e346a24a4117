"""Profiles: one validated YAML file says which data, models and settings a run uses."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ragkit.errors import ProfileError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["float32", "bfloat16", "float16"]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # it becomes a folder's name


class Section(BaseModel):
    """Part of a profile: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class WorldSet(Section):
    """A question set of an embedded world. Entities are split so that the three parts share none."""

    source: Literal["world"]
    name: Name
    world: Literal["almanac", "trivia"]
    seed: int
    entities: Count = 252
    wordings_per_fact: Annotated[int, Field(ge=1, le=5)] = 2
    distill: Count = 2000
    dev: Count = 500
    test: Count = 500


class FileSet(Section):
    """A question set on real text: a DPR-format TSV of passages and JSONL questions (`question`, `answer`).

    Relative paths start from the profile's own folder, as do those of models.
    """

    source: Literal["files"]
    name: Name
    passages: str
    questions: str
    seed: int = 0
    distill: Count = 200
    dev: Count = 100
    test: Count = 200


class HubTable(Section):
    """A table of the hub, or of a folder in the hub's layout: parquet or JSONL files, named splits.

    `columns` says which of its columns hold what we ask for, `rows` how many rows each split must have (checked after
    loading), `licence` goes into the data card. Pin `revision` to a commit, so that a run means the same next year.
    """

    dataset: Annotated[str, Field(min_length=1)]
    config: str | None = None
    files: str | None = (
        None  # read these files of it (a pattern; {split} stands for the split), as where it holds a loading script
    )
    revision: str = "main"
    licence: str = "not stated"
    columns: dict[str, str] = {}
    rows: dict[str, Count] = {}


class HubSet(Section):
    """A question set of the hub.

    `distill` and `dev` are drawn from the split `train` by the seed, `test` from the split `heldout` (which may be the same: no question
    is drawn twice). Passages come from a
    table (column names `id`, `text`, `title` unless `columns` says otherwise), from a DPR-format TSV (its path), or from
    the questions' own candidate pools: columns of the question table that hold lists of passages.
    """

    source: Literal["hub"]
    name: Name
    questions: HubTable
    train: str = "train"
    heldout: str = "validation"
    passages: HubTable | str | None = None
    passage_split: str = "train"
    pools: tuple[str, ...] = Field(default=(), strict=False)
    most_passages: Count | None = (
        None  # of the table or file, drawn by the seed; all of them by default
    )
    seed: int = 0
    distill: Count = 2000
    dev: Count = 500
    test: Count = 500

    @model_validator(mode="after")
    def passages_come_from_one_place(self) -> HubSet:
        if (self.passages is None) == (not self.pools):
            raise ValueError(
                "give either 'passages' (a table, or the path of a DPR-format TSV) or 'pools' (columns of the questions)"
            )
        return self


QuestionSet = WorldSet | FileSet | HubSet


class RetrieverSettings(Section):
    """`model` is `embedded` (trained here by random cropping, Contriever's recipe) or a folder or hub name."""

    model: str = "embedded"
    revision: str = "main"  # of a hub model: pin a commit, so that a run means the same next year
    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True  # unit vectors; Contriever's own score is the plain dot product: false
    passage_tokens: Count = 256
    dtype: Precision = (
        "float32"  # of the encoding; training keeps float32 weights and computes in this
    )
    at_once: Count = 128  # texts in one pass: less needs less memory and changes no result
    crop_steps: Count = 800
    crop_batch: Count = 64
    crop_rate: Positive = 1e-3


class IndexSettings(Section):
    """How passages are searched: exactly, or by an approximate index whose best `candidates` are scored again exactly."""

    kind: Literal["exact", "ivfpq", "hnsw"] = "exact"
    dtype: Literal["float32", "float16"] = "float32"  # of the vectors kept on disk
    shard: Count = 100_000  # passages encoded, added and written at a time
    trained_on: Count = (
        650_000  # vectors that the quantiser of ivfpq learns from: 39 a list or more
    )
    lists: Count = 16_384  # cells of ivfpq; for 21 million passages, fewer for fewer (1 to 4 times the root of their number)
    probes: Count = 64  # cells of ivfpq searched for a query
    code_bytes: Count = 64  # of a vector in ivfpq
    links: Count = 32  # of a vector in hnsw
    effort: Count = 200  # vectors kept in view by hnsw while it builds and searches
    candidates: Count = 400  # found by the approximate index, then scored exactly


class ReaderSettings(Section):
    """`model` is `embedded`, a folder or a hub name; the rest is Step 1, the fine-tuning on questions."""

    model: str = "embedded"
    revision: str = "main"  # of a hub model
    context: Count = 1024
    dtype: Precision = "float32"  # of the reader's computations; Step 1 keeps float32 weights
    at_once: Count = 16  # prompts in one pass: less needs less memory and changes no result
    gradient_checkpointing: bool = (
        False  # Step 1 computes activations twice instead of keeping them
    )
    lora_rank: Annotated[int, Field(ge=0)] = (
        0  # of the adapters that Step 1 trains (peft); 0 trains every weight
    )
    shard: bool = False  # Step 1 splits weights, gradients and optimizer over the processes (FSDP), for a reader whose training fits no single GPU
    answer_tokens: Count = 8
    order: Literal["passages first", "question first"] = "passages first"
    steps: Count = 800
    batch: Count = 8
    rate: Positive = 1e-3
    gold_share: Share = 0.8
    checkpoints: Annotated[int, Field(ge=0, le=10)] = (
        5  # readers on the way that are judged too: at a half, a quarter... of the steps
    )

    @property
    def kept_steps(self) -> list[int]:
        """Steps of Step 1 after which the reader is kept, in order."""
        return sorted(
            {self.steps // 2**halving for halving in range(1, self.checkpoints + 1)} - {0}
        )


class AttentionSettings(Section):
    """How rows of attention become passage scores. Defaults are our choice: the paper's are not known to us."""

    rows: Literal["last_prompt", "predicting", "consuming"] = "last_prompt"
    norm: bool = True
    layers: Literal["all", "first", "middle", "last"] = "all"
    pooling: Literal["sum", "mean"] = "sum"


class DistillSettings(Section):
    """Step 2: the retriever learns KL(target || retriever) with the target detached."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, strict=False)
    questions: Count = 1500
    epochs: Count = 2
    batch: Count = 32
    rate: Positive = 2e-4
    entropy: Share = 0.5  # mean entropy of every non-uniform target, as a share of log(k): it fixes each temperature
    retriever_temperature: Positive = 0.1
    direction: Literal["target || retriever", "retriever || target"] = (
        "target || retriever"  # of the divergence
    )
    side: Literal["query", "both"] = (
        "query"  # 'both' trains the passages' vectors too and encodes them again
    )


class IndicatorSettings(Section):
    """How the indicators are read from attention; every choice is varied in notebook 08."""

    questions: Count = 200
    share: Annotated[float, Field(gt=0, lt=1)] = (
        0.1  # of a question's passage tokens: the 'closest'
    )
    space: Literal["input", "own", "retriever", "contextual"] = "input"


VARIATIONS: dict[str, dict[str, Any]] = {
    "rows: predicting": {"attention": {"rows": "predicting"}},
    "rows: consuming": {"attention": {"rows": "consuming"}},
    "no value norm": {"attention": {"norm": False}},
    "first layer": {"attention": {"layers": "first"}},
    "middle layer": {"attention": {"layers": "middle"}},
    "last layer": {"attention": {"layers": "last"}},
    "mean over tokens": {"attention": {"pooling": "mean"}},
    "sharper target": {"distill": {"entropy": 0.25}},
    "flatter target": {"distill": {"entropy": 0.75}},
    "reverse KL": {"distill": {"direction": "retriever || target"}},
    "both sides": {"distill": {"side": "both"}},
    "question first": {"reader": {"order": "question first"}},
    "index refresh": {"index_refreshes": 1},
}  # one choice each that the paper leaves open, taken otherwise


class ChoiceSettings(Section):
    """Which choices notebook 08 runs Step 2 again for: names of VARIATIONS, each under the first of `distill.seeds`."""

    variations: tuple[str, ...] = Field(
        default=(
            "rows: predicting",
            "rows: consuming",
            "no value norm",
            "mean over tokens",
            "sharper target",
            "flatter target",
            "reverse KL",
        ),
        strict=False,
    )

    @field_validator("variations")
    @classmethod
    def variations_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in VARIATIONS:
                near = difflib.get_close_matches(name, VARIATIONS, 1)
                raise ValueError(
                    f"no variation {name!r}"
                    + (
                        f"; the nearest is {near[0]!r}"
                        if near
                        else f"; there are {', '.join(VARIATIONS)}"
                    )
                )
        return names


class NounSettings(Section):
    """What finds the nouns of questions: `embedded` (trained here on the embedded worlds, and for them only), or a folder or spaCy package."""

    model: Annotated[str, Field(min_length=1)] = "embedded"


class EvaluateSettings(Section):
    """How much of the test part is used, and whether BM25 stands beside it (it needs all passages in memory)."""

    answered: Count = 250
    bm25: bool = True
    bootstrap: Count = 2000


class MachineSettings(Section):
    """What the run computes on. With one process the sets are worked on side by side, else one after another by all."""

    device: Literal["cpu", "cuda"] = "cpu"
    processes: Count = 1  # that share encoding, scoring and training (Accelerate): one a GPU
    kernel: Literal["auto", "flash", "efficient", "math"] = (
        "auto"  # of scaled_dot_product_attention on a GPU
    )


class Profile(Section):
    """Everything a run depends on."""

    name: Name
    judge: bool = True
    seed: int = 0
    threads: Count = 1  # a process; sets are worked on side by side, and results do not depend on the machine's cores
    step1_seeds: tuple[int, ...] = Field(
        default=(0,), min_length=1, strict=False
    )  # claims are judged on every run; notebooks 02 to 08 show the first
    k: Annotated[int, Field(ge=2, le=20)] = 5  # 20 candidates are kept for each question
    sets: tuple[Annotated[QuestionSet, Field(discriminator="source")], ...] = Field(
        min_length=1, strict=False
    )
    machine: MachineSettings = MachineSettings()
    retriever: RetrieverSettings = RetrieverSettings()
    index: IndexSettings = IndexSettings()
    reader: ReaderSettings = ReaderSettings()
    attention: AttentionSettings = AttentionSettings()
    distill: DistillSettings = DistillSettings()
    index_refreshes: Annotated[int, Field(ge=0)] = (
        0  # times within Step 2 that the retriever looks for new candidates and the reader looks at them
    )
    nouns: NounSettings = NounSettings()
    indicators: IndicatorSettings = IndicatorSettings()
    choices: ChoiceSettings = ChoiceSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def parts_agree(self) -> Profile:
        seeds = (("step1_seeds", self.step1_seeds), ("distill.seeds", self.distill.seeds))
        for key, values in (("sets.name", [s.name for s in self.sets]), *seeds):
            if twice := [value for value, times in Counter(values).items() if times > 1]:
                raise ValueError(f"{key}: {twice[0]!r} stands there twice; each needs its own")
        if self.index_refreshes >= self.distill.epochs:
            raise ValueError(
                f"index_refreshes: {self.index_refreshes} parts Step 2 into more pieces than distill.epochs ({self.distill.epochs})"
            )
        if self.machine.processes > min(self.reader.batch, self.distill.batch):
            raise ValueError(
                f"machine.processes: {self.machine.processes} cannot share a batch of fewer (reader.batch, distill.batch)"
            )
        if self.reader.shard and (
            self.machine.processes < 2 or self.reader.lora_rank or self.reader.dtype == "float16"
        ):
            raise ValueError(
                "reader.shard: needs several machine.processes, every weight trained (reader.lora_rank: 0), and reader.dtype bfloat16 or float32"
            )
        return self

    def twin(self, set_name: str) -> str | None:
        """The first set before this one over the same passages of the hub: one file, one encoding and one index serve both.

        The embedded retriever is trained on a set's passages with its seed; another is the same for all sets.
        """
        sources: dict[str, Any] = {}
        for one in self.sets:
            if (
                isinstance(one, HubSet)
                and one.passages is not None
                and self.retriever.model != "embedded"
            ):
                sources[one.name] = (
                    one.passages,
                    one.passage_split,
                    one.most_passages,
                    one.most_passages and one.seed,
                )
        first = next((name for name in sources if sources[name] == sources.get(set_name)), set_name)
        return None if first == set_name else first


def varied(profile: Profile, name: str) -> Profile:
    """A profile with one of VARIATIONS made."""
    changes = {
        key: getattr(profile, key).model_copy(update=new) if isinstance(new, dict) else new
        for key, new in VARIATIONS[name].items()
    }
    return profile.model_copy(update=changes)


def shipped() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("ragkit").joinpath("assets/profiles").iterdir()
    )


def known_keys() -> set[str]:
    """Every key a profile may hold, at any depth."""
    return {key for section in Section.__subclasses__() for key in section.model_fields}


def load_profile(name_or_path: str, changes: Sequence[str] = ()) -> Profile:
    """Reads and validates a profile: one of `shipped()` or a path to a YAML file, with `changes` such as `reader.batch=4` made.

    Relative paths in a file of the user's own start from that file's folder. Raises ProfileError naming the file, the
    key, and for unknown keys the nearest valid one.
    """
    if name_or_path in shipped():
        text = (
            resources.files("ragkit")
            .joinpath(f"assets/profiles/{name_or_path}.yaml")
            .read_text("utf8")
        )
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text("utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(
                f"Profile {name_or_path} cannot be read as UTF-8 text: {error}"
            ) from None
    else:
        near = difflib.get_close_matches(name_or_path, shipped(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ProfileError(
            f"No profile {name_or_path!r}: give one of {', '.join(shipped())} or a path to a YAML file.{hint}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ProfileError(f"Profile {name_or_path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ProfileError(
            f"Profile {name_or_path}: expected keys with values, such as 'name: mine', found {'nothing' if values is None else type(values).__name__}."
        )
    for change in changes:
        put(values, change)
    try:
        profile = Profile.model_validate(values)
    except ValidationError as error:
        raise ProfileError(
            f"Profile {name_or_path}:\n"
            + "\n".join(explain(e["loc"], e["msg"], e["type"]) for e in error.errors())
        ) from None
    if name_or_path in shipped():
        return with_whole_paths(profile, Path.cwd()) if changes else profile
    return with_whole_paths(profile, Path(name_or_path).resolve().parent)


def put(values: dict[str, Any], change: str) -> None:
    """Sets one value of a profile that is not validated yet: `reader.model=path`, `sets.0.distill=20`; the value is read as YAML."""
    key, equals, text = change.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise ProfileError(
            f"{change!r} is no change of a profile: write key=value, such as reader.batch=4."
        )
    place: Any = values
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError):
        raise ProfileError(
            f"{change!r}: the profile has no place {key.strip()!r}, or the value is no YAML. Sets are counted from 0: sets.0.distill=20."
        ) from None


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as YAML; `load_profile` reads the same again."""
    path.write_text(
        yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf8"
    )


def with_whole_paths(profile: Profile, folder: Path) -> Profile:
    """The profile with its relative paths made absolute; a model that is no folder there stays a hub name."""

    def model(name: str) -> str:
        return str(folder / name) if name != "embedded" and (folder / name).is_dir() else name

    def table(one: HubTable) -> HubTable:
        return one.model_copy(update={"dataset": model(one.dataset)})

    def files(one: QuestionSet) -> QuestionSet:
        if isinstance(one, WorldSet):
            return one
        if isinstance(one, HubSet):
            passages = (
                one.passages
                if one.passages is None
                else table(one.passages)
                if isinstance(one.passages, HubTable)
                else str(folder / one.passages)
            )
            return one.model_copy(update={"questions": table(one.questions), "passages": passages})
        return one.model_copy(
            update={
                "passages": str(folder / one.passages),
                "questions": str(folder / one.questions),
            }
        )

    return profile.model_copy(
        update={
            "sets": tuple(files(one) for one in profile.sets),
            "retriever": profile.retriever.model_copy(
                update={"model": model(profile.retriever.model)}
            ),
            "reader": profile.reader.model_copy(update={"model": model(profile.reader.model)}),
            "nouns": profile.nouns.model_copy(update={"model": model(profile.nouns.model)}),
        }
    )


def explain(location: tuple[int | str, ...], message: str, kind: str) -> str:
    """One validation problem as a sentence that names the key."""
    key = ".".join(str(part) for part in location) or "(the whole file)"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), known_keys(), 1)
        return f"  {key}: unknown key." + (
            f" The nearest valid key is {near[0]!r}." if near else ""
        )
    return f"  {key}: {message}"
