"""How golden logits are compared: compact rows, one statistic each for what can go wrong, and what is let pass.

Legend: R rows of logits (a row is the prediction after a token), V vocabulary, K best ids, P ids probed at equal
distances, S = K + P.

A largest difference alone tells little: among 100,000 logits one is always far off where kernels round differently.
Means over all rows of all prompts have far less noise, and each sees what another does not: `rms` any change of
direction, `scale` one of size (a norm of the output), `kl` one among the likely tokens, `rank` one of order whatever
the size.

Differences seen (llama.cpp and onnxruntime-genai, four models of 0.26 to 21M parameters, F16 to Q4_0, FP32 to INT4,
x86-64 with AVX-512): the same kernels with other thread counts, none in any bit. Other kernels (extra buffers on and
off, batches of other shapes): rms at most 0.009, a logit 0.11 standard deviations, scale 0.0006. The rounding of
activations left out altogether (torch on the dequantized weights), which is more than a change of kernel can do: rms
0.027, a logit 0.2, scale 0.0008; of floating-point weights 0.0013, 0.013 and 0.00005. The floors for any machine are
above that, since ARM's kernels, GPUs and other builds were not at hand; the floor for kernels that are alike leaves
room for the libraries beside them (libm). RoPE with base 100,000 instead of 10,000 moves rms by 0.15 and more, a
layer's q of zeros or swapped heads by 0.09 to 0.45, an output norm × 0.9 scale by 0.1.

What a runtime was seen to differ by is the maker's word, which nobody can check on another machine. So it is believed
up to a floor and no further, and no tolerance is more than 1.5 floors: of quantized weights rms 0.045, scale 0.0075,
which is half of the least of these faults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgedistill.records.golden import PROBED_IDS, TOP_IDS, DamageSeen, GoldenOutput, OutputName

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
Statistics = dict[OutputName, float]

FLOATS = ("F32", "F16", "BF16", "FP32", "FP16")
MULTIPLE_OF_SEEN = 4.0
# `logits` in standard deviations of a row's logits over the vocabulary; `rms` and `scale` are relative to 1.
FLOOR_QUANTIZED: Mapping[str, float] = {"logits": 0.25, "rms": 0.03, "scale": 0.005}
FLOOR_FLOAT: Mapping[str, float] = {"logits": 0.02, "rms": 0.002, "scale": 0.0005}
FLOOR_ALIKE: Mapping[str, float] = {"logits": 0.001, "rms": 1e-4, "scale": 2e-5}
# Where a runtime disagrees with itself by more than this many floors, no tolerance tells right from wrong; three times
# the worst that was seen. A manifest that says more is refused: a liar would let a wrong model pass with it.
MAX_SEEN = 1.0
# The most that any tolerance can be, in floors, whatever was seen.
MAX_TOLERANCE = 1.5
COMPARED: tuple[OutputName, ...] = ("logits", "rms", "scale", "kl", "rank")
# Rows whose best token must be the recorded one, or one of the few nearest; of all prompts. Fewer prove nothing. Rows
# that leave one token alone are not demanded: a model of flat logits has none, and there the statistics tell.
MIN_ROWS_COMPARED = 8
BLOCK_ROWS = 16  # of logits, in float64 at a time


@dataclass(frozen=True)
class Compact:
    """What is kept of logits [R, V]: `ids_RK` best ids, best first; `rows` [R, 1 + K + P]: the log of the sum of
    exponentials, the logits of the best ids and of the probed ones."""

    ids_RK: Ids
    rows: Floats

    @property
    def margins_R(self) -> NDArray[np.float64]:
        """By how much the best token leads."""
        if self.ids_RK.shape[1] < 2:
            return np.full(len(self.rows), np.inf)
        return self.rows[:, 1].astype(np.float64) - self.rows[:, 2]

    def may_be_best(self, tolerance: float) -> NDArray[np.bool_]:
        """[R, K] which of the best ids could be best after a tolerated difference; all of a row: nothing is known."""
        best_RK = self.rows[:, 1 : 1 + self.ids_RK.shape[1]].astype(np.float64)
        found: NDArray[np.bool_] = best_RK >= best_RK[:, :1] - 2 * tolerance
        return found

    def part(self, start: int, stop: int) -> Compact:
        return Compact(self.ids_RK[start:stop], self.rows[start:stop])


def probed_ids(vocab_size: int) -> NDArray[np.int64]:
    """[P] ids at equal distances."""
    count = min(PROBED_IDS, vocab_size)
    return np.arange(count, dtype=np.int64) * vocab_size // count


def compact(logits_RV: Floats) -> Compact:
    """The rows as they are kept; ties go to the smaller id."""
    top = min(TOP_IDS, logits_RV.shape[1])
    ids_RK = np.stack([_best_ids(row_V, top) for row_V in logits_RV])
    return Compact(ids_RK, _rows(logits_RV, ids_RK))


def _best_ids(row_V: Floats, count: int) -> Ids:
    """[count] as a stable sort of all has them: best first, of equal ones the smaller id, NaN last."""
    if np.isnan(row_V).any():
        return np.argsort(-row_V, kind="stable")[:count].astype(np.int32)
    least = np.partition(row_V, len(row_V) - count)[len(row_V) - count]
    ids = np.flatnonzero(row_V >= least)
    return ids[np.argsort(-row_V[ids], kind="stable")[:count]].astype(np.int32)


def _rows(logits_RV: Floats, ids_RK: Ids) -> Floats:
    best_RK = np.take_along_axis(logits_RV, ids_RK.astype(np.int64), axis=1)
    probed_RP = logits_RV[:, probed_ids(logits_RV.shape[1])]
    return np.concatenate([_log_sum(logits_RV)[:, None], best_RK, probed_RP], axis=1).astype(np.float32)


def _log_sum(logits_RV: Floats) -> NDArray[np.float64]:
    found = np.empty(len(logits_RV))
    for start in range(0, len(logits_RV), BLOCK_ROWS):
        rows = logits_RV[start : start + BLOCK_ROWS].astype(np.float64)
        largest = rows.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            found[start : start + BLOCK_ROWS] = np.log(np.exp(rows - largest).sum(axis=1)) + largest[:, 0]
    return found


def statistics(expected: Sequence[Compact], found: Sequence[Floats]) -> Statistics:
    """Every statistic over all rows: `expected` as kept, `found` [R, V] each; infinite where a value is no number.

    `rms`: the root mean square difference of logits, each row's mean taken off, ÷ that of the expected ones. `scale`:
    how far the regression of found on expected logits is from 1. `kl`: mean nats of the expected from the found
    distribution over the K best tokens and the rest as one. `rank`: 1 − the mean rank correlation of a row's S logits.
    """
    pairs = [(kept.rows, _rows(logits, kept.ids_RK)) for kept, logits in zip(expected, found, strict=True)]
    top = expected[0].ids_RK.shape[1]
    before, after = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return dict.fromkeys(COMPARED, math.inf)
    ours_RS, theirs_RS = before[:, 1:], after[:, 1:]
    centred, moved = (side - side.mean(axis=1, keepdims=True) for side in (ours_RS, theirs_RS))
    power = max(float((centred**2).sum()), 1e-30)
    return {
        "logits": float(np.abs(theirs_RS - ours_RS).max()),
        "rms": math.sqrt(float(((moved - centred) ** 2).sum()) / power),
        "scale": abs(float((moved * centred).sum()) / power - 1),
        "kl": max(0.0, float(_kl(before, after, top).mean())),
        "rank": max(0.0, float((1 - _rank_correlation(ours_RS, theirs_RS)).mean())),
    }


def _kl(before: NDArray[np.float64], after: NDArray[np.float64], top: int) -> NDArray[np.float64]:
    """[R] nats."""
    log_p, log_q = (side[:, 1 : 1 + top] - side[:, :1] for side in (before, after))
    rest_p, rest_q = (np.maximum(1e-12, 1 - np.exp(side).sum(axis=1)) for side in (log_p, log_q))
    found: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
    return found


def _rank_correlation(ours_RS: NDArray[np.float64], theirs_RS: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R] Spearman's, of the order; equal values keep their places, as both sides hold the same ids."""
    ranks = [np.argsort(np.argsort(side, axis=1, kind="stable"), axis=1) for side in (ours_RS, theirs_RS)]
    one, other = (side - (side.shape[1] - 1) / 2 for side in ranks)
    power = np.maximum(1e-30, (one**2).sum(axis=1))
    found: NDArray[np.float64] = (one * other).sum(axis=1) / power
    return found


def scale_of(last_V: Sequence[Floats]) -> float:
    """The mean standard deviation of the logits after the prompts that are kept."""
    return float(np.mean([one.std() for one in last_V]))


def floors(quantization: str, scale: float) -> tuple[Statistics, Statistics]:
    """What is let pass at least: on any machine, and where the kernels are alike. `scale`: see GoldenOutput."""
    wide = FLOOR_FLOAT if quantization in FLOATS else FLOOR_QUANTIZED
    return _floor(wide, scale), _floor(FLOOR_ALIKE, scale)


def _floor(of: Mapping[str, float], scale: float) -> Statistics:
    # Noise of `rms` moves a log probability by rms × scale, and nats and ranks by about its square.
    noise = (of["rms"] * max(scale, 1.0)) ** 2
    return {
        "logits": of["logits"] * scale,
        "rms": of["rms"],
        "scale": of["scale"],
        "kl": noise,
        "rank": 4 * of["rms"] ** 2 + 1e-6,
    }


def outputs(quantization: str, scale: float, seen: Statistics, seen_alike: Statistics) -> list[GoldenOutput]:
    """The tolerances of what was seen: one rule, when they are made and when they are replayed."""
    wide, alike = floors(quantization, scale)

    def tolerance(largest: float, floor: float) -> float:
        return max(floor, min(MULTIPLE_OF_SEEN * largest, MAX_TOLERANCE * floor))

    found = [_exact("tokens", "token ids are equal or wrong")]
    for name in COMPARED:
        found.append(
            GoldenOutput(
                name=name,
                tolerance=tolerance(seen[name], wide[name]),
                tolerance_alike=tolerance(seen_alike[name], alike[name]),
                largest_seen=seen[name],
                seen_alike=seen_alike[name],
                scale=scale if name == "logits" else None,
                derivation=f"{MULTIPLE_OF_SEEN:g} × largest_seen, at least {wide[name]:.3g} and at most "
                f"{MAX_TOLERANCE * wide[name]:.3g}; where runtime and kernels are those of the maker, "
                f"{MULTIPLE_OF_SEEN:g} × seen_alike, at least {alike[name]:.3g} and at most "
                f"{MAX_TOLERANCE * alike[name]:.3g}",
            )
        )
    found.append(
        _exact(
            "greedy",
            "the best id of a row is one of those within twice the logits' tolerance of the recorded best, which is "
            "alone where it leads by more; each id decoded alone is within twice the tolerance of the best of a batch",
        )
    )
    return found


def _exact(name: OutputName, derivation: str) -> GoldenOutput:
    return GoldenOutput(
        name=name, tolerance=0, tolerance_alike=0, largest_seen=0, seen_alike=0, derivation=derivation
    )  # fmt: skip


def too_much_seen(quantization: str, scale: float, seen: Statistics, seen_alike: Statistics) -> list[str]:
    """The statistics by which ways to compute the same differ so much that nothing is told from right."""
    wide, alike = floors(quantization, scale)
    sides = (("", seen, wide), (" with other thread counts alone", seen_alike, alike))
    return [
        f"{name} differ by {of[name]:.3g}{how}, and {MAX_SEEN * floor[name]:.3g} is the most that can be"
        for how, of, floor in sides
        for name in COMPARED
        if not of[name] <= MAX_SEEN * floor[name]
    ]


def least_damage(logits: GoldenOutput, seen: DamageSeen) -> float:
    """What damaged tokens must do to the logits of a prompt that is kept, ÷ the tolerance.

    Where only kernels that are alike tell them, at least twice what batches of other shapes do.
    """
    if seen == "anywhere":
        return 1.0
    return max(logits.tolerance_alike, 2 * logits.largest_seen) / logits.tolerance


def largest_of(several: Sequence[Statistics]) -> Statistics:
    """The largest of each; 0 where there is none."""
    return {name: max((one[name] for one in several), default=0.0) for name in COMPARED}
