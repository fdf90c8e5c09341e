"""What a graph needs to become a TensorRT engine on a device: standard operators, symmetric INT8, a script beside it.

Nothing of TensorRT runs here: the graph is checked and run in onnxruntime, whose outputs are the golden vectors that
`build_engine.py` compares the engine with on the device.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.records.artifact import TensorSpec
from edgedistill.runtimes.graph import GraphProcess

SCRIPT, SETTINGS, GOLDEN = "build_engine.py", "tensorrt.json", "golden"
SCHEMA = "edgedistill.tensorrt/1"
# TensorRT 10 is the first that takes int64 inputs and strongly typed networks from trtexec; it knows this opset.
MINIMUM_VERSION = (10, 0)
OPSET = 18
STANDARD_DOMAINS = ("", "ai.onnx")
LARGEST_BATCH, USUAL_LENGTH = 8, 128
NOTE = (
    f"for TensorRT: standard operators only; {SCRIPT} builds the engine on the device, compares and times it. It was"
    " never run on one"
)


def require_tensorrt(graph: Path) -> None:
    """UserError for a graph that TensorRT cannot take: another domain's operators, or INT8 with zero points."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(graph), load_external_data=False)
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in STANDARD_DOMAINS})
    if foreign:
        raise UserError(
            f"{graph.name} has the operators {', '.join(foreign[:4])}, which TensorRT does not know",
            "export it with --set export.tensorrt=true; decoders go to a Jetson as GGUF",
        )
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        zero = constants.get(node.input[2])
        if zero is None or zero.data_type == onnx.TensorProto.INT32:
            continue
        if zero.data_type != onnx.TensorProto.INT8 or np.any(numpy_helper.to_array(zero)):
            kind = onnx.TensorProto.DataType.Name(zero.data_type)
            raise UserError(
                f"{graph.name}: {node.name or node.op_type} quantizes to {kind} with a zero point, and TensorRT takes"
                " only INT8 that is symmetric about zero",
                "export it with --set export.int8_scheme=s8s8",
            )


def write_engine_script(
    folder: Path,
    graph: Path,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    batches: Sequence[Mapping[str, NDArray[Any]]],
    longest: int,
    limit: float,
    threads: int = 1,
) -> None:
    """Write build_engine.py, tensorrt.json and golden/ into `folder`, beside `graph`.

    `batches`: golden inputs; onnxruntime's outputs on them are what the engine is held to, within `limit` (relative,
    root mean square). `longest`: the largest size of an axis that is no batch. UserError: see `require_tensorrt`.
    """
    require_tensorrt(graph)
    (folder / GOLDEN).mkdir()
    with GraphProcess(graph, threads=threads) as process:
        cases = [
            {
                "inputs": _written(folder, f"{number:02d}", batch),
                "outputs": _written(folder, f"{number:02d}", process.run(batch)),
            }
            for number, batch in enumerate(batches)
        ]
    settings = {
        "schema": SCHEMA,
        "file": graph.name,
        "minimum_version": MINIMUM_VERSION,
        "axes": _axes(inputs, batches, longest),
        "inputs": [spec.model_dump() for spec in inputs],
        "outputs": [spec.model_dump() for spec in outputs],
        "limit": limit,
        "cases": cases,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8", newline="\n")
    shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)


def _axes(
    inputs: Sequence[TensorSpec], batches: Sequence[Mapping[str, NDArray[Any]]], longest: int
) -> dict[str, list[int]]:
    """Axis that varies → smallest, usual and largest size: the profile that the engine is built for."""
    axes: dict[str, list[int]] = {}
    for spec in inputs:
        for place, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                continue
            seen = max(batch[spec.name].shape[place] for batch in batches)
            most = max(seen, LARGEST_BATCH if dim == "batch" else longest)
            usual = 1 if dim == "batch" else min(USUAL_LENGTH, most)
            axes[dim] = [1, usual, most]
    return axes


def _written(folder: Path, stem: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    """Raw little-endian values in golden/, as trtexec loads them."""
    found = {}
    for name, values in arrays.items():
        path = f"{GOLDEN}/{stem}.{name}.bin"
        kind = values.dtype.newbyteorder("<")
        (folder / path).write_bytes(np.ascontiguousarray(values, dtype=kind).tobytes())
        found[name] = {"file": path, "dtype": values.dtype.name, "shape": list(values.shape)}
    return found
