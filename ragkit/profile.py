"""Profiles: one validated YAML file says which data, models and settings a run uses."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from ragkit import settings
from ragkit.errors import ProfileError
from ragkit.settings import ASSETS, Count, Name, Section, Seeds, asset

# Not by `asset()`: no result depends on a profile that is not its own.
SHIPPED = {path.stem: path for path in sorted((ASSETS / "profiles").glob("*.yaml"))}
CHOICES = yaml.safe_load(asset("variations.yaml").read_text("utf8"))
VARIATIONS: dict[str, dict[str, Any]] = CHOICES["taken"] | CHOICES["others"]


class Profile(Section):
    """Everything a run depends on."""

    name: Name
    judge: bool = True
    seed: int = 0
    device: settings.Device = "cpu"  # torchrun says how many processes share the work
    threads: Count = 1  # a process: results depend on them, not on the machine's cores
    step1_seeds: Seeds = (0,)  # claims are judged on each; notebooks show the first
    k: Annotated[int, Field(ge=2, le=20)] = 5  # passages a reader gets; 20 candidates are kept
    sets: settings.Sets
    retriever: settings.RetrieverSettings = settings.RetrieverSettings()
    index: settings.IndexSettings = settings.IndexSettings()
    reader: settings.ReaderSettings = settings.ReaderSettings()
    encoder_decoder: settings.ReaderSettings | None = None  # one beside the reader, fine-tuned
    attention: settings.AttentionSettings = settings.AttentionSettings()
    distill: settings.DistillSettings = settings.DistillSettings()
    # Besides attention and perplexity: what both regimes' readers teach by in notebook 07.
    beside: tuple[settings.Beside, ...] = Field(default=("LOOP", "EMDR2"), strict=False)
    # In which notebook 03 compares what readers see; shuffled is the one that it needs.
    orders: tuple[settings.Order, ...] = Field(default=settings.ORDERS, strict=False)
    nouns: settings.Place = "embedded"  # what finds them: or a folder or package of spaCy
    indicators: settings.IndicatorSettings = settings.IndicatorSettings()
    # Those of VARIATIONS that notebook 08 runs Step 2 again for, under the first of its seeds.
    variations: tuple[str, ...] = Field(tuple(CHOICES["taken"]), strict=False, min_length=1)
    evaluate: settings.EvaluateSettings = settings.EvaluateSettings()

    @model_validator(mode="after")
    def choices_can_be_taken(self) -> "Profile":
        if unknown := [name for name in self.variations if name not in VARIATIONS]:
            raise ValueError(f"no variation {unknown[0]!r}; there are {', '.join(VARIATIONS)}")
        return self


def varied(profile: Profile, name: str) -> Profile:
    """A profile with one of VARIATIONS made."""
    ((key, new),) = VARIATIONS[name].items()
    made = getattr(profile, key).model_copy(update=new) if isinstance(new, dict) else new
    return profile.model_copy(update={key: made})


def load_profile(name_or_path: str, changes: Sequence[str] = ()) -> Profile:
    """Reads and validates one of SHIPPED or a YAML file, with changes such as `reader.batch=4`.
    Relative paths start from the file's folder. Raises ProfileError that names file and key."""
    path = SHIPPED.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        near = [f" Did you mean {one!r}?" for one in get_close_matches(name_or_path, SHIPPED, 1)]
        known = f"give one of {', '.join(SHIPPED)} or a path to a YAML file."
        raise ProfileError(f"No profile {name_or_path!r}: {known}{''.join(near)}")
    try:
        values = yaml.safe_load(path.read_text("utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"Profile {path}: not valid YAML in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"Profile {path}: expected keys with values, such as 'name: mine'.")
    for change in changes:
        _change(values, change)
    folder = Path.cwd() if name_or_path in SHIPPED else path.resolve().parent
    try:
        return Profile.model_validate(values, context=folder)
    except ValidationError as error:
        lines = [_explained(e["loc"], e["msg"], e["type"]) for e in error.errors()]
        raise ProfileError("\n".join([f"Profile {name_or_path}:", *lines])) from None


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as YAML; `load_profile` reads the same again."""
    values = profile.model_dump(mode="json")
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf8")


def _change(values: dict[str, Any], change: str) -> None:
    """Makes one change of unchecked values: `reader.model=path`, `sets.0.distill=20`."""
    place: Any = values
    try:
        keys, text = change.split("=", 1)
        *path, last = (int(key) if key.isdigit() else key for key in keys.strip().split("."))
        for key in path:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
        place[last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError):
        told = "Write key=value, such as reader.batch=4 or, for the first set, sets.0.distill=20."
        raise ProfileError(f"{change!r} is no change of this profile. {told}") from None


def _explained(location: tuple[int | str, ...], message: str, kind: str) -> str:
    """One validation problem as a sentence that names the key."""
    key = ".".join(str(part) for part in location) or "(the whole file)"
    if kind != "extra_forbidden":
        hint = " (YAML reads 1e-4 as a text; write 1.0e-4)" if kind == "float_type" else ""
        return f"  {key}: {message.removeprefix('Value error, ')}{hint}"
    sections = [Profile.model_json_schema(), *Profile.model_json_schema()["$defs"].values()]
    known = {name for section in sections for name in section["properties"]} - {location[-1]}
    near = get_close_matches(str(location[-1]), known, 1)
    return f"  {key}: unknown key." + (f" The nearest valid key is {near[0]!r}." if near else "")
