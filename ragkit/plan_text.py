"""A plan as plain text for people, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ragkit.advice import advice, disk_advice
from ragkit.arithmetic import SHARE_OF_PEAK, Operations
from ragkit.hardware import USABLE
from ragkit.plan import Ground, Needs, Plan
from ragkit.sizes import SetSize, known

WIDE = 100
KINDS = {
    "corpus": "passages and questions",
    "retriever": "the first retriever",
    "vectors": "a vector of every passage",
    "index": "what searches them",
    "candidates": "the first passages of every question",
    "nouns": "nouns of the questions",
    "step1": "Step 1: the reader learns to answer",
    "teacher": "a reader looks at all questions",
    "loop": "LOOP: each passage left out",
    "step2": "Step 2: the retriever learns",
    "tokens": "attention on every token",
    "contextual": "closeness in hidden states",
    "answers": "answers to the test questions",
    "notebooks": "notebooks 00 to 09, once all is made",
}
NETWORK = 10e6  # bytes a second
BUSY = 0.7  # load of a core from which a run takes noticeably longer


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 9.95e9 else f"{size / 1e9:.0f}"


def wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, WIDE, initial_indent=indent, subsequent_indent=indent)


def misses_gpu(plan: Plan) -> bool:
    """Whether the profile asks for a GPU that is not here."""
    return plan.profile.machine.device == "cuda" and plan.machine.device == "cpu"


def note_lines(plan: Plan) -> Iterator[str]:
    """What the table does not say of itself."""
    if misses_gpu(plan):
        yield "  (fits: not judged, for there is no GPU here)"
    if not any(need.stage.kind == "nouns" for need in plan.needs):
        yield wrapped(f"Indicator 2 is not among it: there is no noun finder for these questions here (nouns.model is {plan.profile.nouns.model!r}).")


def machine_lines(plan: Plan) -> Iterator[str]:
    """What is here, and what the profile asks for."""
    machine = plan.machine
    yield f"This machine: {machine.cores} cores, {gigabytes(machine.memory)} GB of memory, {machine.name}" + (
        f" ({gigabytes(machine.gpu_memory)} GB)" if machine.gpu_memory else ""
    )
    if machine.load > BUSY * machine.cores:
        yield wrapped(f"It is busy now ({machine.load:.0f} processes want its cores); the times below are those of a quiet machine.", "")
    if plan.profile.machine.device == "cuda" and 0 < machine.gpus < plan.profile.machine.processes:
        yield wrapped(f"The profile asks for {plan.profile.machine.processes} of them (machine.processes), and there are {machine.gpus}.", "")
    if misses_gpu(plan):
        yield wrapped(
            "The profile asks for a GPU (machine.device), and there is none here. Memory is what that GPU would need; times are those of this "
            "processor, far longer than a GPU's. Make the plan again where the GPU is.",
            "",
        )


def download_lines(plan: Plan) -> Iterator[str]:
    """What is fetched, and how large it is where that is known."""
    yield "To fetch:"
    if not plan.downloads:
        yield "  nothing: everything is here already."
        return
    for one in plan.downloads:
        yield f"  {'unknown' if one.gb is None else f'{one.gb:.2f} GB':>9}  {one.what}"
    size = sum((one.gb or 0) * 1e9 for one in plan.downloads)
    unknown = sum(one.gb is None for one in plan.downloads)
    yield wrapped(
        f"{'At least ' if unknown else ''}{gigabytes(size)} GB in all; at 10 MB a second {duration(size / NETWORK)}."
        + (f" For {unknown} of them no size is known here: look at its page at the hub." if unknown else "")
    )


def set_lines(name: str, size: SetSize) -> Iterator[str]:
    """A set's size, and what of it is assumed."""
    asked = ", ".join(f"{count:,} {part}" for part, count in size.questions.items())
    yield f"  {name}: {size.passages:,} passages of about {size.passage_words:.0f} words; questions: {asked}"
    if size.assumed:
        yield wrapped(f"assumed: {'; '.join(size.assumed)}", "    ")


def table_lines(plan: Plan) -> Iterator[str]:
    """A row a kind of stage."""
    device = "GPU" if plan.profile.machine.device == "cuda" else "models"
    yield f"  {'stage':10} {'what':37} {'number':>6} {'time':>9} {device:>7} {'memory':>7} {'disk':>7}  fits"
    yield f"  {'':10} {'':37} {'':>6} {'':>9} {'GB':>7} {'GB':>7} {'GB':>7}"
    for kind, what in KINDS.items():
        needs = [need for need in plan.needs if need.stage.kind == kind]
        if needs:
            yield row(plan, kind, what, needs)


def row(plan: Plan, kind: str, what: str, needs: list[Needs]) -> str:
    fits = [plan.fits(need) for need in needs]
    said = "?" if None in fits else "yes" if all(fits) else "NO"
    device, host = (max(getattr(need, part) for need in needs) for part in ("device", "host"))
    time, disk = duration(sum(need.seconds for need in needs)), gigabytes(sum(need.disk for need in needs))
    return f"  {kind:10} {what:37} {len(needs):>6} {time:>9} {gigabytes(device):>7} {gigabytes(host):>7} {disk:>7}  {said}"


def gpu_lines(ground: Ground, plan: Plan) -> Iterator[str]:
    """What GPUs that are not here would need, by arithmetic: the operations of all models over a share of their peak, and all else as it is here."""
    operations = {name: Operations(ground.profile, size, ground.reader, ground.retriever).by_unit() for name, size in ground.sizes.items()}
    computed, beside = 0.0, 0.0
    for need in plan.needs:
        mine = operations.get(need.stage.set_name, {})
        computed += sum(amount * mine.get(unit, 0) for unit, amount in need.stage.units.items())
        costs = plan.costs.get(need.stage.set_name or plan.profile.sets[0].name, {})
        beside += sum(amount * costs.get(unit, 0) for unit, amount in need.stage.units.items() if unit not in mine)
    largest = max(need.device for need in plan.needs) / USABLE
    yield f"On a GPU, by arithmetic alone ({SHARE_OF_PEAK:.0%} of its peak, {computed / 1e15:,.0f} PFLOP; {duration(beside)} beside the models as here):"
    for name, card in known()["gpus"].items():
        took = computed / plan.profile.machine.processes / (card["tflops"] * 1e12 * SHARE_OF_PEAK) + beside
        yield f"  {name:20} {duration(took):>10}   memory {'suffices' if largest <= card['gb'] * 1e9 else 'does NOT suffice'}"


def units_lines(plan: Plan) -> Iterator[str]:
    """What the time was reckoned from: all units of work, and what one cost here."""
    total: dict[str, float] = {}
    cost: dict[str, float] = {}
    for need in plan.needs:
        mine = plan.costs.get(need.stage.set_name or plan.profile.sets[0].name, {})
        for unit, amount in need.stage.units.items():
            total[unit] = total.get(unit, 0) + amount
            cost[unit] = cost.get(unit, 0) + amount * mine.get(unit, 0)
    for unit, amount in total.items():
        if amount:
            yield f"  {amount:>13,.0f} {unit:26} {1e3 * cost[unit] / amount:>11,.3f} ms each {duration(cost[unit]):>10}"


def text(ground: Ground, plan: Plan) -> str:
    """The whole plan."""
    profile, machine = plan.profile, plan.machine
    lines = [f"Plan of profile {profile.name}. Nothing is fetched or trained to make it.", "", *machine_lines(plan), ""]
    lines += ["Sets:", *(line for name, size in ground.sizes.items() for line in set_lines(name, size)), ""]
    lines += [*download_lines(plan), "", "To do:", *table_lines(plan), *note_lines(plan), ""]
    beside = f"{plan.side_by_side} sets side by side" if plan.side_by_side > 1 else f"{profile.machine.processes} at a time"
    lines.append(f"Time:   {duration(plan.wall)} from beginning to end ({duration(plan.seconds_of_work)} of work, {beside}).")
    room = plan.disk <= machine.free_disk
    lines.append(f"Disk:   {gigabytes(plan.disk)} GB with what is fetched, {gigabytes(machine.free_disk)} GB free: {'fits' if room else 'does NOT fit'}.")
    short = {need.stage.kind for need in plan.needs if plan.fits(need) is False}
    if misses_gpu(plan):
        lines.append(f"Memory: a GPU of {gigabytes(max(need.device for need in plan.needs) / USABLE)} GB or more is needed.")
    else:
        usable = gigabytes(machine.gpu_memory_for_run or machine.memory_for_run)
        lines.append(f"Memory: {'does NOT suffice for ' + ', '.join(k for k in KINDS if k in short) if short else 'suffices'} ({usable} GB usable).")
    if misses_gpu(plan):
        lines += ["", *gpu_lines(ground, plan)]
    helping = [("disk", [*disk_advice(ground, plan)])] if not room else []
    helping += [(kind, [*advice(ground, plan, kind)]) for kind in KINDS if kind in short]
    if helping:
        lines += ["", 'What would help (one setting of the profile at a time; try it with SET="key=value"):']
        lines += [f"  {kind:10} {one}" for kind, found in helping for one in found or ["nothing that this plan knows: fewer passages, or a smaller model"]]
    lines += ["", "How the time was reckoned (a unit's cost was measured here; other work on the machine adds to it):", *units_lines(plan)]
    return "\n".join(lines) + "\n"
