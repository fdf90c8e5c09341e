"""A GGUF file's values: the header is walked once, a vocabulary becomes texts when it is asked for.

The `gguf` package's reader makes objects of every token, merge and score while it opens a file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.guards.gguf import BOOL, STRING, TYPES, VALUES, GgufHeader, check_gguf

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# ggml's types that are stored as numpy has them
PLAIN: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"), 1: np.dtype("<f2"), 24: np.dtype("i1"), 25: np.dtype("<i2"), 26: np.dtype("<i4"),
    27: np.dtype("<i8"), 28: np.dtype("<f8"),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """`shape` as ggml has it, columns first; `data` [..., columns] of the type's numbers, or [..., bytes of a row]."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    n_elements: int
    n_bytes: int
    data_offset: int
    data: NDArray[Any]


class GgufFile:
    """One file, its tensors mapped from it. Raises UserError for one whose header is not sound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: GgufHeader = check_gguf(path)
        # A plain array on the mapping: every slice of a memmap is one, made in Python, and dequantizing makes 100,000s.
        self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        self._arrays: dict[str, list[Any]] = {}

    @property
    def keys(self) -> list[str]:
        return [*self.header.values, *self.header.arrays]

    def value(self, key: str, default: Any = None) -> Any:
        """A key's value, a list for an array; `default` where it is not there."""
        if key in self.header.values:
            return self.header.values[key]
        if key not in self.header.arrays:
            return default
        if key not in self._arrays:
            self._arrays[key] = self._array(key)
        return self._arrays[key]

    def _array(self, key: str) -> list[Any]:
        kind, count = self.header.arrays[key]
        start, size = self.header.spans[key]
        data = self._bytes[start : start + size].tobytes()
        if kind == STRING:
            return _texts(data, count, f"{self.path}: {key}")
        values: list[Any] = np.frombuffer(data, np.dtype(VALUES[kind])).tolist()
        return [bool(value) for value in values] if kind == BOOL else values

    @cached_property
    def tensors(self) -> list[GgufTensor]:
        from gguf import GGMLQuantizationType

        made = []
        for name, (kind, dims) in self.header.kinds.items():
            start, size = self.header.spans[name]
            raw = self._bytes[start : start + size]
            rows = tuple(reversed(dims[1:]))
            block, block_bytes = TYPES[kind]
            if kind in PLAIN:
                data = raw.view(PLAIN[kind]).reshape(*rows, dims[0])
            else:
                data = raw.reshape(*rows, dims[0] // block * block_bytes)
            made.append(GgufTensor(name, GGMLQuantizationType(kind), dims, math.prod(dims), size, start, data))
        return made


def _texts(data: bytes, count: int, what: str) -> list[str]:
    length_at = struct.Struct("<Q").unpack_from
    at, texts = 0, []
    try:
        for _ in range(count):
            end = at + 8 + length_at(data, at)[0]
            texts.append(data[at + 8 : end].decode("utf-8"))
            at = end
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: text {len(texts)} is not UTF-8", "export the artifact again") from error
    return texts
