"""A float32 graph in half the bytes: FP16 throughout, or weights kept as bfloat16. Inputs and outputs stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import UserError

FLOAT16_MAX = 65504.0
NOTES = {
    "FP16": "weights and activations are float16, which onnxruntime computes as float32 on a CPU: no faster there",
    "BF16": "weights are stored as bfloat16 and computed with as float32, for onnxruntime has no bfloat16 on a CPU",
}


def convert(source: Path, out: Path, precision: str) -> None:
    """Write `source` (float32) as `out`. UserError for weights that float16 cannot hold."""
    if precision == "FP16":
        _to_float16(source, out)
    else:
        _to_bfloat16(source, out)


def _to_float16(source: Path, out: Path) -> None:
    import onnx
    from onnx import numpy_helper
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(str(source))
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name.endswith("_masked"):
            continue
        values = numpy_helper.to_array(tensor)
        largest = float(np.abs(values).max(initial=0.0))
        if len(tensor.dims) > 1 and largest > FLOAT16_MAX:
            raise UserError(
                f"tensor {tensor.name} holds {largest:.4g}, float16 ends at {FLOAT16_MAX:g}",
                "export with quantization BF16 or FP32",
            )
    made = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    # The casts stand at the end, which onnxruntime sorts out and onnx's checker does not.
    OnnxModel.graph_topological_sort(made.graph, is_deterministic=True)
    _save(made, out)


def _to_bfloat16(source: Path, out: Path) -> None:
    import ml_dtypes
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(source))
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        name, stored = tensor.name, f"{tensor.name}_bf16"
        tensor.CopyFrom(numpy_helper.from_array(values, stored))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}_float", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _save(model, out)


def _save(model: Any, out: Path) -> None:
    import onnx

    from edgedistill.onnx.float_export import MAX_EMBEDDED_BYTES

    if model.ByteSize() > MAX_EMBEDDED_BYTES:
        onnx.save(model, str(out), save_as_external_data=True, location=f"{out.name}.data")
    else:
        onnx.save(model, str(out))
