"""Intervals: the one place where a figure gets its 95 %.

A figure is a ratio of sums over independent units: documents of held-out text, repeats of a benchmark, pairs of runs.
Tokens of one document are not independent, so they are summed first: units' sums and counts are all that is looked at.

Legend: D units; n their counts (tokens); w = n / Σn; y their own means.

Every interval is value ± t · s. s² = Σ w² (y − value)² / (1 − 2w + Σw²), which is unbiased for units that vary alike
however uneven their counts (CR2: Bell & McCaffrey 2002), and t is Student's with (Σn)² / Σn² − 1 degrees: for equal
counts that is the usual t interval. benchmarks/interval_coverage.py simulates 5 to 100 units, equal and lognormal
counts (σ up to 1.5), normal, heavy-tailed (Student's t with 3 degrees) and skewed units, correlated tokens. Such
simulations chose all constants here: between 93 and 97 % of the intervals hold the truth. The percentile bootstrap
over documents, which a reader may expect, does so 83 % of the time with five units, and bootstrap-t and Hall's
transformation 88 to 93 % where counts are uneven.

A sample of few units cannot tell how skewed they are, and misses the rare ones that matter. What is known beforehand:
- KL divergences and times are skewed to the right: the upper end moves out by what a skewness of 1.6 takes (the first
  Cornish-Fisher term, γ (2 t² + 1) / 6 · Σw³ / (Σw²)^1.5 standard errors), the lower end in by 0.3 of that;
- documents that lose much against the teacher are rarer than ones that lose little: in a ratio of perplexities the
  lower end, which a gate looks at, moves out by what a skewness of 0.7 takes, the other in by 0.1 of that. No gate
  whose truth is its threshold passes more than 3.5 % of the time;
- a proportion has a t interval of its logit;
- a loss (perplexity) or a difference, of unknown skewness, has a plain t interval.
Where nothing moves, t is widened by 0.3 / effective units.

Where no method holds, there is no interval: fewer than five effective units, (Σn)² / Σn²; eight for a proportion
below 0.1 or above 0.9; twenty for a 99th percentile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

METHOD = "t-5"  # goes into the keys of stages whose records hold intervals: raise it where an interval changes
MIN_UNITS = 5.0
MIN_UNITS_FOR_RARE = 8.0
MIN_UNITS_FOR_P99 = 20.0
MIN_VALUES_FOR_P99 = 100
WIDENED = 0.3
WIDENED_P99 = 1.0
SKEWNESS, MOVED_IN = 1.6, 0.3  # of divergences and times
SKEWNESS_OF_LOSS, MOVED_IN_OF_LOSS = 0.7, 0.1  # of what a document loses against the teacher
Z = 1.959963984540054  # the normal's 97.5th percentile


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, None where there are too few independent units to tell.

    `effective_units`: as many units of equal counts would weigh as much, (Σn)² / Σn².
    """

    value: float
    ci95: tuple[float, float] | None
    units: int
    effective_units: float

    @property
    def enough(self) -> bool:
        return self.ci95 is not None

    @property
    def low(self) -> float | None:
        """What the truth falls below 2.5 % of the time: what a gate looks at. None: too few units."""
        return None if self.ci95 is None else self.ci95[0]


@dataclass(frozen=True)
class ByUnit:
    """Values summed by unit: what `mean`, `proportion` and the others take. Units without a value are left out."""

    sums: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())


def by_unit(values: ArrayLike, unit: NDArray[np.integer]) -> ByUnit:
    """Sums and counts of `values` [N] by `unit` [N], whose numbers start at 0."""
    numbers = np.asarray(values, dtype=np.float64)
    counts = np.asarray(np.bincount(unit), dtype=np.float64)
    sums = np.asarray(np.bincount(unit, weights=numbers), dtype=np.float64)
    return ByUnit(sums[counts > 0], counts[counts > 0])


def effective_units(counts: ArrayLike) -> float:
    """(Σn)² / Σn²."""
    numbers = np.asarray(counts, dtype=np.float64)
    return float(numbers.sum() ** 2 / (numbers**2).sum())


def too_few(units: int, effective: float, what: str = "documents") -> str:
    """What a person reads in the place of an interval."""
    return f"too few {what} ({counted(units, effective)}) for an interval"


def counted(units: int, effective: float) -> str:
    """ "7", or "7, which weigh as much as 4.2 equal ones"."""
    return f"{units}, which weigh as much as {effective:.1f} equal ones" if effective < units - 0.05 else f"{units}"


def in_words(ci95: tuple[float, float] | None, units: int, effective: float, what: str = "documents") -> str:
    """An interval for a sentence, or why there is none."""
    return too_few(units, effective, what) if ci95 is None else f"95 % interval {ci95[0]:.3f} to {ci95[1]:.3f}"


def positive_mean(of: ByUnit) -> Estimate:
    """Mean of what cannot be negative and is skewed to the right: KL divergence, milliseconds. All zero: a point."""
    spread = _spread(of)
    value = of.mean
    if spread is None or value <= 0:
        return _estimate(of, value, None if spread is None else (value, value))
    shift = spread.shift(SKEWNESS)
    low = value - (spread.t - MOVED_IN * shift) * spread.error
    least = float(value * np.exp(-spread.t * spread.error / value))  # above 0, where units differ much
    return _estimate(of, value, (max(low, least), value + (spread.t + shift) * spread.error))


def perplexity(loss: ByUnit) -> Estimate:
    """exp of the mean loss (nats a token)."""
    value, spread = loss.mean, _spread(loss)
    if spread is None:
        return _estimate(loss, float(np.exp(value)), None)
    half = spread.widened_t * spread.error
    return _estimate(loss, float(np.exp(value)), (float(np.exp(value - half)), float(np.exp(value + half))))


def rate(milliseconds: ArrayLike, work: ArrayLike) -> Estimate:
    """Work a second over all repeats: all work ÷ all time. A repeat is a unit, its work (tokens, runs) the count."""
    of = ByUnit(np.asarray(milliseconds, dtype=np.float64), np.asarray(work, dtype=np.float64))
    each = positive_mean(of)
    ci95 = None if each.ci95 is None else (1e3 / each.ci95[1], 1e3 / each.ci95[0])
    return Estimate(1e3 / each.value, ci95, each.units, each.effective_units)


def proportion(hits: ByUnit) -> Estimate:
    """A share of all tokens. Where it is none or all of them, the other end is that of as many independent tokens.

    Below a tenth or above nine, it takes eight effective units: five see the rare tokens of one or two documents.
    """
    value = hits.mean
    spread = _spread(hits, MIN_UNITS if 0.1 <= value <= 0.9 else MIN_UNITS_FOR_RARE)
    if spread is None:
        return _estimate(hits, value, None)
    if not 0 < value < 1:
        missed = 1 - 0.025 ** (1 / float(hits.counts.sum()))
        return _estimate(hits, value, (1 - missed, 1.0) if value >= 1 else (0.0, missed))
    half = spread.t * spread.error / (value * (1 - value))
    odds = np.log(value / (1 - value)) + np.array([-half, half])
    low, high = 1 / (1 + np.exp(-odds))
    return _estimate(hits, value, (float(low), float(high)))


def perplexity_ratio(reference_loss: ByUnit, loss: ByUnit) -> Estimate:
    """exp(mean reference loss − mean loss), paired by unit: retention, where the reference is the teacher.

    The lower end is what a gate looks at; where the truth is its threshold, it passes at most 3.5 % of the time.
    """
    lost = ByUnit(loss.sums - reference_loss.sums, loss.counts)
    value = -lost.mean
    spread = _spread(lost)
    if spread is None:
        return _estimate(lost, float(np.exp(value)), None)
    shift = spread.shift(SKEWNESS_OF_LOSS)
    low = value - (spread.t + shift) * spread.error
    high = value + (spread.t - MOVED_IN_OF_LOSS * shift) * spread.error
    return _estimate(lost, float(np.exp(value)), (float(np.exp(low)), float(np.exp(high))))


def difference(one: ByUnit, other: ByUnit) -> Estimate:
    """Mean of `one` less that of `other`, paired by unit; both have the same counts."""
    between = ByUnit(one.sums - other.sums, one.counts)
    value, spread = between.mean, _spread(between)
    if spread is None:
        return _estimate(between, value, None)
    half = spread.widened_t * spread.error
    return _estimate(between, value, (value - half, value + half))


def ratio_of_means(one: ByUnit, other: ByUnit) -> Estimate:
    """Mean of `one` ÷ that of `other`, both positive, paired by unit: t on the log ratio, linearised by unit."""
    value = one.mean / other.mean
    influence = one.sums / one.mean - other.sums / other.mean
    return linearised(value, ByUnit(influence, one.counts), log=True)


def linearised(value: float, influence: ByUnit, *, log: bool = False) -> Estimate:
    """Any smooth function of means: `influence` is each unit's first-order part in it (log: in its logarithm).

    Its mean is 0 at the value itself; only its spread is looked at.
    """
    spread = _spread(influence)
    if spread is None:
        return _estimate(influence, value, None)
    half = spread.widened_t * spread.error
    ci95 = (value * np.exp(-half), value * np.exp(half)) if log else (value - half, value + half)
    return _estimate(influence, value, (float(min(ci95)), float(max(ci95))))


def p99(values: ArrayLike, unit: NDArray[np.integer]) -> Estimate | None:
    """99th percentile over tokens (the smallest value that 99 % do not exceed); None for fewer than 100 values.

    The interval is Woodruff's (1952): that of the share of tokens above it, carried over to the values that so many
    tokens exceed. It takes twenty effective units: with ten it holds 92 % where documents differ much. None also where
    its upper end lies above every token.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < MIN_VALUES_FOR_P99:
        return None
    ordered = np.sort(numbers)[::-1]
    above = int(np.floor((1 - 0.99) * len(ordered)))
    value = float(ordered[above])
    hits = by_unit(numbers >= value, unit)
    spread = _spread(hits, MIN_UNITS_FOR_P99)
    ci95 = None
    if spread is not None:
        share = (above + 1) / len(ordered)
        half = spread.t * (1 + WIDENED_P99 / effective_units(hits.counts)) * spread.error
        fewest, most = int(np.floor((share - half) * len(ordered))), int(np.ceil((share + half) * len(ordered)))
        if fewest >= 1:
            ci95 = (float(ordered[min(most, len(ordered) - 1)]), float(ordered[min(fewest, above)]))
    return Estimate(value, ci95, len(hits.counts), effective_units(hits.counts))


def median(values: ArrayLike) -> Estimate:
    """Median of independent units (ratios of paired runs): Hettmansperger and Sheather (1986), which assumes no shape.

    Between two pairs of ordered values whose binomial coverage encloses 95 %, interpolated; five units: the extremes.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    value = float(np.median(ordered))
    if count < MIN_UNITS:
        return Estimate(value, None, count, float(count))
    below = np.cumsum(_binomial_half(count))  # [k]: chance that at most k values lie below the median
    inner = 1
    while inner < count // 2 and 1 - 2 * below[inner] >= 0.95:
        inner += 1
    # 1-based depths: `inner` covers at least 95 %, `inner + 1` less
    outer_coverage, inner_coverage = 1 - 2 * below[inner - 1], 1 - 2 * below[inner]
    share = max(0.0, (outer_coverage - 0.95) / (outer_coverage - inner_coverage))
    move = (count - inner) * share / (inner + (count - 2 * inner) * share)
    low = (1 - move) * ordered[inner - 1] + move * ordered[inner]
    high = (1 - move) * ordered[count - inner] + move * ordered[count - inner - 1]
    return Estimate(value, (float(low), float(high)), count, float(count))


@dataclass(frozen=True)
class _Spread:
    """Standard error of a mean over units, its t, that t widened, and Σw³ / (Σw²)^1.5: skewness left of the units'."""

    error: float
    t: float
    widened_t: float
    skewness: float

    def shift(self, skewness: float) -> float:
        """Standard errors by which `skewness` of the units moves the ends: Cornish and Fisher's first term."""
        return skewness * self.skewness * (2 * self.t**2 + 1) / 6


def _spread(of: ByUnit, least: float = MIN_UNITS) -> _Spread | None:
    """None where the effective units are fewer than `least`, or a sum is not finite."""
    effective = effective_units(of.counts)
    if effective < least - 1e-9 or not np.isfinite(of.sums).all():
        return None
    weight = of.counts / of.counts.sum()
    squares = float((weight**2).sum())
    residual = of.sums / of.counts - of.mean
    error = float(np.sqrt((weight**2 * residual**2 / (1 - 2 * weight + squares)).sum()))
    t = _student(effective - 1)
    skewness = float((weight**3).sum() / squares**1.5)
    return _Spread(error=error, t=t, widened_t=t * (1 + WIDENED / effective), skewness=skewness)


def _student(degrees: float) -> float:
    """97.5th percentile of Student's t: Cornish and Fisher's expansion, within 0.03 % from four degrees up."""
    z, n = Z, degrees
    return float(
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _binomial_half(count: int) -> Floats:
    """[k] chance of k heads in `count` throws of a fair coin."""
    chances = np.array([1.0])
    for _ in range(count):
        chances = np.convolve(chances, [0.5, 0.5])
    return chances


def _estimate(of: ByUnit, value: float, ci95: tuple[float, float] | None) -> Estimate:
    return Estimate(value, ci95, len(of.counts), effective_units(of.counts))
