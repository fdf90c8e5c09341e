"""Intervals against simulated truths; the percentile bootstrap, slow and obvious, fails the same tests."""

from __future__ import annotations

import numpy as np
import pytest

from edgedistill import statistics
from edgedistill.statistics import ByUnit, Estimate

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
