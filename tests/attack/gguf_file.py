"""A GGUF in memory, read and written byte by byte: an attacker's editor, which writes what no library would."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRING, ARRAY, BOOL = 8, 9, 7
UINT32, INT32, FLOAT32 = 4, 5, 6
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass
class Value:
    """A value of the metadata. `of`: the type of an array's elements."""

    type: int
    value: Any
    of: int | None = None


@dataclass
class Tensor:
    """`ne` in ggml's order (columns first); `type` is ggml's number of it."""

    name: str
    ne: list[int]
    type: int
    data: bytes

    @property
    def type_name(self) -> str:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(self.type).name)

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy has it: rows first."""
        return tuple(reversed(self.ne))

    def bytes_of_rows(self) -> NDArray[np.uint8]:
        """[R, bytes of a row], a copy: rows are quantized each by itself, so they can be moved as they are."""
        rows = int(np.prod(self.ne[1:], dtype=np.int64)) if len(self.ne) > 1 else 1
        return np.frombuffer(self.data, dtype=np.uint8).reshape(rows, -1).copy()

    def values(self) -> NDArray[np.float32]:
        from edgedistill.gguf import ggml

        return ggml.dequantize(np.frombuffer(self.data, dtype=np.uint8), self.type_name, self.shape)

    def store(self, values: NDArray[Any]) -> None:
        """Store these values in the tensor's own type."""
        from edgedistill.gguf import ggml

        rows = np.asarray(values, dtype=np.float32).reshape(-1, self.ne[0])
        if self.type_name in ggml.FLOATS:
            with np.errstate(over="ignore"):
                self.data = _floats(rows, self.type_name)
            return
        importance = np.ones(self.ne[0], dtype=np.float32) if ggml.needs_importance(self.type_name) else None
        self.data = ggml.quantize(rows, self.type_name, importance).tobytes()


@dataclass
class Gguf:
    """Metadata and tensors, in the file's order."""

    kv: dict[str, Value]
    tensors: dict[str, Tensor]

    @property
    def arch(self) -> str:
        return str(self.kv["general.architecture"].value)

    def get(self, key: str, default: Any = None) -> Any:
        """A value; keys that begin with a dot are the architecture's."""
        found = self.kv.get(self.arch + key if key.startswith(".") else key)
        return default if found is None else found.value

    def set(self, key: str, value: Any, type_: int | None = None) -> None:
        """Set a value; the type is the one that is there, or `type_`."""
        key = self.arch + key if key.startswith(".") else key
        if key in self.kv:
            self.kv[key].value = value
        elif isinstance(value, str):
            self.kv[key] = Value(STRING, value)
        elif isinstance(value, bool):
            self.kv[key] = Value(BOOL, value)
        else:
            self.kv[key] = Value(type_ if type_ is not None else FLOAT32 if isinstance(value, float) else UINT32, value)


def _floats(rows: NDArray[np.float32], type_name: str) -> bytes:
    if type_name == "F32":
        return rows.tobytes()
    if type_name == "F16":
        return rows.astype(np.float16).tobytes()
    bits = np.ascontiguousarray(rows).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def read(path: Path) -> Gguf:
    """Read a whole GGUF (version 3, one file)."""
    data = path.read_bytes()
    magic, version, tensor_count, kv_count = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3), (magic, version)
    position = 24

    def take(format_: str) -> Any:
        nonlocal position
        (found,) = struct.unpack_from(format_, data, position)
        position += struct.calcsize(format_)
        return found

    def text() -> str:
        nonlocal position
        length = take("<Q")
        position += length
        return data[position - length : position].decode("utf-8", errors="surrogateescape")

    def value(kind: int) -> Value:
        if kind == STRING:
            return Value(kind, text())
        if kind == ARRAY:
            of, count = take("<I"), take("<Q")
            return Value(kind, [value(of).value for _ in range(count)], of)
        return Value(kind, take(FORMATS[kind]))

    kv = {}
    for _ in range(kv_count):
        key = text()
        kv[key] = value(take("<I"))
    infos = []
    for _ in range(tensor_count):
        name = text()
        ne = [take("<Q") for _ in range(take("<I"))]
        infos.append((name, ne, take("<I"), take("<Q")))
    start = _padded(position, int(kv["general.alignment"].value) if "general.alignment" in kv else 32)
    tensors = {}
    for name, ne, kind, offset in infos:
        size = nbytes(kind, ne)
        tensors[name] = Tensor(name, ne, kind, data[start + offset : start + offset + size])
        assert len(tensors[name].data) == size, name
    return Gguf(kv, tensors)


def write(model: Gguf, path: Path) -> None:
    """Write it whole, tensors in the order of the mapping, their offsets as they follow."""
    alignment = int(model.get("general.alignment", 32))
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(model.tensors), len(model.kv)))
    for key, value in model.kv.items():
        head += _text(key) + struct.pack("<I", value.type) + _value(value.type, value.value, value.of)
    offset = 0
    for tensor in model.tensors.values():
        head += _text(tensor.name) + struct.pack("<I", len(tensor.ne)) + struct.pack(f"<{len(tensor.ne)}Q", *tensor.ne)
        head += struct.pack("<IQ", tensor.type, offset)
        offset = _padded(offset + len(tensor.data), alignment)
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head), alignment), b"\0"))
        for tensor in model.tensors.values():
            file.write(tensor.data.ljust(_padded(len(tensor.data), alignment), b"\0"))


def nbytes(kind: int, ne: list[int]) -> int:
    """Bytes of a tensor of this ggml type and shape."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(np.prod(ne, dtype=np.int64)) // block * size


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _text(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any, of: int | None) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        assert of is not None
        return struct.pack("<IQ", of, len(value)) + b"".join(_value(of, each, None) for each in value)
    return struct.pack(FORMATS[kind], value)
