"""What a GGUF stores of a tensor: the converter's rounding, then libggml's own quantization, bit for bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgedistill.gguf import ggml
from edgedistill.models.streaming import as_stored
from edgedistill.quantization.mixes import UNQUANTIZED

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def packed(values: Floats, type_name: str, importance: Floats | None, *, tensor: str, threads: int = 1) -> Bytes:
    """The bytes [rows, bytes of a row] of a tensor as the converter and llama.cpp store it, columns as in the GGUF.

    A quantized one is rounded to float16 first. Rows are quantized each by itself, so the order in which a family
    stores them does not matter.
    """
    if type_name in UNQUANTIZED:
        return as_stored(values, type_name, tensor=tensor).view(np.uint8)  # type: ignore[arg-type]
    halved = as_stored(values, "F16", tensor=tensor).astype(np.float32)
    return ggml.quantize(halved, type_name, importance, threads=threads)


def gguf_values(values: Floats, type_name: str, importance: Floats | None, *, tensor: str, threads: int = 1) -> Floats:
    """A tensor as it is computed with: `packed`, and dequantized."""
    data = packed(values, type_name, importance, tensor=tensor, threads=threads)
    return ggml.dequantize(data, type_name, values.shape)


def as_converted(values: Floats, change: str) -> Floats:
    """The values as the converter writes them (see models/streaming.py); the order of rows does not matter here."""
    if change == "transposed":
        return np.ascontiguousarray(values.T)
    return values + np.float32(1) if change == "plus_one" else values


def as_in_torch(values: Floats, change: str) -> Floats:
    """The inverse of `as_converted`."""
    if change == "transposed":
        return np.ascontiguousarray(values.T)
    return values - np.float32(1) if change == "plus_one" else values
