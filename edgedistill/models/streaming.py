"""A tensor from a safetensors file into a GGUF, a few megabytes at a time, changed and converted on the way.

Values are looked at as whole numbers where that is enough: equal types are copied, bfloat16 becomes float16 through a
table of its 65,536 values, and NaN, infinity and overflow show in the largest magnitude's bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.architectures import TensorSpec, to_interleaved
from edgedistill.models.weights import StoredTensor, read_tensor

Dtype = Literal["F32", "F16", "BF16"]
FLOAT16_MAX = 65504.0
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
BLOCK_ELEMENTS = 1 << 20
TABLE_ELEMENTS = 1 << 16  # so many indices of 8 bytes stay in the cache
# dtype → (whole numbers of its width, all bits but the sign, the exponent's bits: infinity, beyond it NaN)
BITS: dict[str, tuple[Any, int, int]] = {
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


def write_tensor(file: IO[bytes], tensor: StoredTensor, spec: TensorSpec, dtype: Dtype, *, name: str) -> None:
    """Append the tensor's values as `dtype`, in the order that llama.cpp wants.

    Raises UserError for NaN, infinity, and for values that float16 cannot hold.
    """
    source = tensor.dtype
    if source == "F64" or spec.change in ("plus_one", "transposed"):
        # Vectors, and GPT-2's matrices: whole.
        values = read_tensor(tensor)
        if spec.change == "plus_one":
            values = values + np.float32(1)
        elif spec.change == "transposed":
            values = np.ascontiguousarray(values.T)
        if spec.rope_heads:
            values = to_interleaved(values, spec.rope_heads)
        as_stored(values, dtype, tensor=name).tofile(file)
        return
    convert = converter(source, dtype)
    # Written by a thread while the next block is read and converted: half of the time is the kernel's copying.
    with ThreadPoolExecutor(max_workers=1) as writer:
        written: Future[None] | None = None
        for block in _blocks(tensor, spec):
            _check(block, source, dtype, tensor, name)
            values = convert(block)
            if written is not None:
                written.result()
            written = writer.submit(values.tofile, file)
        if written is not None:
            written.result()


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same values, compared a few megabytes at a time."""
    if one.shape != other.shape:
        return False
    plain = TensorSpec("", one.shape)
    if one.dtype == other.dtype and one.dtype in BITS:
        return all(np.array_equal(a, b) for a, b in zip(_blocks(one, plain), _blocks(other, plain), strict=True))
    return bool(np.array_equal(read_tensor(one), read_tensor(other)))


def as_stored(values: NDArray[np.float32], dtype: Dtype, *, tensor: str) -> NDArray[Any]:
    """float32 → the array whose bytes a GGUF holds: float32, float16, or bfloat16's bits as uint16.

    Raises UserError for NaN, infinity, and for values that float16 cannot hold.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    largest = int((bits & BITS["F32"][1]).max(initial=0))
    if largest >= BITS["F32"][2]:
        raise _not_finite(tensor, int(np.count_nonzero(~np.isfinite(values))))
    if dtype == "F16":
        _fits(tensor, float(np.uint32(largest).view(np.float32)))
    return converter("F32", dtype)(bits).view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype])


@functools.cache
def converter(source: str, dtype: Dtype) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Bits of `source` (whole numbers) → bits of `dtype`, rounded to nearest, ties to even. Finite values only."""
    if source == dtype:
        return lambda bits: bits
    if source == "BF16":
        return _widened if dtype == "F32" else _looked_up
    if source == "F16":
        widen: Callable[[NDArray[Any]], NDArray[Any]] = lambda bits: (  # noqa: E731
            bits.view(np.float16).astype(np.float32).view(np.uint32)
        )
        return widen if dtype == "F32" else lambda bits: _rounded_bfloat16(widen(bits))
    if dtype == "F16":
        return lambda bits: bits.view(np.float32).astype(np.float16).view(np.uint16)
    return _rounded_bfloat16


def _widened(bits: NDArray[Any]) -> NDArray[Any]:
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide


def _rounded_bfloat16(bits: NDArray[Any]) -> NDArray[Any]:
    # Add half of the last kept bit, less one where that bit is even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _looked_up(bits: NDArray[Any]) -> NDArray[Any]:
    table = _float16_of_bfloat16()
    flat = bits.reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, TABLE_ELEMENTS):
        np.take(table, flat[start : start + TABLE_ELEMENTS], out=out[start : start + TABLE_ELEMENTS], mode="wrap")
    return out.reshape(bits.shape)


@functools.cache
def _float16_of_bfloat16() -> NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(np.float16).view(np.uint16)


def _blocks(tensor: StoredTensor, spec: TensorSpec) -> Iterator[NDArray[Any]]:
    """The tensor's bits in order, whole rows at a time; of a rotated one whole heads, permuted. A block is overwritten
    by the next but one."""
    rows = tensor.shape[0] if tensor.shape else 1
    columns = tensor.elements // max(rows, 1)
    unit = rows // spec.rope_heads if spec.rope_heads else 1
    step = max(1, BLOCK_ELEMENTS // max(1, columns * unit)) * unit
    block_shape = (min(step, rows), columns)
    buffers = [np.empty(block_shape, dtype=BITS[tensor.dtype][0]) for _ in range(2 if step < rows else 1)]
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for number, start in enumerate(range(0, rows, step)):
            block = buffers[number % len(buffers)][: min(step, rows - start)]
            _read_whole(file, block, tensor)
            yield to_interleaved(block, len(block) // unit) if spec.rope_heads else block


def _read_whole(file: IO[bytes], block: NDArray[Any], tensor: StoredTensor) -> None:
    view = memoryview(block.reshape(-1).view(np.uint8).data)
    while view:
        count: int = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise UserError(
                f"{tensor.path} ended early, {len(view):,} bytes before a tensor's end", "copy the file again"
            )
        view = view[count:]


def _check(block: NDArray[Any], source: str, dtype: Dtype, tensor: StoredTensor, name: str) -> None:
    width, magnitude, infinity = BITS[source]
    largest = int((block & width(magnitude)).max(initial=0))
    if largest >= infinity:
        bad = int(np.count_nonzero(~np.isfinite(read_tensor(tensor))))
        raise _not_finite(name, bad)
    if dtype == "F16" and source != "F16":
        wide = largest << 16 if source == "BF16" else largest
        _fits(name, float(np.uint32(wide).view(np.float32)))


def _fits(name: str, largest: float) -> None:
    if largest > FLOAT16_MAX:
        raise UserError(
            f"{name} holds {largest:g}, more than float16's largest value {FLOAT16_MAX:g}",
            "export with quantization BF16 or F32",
        )


def _not_finite(name: str, bad: int) -> UserError:
    return UserError(
        f"{name} holds {bad} values that are NaN or infinite", "the training diverged: use an earlier checkpoint"
    )
