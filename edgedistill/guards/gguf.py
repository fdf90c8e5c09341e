"""A GGUF's header, before llama.cpp opens it: every count, length, type, value and offset.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The whole header is walked, so that what is behind it
is where the tensors say; a vocabulary's strings are stepped over and become no objects.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.guards.allowed import REMEDY
from edgedistill.strict import open_regular, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 200
MAX_NAME_BYTES = 63  # ggml keeps 64 with the zero
MAX_STRING_BYTES = 1 << 20
MAX_TOKENS = 1 << 22
MAX_ARRAY = 1 << 22
MAX_BLOB = 8 << 20  # the byte arrays of SentencePiece's normalisation
MAX_STRINGS_BYTES = 256 << 20
MAX_DIMS = 4
MAX_FILES = 1024
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
KEY = re.compile(r"[a-z0-9_\-]+(\.[A-Za-z0-9_\-]+)+")
NAME = re.compile(r"[A-Za-z0-9_.\-]+")
STRING, ARRAY, BOOL = 8, 9, 7
FLOATS = (6, 12)
VALUES = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
# ggml's type → elements and bytes of a block
TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74), 18: (256, 98),
    19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
# Ends of keys that hold a size, and the most that it may be; llama.cpp allocates and loops by them.
SIZES = {
    ".block_count": MAX_LAYERS, ".embedding_length": MAX_SIZE, ".feed_forward_length": MAX_SIZE,
    ".context_length": 1 << 30, ".vocab_size": MAX_TOKENS, ".attention.head_count": 1 << 16,
    ".attention.head_count_kv": 1 << 16, ".attention.key_length": 1 << 16, ".attention.value_length": 1 << 16,
    ".rope.dimension_count": 1 << 16, ".expert_count": 1 << 12, ".expert_used_count": 1 << 12,
    ".token_type_count": 1 << 16, ".attention.sliding_window": 1 << 30,
}  # fmt: skip


@dataclass
class GgufHeader:
    """What a file says. `values`: scalars and short strings; `arrays`: key → (type, count); `tensors`: name → bytes.

    `spans`: array or tensor → where its bytes begin in the file, and how many; `kinds`: tensor → ggml's type and dims;
    `keys_end`: where the tensors' descriptions begin.
    """

    path: Path
    bytes: int
    values: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    kinds: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    keys_end: int = 0


def check_gguf(path: Path) -> GgufHeader:
    """Read one file's header. Raises UserError naming what is wrong in it."""
    with open_regular(path, what="GGUF file") as file:
        size = os.fstat(file.fileno()).st_size
        found = GgufHeader(path, size)
        head = file.read(24)
        if head[:4] != MAGIC:
            raise UserError(f"{path} is not a GGUF file: it begins with {head[:4]!r} and not with {MAGIC!r}", REMEDY)
        if len(head) < 24:
            raise UserError(f"{path} is cut short: it has {size} bytes", REMEDY)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Reader(data, found).read()
            except (struct.error, IndexError) as error:
                raise UserError(f"{path} is cut short: its header does not end in {size:,} bytes", REMEDY) from error
    return found


class _Reader:
    def __init__(self, data: mmap.mmap, found: GgufHeader) -> None:
        self.data = data
        self.found = found
        self.at = 4
        self.string_bytes = 0

    def refused(self, why: str) -> UserError:
        return UserError(f"{self.found.path}: {why}", REMEDY)

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self, limit: int, what: str) -> bytes:
        length = self.number("<Q")
        if length > limit:
            raise self.refused(f"{what} has {length:,} bytes; at most {limit:,} are read")
        value = self.data[self.at : self.at + length]
        if len(value) != length:
            raise self.refused(f"{what} is cut short")
        self.at += length
        return value

    def read(self) -> None:
        version, tensors, keys = self.number("<I"), self.number("<Q"), self.number("<Q")
        if version not in VERSIONS:
            raise self.refused(f"version {version} of GGUF; {' and '.join(map(str, VERSIONS))} are read")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self.refused(f"it says that it has {tensors:,} tensors and {keys:,} keys")
        for _ in range(keys):
            self.pair()
        self.found.keys_end = self.at
        self.check_values()
        self.check_tensors(tensors)

    def pair(self) -> None:
        name = self.string(MAX_KEY_BYTES, "a key").decode("ascii", errors="replace")
        if not KEY.fullmatch(name):
            raise self.refused(f"the key {shown(name)} is not among what is allowed")
        if name in self.found.values or name in self.found.arrays:
            raise self.refused(f"the key {name} appears there twice")
        kind = self.number("<I")
        if kind == ARRAY:
            self.array(name)
        elif kind == STRING:
            self.found.values[name] = self.utf8(self.string(MAX_STRING_BYTES, name), name)
        elif kind in VALUES:
            value = self.number(VALUES[kind])
            if kind in FLOATS and not math.isfinite(value):
                raise self.refused(f"{name} is {value}")
            if kind == BOOL and value > 1:
                raise self.refused(f"{name} is {value}, and a truth value is 0 or 1")
            self.found.values[name] = bool(value) if kind == BOOL else value
        else:
            raise self.refused(f"{name} has a value of the type {kind}, which GGUF does not have")

    def utf8(self, value: bytes, name: str) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refused(f"{name} is not UTF-8: byte {error.start}") from error

    def array(self, name: str) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        start = self.at
        if kind == STRING:
            if count > MAX_TOKENS:
                raise self.refused(f"{name} has {count:,} texts")
            self.strings(name, count)
        elif kind in VALUES:
            step = struct.calcsize(VALUES[kind])
            if count > MAX_ARRAY or count * step > max(MAX_BLOB, MAX_ARRAY * 4):
                raise self.refused(f"{name} has {count:,} values")
            if self.at + count * step > len(self.data):
                raise self.refused(f"it is cut short within {name}, which has {count:,} values")
            if kind in FLOATS:
                self.check_floats(name, kind, count)
            self.at += count * step
        else:
            raise self.refused(f"{name} is an array of the type {kind}, which is not among what is allowed")
        self.found.arrays[name] = (kind, count)
        self.found.spans[name] = (start, self.at - start)

    def strings(self, name: str, count: int) -> None:
        """Step over them; the sum of their lengths is bounded as well as each."""
        data, at, end, most = self.data, self.at, len(self.data), MAX_STRING_BYTES
        length_at = struct.Struct("<Q").unpack_from
        started = at
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8 + length
            if length > most or at > end:
                if length > most:
                    raise self.refused(f"{name} holds a text of {length:,} bytes")
                raise self.refused(f"it is cut short within {name}")
        self.string_bytes += at - started
        if self.string_bytes > MAX_STRINGS_BYTES:
            raise self.refused(f"its texts have more than {MAX_STRINGS_BYTES:,} bytes")
        self.at = at

    def check_floats(self, name: str, kind: int, count: int) -> None:
        import numpy as np

        dtype = "<f4" if kind == 6 else "<f8"
        if not np.isfinite(np.frombuffer(self.data, dtype, count=count, offset=self.at)).all():
            raise self.refused(f"{name} holds numbers that are not finite")

    def check_values(self) -> None:
        """Sizes within reason; token ids within the vocabulary; as many scores and types as tokens."""
        values, arrays = self.found.values, self.found.arrays
        for name, value in values.items():
            limit = next((most for end, most in SIZES.items() if name.endswith(end)), None)
            if limit is not None and (type(value) is not int or not 0 <= value <= limit):
                raise self.refused(f"{name} is {shown(value)}, not a whole number up to {limit:,}")
        tokens = arrays.get("tokenizer.ggml.tokens", (STRING, 0))
        if tokens[0] != STRING:
            raise self.refused("tokenizer.ggml.tokens are not texts")
        for name, kinds in (("scores", (6,)), ("token_type", (4, 5))):
            key = f"tokenizer.ggml.{name}"
            if key in arrays and (arrays[key][0] not in kinds or arrays[key][1] != tokens[1]):
                raise self.refused(f"{key} has {arrays[key][1]:,} values for {tokens[1]:,} tokens")
        vocabulary = tokens[1] or max((int(v) for k, v in values.items() if k.endswith(".vocab_size")), default=0)
        for name, value in values.items():
            if not name.startswith("tokenizer.ggml.") or not name.endswith("_token_id"):
                continue
            # 2^32 - 1 says in this format that there is none.
            if type(value) is not int or not (0 <= value < vocabulary or value == 0xFFFF_FFFF):
                raise self.refused(f"{name} is {shown(value)}, and there are {vocabulary:,} tokens")

    def check_tensors(self, count: int) -> None:
        """One behind the other without a gap, as llama.cpp wants them, and none beyond the end."""
        alignment = self.found.values.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.refused(f"general.alignment is {shown(alignment)}")
        expected = 0
        for _ in range(count):
            name = self.string(MAX_NAME_BYTES, "a tensor's name").decode("ascii", errors="replace")
            if not NAME.fullmatch(name) or name in self.found.tensors or name in self.found.arrays:
                raise self.refused(f"a tensor has the name {shown(name)}, a second time or with other characters")
            dims = [self.number("<Q") for _ in range(self.rank(name))]
            kind = self.number("<I")
            size = self.tensor_bytes(name, dims, kind)
            offset = self.number("<Q")
            if offset != expected:
                raise self.refused(f"the tensor {name} begins at byte {offset:,} of the data, not at {expected:,}")
            self.found.tensors[name] = size
            self.found.kinds[name] = (kind, tuple(dims))
            self.found.spans[name] = (offset, size)
            expected += -(-size // alignment) * alignment
        # Without tensors (a vocabulary alone) nothing need be padded.
        begin = -(-self.at // alignment) * alignment if count else min(self.found.bytes, self.at + alignment - 1)
        last = expected - (-size % alignment) if count else 0
        for name in self.found.tensors:
            offset, size = self.found.spans[name]
            self.found.spans[name] = (begin + offset, size)
        if not max(self.at, begin + last) <= self.found.bytes <= begin + expected:
            raise self.refused(
                f"it has {self.found.bytes:,} bytes; its tensors end at byte {begin + last:,}: it is "
                + ("cut short" if self.found.bytes < begin + last else "longer than what it says")
            )

    def rank(self, name: str) -> int:
        rank: int = self.number("<I")
        if not 1 <= rank <= MAX_DIMS:
            raise self.refused(f"the tensor {name} has {rank:,} dimensions")
        return rank

    def tensor_bytes(self, name: str, dims: list[int], kind: int) -> int:
        if kind not in TYPES:
            raise self.refused(f"the tensor {name} is of the type {kind}, which is not among those that are known")
        block, size = TYPES[kind]
        if any(not 1 <= n <= 1 << 40 for n in dims) or dims[0] % block:
            raise self.refused(f"the tensor {name} has the shape {shown(dims)} in blocks of {block}")
        return math.prod(dims) // block * size


def split_files(first: Path) -> list[Path]:
    """All files of a GGUF, from its first (or only) one. UserError where one is missing."""
    stem, of, count = first.stem.rpartition("-of-")
    prefix, dash, number = stem.rpartition("-")
    if not (of and dash and number.isdigit() and count.isdigit() and len(number) == len(count) == len("00001")):
        return [first]
    paths = [first.with_name(f"{prefix}-{i + 1:05d}-of-{count}.gguf") for i in range(int(count))]
    if first != paths[0]:
        raise UserError(f"{first} is not the first file of its GGUF", f"open {paths[0].name}")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{first.parent} lacks {', '.join(missing[:3])}", "copy all files of the model")
    return paths


def check_ggufs(first: Path) -> list[GgufHeader]:
    """A GGUF of one file or of several, which lie beside the first under its name. Raises UserError."""
    head = check_gguf(first)
    count = head.values.get(SPLIT_COUNT, 0)
    if type(count) is not int or not 0 <= count <= MAX_FILES:
        raise UserError(f"{first}: {SPLIT_COUNT} is {shown(count)}", REMEDY)
    paths = split_files(first) if count > 1 else [first]
    if len(paths) != max(1, count):
        raise UserError(
            f"{first} is the first of {count} files by what it says, and of {len(paths)} by its name", REMEDY
        )
    heads = [head, *(check_gguf(path) for path in paths[1:])]
    names: set[str] = set()
    for number, one in enumerate(heads):
        if count > 1 and (one.values.get(SPLIT_NO), one.values.get(SPLIT_COUNT)) != (number, count):
            raise UserError(f"{one.path} is not number {number + 1} of {count} by what it says", REMEDY)
        if not names.isdisjoint(one.tensors):
            raise UserError(f"{one.path} holds a tensor that another of its files has too", REMEDY)
        names |= set(one.tensors)
    if count > 1 and head.values.get(SPLIT_TENSORS) != len(names):
        raise UserError(f"{first}: its {count} files hold {len(names)} tensors, not what {SPLIT_TENSORS} says", REMEDY)
    return heads
