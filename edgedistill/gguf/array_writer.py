"""The `gguf` package's writer, but that an array is packed as a whole: of a large vocabulary it packs a million values
one by one. The bytes are the same."""

from __future__ import annotations

import struct
from typing import Any

from gguf import GGUFEndian, GGUFValueType, GGUFWriter

_LENGTH = struct.Struct("<Q").pack
_HEAD = struct.Struct("<IQ").pack  # type of the values, and how many
_FORMS = {int: (GGUFValueType.INT32, "i"), float: (GGUFValueType.FLOAT32, "f")}


class ArrayWriter(GGUFWriter):  # type: ignore[misc]  # the package has no types
    """Arrays of texts, whole numbers, numbers and bytes in one step; all else as the package does it."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        whole = vtype == GGUFValueType.ARRAY and sub_type is None and self.endianess == GGUFEndian.LITTLE
        packed = packed_array(val) if whole else None
        if packed is None:
            other: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return other
        return struct.pack("<I", GGUFValueType.ARRAY) + packed if add_vtype else packed


def packed_array(values: Any) -> bytes | None:
    """An array's bytes behind its own type; None for what is left to the package: empty, mixed or nested ones."""
    if isinstance(values, bytes) and values:
        return _HEAD(GGUFValueType.UINT8, len(values)) + values
    kinds = set(map(type, values)) if isinstance(values, list) else set()
    if kinds == {str}:
        texts = [value.encode("utf-8") for value in values]
        return _HEAD(GGUFValueType.STRING, len(texts)) + b"".join([_LENGTH(len(text)) + text for text in texts])
    if len(kinds) == 1 and (kind := kinds.pop()) in _FORMS:
        value_type, form = _FORMS[kind]
        return _HEAD(value_type, len(values)) + struct.pack(f"<{len(values)}{form}", *values)
    return None
