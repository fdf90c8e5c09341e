"""How far a stored weight may lie from the original: not at all in floating point, by the type's rounding otherwise.

The limits of a type are what libggml's quantizer was seen to do at worst on weights of nine distributions (normal to
Student's t with two degrees of freedom, columns and rows of very different size, an offset), plus a quarter: without
an importance matrix, and with one whose columns differ by a factor of exp(9).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FLOATS = ("F32", "F16", "BF16", "FP32", "FP16", "BF16")


class Limits(NamedTuple):
    """Relative errors, root mean square: of a tensor, of its worst block; and how much smaller or larger it may be."""

    tensor: float
    block: float
    smaller: float
    larger: float


PLAIN: dict[str, Limits] = {
    "Q8_0": Limits(0.015, 0.045, 0.002, 0.002),
    "Q6_K": Limits(0.04, 0.065, 0.002, 0.002),
    "Q5_1": Limits(0.07, 0.10, 0.003, 0.003),
    "Q5_0": Limits(0.11, 0.15, 0.005, 0.003),
    "Q5_K": Limits(0.065, 0.11, 0.004, 0.003),
    "Q4_1": Limits(0.14, 0.22, 0.004, 0.004),
    "Q4_0": Limits(0.18, 0.28, 0.015, 0.004),
    "Q4_K": Limits(0.13, 0.18, 0.007, 0.004),
    "IQ4_NL": Limits(0.15, 0.22, 0.008, 0.004),
    "IQ4_XS": Limits(0.15, 0.28, 0.01, 0.004),
    "Q3_K": Limits(0.24, 0.34, 0.025, 0.008),
    "IQ3_S": Limits(0.34, 0.50, 0.03, 0.06),
    "Q2_K": Limits(0.47, 0.85, 0.04, 0.01),
    # onnxruntime's MatMulNBits, rounded to nearest in blocks of 32
    "INT8": Limits(0.015, 0.045, 0.002, 0.002),
    "INT4": Limits(0.20, 0.32, 0.02, 0.02),
}
WEIGHTED: dict[str, Limits] = {
    "Q8_0": PLAIN["Q8_0"],
    "Q6_K": Limits(0.12, 0.45, 0.05, 0.004),
    "Q5_1": Limits(0.09, 0.55, 0.02, 0.004),
    "Q5_0": Limits(0.18, 0.65, 0.065, 0.004),
    "Q5_K": Limits(0.09, 0.60, 0.02, 0.004),
    "Q4_1": Limits(0.18, 0.75, 0.05, 0.004),
    "Q4_0": Limits(0.22, 0.68, 0.075, 0.004),
    "Q4_K": Limits(0.30, 0.85, 0.12, 0.004),
    "IQ4_NL": Limits(0.24, 0.70, 0.09, 0.004),
    "IQ4_XS": Limits(0.24, 0.90, 0.085, 0.004),
    "Q3_K": Limits(0.28, 0.65, 0.10, 0.008),
    "IQ3_S": Limits(0.60, 1.10, 0.35, 0.06),
    "IQ3_XXS": Limits(0.51, 1.00, 0.20, 0.03),
    "Q2_K": Limits(0.48, 0.95, 0.17, 0.01),
    "IQ2_S": Limits(0.81, 1.20, 0.42, 0.02),
    "IQ2_XS": Limits(0.83, 1.25, 0.44, 0.03),
    "IQ2_XXS": Limits(1.0, 1.50, 0.68, 0.03),
    "IQ1_M": Limits(0.82, 1.50, 0.43, 0.04),
    "IQ1_S": Limits(0.91, 1.40, 0.52, 0.06),
}
SMALL_BLOCK = 32
LARGE_BLOCK = 256
SMALL_BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "INT8", "INT4")
# Scales are float16: of blocks of values this small nothing is left, which changes nothing either.
UNDERFLOW = 2e-4
NEGLIGIBLE = 0.02
FEW_BLOCKS = 4.0
STANDARD_ERRORS = 6.0
EMPTY_ABOVE = 0.05  # of the tensor's size: a block of zeros that stood for more was lost


def difference(
    stored: NDArray[np.float32], original: NDArray[np.float32], type_name: str, *, weighted: bool = False
) -> str:
    """How a stored tensor differs from the original by more than its type's rounding, in words; "" where it does not.

    Both in one layout, rows of the last axis as they were quantized. `weighted`: an importance matrix may have been
    used. Of a floating-point type `original` must be what the cast gives: every bit counts.
    """
    if stored.shape != original.shape:
        return f"has the shape {list(stored.shape)}, not {list(original.shape)}"
    if type_name in FLOATS:
        return _unequal(stored, original)
    if not np.isfinite(stored).all():
        return f"({type_name}) holds {int(np.count_nonzero(~np.isfinite(stored)))} values that are not numbers"
    limits = (WEIGHTED if weighted or type_name not in PLAIN else PLAIN)[type_name]
    return _beyond(stored, original, type_name, limits)


def _unequal(stored: NDArray[np.float32], original: NDArray[np.float32]) -> str:
    same = stored == original
    count = int(same.size - np.count_nonzero(same))
    if count == 0:
        return ""
    # Not argmin of a million rows: the first one that differs, in the order of the file.
    at = np.unravel_index(int(np.argmin(same)), stored.shape)
    where = ", ".join(str(int(i)) for i in at)
    return (
        f"is not the model's: {count:,} of {same.size:,} values differ, first at [{where}]: {stored[at]:.9g} and not"
        f" {original[at]:.9g}{_scaled(stored, original)}"
    )


def _scaled(stored: NDArray[np.float32], original: NDArray[np.float32]) -> str:
    slope, rest = fit(stored, original)
    return f" ({slope:.3f} times as large, {rest:.2g} of its size beside that)" if np.isfinite(slope) else ""


def fit(stored: NDArray[np.float32], original: NDArray[np.float32]) -> tuple[float, float]:
    """The least-squares s of stored = s · original, and the size of what is left over that of the original."""
    x, y = original.reshape(-1), stored.reshape(-1)
    squares = float(np.dot(x, x))
    if squares == 0:
        return 1.0, float(np.abs(y).max(initial=0.0))
    slope = float(np.dot(x, y)) / squares
    rest = y - np.float32(slope) * x
    return slope, float(np.sqrt(np.dot(rest, rest) / squares))


def _beyond(stored: NDArray[np.float32], original: NDArray[np.float32], type_name: str, limits: Limits) -> str:
    size = float(np.sqrt(np.mean(np.square(original, dtype=np.float64))))
    error = stored - original
    relative = float(np.sqrt(np.mean(np.square(error, dtype=np.float64)))) / max(size, 1e-30)
    spare = min(UNDERFLOW, NEGLIGIBLE * size)
    width = SMALL_BLOCK if type_name in SMALL_BLOCKS else LARGE_BLOCK
    # A small tensor is as good as its few blocks; its scale is known to so many standard errors.
    few = min(1.0, FEW_BLOCKS / max(1.0, original.size / width) ** 0.5)
    most = limits.tensor + few * (limits.block - limits.tensor)
    chance = STANDARD_ERRORS * limits.tensor / original.size**0.5
    slope, rest = fit(stored, original)
    said = f"({type_name}) is not the model's: {slope:.3f} times as large, and {rest:.3g} of its size beside that"
    if relative > most + spare / max(size, 1e-30):
        return said
    if size > UNDERFLOW and not 1 - limits.smaller - chance <= slope <= 1 + limits.larger + chance:
        return said
    columns = original.shape[-1]
    if columns % width:
        return ""  # rows that end within a block: ONNX alone, whose tensors were compared as a whole
    errors = _block_sizes(error, width)
    sizes = _block_sizes(original, width)
    kept = _block_sizes(stored, width)
    lost = (kept == 0) & (sizes > EMPTY_ABOVE * size + spare)
    bad = lost | (errors > limits.block * sizes + spare)
    if not bad.any():
        return ""
    at = int(np.argmax(bad))
    row, block = divmod(at, columns // width)
    what = "zero" if lost[at] else f"off by {errors[at] / max(sizes[at], 1e-30):.2f} of its size"
    return (
        f"({type_name}) is not the model's: {int(bad.sum()):,} blocks differ, first in row {row}, columns from"
        f" {block * width}: {what}"
    )


def _block_sizes(values: NDArray[np.float32], width: int) -> NDArray[np.float64]:
    """Root mean square of each block, in the file's order."""
    blocks = values.reshape(-1, width)
    sizes: NDArray[np.float64] = np.sqrt(np.einsum("bw,bw->b", blocks, blocks, dtype=np.float64) / width)
    return sizes
