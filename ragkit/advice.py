"""What helps where a plan does not fit: settings that lessen a need, each tried on the plan itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ragkit.plan import Ground, Needs, Plan
from ragkit.profile import HubSet, Profile


@dataclass(frozen=True)
class Knob:
    """A setting that lessens what some kinds of stage need; `turn` gives the profile with it, or None where it is turned already."""

    said: str
    kinds: tuple[str, ...]
    turn: Callable[[Profile], Profile | None]


READING = ("teacher", "loop", "tokens", "contextual", "answers", "notebooks")


def setting(section: str, key: str, value: Any) -> Callable[[Profile], Profile | None]:
    """Turns one key to a value."""

    def turn(profile: Profile) -> Profile | None:
        part = getattr(profile, section)
        return None if getattr(part, key) == value else profile.model_copy(update={section: part.model_copy(update={key: value})})

    return turn


def less(section: str, key: str, share: int = 4) -> Callable[[Profile], Profile | None]:
    """Turns one key to a fraction of what it is."""

    def turn(profile: Profile) -> Profile | None:
        now = getattr(getattr(profile, section), key)
        return setting(section, key, max(1, now // share))(profile)

    return turn


KNOBS = (
    Knob("reader.gradient_checkpointing: true", ("step1",), setting("reader", "gradient_checkpointing", True)),
    Knob("a quarter of reader.at_once", ("step1", *READING), less("reader", "at_once")),
    Knob("reader.dtype: bfloat16", ("step1", *READING), setting("reader", "dtype", "bfloat16")),
    Knob("reader.shard: true", ("step1",), lambda profile: setting("reader", "shard", True)(profile) if profile.machine.processes > 1 else None),
    Knob("reader.lora_rank: 16", ("step1",), lambda profile: None if profile.reader.shard else setting("reader", "lora_rank", 16)(profile)),
    Knob("a quarter of retriever.at_once", ("vectors", "candidates", "step2"), less("retriever", "at_once")),
    Knob("a quarter of distill.batch", ("step2",), less("distill", "batch")),
    Knob("a quarter of index.shard", ("vectors",), less("index", "shard")),
    Knob("index.kind: ivfpq", ("index", "candidates", "step2"), setting("index", "kind", "ivfpq")),
    Knob("half of index.code_bytes", ("index", "candidates", "step2"), less("index", "code_bytes", 2)),
    Knob("evaluate.bm25: false", ("answers", "notebooks"), setting("evaluate", "bm25", False)),
)


def most_of(needs: list[Needs], kind: str) -> tuple[float, float]:
    """The largest device and host memory among the stages of a kind."""
    return tuple(max((getattr(need, part) for need in needs if need.stage.kind == kind), default=0.0) for part in ("device", "host"))  # type: ignore[return-value]


def advice(ground: Ground, plan: Plan, kind: str) -> Iterator[str]:
    """For a kind of stage that does not fit: each knob that lessens what it needs, by how much, and whether that is enough; else all of them together."""
    before, helpful, together, enough = sum(most_of(plan.needs, kind)), [], plan.profile, False

    def tried(profile: Profile) -> tuple[float, bool]:
        needs = ground.changed(profile).needs({})
        other = replace(plan, profile=profile, needs=needs)
        return sum(most_of(needs, kind)), all(other.fits(need) for need in needs if need.stage.kind == kind)

    for knob in KNOBS:
        if kind not in knob.kinds or (changed := knob.turn(plan.profile)) is None:
            continue
        after, fits = tried(changed)
        if after < 0.97 * before:
            yield said(knob.said, after, fits)
            helpful.append(knob)
            enough, together = enough or fits, knob.turn(together) or together
    if len(helpful) > 1 and not enough:
        yield said("all of these together", *tried(together))


def said(what: str, needed: float, fits: bool) -> str:
    return f"{what}: {needed / 1e9:.1f} GB" + (", which fits" if fits else "")


def disk_advice(ground: Ground, plan: Plan) -> Iterator[str]:
    """Where the disk does not suffice: settings that need less of it, and how many passages would fit."""
    profile, room = plan.profile, plan.machine.free_disk
    shrinking = {
        "index.dtype: float16": setting("index", "dtype", "float16"),
        "index.kind: ivfpq": setting("index", "kind", "ivfpq") if profile.index.kind == "hnsw" else None,
        "reader.checkpoints: 1": setting("reader", "checkpoints", 1),
    }
    for what, turn in shrinking.items():
        if turn and (changed := turn(profile)):
            after = plan.disk - sum(need.disk for need in plan.needs) + sum(need.disk for need in ground.changed(changed).needs({}))
            if after < 0.97 * plan.disk:
                yield said(what, after, after <= room)
    limited = [settings.name for settings in profile.sets if isinstance(settings, HubSet) and settings.passages is not None]
    passages = sum(ground.sizes[name].passages for name in limited)
    growing = sum(need.disk for need in plan.needs if need.stage.set_name in limited and need.stage.kind in ("corpus", "vectors", "index"))
    if growing > plan.disk - room:
        yield f"most_passages: {passages * (1 - (plan.disk - room) / growing) / len(limited) / 1e6:.1f} million in each set, which fits"
    yield f"another disk with {plan.disk / 1e9:.0f} GB free, by --runs"
