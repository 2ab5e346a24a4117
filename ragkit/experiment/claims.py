"""From what was measured to the ledger: each claim, its rule, a verdict for each set, and why."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from ragkit.distillation.targets import READERS
from ragkit.errors import DataError, NounsError
from ragkit.experiment.analysis import DIFFERENCE, Analysis, Goal
from ragkit.experiment.tables import answer_rows
from ragkit.indicators import measures
from ragkit.indicators.measures import LINE, SPACES, Floats, Interval
from ragkit.settings import asset

# The paper's claims with their rules: claim -> {claim, rule}
STATEMENTS: dict[str, dict[str, str]] = yaml.safe_load(asset("claims.yaml").read_text("utf8"))
WEAKER = ("not comparable", "not yet measured", "undecided")  # than a verdict, weakest first
ENOUGH_READERS = 8  # below that a rank correlation over readers says nothing


class Gain(NamedTuple):
    """A gain over the initial system on one set, and over how many seeds it was measured."""

    value: Interval
    seeds: int


class Part(NamedTuple):
    """A claim on one set: the verdict by its rule, and what was measured, in words."""

    verdict: str
    measured: str


def above(value: Interval, line: float = 0.0) -> str:
    """Reproduced if the interval lies above the line, not reproduced if at or below it."""
    if value.low > line:
        return "reproduced"
    return "not reproduced" if value.high <= line else "undecided"


def at_most_partly(verdict: str, seeds: int) -> str:
    """A result of one seed is never more than 'partly'."""
    return "partly" if verdict == "reproduced" and seeds < 2 else verdict


def together(verdicts: Sequence[str]) -> str:
    """One verdict for several parts: all the same, 'partly' if some hold, else the weakest."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if "reproduced" in verdicts or "partly" in verdicts:
        return "partly"
    return next((weaker for weaker in WEAKER if weaker in verdicts), "not reproduced")


def improves(gain: Gain) -> str:
    """C1, one measure: the gain lies above zero."""
    return at_most_partly(above(gain.value), gain.seeds)


def fails(poor: Gain, good: Gain) -> str:
    """C2: the poor reader's gain lies below half of the good one's; undecided if that is none."""
    works, half = good.value.low > 0, good.value.mean / 2
    if works and poor.value.high < half:
        return at_most_partly("reproduced", min(poor.seeds, good.seeds))
    return "not reproduced" if works and poor.value.low >= half else "undecided"


def higher_when_it_works(difference: Interval, gain: Interval) -> str:
    """C5 and C6, one number: it is higher in the reader whose distillation gains more. Both are
    fine-tuned minus off-the-shelf; undecided if the gain may be zero."""
    if gain.high < 0:
        return above(Interval(-difference.mean, -difference.high, -difference.low, difference.n))
    return above(difference) if gain.low > 0 else "undecided"


def divided(poor: Interval, good: Interval, gain: Interval) -> str:
    """C6: LINE stands between the off-the-shelf reader and the fine-tuned one, the reader whose
    distillation gains more above it; not reproduced if one is clearly on the wrong side."""
    if gain.high < 0:
        poor, good = good, poor
    elif not gain.low > 0:
        return "undecided"
    if good.high < LINE or poor.low > LINE:
        return "not reproduced"
    return "reproduced" if good.low > LINE and poor.high < LINE else "undecided"


def gains(analysis: Analysis) -> dict[str, Gain]:
    """What the fine-tuned reader's attention teaches: gains in HR@5, and in its own EM and F1."""
    target = f"{READERS[1]} attention"
    answers = answer_rows(analysis.lab, analysis.set_name, [target])
    read = answers[answers["reader"] == READERS[1]].set_index(["system", "seed", "question"])
    found = {"HR@5": analysis.hit_gains(target)}
    for measure in ("EM", "F1"):
        values = read[measure].unstack()
        found[measure] = values.loc[target].to_numpy() - values.loc["initial"].to_numpy()
    return {name: Gain(analysis.mean_gain(one), len(one)) for name, one in found.items()}


def gains_improve(analysis: Analysis) -> Part:
    """C1."""
    found = gains(analysis)
    told = ", ".join(f"{measure} {gain.value}" for measure, gain in found.items())
    return Part(together([improves(gain) for gain in found.values()]), told)


def gains_fail(analysis: Analysis) -> Part:
    """C2."""
    hits = [analysis.hit_gains(f"{which} attention") for which in READERS]
    poor, good = (Gain(analysis.mean_gain(one), len(one)) for one in hits)
    return Part(fails(poor, good), f"HR@5 {poor.value} against {good.value}")


def most_attention(analysis: Analysis, goal: Goal) -> Part:
    """C3 (answer) or C4 (nouns): the closest tenth's lift is above the average, and it leads over
    the highest other tenth."""
    profile, tokens = analysis.lab.profile, analysis.tokens(READERS[1])
    close, _ = analysis.closeness(READERS[1], goal, profile.indicators.space)
    lifts = measures.deciles(tokens.attention(profile.attention), close, tokens.question)
    lifts = lifts[analysis.gold_found()]
    if np.isnan(lifts).all(0).any():  # as where no gold passage was retrieved for any question
        few = f"{len(lifts)} questions whose gold passage was retrieved"
        return Part("undecided", f"{few}: too few to fill every tenth")
    other = int(np.nanargmax(np.nanmean(lifts[:, :-1], axis=0)))
    top, lead = (analysis.mean_of(lifts[:, -1] - less) for less in (0, lifts[:, other]))
    told = f"lift of the closest tenth {top}, lead over the next {lead}"
    return Part(together([above(top, 1.0), above(lead)]), told)


def higher(analysis: Analysis, goal: Goal, space: str | None = None) -> Part:
    """C5 (answer), or C6 in one space of closeness (nouns)."""
    taught = [analysis.hit_gains(f"{which} attention") for which in READERS]
    gain, found = analysis.mean_gain(taught[1] - taught[0]), analysis.differences(goal, space)
    verdicts = [higher_when_it_works(value, gain) for value in found.values()]
    numbers = {"HR@5 gain": gain, **found}
    if goal == "nouns":
        for which in READERS:
            values = analysis.indicator(which, goal, space)["Spearman"].to_numpy()
            numbers[f"Spearman of the {which} reader"] = analysis.mean_of(values)
        *_, poor, good = numbers.values()
        verdicts.append(divided(poor, good, gain))
    told = ", ".join(f"{name} {value}" for name, value in numbers.items())
    return Part(together(verdicts), f"fine-tuned minus off-the-shelf: {told}")


def higher_in_all_spaces(analysis: Analysis) -> Part:
    """C6: 'not comparable' if the verdict depends on the space of closeness."""
    found = {space: higher(analysis, "nouns", space) for space in SPACES}
    own = found[analysis.lab.profile.indicators.space]
    same = all(one.verdict == own.verdict for one in found.values())
    by_space = ", ".join(f"{space} {one.verdict}" for space, one in found.items())
    told = f"{own.measured} (by space: {by_space})"
    return Part(own.verdict if same else "not comparable", told)


def less_informative(analysis: Analysis) -> Part:
    """C7, over both indicators and both of their numbers."""
    verdicts, told = [], []
    for goal in get_args(Goal):
        table = analysis.followings(goal)
        for row in table[table["signal"] == DIFFERENCE].itertuples():
            value = Interval(row.correlation, row.low, row.high, row.readers)
            verdicts.append(above(value) if row.readers >= ENOUGH_READERS else "undecided")
            told.append(f"{goal} {row.measure} {value}")
    return Part(together(verdicts), f"correlation with the gain, {DIFFERENCE}: {', '.join(told)}")


JUDGES: dict[str, Callable[[Analysis], Part]] = {
    "C1": gains_improve,
    "C2": gains_fail,
    "C3": partial(most_attention, goal="answer"),
    "C4": partial(most_attention, goal="nouns"),
    "C5": partial(higher, goal="answer"),
    "C6": higher_in_all_spaces,
    "C7": less_informative,
}


def part(analysis: Analysis, claim: str) -> Part:
    """One of JUDGES' claims on one set, over every run of Step 1; without a noun finder C4, C6, C7
    are 'not yet measured'. What is seen in a reader (C3 to C7) is at most 'partly' of one run."""
    try:
        found = {seed: JUDGES[claim](run) for seed, run in analysis.runs().items()}
    except NounsError as error:
        return Part("not yet measured", f"not computed: {error}")
    verdict = together([one.verdict for one in found.values()])
    if claim not in ("C1", "C2"):
        verdict = at_most_partly(verdict, len(found))
    if len(found) == 1:
        return Part(verdict, next(iter(found.values())).measured)
    told = [f"Step 1 with seed {seed}: {one.measured}" for seed, one in found.items()]
    return Part(verdict, " | ".join(told))


def leave_one_out(values: Floats, works: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of readers, of which an indicator's `values` and whether distillation `works` are known
    `[readers]`, told rightly by LINE, and by the best threshold (of equals the middle) of others.
    """
    right = []
    for out in range(len(values)):
        rest, known = np.delete(values, out), np.delete(works, out)
        edges = np.sort(rest)
        tried = np.r_[edges[0] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1] + 1]
        scores = ((rest > tried[:, None]) == known).mean(1)
        best = np.flatnonzero(scores == scores.max())
        right.append((values[out] > tried[best[len(best) // 2]]) == works[out])
    return float(((values > LINE) == works).mean()), float(np.mean(right))


def paper_values(path: Path | None = None) -> dict[str, str]:
    """What a reader who owns the paper has filled in: claim -> value and page. Empty as shipped."""
    filled = yaml.safe_load((path or asset("paper_values.yaml")).read_text("utf8")) or {}
    for claim, row in filled.items():
        if claim not in STATEMENTS or not isinstance(row, dict) or set(row) != {"value", "page"}:
            raise DataError(f"paper_values.yaml: {claim!r} is no claim, or lacks value and page.")
    return {claim: f"{row['value']} (p. {row['page']})" for claim, row in filled.items()}


def ledger(
    parts: Mapping[str, Mapping[str, Part]], judge: bool, paper: Mapping[str, str]
) -> pd.DataFrame:
    """The claims as a table, from `parts[set][claim]`; the column `paper` holds `paper_values`.

    C8: reproduced if all others are, 'partly' if some are, or partly so, with one verdict on both
    sets. Without `judge` (a profile too small to tell) all are 'not comparable'.
    """
    rows, same, held = [], [], []
    for claim in JUDGES:
        found = {name: of_set[claim] for name, of_set in parts.items()}
        verdict = together([one.verdict for one in found.values()])
        if {one.verdict for one in found.values()} == {verdict}:
            same.append(claim)
            held += [claim] if verdict in ("reproduced", "partly") else []
        measured = "; ".join(f"{name}: {one.measured}" for name, one in found.items())
        why = "; ".join(f"{name}: {one.verdict}" for name, one in found.items())
        rows.append((measured, verdict, why))
    told = f"the same verdict on both sets: {', '.join(same) or 'none'}; "
    told += f"of these reproduced or partly so: {', '.join(held) or 'none'}"
    alike = "partly" if held else "not reproduced"
    alike = "reproduced" if {verdict for _, verdict, _ in rows} == {"reproduced"} else alike
    alike = alike if len(parts) > 1 else "not comparable"
    rows.append((told if judge else "", alike, "claim by claim, set by set"))
    texts = pd.DataFrame(STATEMENTS).T.rename(columns={"claim": "statement"})
    table = texts.rename_axis("claim").reset_index()
    table[["measured", "verdict", "why"]] = rows
    if not judge:
        table = table.assign(verdict="not comparable", why="the profile is too small to judge")
    return table.assign(paper=[paper.get(claim, "") for claim in STATEMENTS])
