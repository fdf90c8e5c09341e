"""Which nodes of a float graph can be quantized, how their weights lie, and the type that each of them gets."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import UserError, did_you_mean

STATIC, DYNAMIC, WEIGHTS, INT4, FLOAT = "INT8", "INT8-DYNAMIC", "INT8-WEIGHTS", "INT4", "FP32"
TYPES = (STATIC, DYNAMIC, WEIGHTS, INT4)
NODE_TYPES = (*TYPES, FLOAT)
WEIGHTED = ("MatMul", "Gemm", "Attention", "Conv", "Gather")
# What runs on integers between convolutions: with ranges of its own, or in its input's scale.
# Pad itself runs in float; what joins its output again, a shortcut to more channels, does not.
JOINING = ("Add", "Mul", "GlobalAveragePool", "AveragePool", "Concat", "LeakyRelu", "Pad")
PASSING = ("MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
CLIPPING = ("Relu", "Clip")
AVERAGING = ("ReduceMean",)  # in float, and yet the sum before it is cheaper on integers
ORT_DOMAIN = "com.microsoft"
# Tables smaller than this stay float: there is nothing to gain.
SMALL_WEIGHT = 1024


@dataclass(frozen=True)
class Quantizable:
    """A node with a weight. `axis`: the output channels in it; `input`: the activation; `output`: what it gives.

    `module`: the torch module that it was traced in. `values`: how many weights.
    """

    name: str
    op_type: str
    module: str
    weight: str
    axis: int
    input: str
    output: str
    values: int


def quantizable_nodes(model: Any) -> dict[str, Quantizable]:
    """The nodes of an onnx ModelProto that quantize_graph takes, by name, in the graph's order."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        weight = node.input[0 if node.op_type == "Gather" else 1] if len(node.input) > 1 else ""
        tensor = initializers.get(weight)
        if tensor is None or not _supported(node, tensor):
            continue
        values = 1
        for size in tensor.dims:
            values *= size
        if values < SMALL_WEIGHT and node.op_type == "Gather":
            continue
        found[node.name] = Quantizable(
            name=node.name,
            op_type=node.op_type,
            module=module_of(node),
            weight=weight,
            axis=_axis(node),
            input=node.input[1 if node.op_type == "Gather" else 0],
            output=node.output[0],
            values=values,
        )
    return found


def node_types(
    nodes: Mapping[str, Quantizable],
    quantization: str,
    *,
    types: Sequence[tuple[str, str]] = (),
    keep: Collection[str] = (),
) -> dict[str, str]:
    """Node → one of NODE_TYPES. `types`: regular expression of a node's or its module's name → type, the first counts.

    `keep`: names that stay float. UserError for a type that is none, an expression that is none or matches nothing.
    """
    compiled = []
    for pattern, kind in types:
        if kind not in NODE_TYPES:
            raise UserError(
                f"export.tensor_types: no type '{kind}' for '{pattern}'",
                f"{did_you_mean(kind, NODE_TYPES)} (ONNX nodes: {', '.join(NODE_TYPES)})",
            )
        try:
            compiled.append((re.compile(pattern), kind))
        except re.error as error:
            raise UserError(
                f"export.tensor_types: '{pattern}' is not a regular expression: {error}", "correct it"
            ) from error
    unknown = sorted(set(keep) - set(nodes))
    if unknown:
        raise UserError(f"no node '{unknown[0]}' to keep in float", did_you_mean(unknown[0], nodes))
    for (pattern, _), (expression, _) in zip(types, compiled, strict=True):
        if not any(_matches(expression, node) for node in nodes.values()):
            shown = ", ".join(sorted({node.module or node.name for node in nodes.values()})[:6])
            raise UserError(
                f"export.tensor_types: '{pattern}' matches no node that can be quantized", f"there are e.g. {shown}"
            )
    chosen = {}
    for name, node in nodes.items():
        asked = next((kind for expression, kind in compiled if _matches(expression, node)), quantization)
        chosen[name] = FLOAT if name in keep else _meant(asked, quantization)
    return chosen


def stored_type(kind: str, op_type: str) -> str:
    """What a node of a type gets: convolutions have no integer kernel that takes a float input, tables no input."""
    if op_type == "Conv" and kind in (DYNAMIC, INT4):
        return WEIGHTS
    if op_type == "Gather" and kind in (STATIC, DYNAMIC):
        return WEIGHTS
    return kind


def module_of(node: Any) -> str:
    """The torch module that a node was traced in, by its name in the model; empty where none is known."""
    from edgedistill.onnx.float_export import MODULE_KEY

    name = next((str(p.value) for p in node.metadata_props if p.key == MODULE_KEY), "")
    return name.removeprefix("model.")


def consumers(model: Any) -> dict[str, list[Any]]:
    """Tensor → the nodes that read it."""
    found: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def final_output(node: Any, readers: Mapping[str, list[Any]], outputs: Collection[str]) -> str:
    """What is quantized of an integer operator: its output, or that of the Relu or Clip that alone reads it."""
    output: str = node.output[0]
    behind = readers.get(output, [])
    if len(behind) == 1 and behind[0].op_type in CLIPPING and output not in outputs and behind[0].input[0] == output:
        return str(behind[0].output[0])
    return output


def integer_chain(model: Any, static: Collection[str]) -> dict[str, str]:
    """Node → tensor to quantize behind it: convolutions of `static`, and what joins or passes on their integers."""
    readers = consumers(model)
    outputs = {value.name for value in model.graph.output}
    integers: set[str] = set()
    chain: dict[str, str] = {}
    joins = (*JOINING, *PASSING)
    for node in model.graph.node:
        data = node.input[:1] if node.op_type not in ("Add", "Mul", "Concat") else node.input
        joined = node.op_type in joins and len(node.output) == 1 and all(name in integers for name in data)
        if not (node.op_type == "Conv" and node.name in static) and not joined:
            continue
        final = final_output(node, readers, outputs) if node.op_type not in PASSING else node.output[0]
        taken = (*joins, *AVERAGING)
        if joined and not any(r.name in static or r.op_type in taken for r in readers.get(final, [])):
            continue
        integers.add(final)
        chain[node.name] = final
    return chain


def _supported(node: Any, tensor: Any) -> bool:
    import onnx

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if tensor.data_type != onnx.TensorProto.FLOAT or node.op_type not in WEIGHTED:
        return False
    rank = len(tensor.dims)
    if node.op_type == "Conv":
        return rank in (3, 4, 5)
    if node.op_type == "Gather":
        return rank == 2 and attributes.get("axis", 0) == 0
    if node.op_type == "Gemm":
        return (
            rank == 2
            and not attributes.get("transA", 0)
            and attributes.get("alpha", 1.0) == 1.0
            and attributes.get("beta", 1.0) == 1.0
        )
    if node.op_type == "Attention":
        # Without a past, of three equal parts.
        return (
            rank == 2
            and node.domain == ORT_DOMAIN
            and not any(node.input[4:5])
            and "qkv_hidden_sizes" not in attributes
        )
    return rank == 2


def _axis(node: Any) -> int:
    if node.op_type in ("Conv", "Gather"):
        return 0
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 1


def _matches(expression: re.Pattern[str], node: Quantizable) -> bool:
    return expression.search(node.name) is not None or expression.search(node.module) is not None


def _meant(asked: str, quantization: str) -> str:
    """INT8 beside another quantization is that one's way to hold 8 bits."""
    if asked != STATIC:
        return asked
    return {DYNAMIC: DYNAMIC, WEIGHTS: WEIGHTS, INT4: WEIGHTS}.get(quantization, STATIC)
