"""A checkpoint that is no decoder, or any torch module → a float32 graph for ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.onnx.attention import fused_attention
from edgedistill.onnx.fusions import fuse, name_axes
from edgedistill.onnx.shifting import shift_keeps_the_batch
from edgedistill.onnx.tasks import Graph, TaskModel, open_task
from edgedistill.records.artifact import TensorSpec

DEFAULT_OPSET = 20
OPSETS = range(18, 24)
# A protobuf message ends at 2 GiB; beyond this the weights lie beside the graph.
MAX_EMBEDDED_BYTES = 1_500_000_000
MODULE_KEY = "module"
ATTENTION = ("Attention", "MultiHeadAttention")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class FloatExport:
    """A float32 graph on disk and the torch module that it must agree with. `meanings`: see tasks.Graph."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    module: Any
    parameters: int
    meanings: Mapping[str, str] = field(default_factory=dict)

    def reference(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The module's outputs for named inputs, computed by torch in float32."""
        import torch

        with torch.inference_mode():
            found = self.module(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})
        return {name: value.numpy() for name, value in found.items()}


def export_float(
    checkpoint: Path, out: Path, *, task: str | None = None, opset: int | None = None, first_token: bool = True
) -> list[FloatExport]:
    """Write the float32 graph (two for text2text: encoder and decoder) of a transformers folder into the folder `out`.

    `first_token`: see fusions.fuse. Raises UserError for an unknown task, weights that are missing or not finite, and a
    model that cannot be traced.
    """
    opened = open_task(checkpoint, task)
    return [
        trace(graph, opened.model, out, opset=opset, parameters=opened.parameters, first_token=first_token)
        for graph in opened.graphs
    ]


def export_graphs(
    opened: TaskModel, out: Path, *, opset: int | None = None, standard: bool = False
) -> list[FloatExport]:
    """The graphs of an opened checkpoint, written into the folder `out`. `standard`: see `trace`."""
    return [
        trace(graph, opened.model, out, opset=opset, parameters=opened.parameters, standard=standard)
        for graph in opened.graphs
    ]


def trace(
    graph: Graph,
    model: Any,
    out: Path,
    *,
    opset: int | None,
    parameters: int,
    first_token: bool = True,
    standard: bool = False,
) -> FloatExport:
    """Trace one module, fuse it for ONNX Runtime and write it. The same module gives the same bytes. UserError.

    `standard`: with operators of the ONNX standard alone, as other runtimes take it.
    """
    import onnx_ir

    opset = DEFAULT_OPSET if opset is None else opset
    if opset not in OPSETS:
        raise UserError(f"opset {opset}", f"use {OPSETS.start} to {OPSETS.stop - 1}")
    plain = contextlib.nullcontext()
    with _quiet(), shift_keeps_the_batch(model), plain if standard else fused_attention(model):
        program = _program(graph, opset, fusions=None if standard else "cpu")
    fuse(program, first_token=first_token)
    _require_axes(program, graph)
    name_axes(program, graph.axes)
    _strip(program)
    out.mkdir(parents=True, exist_ok=True)
    path = out / graph.file
    size = sum(v.const_value.nbytes for v in program.graph.initializers.values() if v.const_value is not None)
    onnx_ir.save(program, str(path), external_data=f"{path.name}.data" if size > MAX_EMBEDDED_BYTES else None)
    return FloatExport(
        path=path,
        inputs=tuple(_spec(value) for value in program.graph.inputs),
        outputs=tuple(_spec(value) for value in program.graph.outputs),
        module=graph.module,
        parameters=parameters,
        meanings=graph.meanings,
    )


def _require_axes(program: Any, graph: Graph) -> None:
    """UserError where the tracer made a number of a size that should vary: the graph would take that size alone."""
    for value in program.graph.inputs:
        for axis, name in graph.axes.get(value.name or "", {}).items():
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, int):
                raise UserError(
                    f"{graph.file}: the model fixes the {name} of {value.name} at the {size} that it was traced with",
                    "it cannot be exported to ONNX for other sizes",
                )


def module_graph(
    module: Any,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    file: str = "model.onnx",
) -> Graph:
    """A user's module as a graph to trace. `dynamic` defaults to the first axis of every input, named `batch`."""
    import inspect

    import torch

    from edgedistill.onnx.task_modules import Outputs

    if not isinstance(module, torch.nn.Module):
        raise UserError(f"a {type(module).__name__} is not a torch.nn.Module", "give the model itself")
    if module.training:
        raise UserError("the module is in training mode: dropout and batch norm would be exported", "call .eval()")
    if isinstance(example_inputs, Mapping):
        examples = dict(example_inputs)
    else:
        names = list(inspect.signature(module.forward).parameters)
        examples = dict(zip(names, example_inputs, strict=False))
    if not examples or not all(isinstance(value, torch.Tensor) for value in examples.values()):
        raise UserError(f"example inputs {sorted(examples)} are not all tensors", "give a tensor for each input")
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"tensor {name} holds values that are NaN or infinite", "train or load the model again")
    unknown = set(dynamic or {}) - set(examples)
    if unknown:
        raise UserError(f"dynamic axes for the inputs {sorted(unknown)}", f"the inputs are {', '.join(examples)}")
    with torch.inference_mode():
        found = module(**examples)
    if output_names is None:
        if isinstance(found, Mapping):
            output_names = list(found)
        elif isinstance(found, torch.Tensor):
            output_names = ["output"]
        else:
            output_names = [f"output_{index}" for index in range(len(found))]
    axes = {name: dict(a) for name, a in (dynamic or {name: {0: "batch"} for name in examples}).items()}
    examples = _wide_enough(examples, axes)
    renamed = dict(zip(examples, input_names or examples, strict=False))
    if len(renamed) != len(examples) or len(set(renamed.values())) != len(examples):
        raise UserError(f"input names {list(input_names or [])}", f"give a name for each of {', '.join(examples)}")
    return Graph(
        file,
        Outputs(module, tuple(output_names), arguments={new: old for old, new in renamed.items()}),
        {renamed[name]: value for name, value in examples.items()},
        {renamed[name]: axis for name, axis in axes.items()},
    )


def _wide_enough(examples: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    """Examples whose varying axes have at least two entries: tracing takes an axis of one for a constant."""
    import torch

    made = {}
    for name, value in examples.items():
        for axis in axes.get(name, {}):
            if value.shape[axis] == 1:
                value = torch.cat([value, value], dim=axis)
        made[name] = value
    return made


def _program(graph: Graph, opset: int, *, fusions: str | None) -> Any:
    """transformers' exporter on one module, with ONNX Runtime's fusions. UserError with what torch.export said."""
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    shapes = {name: dict.fromkeys(graph.axes.get(name, {}), torch.export.Dim.AUTO) for name in graph.examples}
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset, ort_fusions=fusions)
    # Copies: one tensor given for two inputs would be one input of the graph.
    examples = {name: value.clone() for name, value in graph.examples.items()}
    try:
        program, _ = OnnxExporter().export_program(graph.module, examples, config)
    # torch.export and torch.onnx raise whatever their passes meet; nothing of it is this program's state.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"torch cannot trace {type(graph.module).__name__}: {type(error).__name__}: {' '.join(lines[:3])[:400]}",
            "write the module so that torch.export takes it, or export another task of it",
        ) from error
    return program


def _strip(program: Any) -> None:
    """Of what tracing notes, keep the module that a node comes from: the rest names files of this machine."""
    import ast

    program.metadata_props.clear()
    program.graph.metadata_props.clear()
    program.doc_string = program.graph.doc_string = None
    program.graph.name = "main_graph"
    program.producer_version = None
    for index, node in enumerate(program.graph.all_nodes()):
        scopes = node.metadata_props.get(_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        node.name = node.name or f"{node.op_type}_{index}"
        if scopes is not None:
            inside = ast.literal_eval(scopes)
            node.metadata_props[MODULE_KEY] = inside[-2] if len(inside) > 1 else ""
        for output in node.outputs:
            output.metadata_props.clear()
            if node.op_type in ATTENTION and output.name.startswith("_symbolic"):
                output.name = f"attention{output.name.removeprefix('_symbolic')}"
    for value in [*program.graph.inputs, *program.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    # The exporter's fusions note no module (query, key and value as one product): it is the one that holds all readers.
    for node in reversed(list(program.graph)):
        if MODULE_KEY not in node.metadata_props:
            readers = [use.node for output in node.outputs for use in output.uses()]
            modules = [reader.metadata_props.get(MODULE_KEY, "").split(".") for reader in readers]
            shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
            if module := ".".join(parts[0] for parts in shared):
                node.metadata_props[MODULE_KEY] = module


def _spec(value: Any) -> TensorSpec:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return TensorSpec(name=value.name, dtype=str(value.dtype).lower(), shape=shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither torch.onnx's progress lines nor its remarks on packages that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
