"""The JSON of a bundle's files: checked where it is first read, and handed on for the same bytes.

A large vocabulary takes seconds to parse, and five checks look at it.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

from edgedistill.records.manifest import REMEDY
from edgedistill.records.reading import json_value

KEPT = 2
LARGE_BYTES = 1 << 16  # what is smaller is parsed sooner than hashed and looked up

_kept: OrderedDict[bytes, Any] = OrderedDict()


def checked_tree(data: bytes, *, what: str, max_bytes: int, max_values: int) -> Any:
    """The value of a file of JSON, as `records.reading.json_value` reads it. UserError naming `what`."""
    value = json_value(data, what=what, remedy=REMEDY, max_bytes=max_bytes, max_values=max_values)
    if len(data) > LARGE_BYTES:
        _kept[hashlib.sha256(data).digest()] = value
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return value


def tree_of(data: bytes) -> Any:
    """The value of bytes whose form was checked; it may be another's too and is not to be changed."""
    if len(data) > LARGE_BYTES and (found := _kept.get(hashlib.sha256(data).digest())) is not None:
        return found
    return json.loads(data)
