"""An ONNX file, before onnxruntime opens it: its operators, its tensors' sizes, where its data lies.

Read at the level of protobuf's bytes, so that `bundle verify` needs no onnx, no weight is copied, and nothing is
overlooked: a field that is not in the tables below is refused, as is one that may stand once and stands twice.
Schema: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.guards.allowed import REMEDY
from edgedistill.guards.genai import FILE_NAME
from edgedistill.guards.onnx_operators import OPERATORS
from edgedistill.guards.protobuf_wire import BYTES, FIXED32, FIXED64, VARINT, Budget, Field, WireError, fields, varint
from edgedistill.strict import open_regular, shown

MAX_FIELDS = 600_000
MAX_NODES = 50_000
MAX_TEXT = 1 << 16
MAX_DATA_FILES = 4096
MAX_DIMS = 16
MAX_ELEMENTS = 1 << 40
# onnxruntime reads settings of its own from here where an environment variable says so.
ORT_SETTINGS = "ort_config"
# TensorProto.DataType → bits of an element; text (8) has no size and is refused.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip

# Field numbers: (message, wire kinds, may repeat)
ONCE, MANY = False, True
MODEL = {
    1: ((VARINT,), ONCE), 2: ((BYTES,), ONCE), 3: ((BYTES,), ONCE), 4: ((BYTES,), ONCE), 5: ((VARINT,), ONCE),
    6: ((BYTES,), ONCE), 7: ((BYTES,), ONCE), 8: ((BYTES,), MANY), 14: ((BYTES,), MANY),
}  # fmt: skip
GRAPH = {
    1: ((BYTES,), MANY), 2: ((BYTES,), ONCE), 5: ((BYTES,), MANY), 10: ((BYTES,), ONCE), 11: ((BYTES,), MANY),
    12: ((BYTES,), MANY), 13: ((BYTES,), MANY), 14: ((BYTES,), MANY), 16: ((BYTES,), MANY),
}  # fmt: skip
NODE = {
    1: ((BYTES,), MANY), 2: ((BYTES,), MANY), 3: ((BYTES,), ONCE), 4: ((BYTES,), ONCE), 5: ((BYTES,), MANY),
    6: ((BYTES,), ONCE), 7: ((BYTES,), ONCE), 8: ((BYTES,), ONCE), 9: ((BYTES,), MANY),
}  # fmt: skip
# No graphs (6, 11): nothing runs inside an operator. No sparse tensors (22, 23).
ATTRIBUTE = {
    1: ((BYTES,), ONCE), 2: ((FIXED32,), ONCE), 3: ((VARINT,), ONCE), 4: ((BYTES,), ONCE), 5: ((BYTES,), ONCE),
    7: ((BYTES, FIXED32), MANY), 8: ((BYTES, VARINT), MANY), 9: ((BYTES,), MANY), 10: ((BYTES,), MANY),
    13: ((BYTES,), ONCE), 14: ((BYTES,), ONCE), 15: ((BYTES,), MANY), 20: ((VARINT,), ONCE),
}  # fmt: skip
TENSOR = {
    1: ((BYTES, VARINT), MANY), 2: ((VARINT,), ONCE), 4: ((BYTES, FIXED32), MANY), 5: ((BYTES, VARINT), MANY),
    7: ((BYTES, VARINT), MANY), 8: ((BYTES,), ONCE), 9: ((BYTES,), ONCE), 10: ((BYTES, FIXED64), MANY),
    11: ((BYTES, VARINT), MANY), 12: ((BYTES,), ONCE), 13: ((BYTES,), MANY), 14: ((VARINT,), ONCE),
    16: ((BYTES,), MANY),
}  # fmt: skip
TENSOR_VALUES = (4, 5, 7, 10, 11)
OPSET = {1: ((BYTES,), ONCE), 2: ((VARINT,), ONCE)}
VALUE = {1: ((BYTES,), ONCE), 2: ((BYTES,), ONCE), 3: ((BYTES,), ONCE), 4: ((BYTES,), MANY)}
# Tensors alone: no sequences, maps, optional or sparse values.
TYPE = {1: ((BYTES,), ONCE), 6: ((BYTES,), ONCE)}
TENSOR_TYPE = {1: ((VARINT,), ONCE), 2: ((BYTES,), ONCE)}
SHAPE = {1: ((BYTES,), MANY)}
DIM = {1: ((VARINT,), ONCE), 2: ((BYTES,), ONCE), 3: ((BYTES,), ONCE)}
PAIR = {1: ((BYTES,), ONCE), 2: ((BYTES,), ONCE)}


@dataclass
class OnnxModel:
    """What a file holds. `files`: names and bytes of the files beside it that hold its weights.

    `pieces`: a node or weight of the graph → where its bytes lie: file, first byte, how many; `weights`: name → type's
    number and dimensions; `inputs`, `outputs`: the same, a dimension without a size as its name. `matrices`: of each
    MatMulNBits its bits and the names of all its inputs but the first.
    """

    path: Path
    bytes: int = 0
    nodes: int = 0
    files: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    weights: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, tuple[int | str, ...]]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, tuple[int | str, ...]]] = field(default_factory=dict)
    matrices: list[tuple[int, list[str]]] = field(default_factory=list)

    @property
    def data_bytes(self) -> int:
        return self.bytes + sum(self.files.values())


def check_onnx(path: Path) -> OnnxModel:
    """Read the whole graph. Raises UserError naming what is not allowed in it."""
    with open_regular(path, what="ONNX model") as file:
        found = OnnxModel(path, bytes=os.fstat(file.fileno()).st_size)
        if found.bytes == 0:
            raise UserError(f"{path} is empty", REMEDY)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            try:
                _Reader(data, found).model()
            except (WireError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is not a whole ONNX model: {error}", REMEDY) from error
    return found


Piece = tuple[str, int, int]
Table = Mapping[int, tuple[tuple[int, ...], bool]]


class _Reader:
    def __init__(self, data: memoryview, found: OnnxModel) -> None:
        self.data = data
        self.found = found
        self.budget = Budget(MAX_FIELDS)

    def refused(self, why: str) -> UserError:
        return UserError(f"{self.found.path}: {why}", REMEDY)

    def read(self, start: int, end: int, table: Table, what: str) -> dict[int, list[Field]]:
        """The fields of a message by number, each of them known."""
        found: dict[int, list[Field]] = {}
        for one in fields(self.data, start, end, self.budget):
            kinds, many = table.get(one.number, ((), ONCE))
            if one.kind not in kinds:
                raise self.refused(f"{what} has a field {one.number}, which is not among what is allowed there")
            if one.number in found and not many:
                raise self.refused(f"{what} has its field {one.number} twice")
            found.setdefault(one.number, []).append(one)
        return found

    def text(self, found: dict[int, list[Field]], number: int, limit: int = MAX_TEXT) -> str:
        if number not in found:
            return ""
        one = found[number][0]
        if one.end - one.value > limit:
            raise self.refused(f"a text of {one.end - one.value:,} bytes")
        return str(self.data[one.value : one.end], "utf-8")

    def model(self) -> None:
        model = self.read(0, len(self.data), MODEL, "the model")
        if 7 not in model:
            raise self.refused("the model has no graph")
        for one in model.get(8, []):
            domain = self.text(self.read(one.value, one.end, OPSET, "an opset"), 1)
            if domain not in OPERATORS:
                raise self.refused(
                    f"it needs the operators of the domain {shown(domain)}, which no runtime here brings"
                )
        for one in model.get(14, []):
            key = self.text(self.read(one.value, one.end, PAIR, "a property"), 1)
            if key.startswith(ORT_SETTINGS):
                raise self.refused(f"its properties hold settings for onnxruntime ({shown(key)})")
        graph = model[7][0]
        self.graph(graph.value, graph.end)

    def graph(self, start: int, end: int) -> None:
        graph = self.read(start, end, GRAPH, "the graph")
        nodes = graph.get(1, [])
        if len(nodes) > MAX_NODES:
            raise self.refused(f"it has {len(nodes):,} nodes; at most {MAX_NODES:,} are read")
        self.found.nodes = len(nodes)
        for one in graph.get(5, []):
            name, where, kind = self.tensor(one)
            if name in self.found.pieces:
                raise self.refused(f"two tensors have the name {shown(name)}")
            self.found.pieces[name], self.found.weights[name] = where, kind
        for number, one in enumerate(nodes):
            # A node need have no name, nor one of its own.
            name = self.node(one)
            self.found.pieces[name if name and name not in self.found.pieces else f"{name}#{number}"] = [self.span(one)]
        for many, into in ((graph.get(11, []), self.found.inputs), (graph.get(12, []), self.found.outputs)):
            into.update(self.value(one) for one in many)

    def span(self, one: Field) -> Piece:
        return self.found.path.name, one.value, one.end - one.value

    def value(self, one: Field) -> tuple[str, tuple[int, tuple[int | str, ...]]]:
        """An input or output: its name, its type's number (0: no tensor), its shape."""
        value = self.read(one.value, one.end, VALUE, "an input or output")
        kind, dims = 0, []
        for whole in value.get(2, []):
            for tensor in self.read(whole.value, whole.end, TYPE, "a type").get(1, []):
                parts = self.read(tensor.value, tensor.end, TENSOR_TYPE, "a tensor's type")
                kind = parts[1][0].value if 1 in parts else 0
                for shape in parts.get(2, []):
                    found = self.read(shape.value, shape.end, SHAPE, "a shape")
                    dims = [self.read(dim.value, dim.end, DIM, "a dimension") for dim in found.get(1, [])]
        return self.text(value, 1), (kind, tuple(dim[1][0].value if 1 in dim else self.text(dim, 2) for dim in dims))

    def node(self, one: Field) -> str:
        """Its name."""
        node = self.read(one.value, one.end, NODE, "a node")
        domain, operator = self.text(node, 7), self.text(node, 4)
        if operator not in OPERATORS.get(domain, ()):
            shown_domain = f" of the domain {shown(domain)}" if domain else ""
            raise self.refused(f"the operator {shown(operator)}{shown_domain} is not among those that are allowed")
        if self.text(node, 8):
            raise self.refused(f"a node calls a function ({shown(self.text(node, 8))})")
        bits = 0
        for inner in node.get(5, []):
            attribute = self.read(inner.value, inner.end, ATTRIBUTE, f"an attribute of {operator}")
            if 3 in attribute and self.text(attribute, 1) == "bits":
                bits = attribute[3][0].value
            for tensor in (*attribute.get(5, []), *attribute.get(10, [])):
                self.tensor(tensor)
        if operator == "MatMulNBits":
            self.found.matrices.append((bits, [self.text({1: [one]}, 1) for one in node.get(1, [])[1:]]))
        return self.text(node, 3)

    def tensor(self, one: Field) -> tuple[str, list[Piece], tuple[int, tuple[int, ...]]]:
        """Its name, where its bytes lie, its type's number and dimensions."""
        tensor = self.read(one.value, one.end, TENSOR, "a tensor")
        name = shown(self.text(tensor, 8))
        kind = tensor[2][0].value if 2 in tensor else 0
        if kind not in BITS:
            raise self.refused(f"the tensor {name} has the type {kind}")
        dims = self.dims(tensor.get(1, []), name)
        elements = prod(dims)
        if elements > MAX_ELEMENTS:
            raise self.refused(f"the tensor {name} has {elements:,} elements")
        needed = -(-elements * BITS[kind] // 8)
        places = sum(number in tensor for number in (9, 13)) + any(number in tensor for number in TENSOR_VALUES)
        outside = 14 in tensor and tensor[14][0].value == 1
        if places > 1 or outside != (13 in tensor):
            raise self.refused(f"the tensor {name} does not say where its values are")
        if outside:
            where = [self.span(one), self.external(tensor[13], name, needed)]
            return self.text(tensor, 8), where, (kind, tuple(dims))
        if 9 in tensor:
            raw = tensor[9][0]
            if raw.end - raw.value != needed:
                raise self.refused(f"the tensor {name} {dims} needs {needed:,} bytes and has {raw.end - raw.value:,}")
        else:
            # Every number takes a byte or more, and of the smallest types two share one.
            held = sum(
                value.end - value.value for n in TENSOR_VALUES for value in tensor.get(n, []) if value.kind == BYTES
            )
            held += sum(8 for n in TENSOR_VALUES for value in tensor.get(n, []) if value.kind != BYTES)
            if elements > 4 * held:
                raise self.refused(f"the tensor {name} {dims} has {held:,} bytes of values")
        return self.text(tensor, 8), [self.span(one)], (kind, tuple(dims))

    def dims(self, found: list[Field], name: str) -> list[int]:
        dims: list[int] = []
        for one in found:
            if one.kind == VARINT:
                dims.append(one.value)
                continue
            at = one.value
            while at < one.end and len(dims) <= MAX_DIMS:
                value, at = varint(self.data, at, one.end)
                dims.append(value)
        if len(dims) > MAX_DIMS or any(value > MAX_ELEMENTS for value in dims):
            raise self.refused(f"the tensor {name} has the shape {shown(dims)}")
        return dims

    def external(self, entries: list[Field], name: str, needed: int) -> Piece:
        """Data in another file: beside this one, and as long as the tensor needs."""
        pairs: dict[str, str] = {}
        for one in entries:
            pair = self.read(one.value, one.end, PAIR, "a place of data")
            key = self.text(pair, 1)
            if key in pairs or key not in ("location", "offset", "length", "checksum"):
                raise self.refused(f"the tensor {name} says {shown(key)} of its data")
            pairs[key] = self.text(pair, 2)
        place = pairs.get("location", "")
        if not re.fullmatch(FILE_NAME, place):
            raise self.refused(
                f"the tensor {name} has its data in {shown(place)}, which is not a file beside the model"
            )
        numbers = [pairs.get(key, default) for key, default in (("offset", "0"), ("length", str(needed)))]
        if not all(re.fullmatch(r"[0-9]{1,18}", text) for text in numbers):
            raise self.refused(f"the tensor {name} has its data at {shown(numbers)}")
        offset, length = map(int, numbers)
        held = self.file_bytes(place, name)
        if length != needed or offset + length > held:
            raise self.refused(
                f"the tensor {name} needs {needed:,} bytes; it names {length:,} from byte {offset:,} of {place}, "
                f"which has {held:,}"
            )
        return place, offset, length

    def file_bytes(self, place: str, name: str) -> int:
        if place not in self.found.files:
            file = self.found.path.parent / place
            if not file.is_file():
                raise self.refused(f"the tensor {name} has its data in {place}, which is missing")
            if len(self.found.files) == MAX_DATA_FILES:
                raise self.refused(f"its data lies in more than {MAX_DATA_FILES} files")
            self.found.files[place] = file.stat().st_size
        return self.found.files[place]
