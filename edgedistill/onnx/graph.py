"""What weights an onnxruntime-genai decoder holds, read from its graph without loading its data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

MODEL_FILE = "model.onnx"
# Tables that the builder computes from the config: no weights of the model.
COMPUTED = ("cos_cache", "sin_cache")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the graph: `name` of its matrix or vector, "INT4"/"INT8"/"FLOAT"/..., bytes with its scales."""

    name: str
    type: str
    rank: int
    bytes: int

    @property
    def is_embedding(self) -> bool:
        return self.name == EMBEDDING


def load_graph(folder: Path) -> ModelProto:
    """The graph of a folder's model.onnx; the weights stay on disk. Raises UserError."""
    import onnx

    path = folder / MODEL_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {MODEL_FILE}", "give the folder that `edgedistill export --format onnx` wrote"
        )
    try:
        return onnx.load(str(path), load_external_data=False)
    # protobuf's exception types differ between its versions
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}", "export the artifact again") from error


def stored_weights(folder: Path) -> list[StoredWeight]:
    """Every weight once: quantized matrices by their MatMulNBits node, the rest as they lie there."""
    import onnx

    model = load_graph(folder)
    initializers = {t.name: t for t in model.graph.initializer}
    found = []
    counted: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        parts = [name for name in node.input[1:] if name in initializers]
        size = sum(_bytes(initializers[p]) for p in parts)
        counted.update(parts)
        found.append(StoredWeight(matrix_name(node.input[1]), f"INT{attribute(node, 'bits')}", 2, size))
    for name, tensor in initializers.items():
        if name in counted or name.startswith(COMPUTED) or tensor.data_type in _index_types():
            continue
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        found.append(StoredWeight(matrix_name(name), kind, len(tensor.dims), _bytes(tensor)))
    return found


def count_types(weights: list[StoredWeight]) -> dict[str, int]:
    """How many weights there are of each type."""
    return dict(sorted(Counter(w.type for w in weights).items()))


def matrix_name(initializer: str) -> str:
    """`model.layers.0.mlp.up_proj.MatMul.weight_Q4` → `model.layers.0.mlp.up_proj.weight`."""
    base, separator, _ = initializer.partition(".MatMul.weight")
    return f"{base}.weight" if separator else initializer


def attribute(node: Any, name: str) -> int:
    """An integer attribute of a node; 0 where it is left out."""
    return next((int(a.i) for a in node.attribute if a.name == name), 0)


def read_initializer(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """An initializer's values, from the graph or from its external file, only this one."""
    import onnx
    from onnx import numpy_helper

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(numpy_helper.to_array(tensor))
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    count = prod(tensor.dims)
    path = folder / where["location"]
    try:
        values = np.fromfile(path, dtype=dtype, count=count, offset=int(where.get("offset", 0)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}", "export the artifact again") from error
    if values.size != count:
        raise UserError(f"{path} is cut short: {tensor.name} has {values.size} of {count} values", "export it again")
    return values.reshape(tuple(tensor.dims))


def _bytes(tensor: TensorProto) -> int:
    import onnx

    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    size: int = prod(tensor.dims) * dtype.itemsize
    return size


def _index_types() -> frozenset[int]:
    import onnx

    return frozenset({onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL})
