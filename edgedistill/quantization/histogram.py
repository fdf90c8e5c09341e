"""Ranges of activations from what is streamed past: minimum and maximum, then counts in fixed bins. Nothing is kept.

Two passes over the samples: the first finds each tensor's extremes, the second counts in bins over [-a, a], where a is
the largest absolute value of the first. numpy alone: this runs in the child that holds the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# Bins over [-a, a]: 2048 a side, as in TensorRT's calibrator (S. Migacz, 8-bit Inference with TensorRT, GTC 2017).
BINS = 4096
HALF = BINS // 2
PERCENTILE = 99.99
# The shortest window that entropy tries, in bins a side: one for each level of 7 bits.
FIRST_WINDOW = 128
WINDOW_STEP = 8
CHUNK = 1 << 16
SMOOTHING = 1e-4

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")


@dataclass
class Observed:
    """What one tensor was seen to hold. `amplitude`: of the bins; None until the second pass."""

    low: float = float("inf")
    high: float = float("-inf")
    values: int = 0
    finite: bool = True
    amplitude: float | None = None
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def widen(self, values: NDArray[Any]) -> None:
        """First pass: extremes."""
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        self.finite = self.finite and bool(np.isfinite(low) and np.isfinite(high))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.values += values.size

    def begin_bins(self) -> None:
        """Between the passes: fix the bins. The amplitude is rounded up, so that rounding noise in it moves no bin."""
        largest = max(abs(self.low), abs(self.high)) if self.values and self.finite else 0.0
        self.amplitude = rounded_up(largest)

    def count(self, values: NDArray[Any]) -> None:
        """Second pass: bin i holds the values in [-a + i w, -a + (i + 1) w), the last one a too."""
        if not self.amplitude:
            return
        flat = values.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK].astype(np.float64)
            index = np.floor((part / self.amplitude + 1.0) * HALF).astype(np.int64)
            self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)


def rounded_up(value: float) -> float:
    """The next number with 10 bits of mantissa."""
    if value <= 0 or not np.isfinite(value):
        return 0.0
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.ceil(mantissa * 1024) / 1024, exponent))


def real(values: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[Any]:
    """Without positions that are padding: of [B, T, ...] or [B T, ...] with a mask [B, T] of 0 and 1."""
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return values
    kept = values
    if values.ndim >= 2 and values.shape[:2] == mask.shape:
        kept = values[mask.astype(bool)]
    elif values.ndim >= 2 and values.shape[0] == mask.size:
        kept = values[mask.reshape(-1).astype(bool)]
    return kept


def chosen_range(observed: Observed, method: Method, *, symmetric: bool) -> tuple[float, float]:
    """The range [low, high] to quantize, 0 in it: what is beyond is clipped. `symmetric`: about 0, as int8 takes it."""
    low, high = min(0.0, observed.low), max(0.0, observed.high)
    if method == "minmax" or not observed.amplitude:
        return low, high
    if method == "percentile":
        below, above = percentile_range(observed.counts, observed.amplitude, PERCENTILE)
        return max(low, min(0.0, below)), min(high, max(0.0, above))
    threshold = entropy_threshold(observed.counts, observed.amplitude, low=low, high=high, symmetric=symmetric)
    return max(low, -threshold), min(high, threshold)


def percentile_range(counts: NDArray[np.int64], amplitude: float, percentile: float) -> tuple[float, float]:
    """The values between which `percentile` % of all lie, the rest cut in halves; linear within a bin."""
    edges = np.linspace(-amplitude, amplitude, len(counts) + 1)
    total = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    cut = (100 - percentile) / 200 * total[-1]
    below = float(np.interp(cut, total, edges))
    above = float(np.interp(total[-1] - cut, total, edges))
    return below, above


def entropy_threshold(
    counts: NDArray[np.int64], amplitude: float, *, low: float, high: float, symmetric: bool, levels: int = 255
) -> float:
    """The t of least KL(P ‖ Q): P what lies in [-t, t], the rest clipped onto its ends, Q the same in `levels` steps.

    An asymmetric type spreads its levels over the part of [-t, t] that holds values, a symmetric one over all of it.
    """
    width = 2 * amplitude / len(counts)
    half = len(counts) // 2
    first = 0 if symmetric else max(0, int(np.floor((low + amplitude) / width)))
    last = len(counts) if symmetric else min(len(counts), max(half + 1, int(np.ceil((high + amplitude) / width))))
    best, best_t = np.inf, amplitude
    windows = [*range(FIRST_WINDOW, half, WINDOW_STEP), half]
    for window in windows:
        start, end = max(first, half - window), min(last, half + window)
        divergence = _divergence(counts, start, end, levels)
        if divergence < best:
            best, best_t = divergence, window * width
    return best_t


def _divergence(counts: NDArray[np.int64], start: int, end: int, levels: int) -> float:
    inside = counts[start:end].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    if clipped.sum() == 0:
        return float("inf")
    level = np.arange(len(inside)) * levels // len(inside) if len(inside) > levels else np.arange(len(inside))
    filled = clipped > 0
    sums = np.bincount(level, weights=inside, minlength=int(level[-1]) + 1)
    share = np.bincount(level, weights=filled.astype(np.float64), minlength=int(level[-1]) + 1)
    spread = np.where(filled, (sums / np.maximum(share, 1))[level], 0.0)
    p, q = smoothed(clipped), smoothed(spread)
    if p is None or q is None:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


def smoothed(counts: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """A little of what the filled bins hold moved into the empty ones; None where too little is filled."""
    empty = counts == 0
    zeros = int(empty.sum())
    filled = len(counts) - zeros
    if filled == 0:
        return None
    taken = SMOOTHING * zeros / filled
    if taken >= 1.0:
        return None
    return np.where(empty, SMOOTHING, counts - taken)


def observe(observed: Mapping[str, Observed], found: Mapping[str, NDArray[Any]], mask: NDArray[Any] | None) -> None:
    """One run's tensors into what is seen of each: extremes in the first pass, counts once the bins are fixed."""
    for name, seen in observed.items():
        values = real(found[name], mask)
        if seen.amplitude is None:
            seen.widen(values)
        else:
            seen.count(values)
