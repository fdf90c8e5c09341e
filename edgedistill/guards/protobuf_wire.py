"""Protocol Buffers at the level of their bytes, without a schema's library: fields with their numbers, nothing copied.

Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10


class WireError(ValueError):
    """Bytes that are no message, or more fields than are read."""


class Field(NamedTuple):
    """`value`: a number, or of BYTES where it begins; `end`: where its bytes end."""

    number: int
    kind: int
    value: int
    end: int


class Budget:
    """How many fields may still be read of one file: what bounds the time."""

    def __init__(self, fields: int) -> None:
        self.left = fields


def varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends)."""
    if at < end and data[at] < 0x80:
        return data[at], at + 1
    value = shift = 0
    for position in range(at, min(end, at + MAX_VARINT_BYTES)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + 1
        shift += 7
    raise WireError(f"a number at byte {at} does not end")


def fields(data: memoryview, start: int, end: int, budget: Budget) -> Iterator[Field]:
    """The fields of the message in data[start:end], in order. Raises WireError."""
    at = start
    while at < end:
        budget.left -= 1
        if budget.left < 0:
            raise WireError("it has more fields than are read")
        key, at = varint(data, at, end)
        number, kind = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"a field numbered {number} at byte {at}")
        if kind == VARINT:
            value, at = varint(data, at, end)
            yield Field(number, kind, value, at)
        elif kind == BYTES:
            size, begin = varint(data, at, end)
            at = begin + size
            if at > end:
                raise WireError(f"a field of {size} bytes at byte {begin} is longer than what holds it")
            yield Field(number, kind, begin, at)
        elif kind in (FIXED32, FIXED64):
            begin, at = at, at + (4 if kind == FIXED32 else 8)
            if at > end:
                raise WireError(f"a number at byte {begin} is cut short")
            yield Field(number, kind, int.from_bytes(data[begin:at], "little"), at)
        else:
            raise WireError(f"a field of kind {kind} at byte {at}")
