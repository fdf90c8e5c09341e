"""A shortcut without weights, as one convolution.

ResNets for small images (He et al. 2015, option A) join stages of different width by every second pixel and zeros for
the new channels: Slice, Slice, Pad. Runtimes lay out channels in blocks for convolutions and leave that layout for such
operators, and for the sum behind them, and for every block after it, whose sums then are operators of their own. A 1×1
convolution whose weights are ones and zeros is the same function (each output is one input times 1, plus zeros) and
stays in the layout, in float as in integers: a weight of one and a weight of zero have no rounding.

Shapes: x [B, C, H, W] → [B, C', ⌈H / s⌉, ⌈W / t⌉], weight [C', C, 1, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir


def convolve_shortcuts(model: onnx_ir.Model) -> int:
    """Rewrite, in place, each Pad of channels that a sum reads, with strided Slices before it; gives their number."""
    import onnx_ir

    made = 0
    for node in list(model.graph):
        found = _shortcut(node)
        if found is None:
            continue
        source, strides, before, after = found
        channels, kind = int(source.shape[1]), source.dtype
        weight = np.zeros((before + channels + after, channels, 1, 1), dtype=kind.numpy())
        weight[before + np.arange(channels), np.arange(channels)] = 1
        tensor = onnx_ir.tensor(weight, name=f"{node.outputs[0].name}_weight")
        value = onnx_ir.Value(
            name=tensor.name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype)
        )
        model.graph.register_initializer(value)
        convolution = onnx_ir.node(
            "Conv", [source, value], {"kernel_shape": [1, 1], "strides": list(strides)},
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        old, new = node.outputs[0], convolution.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        model.graph.insert_before(node, convolution)
        onnx_ir.convenience.replace_all_uses_with(old, new)
        model.graph.remove(node, safe=True)
        made += 1
    return made


def _shortcut(node: onnx_ir.Node) -> tuple[onnx_ir.Value, tuple[int, int], int, int] | None:
    """What is sliced, its strides, and the zeros before and after its channels; None where `node` is no such Pad."""
    if node.op_type != "Pad" or node.domain not in ("", "ai.onnx"):
        return None
    if node.attributes.get_string("mode", "constant") != "constant" or any(v is not None for v in node.inputs[3:]):
        return None
    pads, fill = _constant(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    if pads is None or pads.size != 8 or (pads < 0).any() or pads[[0, 2, 3, 4, 6, 7]].any():
        return None
    if fill is not None and ((zero := _constant(fill)) is None or zero.any()):
        return None
    readers = [use.node for use in node.outputs[0].uses()]
    if not readers or any(reader.op_type != "Add" for reader in readers):
        return None
    source, strides = node.inputs[0], [1, 1]
    while source is not None and (before := _strided(source)) is not None:
        source, axis, step = before
        strides[axis - 2] *= step
    if source is None or source.shape is None or len(source.shape) != 4 or not isinstance(source.shape[1], int):
        return None
    if source.dtype is None or source.dtype.name not in ("FLOAT", "FLOAT16", "DOUBLE"):
        return None
    return source, (strides[0], strides[1]), int(pads[1]), int(pads[5])


def _strided(value: onnx_ir.Value) -> tuple[onnx_ir.Value, int, int] | None:
    """What `value` takes every step-th row or column of, from the first to the last: (it, its axis, the step)."""
    node = value.producer()
    if node is None or node.op_type != "Slice" or len(value.uses()) != 1 or len(node.inputs) < 4:
        return None
    source = node.inputs[0]
    starts, ends, axes = (_constant(given) for given in node.inputs[1:4])
    steps = _constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1, dtype=np.int64)
    if source is None or starts is None or ends is None or axes is None or steps is None:
        return None
    if any(given.size != 1 for given in (starts, ends, axes, steps)) or source.shape is None or len(source.shape) != 4:
        return None
    axis, step = int(axes.item()) % 4, int(steps.item())
    size = source.shape[axis]
    end = size if isinstance(size, int) else np.iinfo(np.int32).max  # a symbolic size: only "to the end" will do
    if axis not in (2, 3) or step < 1 or int(starts.item()) != 0 or int(ends.item()) < end:
        return None
    return source, axis, step


def _constant(value: onnx_ir.Value | None) -> Any:
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())
