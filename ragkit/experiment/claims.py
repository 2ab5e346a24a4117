"""From what was measured to the ledger: each claim, its rule, a verdict for each set, and why."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import get_args

import numpy as np
import pandas as pd

from ragkit.distillation.targets import READERS
from ragkit.errors import NounsError
from ragkit.experiment.analysis import COMPARED, DIFFERENCE, Analysis, Goal
from ragkit.experiment.rules import LIMITS, LINE, STATEMENTS, Number, Part, judged, side, together
from ragkit.experiment.tables import answer_rows, exact_by_case
from ragkit.indicators import measures
from ragkit.indicators.measures import SPACES, Floats, Interval

GOLD = "gold among the passages"  # the case of dev in which readers are compared


def gains(analysis: Analysis) -> dict[str, Floats]:
    """What the fine-tuned reader's attention teaches `[seeds, questions]`: gains over the initial
    system in HR@5, EM and F1, and in HR@5 beyond what two controls teach."""
    target = f"{READERS[1]} attention"
    answers = answer_rows(analysis.lab, analysis.set_name, [target])
    read = answers[answers["reader"] == READERS[1]].set_index(["system", "seed", "question"])
    found = {"HR@5": analysis.hit_gains(target)}
    for measure in ("EM", "F1"):
        values = read[measure].unstack()
        found[measure] = values.loc[target].to_numpy() - values.loc["initial"].to_numpy()
    for control in ("uniform", "answer string"):
        found[f"HR@5 beyond {control}"] = found["HR@5"] - analysis.hit_gains(control)
    return found


def gains_improve(analysis: Analysis) -> Part:
    """C1."""
    lines = dict.fromkeys(("HR@5", "EM", "F1"), LIMITS["no_gain"]) | {"HR@5 beyond uniform": 0.0}
    found = {name: analysis.mean_of(values) for name, values in gains(analysis).items()}
    part = judged(Number(n, v, lines.get(n, 0.0), votes=n in lines) for n, v in found.items())
    more = ("undecided whether more", "more", "no more")[side(found["HR@5 beyond answer string"])]
    return Part(part.verdict, f"{part.measured}: {more} than string matching")


def by_prompt(analysis: Analysis, asks: Callable[[Analysis, str], Iterable[Number]]) -> Part:
    """C2, C5, C6: what a claim `asks`, by each prompt for which the off-the-shelf one is poorer."""
    lab, numbers, told = analysis.lab, list[Number](), []
    for ending in ("", " cloze") if lab.graph.has_clozes else ("",):
        exact = [exact_by_case(lab, analysis.set_name, f"{which}{ending}") for which in READERS]
        poorer = analysis.mean_of(exact[1][GOLD] - exact[0][GOLD], "dev")
        prompt, comparable = ending.strip() or "question", side(poorer, LIMITS["no_gain"]) > 0
        told.append(f"asked by {prompt}, EM with gold passages, fine-tuned minus off-the-shelf")
        told[-1] += f" {poorer}{'' if comparable else ' (not comparable)'}"
        if comparable:
            numbers += [n._replace(name=f"{prompt}: {n.name}") for n in asks(analysis, ending)]
    part = judged(numbers) if numbers else Part("not comparable", "")
    return Part(part.verdict, " · ".join(filter(None, [part.measured, *told])))


def gains_fail(analysis: Analysis, ending: str) -> Iterator[Number]:
    """C2."""
    poor, good = (analysis.hit_gains(f"{which}{ending} attention") for which in READERS)
    works, no_gain = analysis.mean_of(good), LIMITS["no_gain"]
    sign = int(works.low > no_gain)
    yield Number("fine-tuned HR@5 gain", works, votes=False)
    yield Number("off-the-shelf HR@5 gain", analysis.mean_of(poor), no_gain, -sign)
    yield Number("fine-tuned minus off-the-shelf", analysis.mean_of(good - poor), no_gain, sign)
    beyond = analysis.mean_of(poor - analysis.hit_gains("uniform"))
    yield Number("off-the-shelf minus uniform", beyond, votes=False)


def of_gold(analysis: Analysis, values: Floats) -> Interval:
    """Mean of values `[questions]` over those whose gold passage was retrieved."""
    return analysis.mean_of(np.where(analysis.gold_found(), values, np.nan))


def answers_most(analysis: Analysis) -> Part:
    """C3."""
    profile, share = analysis.lab.profile, LIMITS["closest"]
    tokens, numbers = analysis.tokens(READERS[1]), list[Number]()
    close, exact = analysis.closeness(READERS[1], "answer", profile.indicators.space)
    lifts = measures.lift(tokens.attention(profile.attention), tokens.question)
    for ending, kept in (("", close), (" (no exact)", np.where(exact, np.nan, close))):
        near = measures.closest(kept, tokens.question, share)
        top = measures.means(np.where(near, lifts, np.nan), tokens.question)
        rest = np.where(near, np.nan, kept)
        others = measures.deciles(lifts, rest, tokens.question, round(1 / share) - 1)
        levels = pd.DataFrame(others[analysis.gold_found()]).mean().fillna(-np.inf)
        lead = top - others[:, int(levels.argmax())]
        for name, values, line in (("lift of the closest", top, 1.0), ("lead", lead, 0.0)):
            value = of_gold(analysis, values)
            numbers.append(Number(f"{name}{ending}", value, line, votes=not ending))
    return judged(numbers)


def nouns_most(analysis: Analysis) -> Part:
    """C4, with its positive control."""
    profile, which = analysis.lab.profile, READERS[1]
    space, tokens = profile.indicators.space, analysis.tokens(which, titles=True)
    close, nouns = analysis.closeness(which, "nouns", space, titles=True)
    _, answer = analysis.closeness(which, "answer", space, titles=True)
    labels = np.array(analysis.by_word(which, analysis.speech(), titles=True))
    cells = np.vstack([tokens.owner, np.unique(labels, return_inverse=True)[1]])
    near = measures.closest(np.where(answer, np.nan, close), tokens.question, LIMITS["closest"])

    def judge(attention: Floats) -> Part:
        lifts = measures.lift(attention, tokens.question)
        top = measures.means(np.where(near, lifts, np.nan), tokens.question)
        apart = np.where(answer | (labels == "unknown"), np.nan, lifts)
        lead = measures.matched_lead(apart, near, cells, tokens.question)
        numbers = {"lift of the closest": (top, 1.0), "lead over those alike": (lead, 0.0)}
        return judged(Number(n, of_gold(analysis, v), line) for n, (v, line) in numbers.items())

    found = judge(tokens.attention(profile.attention))
    # a tenth for other tokens: a question without such nouns has lifts
    planted = judge(np.where(nouns, 1.0, 0.1))
    told = f"{found.measured} (planted on the nouns: {planted.measured}, {planted.verdict})"
    return Part(found.verdict if planted.verdict == "reproduced" else "not comparable", told)


def higher(
    analysis: Analysis, ending: str, goal: Goal, space: str | None = None
) -> Iterator[Number]:
    """C5 (answer), or C6 in one space of closeness (nouns)."""
    poor, good = (f"{which}{ending}" for which in READERS)
    taught, before, after = {}, {}, {}
    for which in (poor, good):
        taught[which] = analysis.hit_gains(f"{which} attention")
        before[which] = analysis.indicator(which, goal, space)
        after[which] = analysis.indicator(which, goal, space, f"{which} attention")
    gain = analysis.mean_of(taught[good] - taught[poor])
    sign = side(gain)  # the reader whose distillation gains more should have the higher indicator
    yield Number("HR@5 gain, fine-tuned minus off-the-shelf", gain, votes=False)
    found, order = {}, COMPARED[1]
    for name in COMPARED:
        found[f"{name}, {good} minus {poor}"] = (after[good][name] - after[poor][name], 0.0, sign)
    rise, fall = after[good][order] - before[good][order], before[poor][order] - after[poor][order]
    found[f"{order}, {good} after minus before"] = (rise, 0.0, sign)
    found[f"{order}, {poor} before minus after"] = (fall, 0.0, sign)
    if goal == "nouns":
        found[f"{order} of {poor}"] = (after[poor][order], LINE, -sign)
        found[f"{order} of {good}"] = (after[good][order], LINE, sign)
    groups = len({*analysis.groups()[: len(analysis.questions)]})
    for name, (values, line, wanted) in found.items():
        value = analysis.mean_of(values.to_numpy())
        few = value.n < LIMITS["defined"] * groups
        told = f" (defined for {value.n} of {groups})" if few else ""
        yield Number(f"{name}{told}", value, line, 0 if few else wanted)


def higher_in_all_spaces(analysis: Analysis) -> Part:
    """C6: 'not comparable' if the verdict depends on the space of closeness."""
    asks = {space: partial(higher, goal="nouns", space=space) for space in SPACES}
    found = {space: by_prompt(analysis, one) for space, one in asks.items()}
    own = found[analysis.lab.profile.indicators.space]
    same = all(one.verdict == own.verdict for one in found.values())
    by_space = ", ".join(f"{space} {one.verdict}" for space, one in found.items())
    told = f"{own.measured} (by space: {by_space})"
    return Part(own.verdict if same else "not comparable", told)


def less_informative(analysis: Analysis) -> Part:
    """C7, over both indicators and both of their numbers."""
    tables = {goal: analysis.followings(goal) for goal in get_args(Goal)}
    numbers, told = list[Number](), ""
    for goal, table in tables.items():
        for row in table[table["signal"] == DIFFERENCE].itertuples():
            enough = row.readers >= LIMITS["readers"] and row.trainings >= LIMITS["trainings"]
            numbers.append(Number(f"{goal} {row.measure}", row.value, sign=int(enough)))
            told = f"{row.readers} readers of {row.trainings} trainings"
    part = judged(numbers)
    return Part(part.verdict, f"correlation with the gain, {DIFFERENCE}: {part.measured} ({told})")


JUDGES: dict[str, Callable[[Analysis], Part]] = {
    "C1": gains_improve,
    "C2": partial(by_prompt, asks=gains_fail),
    "C3": answers_most,
    "C4": nouns_most,
    "C5": partial(by_prompt, asks=partial(higher, goal="answer")),
    "C6": higher_in_all_spaces,
    "C7": less_informative,
}


def part(analysis: Analysis, claim: str) -> Part:
    """One of JUDGES' claims on one set, over every run of Step 1 (C7 takes them at once), at most
    'partly' of too few `repeats`; without a noun finder C4, C6, C7 are 'not yet measured'."""
    runs = analysis.runs()
    try:
        asked = {0: analysis} if claim == "C7" else runs
        found = {seed: JUDGES[claim](run) for seed, run in asked.items()}
    except NounsError as error:
        return Part("not yet measured", f"not computed: {error}")
    verdict, cap = together([one.verdict for one in found.values()]), ""
    told = [f"Step 1 with seed {seed}: {one.measured}" for seed, one in found.items()]
    told = told if len(found) > 1 else [one.measured for one in found.values()]
    step = "Step 1" if claim > "C2" else "Step 2"
    times = len(runs if step == "Step 1" else analysis.lab.profile.distill.seeds)
    if verdict == "reproduced" and claim != "C7" and times < LIMITS["repeats"]:
        verdict, cap = "partly", f"held, but {step} ran with one seed"
    if (n := len(set(analysis.groups()))) < LIMITS["entities"]:
        verdict, cap = "not comparable", f"{verdict}, but of {n} entities in test only"
    return Part(verdict, " | ".join(told), cap)


def ledger(
    parts: Mapping[str, Mapping[str, Part]], judge: bool, paper: Mapping[str, str]
) -> pd.DataFrame:
    """The claims as a table, from `parts[set][claim]`; the column `paper` holds `paper_values`.
    Without `judge` (a profile too small to tell) all are 'not comparable'."""
    rows, held, opposed, all_hold = [], [], [], True
    for claim in JUDGES:
        found = {name: of_set[claim] for name, of_set in parts.items()}
        verdicts = {one.verdict for one in found.values()}
        holds = {"reproduced", "partly"} & verdicts
        all_hold &= verdicts == {"reproduced"}
        held += [claim] if holds == verdicts else []
        opposed += [claim] if holds and "not reproduced" in verdicts else []
        measured = "; ".join(f"{name}: {one.measured}" for name, one in found.items())
        whys = [f"{n}: {p.verdict}{p.cap and f' ({p.cap})'}" for n, p in found.items()]
        rows.append((measured, together([p.verdict for p in found.values()]), "; ".join(whys)))
    told = f"reproduced or partly so on both sets: {', '.join(held) or 'none'}; "
    told += f"on one, and not reproduced on another: {', '.join(opposed) or 'none'}"
    alike = "mixed" if held and opposed else "not reproduced" if opposed else "undecided"
    alike = "reproduced" if all_hold else "partly" if held and not opposed else alike
    alike = alike if len(parts) > 1 else "not comparable"
    rows.append((told if judge else "", alike, "claim by claim, set by set"))
    texts = pd.DataFrame(STATEMENTS).T.rename(columns={"claim": "statement"})
    table = texts.rename_axis("claim").reset_index()
    table[["measured", "verdict", "why"]] = rows
    if not judge:
        table = table.assign(verdict="not comparable", why="the profile is too small to judge")
    return table.assign(paper=[paper.get(claim, "") for claim in STATEMENTS])
