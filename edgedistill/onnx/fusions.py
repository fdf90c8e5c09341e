"""What ONNX Runtime runs as one operator, written as one: on a graph that `fused_attention` was traced with.

transformers' own `ort_fusions` ran before: SkipLayerNormalization and BiasGelu are there, and products of one input
are one MatMul followed by a Split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.onnx.first_token import keep_first_token
from edgedistill.onnx.shortcuts import convolve_shortcuts

if TYPE_CHECKING:
    import onnx_ir

ORT_DOMAIN = "com.microsoft"


def fuse(model: onnx_ir.Model, *, first_token: bool = True) -> None:
    """Rewrite `model` in place: no reshape that changes nothing, and attention with its projections in one node.

    A shortcut that pads channels becomes a convolution (shortcuts.py).
    `first_token`: a last layer of which one token is read is computed for that token (first_token.py).
    """
    from onnx_ir.passes import common

    _drop_empty_reshapes(model)
    convolve_shortcuts(model)
    if first_token:
        common.RemoveUnusedNodesPass()(model)
        keep_first_token(model)
    for node in list(model.graph):
        if node.op_type == "MultiHeadAttention":
            _pack_projections(model, node)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    if any(node.domain == ORT_DOMAIN for node in model.graph):
        model.graph.opset_imports[ORT_DOMAIN] = 1


def name_axes(model: onnx_ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Call the symbolic sizes of the graph what `axes` (input → axis → name) calls them."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        shape = value.shape
        for axis, name in axes.get(value.name or "", {}).items():
            if shape is not None and isinstance(shape[axis], onnx_ir.SymbolicDim):
                names[str(shape[axis].value)] = name
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        value.shape = onnx_ir.Shape(
            [dim if isinstance(dim, int) else _renamed(str(dim.value), names) for dim in value.shape]
        )


def _renamed(size: str, names: Mapping[str, str]) -> str:
    """ "s59 + s70" → "past + tokens"."""
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size)


def _drop_empty_reshapes(model: onnx_ir.Model) -> None:
    """Reshapes of reshapes that end in the shape that they began with. Symbols that are equal are equal sizes."""
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        root, wanted = node.inputs[0], node.outputs[0].shape
        while root is not None and wanted is not None:
            if root.shape is not None and _same(root.shape, wanted):
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], root)
                break
            before = root.producer()
            root = before.inputs[0] if before is not None and before.op_type == "Reshape" else None


def _same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one, other, strict=True)
    )


def _pack_projections(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    """MatMul → Split → three Adds → MultiHeadAttention becomes Attention, whose products are packed once at load."""
    import onnx_ir

    parts = [_projection(value) for value in node.inputs[:3]]
    found = [part for part in parts if part is not None]
    if len(found) != 3 or len({id(split) for split, _, _ in found}) != 1 or [i for _, i, _ in found] != [0, 1, 2]:
        return
    split = found[0][0]
    product = split.inputs[0].producer() if split.inputs[0] is not None else None
    if product is None or product.op_type != "MatMul":
        return
    source, weight = product.inputs
    packed = _constant(weight)
    if source is None or source.shape is None or len(source.shape) != 3 or packed is None or packed.shape[1] % 3:
        return
    width = packed.shape[1] // 3
    biases = [np.zeros(width, packed.dtype) if bias is None else bias for _, _, bias in found]
    if any(bias.shape != (width,) for bias in biases):
        return
    tensor = onnx_ir.tensor(np.concatenate(biases), name=f"{weight.name}_bias")
    bias = onnx_ir.Value(
        name=tensor.name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype)
    )
    model.graph.register_initializer(bias)
    given = [*node.inputs, *[None] * 6][:6]
    attention = onnx_ir.node(
        "Attention",
        [source, weight, bias, given[4], None, given[5]],
        dict(node.attributes),
        domain=ORT_DOMAIN,
        metadata_props=dict(node.metadata_props),
    )
    old, new = node.outputs[0], attention.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    model.graph.insert_before(node, attention)
    onnx_ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove(node, safe=True)


def _projection(value: onnx_ir.Value | None) -> tuple[onnx_ir.Node, int, NDArray[Any] | None] | None:
    """The Split that a projection comes from, its place there, and its bias."""
    bias = None
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Add":
        bias = _constant(node.inputs[1])
        value = node.inputs[0]
        if bias is None or value is None:
            return None
        node = value.producer()
    if node is None or node.op_type != "Split" or value is None or node.attributes.get_int("axis", 0) not in (-1, 2):
        return None
    return node, node.outputs.index(value), bias


def _constant(value: onnx_ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())
