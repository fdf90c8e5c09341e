"""A graph whose head reads one token computes its last layer for that token alone.

A text classifier, a ViT and an embedding pooled by its first token take `[:, 0]` of the last hidden states. What acts
on each token by itself (products with a weight, norms, activations, sums) then needs that row only, and attention needs
its query only; keys and values are still those of all tokens. Of 12 D² products a token, 10 D² are saved in that layer.

The graph is walked backwards from `[:, 0]`, and a node is narrowed where everything that reads its output was. The
arithmetic of a row is the same, so that nothing but the order of a kernel's sums may differ.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

# Operator → which inputs hold a row for each token; the others must be weights. Elementwise on them, or along D.
ROW_WISE: dict[str, tuple[int, ...]] = {
    "SkipLayerNormalization": (0, 1), "LayerNormalization": (0,), "SimplifiedLayerNormalization": (0,),
    "SkipSimplifiedLayerNormalization": (0, 1), "MatMul": (0,), "BiasGelu": (0,), "Gelu": (0,), "FastGelu": (0,),
    "QuickGelu": (0,), "Relu": (0,), "Tanh": (0,), "Erf": (0,), "Sigmoid": (0,), "Identity": (0,),
    "Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1),
}  # fmt: skip
PRODUCTS = ("MatMul", "MultiHeadAttention")


def keep_first_token(model: onnx_ir.Model) -> int:
    """Narrow `model` in place to what `[:, 0]` of its states needs; gives how many nodes were narrowed.

    Comes before attention is packed with its projections: of MatMul → Split → MultiHeadAttention the query's part
    becomes a product of its own. Nothing changes where no product would be saved.
    """
    narrowed = _narrowed(model)
    if not any(node.op_type in PRODUCTS for node in narrowed):
        return 0
    sliced: dict[str, onnx_ir.Value] = {}
    inside = {id(output) for node in narrowed for output in node.outputs}
    for node in narrowed:
        for index in _rows(node):
            value = node.inputs[index]
            if value is None or id(value) in inside or not _has_rows(value):
                continue
            if value.name not in sliced:
                sliced[str(value.name)] = _query(model, node, value) or _first_row(model, node, value)
            node.replace_input_with(index, sliced[str(value.name)])
    for node in narrowed:
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = _with_one_row(output.shape)
    return len(narrowed)


def _narrowed(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Nodes of which only the first row is read, in the graph's order."""
    ends = {id(value) for value in model.graph.outputs}
    found: dict[int, onnx_ir.Node] = {}
    for node in reversed(list(model.graph)):
        if not _acts_on_rows(node):
            continue
        read = [use for output in node.outputs for use in output.uses()]
        if not read or any(id(output) in ends for output in node.outputs):
            continue
        if all(_takes_first(use.node) if id(use.node) not in found else use.idx in _rows(use.node) for use in read):
            found[id(node)] = node
    return list(reversed(found.values()))


def _takes_first(node: onnx_ir.Node) -> bool:
    """Whether it is `[:, 0]` of [B, T, D]."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or node.attributes.get_int("axis", 0) != 1:
        return False
    index = _constant(node.inputs[1])
    return index is not None and index.size == 1 and int(index.reshape(-1)[0]) == 0 and _has_rows(node.inputs[0])


def _acts_on_rows(node: onnx_ir.Node) -> bool:
    if node.op_type == "MultiHeadAttention":
        # With a bias for each query, or a cache, a row is not only its query's.
        extra = [value for value in node.inputs[5:] if value is not None]
        return not extra and all(value is not None and _has_rows(value) for value in node.inputs[:3])
    if node.op_type not in ROW_WISE or not _has_rows(node.outputs[0]):
        return False
    shape = node.outputs[0].shape
    if node.op_type.endswith("LayerNormalization") and node.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        weight = _constant(value)
        if node.op_type == "MatMul" and index == 1:
            if weight is None or weight.ndim != 2:
                return False
        elif weight is not None:
            if weight.ndim > 1 and weight.size > 1:
                return False
        elif index not in ROW_WISE[node.op_type] or not _has_rows(value) or value.shape[:2] != shape[:2]:
            return False
    return True


def _rows(node: onnx_ir.Node) -> tuple[int, ...]:
    """Which inputs of a narrowed node are narrowed."""
    return (0,) if node.op_type == "MultiHeadAttention" else ROW_WISE[node.op_type]


def _has_rows(value: onnx_ir.Value | None) -> bool:
    return value is not None and value.const_value is None and value.shape is not None and len(value.shape) == 3


def _constant(value: onnx_ir.Value | None) -> Any:
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())


def _with_one_row(shape: onnx_ir.Shape) -> onnx_ir.Shape:
    import onnx_ir

    return onnx_ir.Shape([shape[0], 1, shape[2]])


def _first_row(model: onnx_ir.Model, node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value:
    """value[:, :1], before `node`."""
    import onnx_ir

    if "first_row" not in model.graph.initializers:
        _initializer(model, "first_row", np.array([0], dtype=np.int64))
    index = model.graph.initializers["first_row"]
    gather = onnx_ir.node("Gather", [value, index], {"axis": 1})
    made = gather.outputs[0]
    made.name, made.type = f"{value.name}_first", value.type
    made.shape = _with_one_row(value.shape) if value.shape is not None else None
    model.graph.insert_before(node, gather)
    return made


def _query(model: onnx_ir.Model, node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    """`value`, a part of Split(MatMul(x, W)), as MatMul(x[:, :1], W's part); the other parts keep theirs.

    None where it is no such part, or where W has other readers: then it would be stored twice.
    """
    import onnx_ir

    split = value.producer()
    product = split.inputs[0].producer() if split is not None and split.op_type == "Split" else None
    if split is None or product is None or product.op_type != "MatMul" or len(split.inputs[0].uses()) != 1:
        return None
    if split.attributes.get_int("axis", 0) not in (-1, 2) or value is not split.outputs[0] or len(value.uses()) != 1:
        return None
    source, weight = product.inputs
    packed = _constant(weight)
    found = [part.shape[2] if part.shape is not None else None for part in split.outputs]
    sizes = [size for size in found if isinstance(size, int)]
    if packed is None or packed.ndim != 2 or not _has_rows(source) or len(weight.uses()) != 1:
        return None
    if len(sizes) < 2 or len(sizes) < len(found) or sum(sizes) != packed.shape[1]:
        return None
    own = onnx_ir.node(
        "MatMul",
        [
            _first_row(model, product, source),
            _initializer(model, f"{weight.name}_first", np.ascontiguousarray(packed[:, : sizes[0]])),
        ],
        metadata_props=dict(product.metadata_props),
    )
    made = own.outputs[0]
    made.name, made.type, made.shape = f"{value.name}_first", value.type, _with_one_row(value.shape)
    model.graph.insert_before(node, own)
    _without_first_part(model, product, split, weight, packed, sizes)
    return made


def _without_first_part(
    model: onnx_ir.Model, product: onnx_ir.Node, split: onnx_ir.Node, weight: Any, packed: Any, sizes: list[int]
) -> None:
    """Split(MatMul(x, W)) gives its other parts alone: the first one's only reader is about to read another product."""
    import onnx_ir

    rest = _initializer(model, f"{weight.name}_rest", np.ascontiguousarray(packed[:, sizes[0] :]))
    product.replace_input_with(1, rest)
    before = product.outputs[0]
    before.shape = onnx_ir.Shape([*before.shape[:2], sum(sizes[1:])]) if before.shape is not None else None
    parts = _initializer(model, f"{weight.name}_parts", np.array(sizes[1:], dtype=np.int64))
    fewer = onnx_ir.node("Split", [before, parts], {"axis": 2}, num_outputs=len(sizes) - 1,
                         metadata_props=dict(split.metadata_props))  # fmt: skip
    model.graph.insert_before(split, fewer)
    for old, new in zip(split.outputs[1:], fewer.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        onnx_ir.convenience.replace_all_uses_with(old, new)


def _initializer(model: onnx_ir.Model, name: str, array: Any) -> onnx_ir.Value:
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    return value
