"""Do the intervals of edgedistill/statistics.py hold the truth 95 times in 100, where the truth is known?

Every function is called on simulated units: 3 to 100 documents of equal and of lognormal lengths, with normal, heavy-tailed
(Student's t, three degrees) and skewed effects of documents, exponential tokens in runs of four; repeats of a benchmark with
skewed and heavy-tailed times; pairs of runs. Coverage is of the intervals that there are; below, 'too few' has its own column.
The percentile bootstrap over documents is simulated beside them, on the settings that tests/test_statistics.py shows.

--check: coverage between 93 and 97 % in every setting from five effective units up; a gate whose truth is its threshold passes
at most 3.5 % of the time. A setting within half a point of a bound is simulated with --fine trials.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Bound, finish, parser
from numpy.typing import NDArray

from edgedistill import statistics
from edgedistill.statistics import ByUnit, Estimate

Floats = NDArray[np.float64]
Rng = np.random.Generator
RUN = 4  # tokens that share one draw: correlated within a document
TOKENS = 200  # a document, on average
UNITS = (3, 5, 6, 8, 10, 20, 40, 100)
LENGTHS = {"equal": 0.0, "lognormal 0.5": 0.5, "lognormal 1": 1.0, "lognormal 1.5": 1.5}
LOWEST, HIGHEST, GATE = 0.93, 0.97, 0.035


@dataclass(frozen=True)
class Setting:
    """What is simulated: `draw(rng, counts)` gives the estimate of one set of units; `truth` is what it estimates."""

    figure: str
    effects: str
    truth: float
    draw: Callable[[Rng, Floats], Estimate | None]
    gate: bool = False
    lengths: tuple[str, ...] = tuple(LENGTHS)
    units: tuple[int, ...] = UNITS


@dataclass(frozen=True)
class Covered:
    """Of `trials`: shares that have no interval, and of those that have one: hold the truth, lie below, lie above."""

    trials: int
    too_few: float
    covered: float
    below: float
    above: float


def lengths(rng: Rng, units: int, spread: float) -> Floats:
    """Tokens of each document, in whole runs."""
    if spread == 0:
        return np.full(units, float(TOKENS))
    return RUN * np.maximum(1, np.round(TOKENS / RUN * np.exp(spread * rng.normal(size=units) - spread**2 / 2)))


def effect(rng: Rng, kind: str, units: int) -> Floats:
    """Documents' own effects, mean 0 and standard deviation 1."""
    if kind == "normal":
        return rng.normal(size=units)
    if kind == "heavy":
        return rng.standard_t(3, size=units) / np.sqrt(3)
    if kind == "skewed":  # gamma of shape 4: skewness 1
        return (rng.gamma(4, size=units) - 4) / 2
    if kind == "skewed left":
        return -effect(rng, "skewed", units)
    if kind == "very skewed":  # lognormal of 0.5: skewness 1.75
        return (np.exp(0.5 * rng.normal(size=units) - 0.125) - 1) / np.sqrt(np.exp(0.25) - 1)
    if kind == "exponential":  # skewness 2
        return rng.exponential(size=units) - 1
    raise ValueError(kind)


def noise(rng: Rng, counts: Floats, shape: float) -> Floats:
    """Sum over each document of gamma tokens of mean 1 in runs: exactly gamma. `shape` 1: exponential."""
    return RUN / shape * rng.gamma(shape * counts / RUN)


def positive(kind: str, spread: float, shape: float) -> Callable[[Rng, Floats], ByUnit]:
    """Losses or divergences of mean 1: a document's tokens are scaled by its effect."""

    def draw(rng: Rng, counts: Floats) -> ByUnit:
        scale = np.maximum(0.02, 1 + spread * effect(rng, kind, len(counts)))
        return ByUnit(scale * noise(rng, counts, shape), counts)

    return draw


def retention(kind: str) -> Callable[[Rng, Floats], Estimate]:
    """Documents lose 0.1 nats on average, 0.1 apart; tokens lose 0.4 apart."""

    def draw(rng: Rng, counts: Floats) -> Estimate:
        lost = counts * 0.1 * (1 + effect(rng, kind, len(counts)))
        lost += 0.4 * np.sqrt(RUN * counts) * rng.normal(size=len(counts))
        reference = 3 * noise(rng, counts, 1)
        return statistics.perplexity_ratio(ByUnit(reference, counts), ByUnit(reference + lost, counts))

    return draw


def agreement(share: float, concentration: float) -> Callable[[Rng, Floats], Estimate]:
    def draw(rng: Rng, counts: Floats) -> Estimate:
        own = rng.beta(share * concentration, (1 - share) * concentration, len(counts))
        return statistics.proportion(ByUnit(RUN * rng.binomial((counts / RUN).astype(int), own).astype(float), counts))

    return draw


def divergence_ratio(rng: Rng, counts: Floats) -> Estimate:
    """Two artifacts' divergences of the same documents: they share the document's effect."""
    shared = np.exp(0.5 * rng.normal(size=len(counts)))
    own = np.exp(0.2 * rng.normal(size=(2, len(counts))))
    one, other = (ByUnit(scale * shared * noise(rng, counts, 0.5), counts) for scale in own)
    return statistics.ratio_of_means(one, other)


def difference(rng: Rng, counts: Floats) -> Estimate:
    one = positive("skewed", 0.3, 1)(rng, counts)
    other = ByUnit(one.sums + 0.3 * np.sqrt(RUN * counts) * rng.normal(size=len(counts)), counts)
    return statistics.difference(one, other)


def speed(kind: str, spread: float) -> Callable[[Rng, Floats], Estimate]:
    """Tokens a second where a repeat of 64 tokens takes a second on average."""

    def draw(rng: Rng, counts: Floats) -> Estimate:
        ms = 1e3 * np.maximum(0.3, 1 + spread * effect(rng, kind, len(counts)))
        return statistics.rate(ms, np.full(len(counts), 64.0))

    return draw


def pairs(kind: str) -> Callable[[Rng, Floats], Estimate]:
    """Ratios of paired runs about a median of 1."""
    middle = {"normal": 0.0, "heavy": 0.0, "very skewed": float((np.exp(-0.125) - 1) / np.sqrt(np.exp(0.25) - 1))}[kind]

    def draw(rng: Rng, counts: Floats) -> Estimate:
        return statistics.median(1 + 0.1 * (effect(rng, kind, len(counts)) - middle))

    return draw


TAIL_SPREAD = 1.5  # standard deviation of log KL over a document's tokens


def tail(spread: float) -> Callable[[Rng, Floats], Estimate | None]:
    """99th percentile of lognormal divergences whose documents' levels lie `spread` apart in their logarithm."""

    def draw(rng: Rng, counts: Floats) -> Estimate | None:
        owner = np.repeat(np.arange(len(counts)), counts.astype(int))
        level = spread * rng.normal(size=len(counts))
        return statistics.p99(np.exp(level[owner] + TAIL_SPREAD * rng.normal(size=len(owner))), owner)

    return draw


def settings() -> Iterator[Setting]:
    yield from (
        Setting("perplexity", kind, float(np.exp(1.0)), _then(positive(kind, 0.25, 1), statistics.perplexity))
        for kind in ("normal", "heavy", "skewed", "skewed left")
    )
    yield from (
        Setting("mean KL", f"{kind}, tokens skewed", 1.0, _then(positive(kind, 0.5, 0.25), statistics.positive_mean))
        for kind in ("normal", "skewed", "very skewed")
    )
    for share, concentration in ((0.8, 10), (0.5, 20), (0.97, 50)):
        yield Setting("agreement", f"beta about {share}", share, agreement(share, concentration))
    for kind in ("normal", "heavy", "skewed", "skewed left"):
        gate = kind != "skewed left"  # that one fails the honest too often, and never passes the wrong
        yield Setting("retention", kind, float(np.exp(-0.1)), retention(kind), gate=gate)
    yield Setting("ratio of KL", "lognormal 0.2 apart", 1.0, divergence_ratio)
    yield Setting("difference", "normal", 0.0, difference)
    repeats: Any = {"lengths": ("equal",), "units": (3, 5, 7, 10, 20, 30)}
    for kind, spread in (
        ("normal", 0.05),
        ("heavy", 0.05),
        ("skewed", 0.1),
        ("very skewed", 0.2),
        ("exponential", 0.3),
    ):
        yield Setting("rate", f"{kind}, {spread:.0%}", 64.0, speed(kind, spread), **repeats)
    for kind in ("normal", "heavy", "very skewed"):
        yield Setting("median of pairs", kind, 1.0, pairs(kind), lengths=("equal",), units=(3, 5, 8, 12, 20, 30))
    for spread in (0.2, 0.5):
        truth = float(np.exp(2.3263478740408408 * np.hypot(spread, TAIL_SPREAD)))
        yield Setting("p99 of KL", f"{spread} apart", truth, tail(spread), units=(10, 20, 40, 100))


def _then(
    units: Callable[[Rng, Floats], ByUnit], function: Callable[[ByUnit], Estimate]
) -> Callable[[Rng, Floats], Estimate]:
    return lambda rng, counts: function(units(rng, counts))


def simulate(setting: Setting, length: str, units: int, trials: int, seed: int = 0) -> Covered:
    """The same trials for the same arguments."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{setting.figure}{setting.effects}{length}{units}".encode())))
    few = covered = below = above = 0
    for _ in range(trials):
        found = setting.draw(rng, lengths(rng, units, LENGTHS[length]))
        if found is None or found.ci95 is None:
            few += 1
            continue
        below += found.ci95[1] < setting.truth
        above += found.ci95[0] > setting.truth
        covered += found.ci95[0] <= setting.truth <= found.ci95[1]
    with_interval = max(1, trials - few)
    return Covered(trials, few / trials, covered / with_interval, below / with_interval, above / with_interval)


def refined(setting: Setting, length: str, units: int, trials: int, fine: int) -> Covered:
    """With `fine` trials where the first tell that a bound is near."""
    found = simulate(setting, length, units, trials)
    if found.too_few < 0.9 and (
        not LOWEST + 0.005 < found.covered < HIGHEST - 0.005 or (setting.gate and found.above > GATE - 0.005)
    ):
        return simulate(setting, length, units, fine, seed=1)
    return found


def rows_of(asked: argparse.Namespace) -> Iterator[tuple[Setting, str, int, Covered]]:
    for setting in settings():
        for length in setting.lengths:
            for units in setting.units:
                yield setting, length, units, refined(setting, length, units, asked.trials, asked.fine)


def bounds_of(found: Sequence[tuple[Setting, str, int, Covered]], least: float) -> list[Bound]:
    """Of the settings in which at least `least` of the trials have an interval."""
    told = [(setting, covered) for setting, _, _, covered in found if 1 - covered.too_few >= least]
    gates = [covered.above for setting, covered in told if setting.gate]
    few = [covered.too_few for _, _, units, covered in found if units < statistics.MIN_UNITS]
    return [
        Bound("coverage, lowest of all settings", min(covered.covered for _, covered in told), ">=", LOWEST),
        Bound("coverage, highest of all settings", max(covered.covered for _, covered in told), "<=", HIGHEST),
        Bound("a gate at its threshold passes, most of all settings", max(gates), "<=", GATE),
        Bound("intervals below five units, share of trials", 1 - min(few), "<=", 0.0),
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--trials", type=int, default=4000)
    arguments.add_argument("--fine", type=int, default=20_000)
    asked = arguments.parse_args()
    found = list(rows_of(asked))
    finish(
        "interval_coverage",
        asked,
        figures={
            f"{setting.figure}, {setting.effects}, {length}, {units}": vars(covered)
            for setting, length, units, covered in found
        },
        header=("figure", "effects", "lengths", "units", "too few", "covered", "truth below", "truth above"),
        rows=[
            (setting.figure, setting.effects, length, str(units), f"{c.too_few:.1%}", *_shares(c))
            for setting, length, units, c in found
        ],
        bounds=bounds_of(found, least=0.25),
        notes=[
            "Coverage is of the intervals that there are; settings in which fewer than a quarter of the trials have one do not count."
        ],
    )


def _shares(covered: Covered) -> tuple[str, str, str]:
    if covered.too_few == 1:
        return "", "", ""
    return f"{covered.covered:.1%}", f"{covered.above:.1%}", f"{covered.below:.1%}"


if __name__ == "__main__":
    main()
