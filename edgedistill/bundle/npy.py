"""The .npy files of golden vectors: one form of header, written and read here, byte by byte.

numpy's reader hands the header to Python's parser, which some headers keep busy or break. What a bundle holds has one
header for one type and shape, so it is made anew and compared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.records.golden import ArrayType
from edgedistill.strict import shown

MAGIC = b"\x93NUMPY\x01\x00"
ALIGNMENT = 64
ITEM_BYTES = 4
HEADER_SHOWN = 120
REMEDY = "make the bundle again"


def header(dtype: ArrayType, shape: tuple[int, ...]) -> bytes:
    """All that stands before the values: magic, version 1.0, length, and the dict as numpy writes it."""
    dims = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {dims}, }}"
    # numpy leaves room for a first dimension of 21 digits, so that a file can grow in place.
    text += " " * (21 - len(str(shape[0])) if shape else 0)
    room = -(len(MAGIC) + 2 + len(text) + 1) % ALIGNMENT
    line = text + " " * room + "\n"
    return MAGIC + len(line).to_bytes(2, "little") + line.encode("latin-1")


def array_bytes(dtype: ArrayType, shape: tuple[int, ...]) -> int:
    """The size of the file of an array."""
    return len(header(dtype, shape)) + math.prod(shape) * ITEM_BYTES


def load_array(path: Path, dtype: ArrayType, shape: tuple[int, ...], *, what: str) -> NDArray[Any]:
    """A .npy file of exactly this type and shape, never a pickle. Raises UserError naming `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(array_bytes(dtype, shape) + 1)
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}", REMEDY) from error
    return array_of(data, dtype, shape, what=what)


def array_of(data: bytes, dtype: ArrayType, shape: tuple[int, ...], *, what: str) -> NDArray[Any]:
    """As `load_array`, of the file's bytes."""
    wanted = header(dtype, shape)
    named = f"{what} is not a .npy file of {dtype} {list(shape)}"
    if not data.startswith(wanted):
        raise UserError(f"{named}: its header is {shown(data[len(MAGIC) + 2 : HEADER_SHOWN])}", REMEDY)
    if len(data) != array_bytes(dtype, shape):
        raise UserError(f"{named}: it is cut short or too long", REMEDY)
    return np.frombuffer(data, dtype=dtype, offset=len(wanted)).reshape(shape)
