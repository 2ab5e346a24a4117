"""Profiles: one validated YAML file says which data, models and settings a run uses."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ragkit import settings
from ragkit.errors import ProfileError
from ragkit.settings import ASSETS, Count, Name, Section, Seeds

# Not by `asset()`: no result depends on a profile that is not its own.
SHIPPED = {path.stem: path for path in sorted((ASSETS / "profiles").glob("*.yaml"))}
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
TAKEN = (
    *("rows: predicting", "rows: consuming", "no value norm", "mean over tokens"),
    *("sharper target", "flatter target", "reverse KL"),
)


class ChoiceSettings(Section):
    """Which of VARIATIONS notebook 08 runs Step 2 again for, under the first of `distill.seeds`."""

    variations: tuple[str, ...] = Field(default=TAKEN, strict=False)

    @field_validator("variations")
    @classmethod
    def variations_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in VARIATIONS]:
            raise ValueError(f"no variation {unknown[0]!r}; there are {', '.join(VARIATIONS)}")
        return names


class Profile(Section):
    """Everything a run depends on."""

    name: Name
    judge: bool = True
    seed: int = 0
    threads: Count = 1  # a process: results depend on them, not on the machine's cores
    step1_seeds: Seeds = (0,)  # claims are judged on each; notebooks show the first
    k: Annotated[int, Field(ge=2, le=20)] = 5  # passages a reader gets; 20 candidates are kept
    sets: settings.Sets
    machine: settings.MachineSettings = settings.MachineSettings()
    retriever: settings.RetrieverSettings = settings.RetrieverSettings()
    index: settings.IndexSettings = settings.IndexSettings()
    reader: settings.ReaderSettings = settings.ReaderSettings()
    attention: settings.AttentionSettings = settings.AttentionSettings()
    distill: settings.DistillSettings = settings.DistillSettings()
    index_refreshes: Annotated[int, Field(ge=0)] = 0  # within Step 2: new candidates, a new look
    nouns: settings.NounSettings = settings.NounSettings()
    indicators: settings.IndicatorSettings = settings.IndicatorSettings()
    choices: ChoiceSettings = ChoiceSettings()
    evaluate: settings.EvaluateSettings = settings.EvaluateSettings()

    @model_validator(mode="after")
    def step_2_has_enough_epochs(self) -> "Profile":
        if self.index_refreshes >= self.distill.epochs:
            raise ValueError(
                f"index_refreshes: {self.index_refreshes} parts Step 2 into more pieces than "
                f"distill.epochs ({self.distill.epochs})"
            )
        return self


def varied(profile: Profile, name: str) -> Profile:
    """A profile with one of VARIATIONS made."""
    changes = {
        key: getattr(profile, key).model_copy(update=new) if isinstance(new, dict) else new
        for key, new in VARIATIONS[name].items()
    }
    return profile.model_copy(update=changes)


def load_profile(name_or_path: str, changes: Sequence[str] = ()) -> Profile:
    """Reads and validates one of SHIPPED or a YAML file, with changes such as `reader.batch=4`.

    Relative paths start from the file's folder. Raises ProfileError that names file and key.
    """
    path = SHIPPED.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, SHIPPED, 1)
        raise ProfileError(
            f"No profile {name_or_path!r}: give one of {', '.join(SHIPPED)} or a path to a YAML "
            "file." + (f" Did you mean {near[0]!r}?" if near else "")
        )
    try:
        values = yaml.safe_load(path.read_text("utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"Profile {path}: not valid YAML in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"Profile {path}: expected keys with values, such as 'name: mine'.")
    for change in changes:
        _change(values, change)
    if changes or name_or_path not in SHIPPED:
        values = _located(values, Path.cwd() if name_or_path in SHIPPED else path.resolve().parent)
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        lines = [_explained(e["loc"], e["msg"], e["type"]) for e in error.errors()]
        raise ProfileError("\n".join([f"Profile {name_or_path}:", *lines])) from None


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as YAML; `load_profile` reads the same again."""
    values = profile.model_dump(mode="json")
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf8")


def _change(values: dict[str, Any], change: str) -> None:
    """Makes one change of unchecked values: `reader.model=path`, `sets.0.distill=20`."""
    key, equals, text = change.partition("=")
    *path, last = key.strip().split(".")
    place: Any = values
    try:
        if not equals:
            raise ValueError
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError):
        raise ProfileError(
            f"{change!r} is no change of this profile. Write key=value, such as reader.batch=4 or, "
            "for sets are counted from 0, sets.0.distill=20."
        ) from None


def _located(value: Any, folder: Path) -> Any:
    """Unchecked values with absolute paths; a model that is no folder there stays a hub name."""
    if isinstance(value, list):
        return [_located(one, folder) for one in value]
    if not isinstance(value, dict):
        return value
    made = {}
    for key, one in value.items():
        is_path = isinstance(one, str) and (
            key in ("passages", "questions")
            or (key in ("model", "dataset") and one != "embedded" and (folder / one).is_dir())
        )
        made[key] = str(folder / one) if is_path else _located(one, folder)
    return made


def _explained(location: tuple[int | str, ...], message: str, kind: str) -> str:
    """One validation problem as a sentence that names the key."""
    key = ".".join(str(part) for part in location) or "(the whole file)"
    if kind != "extra_forbidden":
        return f"  {key}: {message.removeprefix('Value error, ')}"
    known = {name for section in Section.__subclasses__() for name in section.model_fields}
    near = difflib.get_close_matches(str(location[-1]), known, 1)
    return f"  {key}: unknown key." + (f" The nearest valid key is {near[0]!r}." if near else "")
