"""The values that onnxruntime's weight formats store: MatMulNBits' blocks, and the integers of QDQ graphs.

Both call what onnxruntime's own quantizers call, so that a weight rounded here is the weight in the file, bit for bit.
Legend: R rows (a torch weight's outputs), C columns (its inputs).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.onnx.dequantize import unpack

BLOCK_SIZE = 32  # as onnx/decoder.py asks the builder for
BITS = (4, 8)


def matmul_nbits_values(
    values_RC: NDArray[np.float32], bits: int, *, block_size: int = BLOCK_SIZE, symmetric: bool = True
) -> NDArray[np.float32]:
    """[R, C] as MatMulNBits holds it: blocks of `block_size` columns of a row, the last one padded with zeros.

    The quantizer is onnxruntime's (`quantize_matmul_4bits`, `quantize_matmul_8bits`), which the onnxruntime-genai
    builder uses in its default method. Raises UserError for other bits and for values that are not finite.
    """
    packed, scales, zero_points = matmul_nbits_stored(values_RC, bits, block_size=block_size, symmetric=symmetric)
    columns = values_RC.shape[1]
    return unpack(packed, scales, None if symmetric else zero_points, columns=columns, bits=bits, block_size=block_size)


def qdq_values(
    values: NDArray[np.float32],
    *,
    axis: int | None,
    signed: bool = True,
    symmetric: bool = True,
    reduce_range: bool = False,
) -> NDArray[np.float32]:
    """`values` as a QDQ graph stores an INT8 weight and its DequantizeLinear gives it back, (q − zero point) · scale.

    `axis`: the channels, each with its own scale; None: one scale. `signed`: int8, else uint8. `reduce_range`: 7 bits,
    for x86 without VNNI. onnxruntime's static quantizer makes weights by channel symmetric unless an override says
    otherwise; the arithmetic is its quant_utils'. UserError where something is not finite.
    """
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import quantize_data

    _require_finite(values)
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    out = np.empty_like(values, dtype=np.float32)
    channels = [slice(None)] if axis is None else range(values.shape[axis])
    for channel in channels:
        where = (Ellipsis,) if axis is None else (*(slice(None),) * axis, channel)
        part = np.ascontiguousarray(values[where], dtype=np.float32)
        zero_point, scale, stored = quantize_data(part, kind, symmetric, reduce_range=reduce_range)
        difference = np.asarray(stored).astype(np.int32) - np.asarray(zero_point).astype(np.int32)
        out[where] = difference.astype(np.float32).reshape(part.shape) * np.float32(scale)
    return out


def qdq_stored(
    values: NDArray[np.float32], *, axis: int, reduce_range: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int8]]:
    """int8 weights about zero with a scale for each entry of `axis`: integers, scales, zero points (all 0).

    All channels at once, with the arithmetic of `qdq_values`, which takes them one by one: the same bits.
    """
    _require_finite(values)
    largest = 64 if reduce_range else 127
    others = tuple(i for i in range(values.ndim) if i != axis)
    highest = np.abs(values).max(axis=others, initial=0.0).astype(np.float64)
    scales = (2 * highest / (2 * largest)).astype(np.float32)
    scales[2 * highest / (2 * largest) < np.finfo(np.float32).tiny] = 1.0
    shape = [1] * values.ndim
    shape[axis] = -1
    stored = np.clip((values / scales.reshape(shape)).round(), -128, 127).astype(np.int8)
    return stored, scales, np.zeros(len(scales), dtype=np.int8)


def matmul_nbits_stored(
    values_RC: NDArray[np.float32], bits: int, *, block_size: int = BLOCK_SIZE, symmetric: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """What `matmul_nbits_values` gives, as it is stored: [R, blocks, block bytes], scales [R, blocks], zero points.

    `symmetric`: the zero point is 2^(bits − 1), and need not be stored. UserError as there.
    """
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

    if bits not in BITS:
        raise UserError(f"MatMulNBits of {bits} bits", "use 4 or 8")
    _require_finite(values_RC)
    rows, columns = values_RC.shape
    blocks = -(-columns // block_size)
    per_byte = 8 // bits
    # onnxruntime takes it as MatMul does, [in, out], whole blocks
    padded_CR = np.zeros((blocks * block_size, rows), dtype=np.float32)
    padded_CR[:columns] = values_RC.T
    packed = np.zeros((rows, blocks, block_size // per_byte), dtype=np.uint8)
    zero_points = np.zeros((rows, -(-blocks // per_byte)), dtype=np.uint8)
    scales = np.zeros((rows, blocks), dtype=np.float32)
    quantize = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    quantize(packed, padded_CR, scales, zero_points, block_size, rows, columns, symmetric)
    return packed, scales, zero_points


def decoder_values(values: NDArray[np.float32], kind: Literal["INT4", "INT8", "FP32"] | str) -> NDArray[np.float32]:
    """A decoder's weight as its graph stores it, by the type that `onnx.dequantize.stored` names."""
    if kind == "FP32":
        return values
    if kind in ("INT4", "INT8"):
        return matmul_nbits_values(values, int(kind[3:]))
    raise UserError(f"no weights of type {kind} in an ONNX decoder", "use INT4, INT8 or FP32")


def _require_finite(values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise UserError(f"{bad} weights are NaN or infinite", "the training diverged: use an earlier checkpoint")
