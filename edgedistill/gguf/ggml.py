"""libggml's own block quantization, called through ctypes: the bytes that `llama_model_quantize` stores.

The library is the one that llama-cpp-python brings. A row is quantized by itself, so rows may be quantized in any
order and by several threads. libggml answers wrong input with `abort()`, which would take the process with it:
everything is checked before the call.

Legend: R rows, C columns (of a torch weight [out, in]: R = out, C = in), B bytes of a row.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError, did_you_mean

# What `ggml_quantize_chunk` takes; it aborts at any other type.
TYPES = (
    "F32", "F16", "BF16",
    "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4",
    "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
    "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
)  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
LARGEST = 65504.0  # float16's: scales are stored in it, and the files that are quantized hold it
# Beyond, libggml's float32 sums of importance · value² (squared once more) overflow, and its assertions abort.
MOST_WEIGHTED_SQUARE = 1e15
THREADED_VALUES = 1 << 16  # below, starting threads costs more than they save
_INITIALISING = threading.Lock()


def quantize(
    values_RC: NDArray[np.float32],
    type_name: str,
    importance_C: NDArray[np.float32] | None = None,
    *,
    threads: int = 1,
) -> NDArray[np.uint8]:
    """[R, B] bytes of `type_name` ("Q4_K", not the mix "Q4_K_M") as `ggml_quantize_chunk` makes them.

    `importance_C` [C] weights the columns' squared errors; None where there is no importance matrix. The result is a
    function of the values, the type and the importance alone, whatever `threads`. Raises UserError for a type that
    libggml cannot write, columns that are no multiple of its block, a type that needs an importance matrix and has
    none, for values that float16 cannot hold (NaN and infinity too), for importances that are negative or not finite.
    """
    values = np.ascontiguousarray(values_RC, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"values of shape {values.shape}: a matrix is wanted")
    rows, columns = values.shape
    width = row_bytes(type_name, columns)
    largest = _largest(values, f"values to be quantized to {type_name}")
    if type_name not in FLOATS and largest > LARGEST:
        raise UserError(
            f"a value of {largest:g}, more than float16's largest {LARGEST:g}", "use quantization BF16 or F32"
        )
    importance = _checked_importance(importance_C, type_name, columns, largest)
    out = np.empty((rows, width), dtype=np.uint8)
    if values.size == 0:
        return out
    _initialise(type_name)
    parts = _row_ranges(rows, threads if values.size >= THREADED_VALUES else 1)
    if len(parts) == 1:
        _quantize_rows(values, out, type_name, importance)
        return out
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [
            pool.submit(_quantize_rows, values[first:last], out[first:last], type_name, importance)
            for first, last in parts
        ]:
            done.result()
    return out


def dequantize(data: NDArray[np.uint8], type_name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """float32 values of `shape` from the bytes of `quantize`, by libggml's own `dequantize_row_*`.

    Raises UserError for an unknown type and for bytes that are not as many as the shape takes.
    """
    *leading, columns = shape
    rows = int(np.prod(leading, dtype=np.int64))
    width = row_bytes(type_name, columns)
    packed = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if packed.size != rows * width:
        raise UserError(
            f"{packed.size:,} bytes of {type_name} for the shape {tuple(shape)}, which takes {rows * width:,}",
            "read the tensor again: it is cut short, or of another type",
        )
    if type_name == "F32":
        return packed.view(np.float32).reshape(shape).copy()
    if type_name == "F16":
        return packed.view(np.float16).astype(np.float32).reshape(shape)
    if type_name == "BF16":
        return (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    out = np.empty(tuple(shape), dtype=np.float32)
    if out.size:
        # C's spelling of them: q4_0, q6_K, iq4_nl
        function = getattr(_library(), f"dequantize_row_{type_name.lower().replace('_k', '_K')}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        function(packed.ctypes.data, out.ctypes.data, out.size)
    return out


def block_size(type_name: str) -> int:
    """Columns of a row that are quantized together; a row is whole blocks. UserError for an unknown type."""
    return int(_library().ggml_blck_size(_number(type_name)))


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a row of `columns`. UserError where they are no multiple of the type's block."""
    block = block_size(type_name)
    if columns % block:
        raise UserError(
            f"{type_name} takes rows in blocks of {block}, and these have {columns} columns",
            "use the fallback that llama.cpp takes at this width, e.g. Q8_0 or F16",
        )
    return columns // block * int(_library().ggml_type_size(_number(type_name)))


def needs_importance(type_name: str) -> bool:
    """Whether libggml cannot make this type without an importance matrix.

    llama.cpp's mixes refuse some more without one (IQ2_S, IQ1_M): that is the mix's rule, not the block's.
    """
    return bool(_library().ggml_quantize_requires_imatrix(_number(type_name)))


def _number(type_name: str) -> int:
    from gguf import GGMLQuantizationType

    if type_name not in TYPES:
        raise UserError(f"libggml writes no type '{type_name}'", did_you_mean(type_name, TYPES))
    return int(GGMLQuantizationType[type_name])


@cache
def _library() -> Any:
    """libggml-base of the installed llama-cpp-python, with the signatures of ggml.h."""
    from llama_cpp import _ctypes_extensions, _ggml

    library = _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_quantize_init", None, [ctypes.c_int]),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, [ctypes.c_int]),
        ("ggml_blck_size", integer, [ctypes.c_int]),
        ("ggml_type_size", ctypes.c_size_t, [ctypes.c_int]),
        ("ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _initialise(type_name: str) -> None:
    # The grids of the IQ types are built at the first call; they stay, as another thread may be using them.
    with _INITIALISING:
        _library().ggml_quantize_init(_number(type_name))


def _quantize_rows(
    values_RC: NDArray[np.float32], out_RB: NDArray[np.uint8], type_name: str, importance_C: NDArray[np.float32] | None
) -> None:
    rows, columns = values_RC.shape
    written = _library().ggml_quantize_chunk(
        _number(type_name), values_RC.ctypes.data, out_RB.ctypes.data, 0, rows, columns,
        None if importance_C is None else importance_C.ctypes.data,
    )  # fmt: skip
    if written != out_RB.nbytes:
        raise RuntimeError(f"libggml wrote {written} bytes of {type_name}, {out_RB.nbytes} were expected")


def _checked_importance(
    importance_C: NDArray[np.float32] | None, type_name: str, columns: int, largest: float
) -> NDArray[np.float32] | None:
    if importance_C is None:
        if needs_importance(type_name):
            raise UserError(
                f"{type_name} cannot be made without an importance matrix", "give calibration text, or a finer type"
            )
        return None
    importance = np.ascontiguousarray(importance_C, dtype=np.float32)
    if importance.shape != (columns,):
        raise UserError(
            f"an importance matrix of shape {importance.shape} for {columns} columns",
            "compute it from this checkpoint",
        )
    most = _largest(importance, "importances")
    if float(importance.min(initial=0.0)) < 0:
        raise UserError(
            f"an importance of {float(importance.min()):g}", "importances are mean squares: compute them again"
        )
    if most * largest**2 > MOST_WEIGHTED_SQUARE:
        raise UserError(
            f"an importance of {most:g} on values of up to {largest:g}, too much for libggml's float32 sums",
            "leave the importance matrix out, or find what makes the activations so large",
        )
    return importance


def _largest(values: NDArray[np.float32], what: str) -> float:
    """The largest magnitude; UserError where something is NaN or infinite."""
    if not values.size:
        return 0.0
    # NaN and infinities of both signs survive min and max, so no mask as large as the values is needed
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise UserError(f"{bad} of the {what} are NaN or infinite", "the training diverged: use an earlier checkpoint")
    return max(-low, high)


def _row_ranges(rows: int, threads: int) -> list[tuple[int, int]]:
    parts = max(1, min(threads, rows))
    edges = [rows * index // parts for index in range(parts + 1)]
    return list(itertools.pairwise(edges))
