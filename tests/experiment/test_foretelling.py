"""Notebook 11's statistics: AUC, intervals over trainings, and when a foreteller is useful."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import yaml
from cells import defined
from scipy import stats
from sklearn.metrics import roc_auc_score

from ragkit.settings import asset, reference

STUDY = yaml.safe_load(asset("foretelling.yaml").read_text("utf8"))
study = defined("11_who_can_teach", "study", STUDY=STUDY)


def table_of(rng, trainings=16, each=4, truth=1.0, planted=0.0):
    """Readers whose gain follows a hidden skill; exact match sees some of it, `nouns: Spearman` a
    share `planted`, everything else nothing."""
    rows = []
    for number in range(trainings):
        base = rng.normal()
        for step in range(each):
            skill = base + rng.normal(0, 0.5)
            row = {name: rng.normal() for name in study.FORETELLERS}
            row |= {"set": "toy", "training": str(number), "reader": str(step)}
            row["exact match"] = truth * skill + rng.normal(0, 1.5)
            row["nouns: Spearman"] = planted * skill + (1 - planted) * rng.normal()
            rows.append(row | {"gain by attention": 0.02 + 0.1 * skill})
    return pd.DataFrame(rows)


def test_auc_and_correlation_agree_with_libraries():
    rng = np.random.default_rng(0)
    values, can = rng.integers(0, 5, 60).astype(float), rng.random(60) > 0.5
    assert study.auc(values, can) == pytest.approx(roc_auc_score(can, values))
    assert np.isnan(study.auc(values, np.ones(60, bool)))
    other = rng.normal(size=60)
    assert study.by_rank(values, other) == pytest.approx(stats.spearmanr(values, other).statistic)
    known = rng.normal(size=60)
    r = [stats.spearmanr(*pair).statistic
         for pair in ((values, other), (values, known), (other, known))]  # fmt: skip
    by_formula = (r[0] - r[1] * r[2]) / np.sqrt((1 - r[1] ** 2) * (1 - r[2] ** 2))
    assert study.beyond(values, other, known) == pytest.approx(by_formula)
    assert np.isnan(study.beyond(values, other, values))


def test_an_interval_over_trainings_is_wider_than_over_readers():
    """Forty readers of ten trainings, alike within a training: ten numbers, not forty."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=10).repeat(4) for _ in "xy")
    by_training = study.interval(study.by_rank, (x, y), np.arange(10).repeat(4).astype(str))
    by_reader = study.interval(study.by_rank, (x, y), np.arange(40).astype(str))
    widths = [one.high - one.low for one in (by_training, by_reader)]
    assert widths[0] > 1.5 * widths[1]
    assert by_training.n == 10


def test_a_reader_is_foretold_by_other_trainings_only():
    table = table_of(np.random.default_rng(1))
    chosen = study.chosen_without(table, "attention")
    before = study.foretold(table, "attention", chosen)
    own = table["training"] == "3"
    turned = table.copy()
    turned.loc[own, "gain by attention"] *= -1
    after = study.foretold(turned, "attention", chosen)
    assert np.allclose(before[own], after[own])
    assert not np.allclose(before[~own], after[~own])


def test_a_planted_foreteller_is_found_useful():
    found = []
    for seed in range(10):
        table = table_of(np.random.default_rng(seed), trainings=24, planted=0.9)
        value = study.added(table, "attention", ["nouns: Spearman"])["nouns: Spearman"]
        found.append(study.is_useful(value))
    assert sum(found) >= 9


def test_a_random_foreteller_is_seldom_found_useful(monkeypatch):
    """False alarms over 200 draws: no more than the level allows."""
    alarms, fewer = 0, partial(study.interval, resamples=200)
    monkeypatch.setitem(study.added.__globals__, "interval", fewer)
    for seed in range(200):
        table = table_of(np.random.default_rng(1000 + seed), trainings=12)
        value = study.added(table, "attention", ["nouns: Spearman"])["nouns: Spearman"]
        alarms += study.is_useful(value)
    level = STUDY["thresholds"]["level"]
    assert stats.binomtest(alarms, 200, level, "greater").pvalue > 0.01, alarms


def test_holm_stands_as_by_hand():
    ps = np.array([0.03, 0.001, 0.2, 0.012])
    assert study.standing(ps, 0.05).tolist() == [False, True, False, True]


def test_the_best_line_parts_what_can_be_parted():
    values, can = np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, False, True, True])
    assert study.best_line(values, can) == 0.3
    assert np.isnan(study.best_line(values, np.ones(4, dtype=bool)))


def test_a_correlation_in_a_narrow_range_is_widened_by_thorndikes_formula():
    """A correlation of .5, cut to a third of the outcome's deviation, comes back."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=400_000)
    x = 0.5 * y + np.sqrt(0.75) * rng.normal(size=len(y))
    kept = np.abs(y) < 0.6
    narrow = np.corrcoef(x[kept], y[kept])[0, 1]
    assert narrow < 0.25
    assert study.widened(narrow, y[kept].std(), y.std()) == pytest.approx(0.5, abs=0.02)


def test_the_rule_is_the_number_that_is_wrong_for_the_fewest_readers_left_out():
    """One number parts them, read from below; another does so for all trainings but one."""
    rng = np.random.default_rng(0)
    table = table_of(rng, trainings=10)
    can = table["gain by attention"] >= STUDY["thresholds"]["gain"]
    for name in study.JUDGED:
        table[name] = rng.normal(size=len(table))
    table["entropy"] = np.where(can, 0.2, 0.8)
    table["nouns: share"] = np.where(can, 0.8, 0.2)
    table.loc[table["training"] == "3", "nouns: share"] = 1 - table["nouns: share"]
    of = study.clusters(table)
    assert study.error_rate(table, "attention", "entropy", of) == 0
    assert study.error_rate(table, "attention", "nouns: share", of) == pytest.approx(0.1)
    row = study.rule(table, "attention")
    assert (row["foreteller"], row["can teach"], row["error rate"]) == ("entropy", "below", 0)
    assert table.loc[can, "entropy"].max() <= row["cut"] < table.loc[~can, "entropy"].min()
    assert row["commoner"] == pytest.approx(min(can.mean(), 1 - can.mean()), abs=1e-6)
    assert (row["readers"], row["trainings"]) == (40, 10)


def test_an_error_rate_is_of_lines_that_have_not_seen_the_training():
    """A number that knows the training alone, not who can teach, is right for nothing."""
    table = table_of(np.random.default_rng(0), trainings=12, each=1)
    table["entropy"] = np.arange(12.0)
    can = np.arange(12) % 2 == 0
    table["gain by attention"] = np.where(can, 0.1, -0.1)
    assert study.error_rate(table, "attention", "entropy", study.clusters(table)) >= 0.4


def test_a_line_that_lies_elsewhere_in_another_world_is_wrong_there():
    """The order is perfect in both worlds, the cut of one is half wrong in the other."""
    skill = np.tile(np.arange(20.0), 2)
    table = pd.DataFrame({"set": ["here"] * 20 + ["there"] * 20, "training": np.arange(40) // 4})
    table["training"] = table["training"].astype(str)
    for name in study.JUDGED:
        table[name] = 0.0
    table["entropy"] = skill + np.where(table["set"] == "there", 10, 0)
    table["gain by attention"] = np.where(skill >= 10, 0.1, -0.1)
    assert study.rule(table, "attention")["other world"] == pytest.approx(0.5)
    table["entropy"] = skill
    assert study.rule(table, "attention")["other world"] == 0


def test_the_judge_has_the_rules_of_the_published_study():
    table = pd.read_csv(reference("study") / "11_readers.csv")
    rules = pd.DataFrame([study.rule(table, signal) for signal in STUDY["signals"]])
    kept = pd.read_csv(asset("judge.csv"))
    pd.testing.assert_frame_equal(kept, rules, check_dtype=False, atol=1e-6)


def test_the_published_study_is_of_todays_rules():
    table = pd.read_csv(reference("study") / "11_readers.csv")
    assert set(table["training"]) == set(STUDY["trainings"])
    assert not table.isna().to_numpy().all(0).any()
    assert len(table) >= 125
    assert len(table.groupby(["set", "training"])) >= 25
