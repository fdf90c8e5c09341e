"""Frames between a runtime's child process and its parent: a JSON header and raw arrays, never pickle.

    b"EDF1" | header bytes, u32 | payload bytes, u64 | header, JSON | arrays one after another, little-endian

A frame that breaks these rules is refused before anything of its size is allocated.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"EDF1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 8 << 20
MAX_PAYLOAD_BYTES = 1 << 30
# Rows of logits are sent in frames of about this size, so that neither side holds them twice.
CHUNK_BYTES = 32 << 20
DTYPES = ("<f4", "<i4", "<i8")

Array = NDArray[Any]
Frame = tuple[dict[str, Any], dict[str, Array]]
# Called before each read or write with the file descriptor; returns when it is ready, or raises.
Wait = Callable[[int], None]


class FrameError(Exception):
    """Bytes that are no frame, or a frame beyond the limits."""


def send(fd: int, header: Mapping[str, Any], arrays: Mapping[str, Array], wait: Wait | None = None) -> None:
    """Write one frame. Raises FrameError where it is too large, OSError where the other end is gone."""
    rows = []
    blocks = []
    for name, array in arrays.items():
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        if little.dtype.str not in DTYPES:
            raise FrameError(f"array '{name}' has the type {array.dtype}; frames carry {', '.join(DTYPES)}")
        rows.append({"name": name, "dtype": little.dtype.str, "shape": list(little.shape)})
        blocks.append(little)
    text = json.dumps({"params": dict(header), "arrays": rows}).encode()
    payload = sum(block.nbytes for block in blocks)
    if len(text) > MAX_HEADER_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise FrameError(f"a frame of {len(text)} + {payload} bytes is over the limit")
    _write(fd, memoryview(PREFIX.pack(MAGIC, len(text), payload) + text), wait)
    for block in blocks:
        if block.nbytes:
            _write(fd, block.data.cast("B"), wait)


def receive(fd: int, wait: Wait | None = None) -> Frame | None:
    """Read one frame; None where the other end closed before it began. Raises FrameError."""
    prefix = _read(fd, PREFIX.size, wait, may_end=True)
    if not prefix:
        return None
    magic, header_bytes, payload_bytes = PREFIX.unpack(prefix)
    if magic != MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise FrameError(f"not a frame: {bytes(prefix)!r}")
    try:
        header = json.loads(bytes(_read(fd, header_bytes, wait)))
        shapes = [(str(r["name"]), str(r["dtype"]), [int(n) for n in r["shape"]]) for r in header["arrays"]]
        params = dict(header["params"])
    except (ValueError, KeyError, TypeError) as error:
        raise FrameError(f"a frame's header cannot be read: {error}") from error
    if any(dtype not in DTYPES or min(shape, default=0) < 0 for _, dtype, shape in shapes):
        raise FrameError("a frame holds an array of a type that is not allowed")
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in shapes]
    if sum(sizes) != payload_bytes:
        raise FrameError(f"a frame's arrays need {sum(sizes)} bytes and it has {payload_bytes}")
    arrays = {}
    for (name, dtype, shape), size in zip(shapes, sizes, strict=True):
        arrays[name] = np.frombuffer(_read(fd, size, wait), dtype=dtype).reshape(shape)
    return params, arrays


def _write(fd: int, data: memoryview, wait: Wait | None) -> None:
    while data:
        if wait is not None:
            wait(fd)
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            continue


def _read(fd: int, size: int, wait: Wait | None, *, may_end: bool = False) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        if wait is not None:
            wait(fd)
        try:
            count = os.readv(fd, [view[done:]])
        except BlockingIOError:
            continue
        if count == 0:
            if may_end and done == 0:
                return bytearray()
            raise FrameError(f"the other end closed after {done} of {size} bytes")
        done += count
    return data
