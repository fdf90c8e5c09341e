"""The header of a safetensors file, read strictly: what passes here, no other reader of the format refuses.

Format: https://github.com/huggingface/safetensors (u64 header length, JSON header, data). As its own library has it,
the tensors lie one behind the other, without overlap or hole, from the header's end to the file's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.strict import NotJson, open_regular, parse_json, shown

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Bits of a value; the format's names.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MAX_DIMENSIONS = 16  # numpy and torch take 64
_LARGEST = 1 << 63  # sizes and places are 64-bit numbers for every reader


@dataclass(frozen=True)
class Entry:
    """A tensor: its dtype in the format's words, its shape, and the bytes of the file that are its data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """Name → tensor in the header's order, the metadata, and where the data begin."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_begin: int


def read_safetensors_header(path: Path) -> Header:
    """The checked header. UserError for a file that is cut short, has bytes to spare, or whose header any reader of
    the format would refuse: unknown dtypes, shapes that are no whole numbers, overlapping or missing bytes."""
    with open_regular(path, what="safetensors file") as file:
        size = os.fstat(file.fileno()).st_size
        again = f"copy or download it again (it has {size:,} bytes)"
        if size < 8:
            raise UserError(f"{path} is cut short: {size} bytes, less than its header's length", again)
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a safetensors file: its header would have {length:,} bytes", again)
        if 8 + length > size:
            raise UserError(f"{path} is cut short: its header alone needs {8 + length:,} bytes", again)
        raw = file.read(length)
    if len(raw) < length:
        raise UserError(f"{path} is cut short: it ends within its header", again)
    try:
        if raw[:1] != b"{":
            raise NotJson("it does not begin with {")
        tree = parse_json(raw, max_depth=4)
    except NotJson as error:
        raise UserError(f"{path}: its header: {error}", again) from error
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: the header's __metadata__ is not a table of texts", again)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in tree.items()}
    _require_cover(path, tensors, 8 + length, size)
    return Header(tensors, metadata, 8 + length)


def _entry(path: Path, name: str, entry: Any, data_begin: int) -> Entry:
    where = f"{path}: tensor {shown(name)}"
    again = "copy or download it again"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: the header's entry is damaged: {shown(entry)}", again)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(f"{where} is stored as {shown(dtype)}", f"the format has {', '.join(BITS)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise UserError(f"{where}: shape {shown(shape)}, bytes {shown(offsets)}: these are not whole numbers", again)
    begin, end = offsets
    # Beside a 0 too: numpy and torch multiply the other lengths for their strides.
    if len(shape) > MAX_DIMENSIONS or prod(length or 1 for length in shape) * BITS[dtype] > _LARGEST:
        raise UserError(f"{where}: shape {shown(shape)} is larger than any file", again)
    bits = prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise UserError(f"{where} of shape {shown(shape)} in {dtype} has {end - begin:,} bytes", again)
    return Entry(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int and 0 <= part < _LARGEST for part in value)


def _require_cover(path: Path, tensors: dict[str, Entry], data_begin: int, size: int) -> None:
    at, last = data_begin, ""
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = f"overlaps {shown(last)}" if entry.begin < at else "does not begin where the data before it end"
            raise UserError(
                f"{path}: tensor {shown(name)} {what} (byte {entry.begin:,}, not {at:,})", "copy or download it again"
            )
        at, last = entry.end, name
    again = f"copy or download it again (it has {size:,} bytes)"
    if at > size:
        raise UserError(f"{path} is cut short: its tensors end at byte {at:,}", again)
    if at < size:
        raise UserError(f"{path} has {size - at:,} bytes behind its last tensor", again)
