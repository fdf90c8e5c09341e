"""A float graph on its way to a quantized one: its weights, new names, and the nodes that take the place of others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORT_DOMAIN = "com.microsoft"


class Rewriter:
    """Nodes are given in order; constants are stored once for each content and name asked for."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.model = onnx.load(str(path))
        self.nodes: list[Any] = []
        self._initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._taken = {
            *self._initializers,
            *(value.name for value in self.model.graph.input),
            *(name for node in self.model.graph.node for name in node.output),
        }
        self._node_names = {node.name for node in self.model.graph.node}
        self._made: dict[tuple[str, str, tuple[int, ...], str], str] = {}

    def weight(self, name: str) -> NDArray[np.float32]:
        """An initializer's values."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self._initializers[name]), dtype=np.float32)

    def is_constant(self, name: str) -> bool:
        return name in self._initializers

    def is_float_matrix(self, name: str, values: int) -> bool:
        """Whether an initializer is float32 of two axes or more, with at least so many values."""
        import onnx

        tensor = self._initializers.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            return False
        return bool(math.prod(tensor.dims) >= values)

    def constant(self, values: NDArray[Any], name: str) -> str:
        """The name of an initializer with these values: `name`, or with a number where that is another's."""
        from onnx import numpy_helper

        values = np.asarray(values)
        key = (name, values.dtype.str, values.shape, hashlib.sha256(values.tobytes()).hexdigest())
        if key not in self._made:
            made = self._made[key] = self.fresh(name)
            self._initializers[made] = numpy_helper.from_array(values, made)
        return self._made[key]

    def fresh(self, name: str) -> str:
        """A name for a tensor that none has."""
        found, number = name, 1
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        return found

    def fresh_node(self, name: str) -> str:
        """A name for a node that none has."""
        found, number = name, 1
        while found in self._node_names:
            number += 1
            found = f"{name}_{number}"
        self._node_names.add(found)
        return found

    def add(
        self, op_type: str, inputs: Sequence[str], output: str, *, like: Any = None, domain: str = "", **attributes: Any
    ) -> str:
        """A node that gives `output`, with the attributes and notes of the node that it stands for, if any."""
        from onnx import helper

        name = self.fresh_node(f"{output}_{op_type}")
        node = helper.make_node(op_type, list(inputs), [output], name=name, domain=domain, **attributes)
        if like is not None:
            node.name = like.name
            node.metadata_props.extend(like.metadata_props)
        self.nodes.append(node)
        return output

    def save(self, out: Path) -> None:
        """Write the graph of the nodes given, with the constants that they read. The same graph: the same bytes."""
        import onnx

        from edgedistill.onnx.float_export import MAX_EMBEDDED_BYTES

        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | {value.name for value in graph.output}
        del graph.initializer[:]
        graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in used)
        # Shapes of tensors that are gone, or are now integers.
        del graph.value_info[:]
        if not any(entry.domain == ORT_DOMAIN for entry in self.model.opset_import):
            self.model.opset_import.append(onnx.helper.make_opsetid(ORT_DOMAIN, 1))
        if self.model.ByteSize() > MAX_EMBEDDED_BYTES:
            onnx.save(self.model, str(out), save_as_external_data=True, location=f"{out.name}.data")
        else:
            onnx.save(self.model, str(out))
