"""INT8 nodes: static ones between QuantizeLinear and DequantizeLinear, dynamic ones that find their ranges in each run.

What onnxruntime runs on integers: QLinearConv, QGemm, MatMulIntegerToFloat, QLinearAdd and pools, which it makes of
Q/DQ pairs when it loads a graph; QAttention and DynamicQuantizeMatMul, which are written as they are.
Legend: K inputs of a product, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.onnx.blocks import qdq_stored
from edgedistill.onnx.int8_scheme import Scheme
from edgedistill.onnx.quantizable import PASSING, Quantizable
from edgedistill.onnx.rewriting import ORT_DOMAIN, Rewriter

Range = tuple[float, float]


@dataclass(frozen=True)
class Step:
    """Scale and zero point of an activation, as names of constants and as values."""

    scale: float
    zero_point: int
    scale_name: str
    zero_point_name: str


def activation_step(limits: Range, scheme: Scheme) -> tuple[np.float32, int]:
    """Scale and zero point of a range with 0 in it: uint8 over all of it, or int8 about zero. One value: scale 1."""
    low, high = min(0.0, limits[0]), max(0.0, limits[1])
    if scheme.signed_activations:
        largest = max(-low, high)
        return (np.float32(largest / 127) if largest > 0 else np.float32(1)), 0
    if high == low:
        return np.float32(1), 0
    scale = np.float32((high - low) / 255)
    return scale, int(np.clip(np.rint(-low / float(scale)), 0, 255))


class Int8Writer:
    """Writes INT8 nodes into a Rewriter. `ranges`: tensor → what its values lie in, for static nodes."""

    def __init__(self, graph: Rewriter, scheme: Scheme, ranges: Mapping[str, Range], chain: Mapping[str, str]) -> None:
        self.graph = graph
        self.scheme = scheme
        self.ranges = ranges
        self.chain = chain
        self.steps: dict[str, Step] = {}
        self._inputs: dict[str, str] = {}
        self._dequantized: dict[str, str] = {}
        self._pending: dict[str, Step | None] = {}
        self._dynamic: dict[str, tuple[str, str, str]] = {}

    def static(self, node: Any, info: Quantizable) -> None:
        """A node with a weight whose input is quantized with known ranges."""
        from onnx import helper

        if info.op_type == "Attention":
            self._static_attention(node, info)
            return
        quantized = self._dequantized_input(info.input)
        weight, scales = self._weight(info)
        inputs = [quantized, weight]
        if len(node.input) > 2 and node.input[2]:
            inputs.append(self._bias(node.input[2], info, scales))
        made = helper.make_node(node.op_type, inputs, list(node.output), name=node.name, domain=node.domain)
        made.attribute.extend(node.attribute)
        made.metadata_props.extend(node.metadata_props)
        self.graph.nodes.append(made)
        self.behind(node)

    def plain(self, node: Any) -> None:
        """A node as it is."""
        import onnx

        made = onnx.NodeProto()
        made.CopyFrom(node)
        self.graph.nodes.append(made)

    def behind(self, node: Any) -> None:
        """Q and DQ of what a node of the integer chain gives; called for every node, in the graph's order."""
        final = self.chain.get(node.name)
        if final is not None:
            shared = None
            if node.op_type in PASSING:
                shared = self.steps[node.input[0]]  # what is only moved keeps its scale
            self._pending[final] = shared
        for position, output in enumerate(node.output):
            if output in self._pending:
                step = self._pending.pop(output) or self._step(output)
                before = self.graph.fresh(f"{output}_float")
                self.graph.nodes[-1].output[position] = before
                stored = self.graph.fresh(f"{output}_quantized")
                self.graph.add("QuantizeLinear", [before, step.scale_name, step.zero_point_name], stored)
                self.graph.add("DequantizeLinear", [stored, step.scale_name, step.zero_point_name], output)
                self.steps[output] = step

    def dynamic(self, node: Any, info: Quantizable) -> None:
        """A product whose input is quantized in each run: MatMul and Gemm, Attention with its projections."""
        if info.op_type == "Attention":
            self._dynamic_attention(node, info)
            return
        # A bias, of Gemm, is the operator's last input.
        bias = [name for name in node.input[2:3] if name]
        self._dynamic_product([info.input, *self._weight_constants(info), *bias], info.output, like=node)

    def table(self, node: Any, info: Quantizable) -> None:
        """An embedding as int8 with a scale for each row, of which a run reads the rows that it needs."""
        graph = self.graph
        stored, scales, _ = qdq_stored(graph.weight(info.weight), axis=0)
        rows = graph.constant(stored, f"{info.weight}_quantized")
        scale = graph.constant(scales.reshape(-1, 1), f"{info.weight}_scale")
        looked_up = graph.add("Gather", [rows, info.input], graph.fresh(f"{info.output}_quantized"), axis=0)
        scaled = graph.add("Gather", [scale, info.input], graph.fresh(f"{info.output}_scale"), axis=0)
        whole = graph.add("Cast", [looked_up], graph.fresh(f"{info.output}_cast"), to=1)
        graph.add("Mul", [whole, scaled], info.output, like=node)

    def stored_weight(self, node: Any, info: Quantizable, *, folded: bool = True) -> None:
        """A convolution in float whose weight lies in the file as int8.

        `folded`: dequantized when the graph is loaded, by Cast and Mul of constants, which onnxruntime folds. Else by a
        DequantizeLinear, which runs each time, and whose convolution misses the layout and the fusions of those with a
        constant weight. Zero points are 0.
        """
        from onnx import helper

        graph = self.graph
        stored, scales, zeros = qdq_stored(graph.weight(info.weight), axis=info.axis)
        if folded:
            shape = [-1 if axis == info.axis else 1 for axis in range(stored.ndim)]
            scale = graph.constant(scales.reshape(shape), f"{info.weight}_scale")
            constant = graph.constant(stored, f"{info.weight}_quantized")
            whole = graph.add("Cast", [constant], graph.fresh(f"{info.weight}_cast"), to=1)
            weight = graph.add("Mul", [whole, scale], graph.fresh(f"{info.weight}_dequantized"))
        else:
            weight = self._dequantized_constant(stored, scales, zeros, info)
        made = helper.make_node(
            node.op_type, [node.input[0], weight, *node.input[2:]], list(node.output), name=node.name
        )
        made.attribute.extend(node.attribute)
        made.metadata_props.extend(node.metadata_props)
        graph.nodes.append(made)

    def _static_attention(self, node: Any, info: Quantizable) -> None:
        if not self._has_kernel(node):
            quantized = self._dequantized_input(info.input)
            weight, scales = self._weight(info)
            projected = self.graph.fresh(f"{info.output}_projected")
            product = self.graph.add("MatMul", [quantized, weight], projected)
            split_attention(self.graph, node, product, len(scales) // 3, info.output)
            return
        step = self._step(info.input)
        self._attention(node, info, (self._quantized_input(info.input), step.scale_name, step.zero_point_name))

    def _dynamic_attention(self, node: Any, info: Quantizable) -> None:
        if not self._has_kernel(node):
            projected = self.graph.fresh(f"{info.output}_projected")
            product = self._dynamic_product([info.input, *self._weight_constants(info)], projected)
            split_attention(self.graph, node, product, self.graph.weight(info.weight).shape[1] // 3, info.output)
            return
        self._attention(node, info, self._found_in_the_run(info.input))

    def _has_kernel(self, node: Any) -> bool:
        """Whether QAttention computes it: unsigned inputs, and nothing added to the scores."""
        return not self.scheme.signed_activations and not any(node.input[5:6])

    def _attention(self, node: Any, info: Quantizable, quantized: tuple[str, str, str]) -> None:
        graph = self.graph
        name, scale, zero_point = quantized
        _, _, bias, mask = [*node.input, "", ""][:4]
        weight, weight_scale, weight_zero = self._weight_constants(info)
        if not bias:
            bias = graph.constant(np.zeros(graph.weight(info.weight).shape[1], np.float32), f"{info.weight}_bias")
        inputs = [name, weight, bias, scale, weight_scale, mask, zero_point, weight_zero]
        graph.add("QAttention", inputs, info.output, like=node, domain=ORT_DOMAIN)
        graph.nodes[-1].attribute.extend(node.attribute)

    def _dynamic_product(self, inputs: list[str], output: str, like: Any = None) -> str:
        return self.graph.add("DynamicQuantizeMatMul", inputs, output, like=like, domain=ORT_DOMAIN)

    def _found_in_the_run(self, name: str) -> tuple[str, str, str]:
        from onnx import helper

        if name not in self._dynamic:
            outputs = [self.graph.fresh(f"{name}_{part}") for part in ("quantized", "scale", "zero_point")]
            self.graph.nodes.append(
                helper.make_node("DynamicQuantizeLinear", [name], outputs, name=f"{name}_DynamicQuantizeLinear")
            )
            self._dynamic[name] = (outputs[0], outputs[1], outputs[2])
        return self._dynamic[name]

    def _dequantized_input(self, name: str) -> str:
        """The tensor as it comes out of int8; itself where it is quantized already."""
        if name in self.steps and name not in self._inputs:
            return name
        if name not in self._dequantized:
            stored, step = self._quantized_input(name), self._step(name)
            pair = [step.scale_name, step.zero_point_name]
            back = self.graph.fresh(f"{name}_dequantized")
            self._dequantized[name] = self.graph.add("DequantizeLinear", [stored, *pair], back)
        return self._dequantized[name]

    def _quantized_input(self, name: str) -> str:
        """The tensor's integers."""
        if name not in self._inputs:
            step = self.steps[name] = self._step(name)
            stored = self.graph.fresh(f"{name}_quantized")
            self._inputs[name] = self.graph.add("QuantizeLinear", [name, step.scale_name, step.zero_point_name], stored)
        return self._inputs[name]

    def _step(self, name: str) -> Step:
        if name in self.steps:
            return self.steps[name]
        scale, zero_point = activation_step(self.ranges[name], self.scheme)
        kind = np.int8 if self.scheme.signed_activations else np.uint8
        return Step(
            float(scale),
            zero_point,
            self.graph.constant(np.asarray(scale, dtype=np.float32), f"{name}_scale"),
            self.graph.constant(np.asarray(zero_point, dtype=kind), f"{name}_zero_point"),
        )

    def _stored(self, info: Quantizable) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any]]:
        """Integers, scales and zero points of a weight, in the signs of the scheme."""
        stored, scales, zeros = qdq_stored(
            self.graph.weight(info.weight), axis=info.axis, reduce_range=self.scheme.reduce_range
        )
        if self.scheme.signed_weights:
            return stored, scales, zeros
        return (stored.astype(np.int16) + 128).astype(np.uint8), scales, np.full_like(zeros, 128, dtype=np.uint8)

    def _weight_constants(self, info: Quantizable) -> tuple[str, str, str]:
        """Integers [K, N], scales and zero points of a product's weight, as constants."""
        stored, scales, zeros = self._stored(info)
        if info.axis == 0:  # Gemm with a transposed weight
            stored = np.ascontiguousarray(stored.T)
        constant = self.graph.constant
        return (
            constant(stored, f"{info.weight}_quantized"),
            constant(scales, f"{info.weight}_scale"),
            constant(zeros, f"{info.weight}_zero_point"),
        )

    def _weight(self, info: Quantizable) -> tuple[str, NDArray[np.float32]]:
        stored, scales, zeros = self._stored(info)
        return self._dequantized_constant(stored, scales, zeros, info), scales

    def _dequantized_constant(
        self, stored: NDArray[Any], scales: NDArray[np.float32], zeros: NDArray[Any], info: Quantizable
    ) -> str:
        graph = self.graph
        inputs = [
            graph.constant(stored, f"{info.weight}_quantized"),
            graph.constant(scales, f"{info.weight}_scale"),
            graph.constant(zeros, f"{info.weight}_zero_point"),
        ]
        return graph.add("DequantizeLinear", inputs, graph.fresh(f"{info.weight}_dequantized"), axis=info.axis)

    def _bias(self, name: str, info: Quantizable, scales: NDArray[np.float32]) -> str:
        """A bias as int32 at the scale of the products that it is added to."""
        graph = self.graph
        if not graph.is_constant(name):
            return name
        scale = scales * np.float32(self.steps[info.input].scale)
        values = graph.weight(name).reshape(-1).astype(np.float64)
        limit = 2**31 - 1
        stored = np.clip(np.rint(values / scale.astype(np.float64)), -limit, limit).astype(np.int32)
        inputs = [
            graph.constant(stored, f"{name}_quantized"),
            graph.constant(scale, f"{name}_scale"),
            graph.constant(np.zeros(len(stored), np.int32), f"{name}_zero_point"),
        ]
        return graph.add("DequantizeLinear", inputs, graph.fresh(f"{name}_dequantized"), axis=0)


def split_attention(graph: Rewriter, node: Any, product: str, width: int, output: str) -> None:
    """MultiHeadAttention of a packed product [B, T, 3 N], for an Attention node whose projections are apart."""
    from onnx import helper

    given = [*node.input, *[""] * 6][:6]
    parts = [graph.fresh(f"{output}_{letter}") for letter in "qkv"]
    sizes = graph.constant(np.full(3, width, dtype=np.int64), "projection_sizes")
    graph.nodes.append(helper.make_node("Split", [product, sizes], parts, name=f"{output}_Split", axis=2))
    # query, key, value, bias, key_padding_mask, attention_bias
    graph.add("MultiHeadAttention", [*parts, given[2], given[3], given[5]], output, like=node, domain=ORT_DOMAIN)
    kept = ("num_heads", "scale", "mask_filter_value", "unidirectional")
    graph.nodes[-1].attribute.extend(a for a in node.attribute if a.name in kept)
