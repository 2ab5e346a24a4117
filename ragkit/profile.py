"""Profiles: one validated YAML file says which data, models and settings a run uses."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ragkit import RagkitError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ProfileError(RagkitError):
    """The profile cannot be used; the message names the file and the key."""


class Section(BaseModel):
    """Part of a profile: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WorldSet(Section):
    """A question set of an embedded world. Entities are split so that the three parts share none."""

    source: Literal["world"]
    name: str
    world: Literal["almanac", "trivia"]
    seed: int
    entities: Count = 252
    wordings_per_fact: Annotated[int, Field(ge=1, le=5)] = 2
    distill: Count = 2000
    dev: Count = 500
    test: Count = 500


class FileSet(Section):
    """A question set on real text: a DPR-format TSV of passages and JSONL questions (`question`, `answer`)."""

    source: Literal["files"]
    name: str
    passages: str
    questions: str
    seed: int = 0
    distill: Count = 200
    dev: Count = 100
    test: Count = 200


class RetrieverSettings(Section):
    """`model` is `embedded` (trained here by random cropping, Contriever's recipe) or a folder or hub name."""

    model: str = "embedded"
    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True  # unit vectors; Contriever's own score is the plain dot product: false
    passage_tokens: Count = 256
    crop_steps: Count = 800
    crop_batch: Count = 64
    crop_rate: Positive = 1e-3


class ReaderSettings(Section):
    """`model` is `embedded`, a folder or a hub name; the rest is Step 1, the fine-tuning on questions."""

    model: str = "embedded"
    context: Count = 1024
    answer_tokens: Count = 8
    steps: Count = 300
    batch: Count = 16
    rate: Positive = 1e-3
    gold_share: Share = 0.8


class AttentionSettings(Section):
    """How rows of attention become passage scores. Defaults are our choice: the paper's are not known to us."""

    rows: Literal["last_prompt", "predicting", "consuming"] = "last_prompt"
    norm: bool = True
    pooling: Literal["sum", "mean"] = "sum"


class DistillSettings(Section):
    """Step 2: the retriever learns KL(target || retriever) with the target detached."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, strict=False)
    questions: Count = 1000
    epochs: Count = 3
    batch: Count = 32
    rate: Positive = 5e-4
    entropy: Share = 0.5  # mean entropy of every non-uniform target, as a share of log(k): it fixes each temperature
    retriever_temperature: Positive = 0.05


class EvaluateSettings(Section):
    """How much of the test part is used."""

    answered: Count = 250
    bootstrap: Count = 2000


class Profile(Section):
    """Everything a run depends on."""

    name: str
    judge: bool = True
    seed: int = 0
    k: Annotated[int, Field(ge=2)] = 5
    sets: tuple[Annotated[WorldSet | FileSet, Field(discriminator="source")], ...] = Field(min_length=1, strict=False)
    retriever: RetrieverSettings = RetrieverSettings()
    reader: ReaderSettings = ReaderSettings()
    attention: AttentionSettings = AttentionSettings()
    distill: DistillSettings = DistillSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def set_names_differ(self) -> Profile:
        names = [s.name for s in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"sets: two sets share a name: {names}")
        return self


def shipped() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("ragkit").joinpath("assets/profiles").iterdir())


def known_keys() -> set[str]:
    """Every key a profile may hold, at any depth."""
    sections: list[type[BaseModel]] = [Profile, WorldSet, FileSet, RetrieverSettings, ReaderSettings, AttentionSettings, DistillSettings, EvaluateSettings]
    return {key for section in sections for key in section.model_fields}


def load_profile(name_or_path: str) -> Profile:
    """Reads and validates a profile: one of `shipped()` or a path to a YAML file.

    Raises ProfileError naming the file, the key, and for unknown keys the nearest valid one.
    """
    if name_or_path in shipped():
        text = resources.files("ragkit").joinpath(f"assets/profiles/{name_or_path}.yaml").read_text("utf8")
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text("utf8")
    else:
        near = difflib.get_close_matches(name_or_path, shipped(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ProfileError(f"No profile {name_or_path!r}: give one of {', '.join(shipped())} or a path to a YAML file.{hint}")
    try:
        return Profile.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ProfileError(f"Profile {name_or_path}: not valid YAML: {error}") from error
    except ValidationError as error:
        raise ProfileError(f"Profile {name_or_path}:\n" + "\n".join(explain(e["loc"], e["msg"], e["type"]) for e in error.errors())) from None


def explain(location: tuple[int | str, ...], message: str, kind: str) -> str:
    """One validation problem as a sentence that names the key."""
    key = ".".join(str(part) for part in location) or "(the whole file)"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), known_keys(), 1)
        return f"  {key}: unknown key." + (f" The nearest valid key is {near[0]!r}." if near else "")
    return f"  {key}: {message}"
