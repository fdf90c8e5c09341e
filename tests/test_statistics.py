"""Intervals against simulated truths; the percentile bootstrap, slow and obvious, fails the same tests."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill import statistics
from edgedistill.statistics import ByUnit, Estimate

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import interval_coverage as simulated  # noqa: E402

sys.path.remove(BENCHMARKS)
T_975 = {4: 2.776445, 5: 2.570582, 9: 2.262157, 30: 2.042272}  # tables of Student's t


def test_equal_units_have_the_usual_t_interval() -> None:
    means = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 9.0])
    of = ByUnit(means * 7, np.full(6, 7.0))
    half = T_975[5] * means.std(ddof=1) / np.sqrt(6)
    zero = ByUnit(np.zeros(6), of.counts)
    low, high = statistics.difference(of, zero).ci95 or (0.0, 0.0)
    widened = half * (1 + statistics.WIDENED / 6)
    assert (low, high) == pytest.approx((4 - widened, 4 + widened), rel=1e-3)
    for degrees, value in T_975.items():
        assert statistics._student(degrees) == pytest.approx(value, rel=4e-4)


@pytest.mark.parametrize("units", [1, 2, 3, 4])
def test_fewer_than_five_units_have_no_interval(units: int) -> None:
    of = ByUnit(np.arange(1.0, units + 1), np.ones(units))
    for found in (
        statistics.positive_mean(of), statistics.perplexity(of), statistics.rate(of.sums, of.counts),
        statistics.proportion(ByUnit(of.counts * 0.5, of.counts)), statistics.perplexity_ratio(of, of),
        statistics.difference(of, of), statistics.ratio_of_means(of, of), statistics.median(of.sums),
    ):  # fmt: skip
        assert isinstance(found, Estimate) and np.isfinite(found.value)
        assert found.ci95 is None and not found.enough and found.low is None and found.units == units


def test_uneven_counts_weigh_as_fewer_units() -> None:
    counts = np.array([1000.0, 10, 10, 10, 10, 10, 10])
    found = statistics.positive_mean(ByUnit(counts * 2, counts))
    assert found.ci95 is None and found.units == 7 and found.effective_units == pytest.approx(1.12, abs=0.01)
    assert "7" in statistics.too_few(found.units, found.effective_units)
    assert statistics.too_few(3, 3.0) == "too few documents (3) for an interval"


def test_figures_are_ratios_of_sums() -> None:
    unit = np.array([0, 0, 1, 1, 3, 3, 4, 4, 5, 6])  # 2 has no value
    values = np.arange(10.0)
    of = statistics.by_unit(values, unit)
    assert of.sums.tolist() == [1, 5, 9, 13, 8, 9] and of.counts.tolist() == [2, 2, 2, 2, 1, 1]
    other = ByUnit(of.sums / 2, of.counts)
    assert statistics.positive_mean(of).value == values.mean() and statistics.positive_mean(of).units == 6
    assert statistics.perplexity(other).value == pytest.approx(np.exp(2.25))
    assert statistics.perplexity_ratio(other, of).value == pytest.approx(np.exp(-2.25))
    assert statistics.difference(of, other).value == 2.25 and statistics.ratio_of_means(of, other).value == 2
    assert statistics.perplexity_ratio(of, of).ci95 == statistics.ratio_of_means(of, of).ci95 == (1.0, 1.0)
    for found in (
        statistics.positive_mean(of),
        statistics.perplexity_ratio(other, of),
        statistics.difference(of, other),
    ):
        assert found.ci95 is not None and found.ci95[0] < found.value < found.ci95[1] and found.low == found.ci95[0]


def test_edges() -> None:
    counts = np.full(8, 50.0)
    assert statistics.positive_mean(ByUnit(counts * 0, counts)).ci95 == (0.0, 0.0)
    every, none = statistics.proportion(ByUnit(counts, counts)), statistics.proportion(ByUnit(counts * 0, counts))
    # 400 tokens, none of which differs: 1 - 0.025^(1/400)
    assert every.ci95 == pytest.approx((0.99082, 1.0), abs=1e-5) and none.ci95 == pytest.approx(
        (0.0, 0.00918), abs=1e-5
    )
    broken = np.append(np.ones(7), np.nan)
    for function in (statistics.positive_mean, statistics.perplexity):
        assert function(ByUnit(broken, counts)).ci95 is None
    one_has_all = ByUnit(np.append(np.zeros(7), 9.0), counts)
    low, high = statistics.positive_mean(one_has_all).ci95 or (0.0, 0.0)
    assert 0 < low < 9 / 400 < high


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(100, 800), ties=st.booleans())
def test_p99_equals_the_sorted_reference(seed: int, tokens: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, tokens).astype(np.float32) if ties else rng.random(tokens).astype(np.float32)
    found = statistics.p99(values, rng.integers(0, 30, tokens))
    assert found is not None and found.value == np.sort(values)[::-1][math.floor((1 - 0.99) * tokens)]
    assert found.ci95 is None or found.ci95[0] <= found.value <= found.ci95[1]


def test_p99_is_the_smallest_value_that_99_in_100_do_not_exceed() -> None:
    assert statistics.p99(np.ones(99), np.zeros(99, dtype=np.int64)) is None
    rng = np.random.default_rng(0)
    values, unit = rng.random(4000), np.repeat(np.arange(40), 100)
    found = statistics.p99(values, unit)
    assert found is not None and found.ci95 is not None and found.units == 40
    assert found.value == np.sort(values)[::-1][40] and found.ci95[0] < found.value < found.ci95[1]
    few = statistics.p99(values, unit // 3)
    assert few is not None and few.ci95 is None and few.value == found.value and few.units == 14


def test_the_median_of_twelve_lies_between_the_third_and_the_tenth() -> None:
    found = statistics.median(np.arange(12.0))
    assert found.value == 5.5 and found.ci95 is not None
    low, high = found.ci95  # 96.1 % between third and tenth, 85.4 % between the fourth and ninth
    assert 2 < low < 2.3 and low + high == pytest.approx(11.0)
    assert statistics.median(np.arange(5.0)).ci95 == (0.0, 4.0)


def percentile_bootstrap(of: ByUnit, rng: np.random.Generator, draws: int = 400) -> tuple[float, float]:
    """What this project had: means of units drawn with replacement, and their 2.5th and 97.5th percentile."""
    picks = rng.multinomial(len(of.counts), np.full(len(of.counts), 1 / len(of.counts)), size=draws)
    low, high = np.percentile((picks @ of.sums) / (picks @ of.counts), [2.5, 97.5])
    return float(low), float(high)


# Each figure with each effect, at the counts of units where it is hardest
QUICK = [
    pytest.param(setting, length, units, id=f"{setting.figure}, {setting.effects}, {length}, {units}")
    for setting in simulated.settings()
    for length, units in (("equal", 5), ("equal", 12), ("lognormal 1", 20))
    if length in setting.lengths and setting.figure != "p99 of KL"
]


@pytest.mark.parametrize(("setting", "length", "units"), QUICK)
def test_95_percent_is_95_percent(setting: simulated.Setting, length: str, units: int) -> None:
    trials = 1000
    found = simulated.simulate(setting, length, units, trials)
    if found.too_few == 1:  # a share of 0.97 takes eight documents
        assert setting.effects == "beta about 0.97" and units < statistics.MIN_UNITS_FOR_RARE
        return
    chance = 3 * np.sqrt(0.95 * 0.05 / (trials * (1 - found.too_few)))
    assert simulated.LOWEST - chance <= found.covered <= simulated.HIGHEST + chance
    if setting.gate:
        assert found.above <= simulated.GATE + chance


def test_95_percent_is_95_percent_of_a_99th_percentile() -> None:
    setting = next(setting for setting in simulated.settings() if setting.figure == "p99 of KL")
    found = simulated.simulate(setting, "equal", 30, 300)
    assert found.too_few < 0.1 and found.covered >= 0.90
    assert simulated.simulate(setting, "equal", 15, 5).too_few == 1


@pytest.mark.parametrize(("units", "most", "gate"), [(5, 0.87, 0.07), (10, 0.92, 0.05)])
def test_the_percentile_bootstrap_would_fail_these_tests(units: int, most: float, gate: float) -> None:
    """Were it put back in the place of what is there, the tests above would fail."""
    rng = np.random.default_rng(0)
    trials, covered, passes = 1000, 0, 0
    for _ in range(trials):
        counts = simulated.lengths(rng, units, 0)
        low, high = percentile_bootstrap(
            ByUnit(counts * (0.1 + 0.1 * simulated.effect(rng, "normal", units)), counts), rng
        )
        covered += low <= 0.1 <= high
        passes += high < 0.1  # losses: the gate looks at exp(-high)
    chance = 3 * np.sqrt(0.95 * 0.05 / trials)
    assert covered / trials < most < simulated.LOWEST - chance + 0.02
    assert covered / trials < simulated.LOWEST - chance or units > 5
    assert passes / trials > gate
