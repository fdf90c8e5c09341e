"""Float graphs → graphs with INT8 (static or dynamic), or with weights of 8 or 4 bits: what the exporter calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError, did_you_mean
from edgedistill.onnx.calibration import Samples, observe_ranges, ranges_of
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.int8_scheme import scheme_of
from edgedistill.onnx.qdq import Range
from edgedistill.onnx.quantizable import (
    DYNAMIC,
    FLOAT,
    STATIC,
    TYPES,
    Quantizable,
    node_types,
    quantizable_nodes,
)  # fmt: skip
from edgedistill.onnx.quantized_graph import load, require_static, static_tensors, write_graph
from edgedistill.onnx.sensitivity import kept_nodes
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.histogram import Observed
from edgedistill.quantization.options import DEFAULT_OPTIONS, ExportOptions


def quantize(
    exports: Sequence[FloatExport],
    built: Path,
    *,
    quantization: str,
    samples: Samples | None,
    threads: int = 1,
    options: ExportOptions = DEFAULT_OPTIONS,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Write each graph, under its name, into the folder `built`; gives fields of the artifact's record.

    Raises UserError for static INT8 without samples or of several graphs, and for types that cannot be.
    """
    if quantization == STATIC:
        require_static(len(exports), samples is not None)
    scheme, why = scheme_of(options.int8_scheme)
    if quantization == DYNAMIC and scheme.signed_activations:
        raise UserError(
            f"INT8 scheme {scheme.name} with {DYNAMIC}: onnxruntime finds uint8 ranges in a run, never int8",
            f"use {STATIC}, or another of export.int8_scheme",
        )
    fields: dict[str, Any] = {"overrides": {}, "fallbacks": [], "notes": []}
    models = [load(export) for export in exports]
    for export, model in zip(exports, models, strict=True):
        nodes = quantizable_nodes(model)
        if not nodes:
            raise UserError(f"{export.path.name} has no weights that can be quantized", "export with quantization FP32")
    if options.mixed_retention is not None and len(exports) > 1:
        raise UserError(
            "export.mixed_retention of a text2text model: its two graphs are not measured together",
            "leave it out, and name nodes with export.tensor_types",
        )
    types = _types_of_each(models, quantization, options.tensor_types)
    for export, chosen in zip(exports, types, strict=True):
        ranges: dict[str, Range] = {}
        observed: dict[str, Observed] | None = None
        if STATIC in chosen.values():
            if samples is None:
                require_static(len(exports), given=False)
            assert samples is not None
            observed = observe_ranges(
                export, samples, static_tensors(export), method=options.calibration_method, threads=threads,
                progress=progress,
            )  # fmt: skip
            ranges = ranges_of(observed, options.calibration_method, symmetric=scheme.signed_activations)
            fields["calibration"] = samples.record
        if options.mixed_retention is not None:
            assert samples is not None
            kept, fields["sensitivity"] = kept_nodes(
                export, quantizable_nodes(load(export)), samples, quantization=quantization, observed=observed,
                options=options, threads=threads, progress=progress,
            )  # fmt: skip
            chosen |= dict.fromkeys(kept, FLOAT)
        # onnxruntime's converter writes into a .ort file what it folds: that weight would be float again.
        made = write_graph(
            export, built / export.path.name, chosen, ranges=ranges, scheme=scheme, folded=not options.ort_format
        )
        fields["fallbacks"] += made.fallbacks
        fields["overrides"] |= {name: kind for name, kind in chosen.items() if kind != quantization}
    if quantization in (STATIC, DYNAMIC):
        fields["notes"].append(f"INT8 scheme {scheme.name}: {why}")
    return fields


def _types_of_each(models: Sequence[Any], quantization: str, types: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Types of the nodes of each graph; an expression must match in one of them."""
    if quantization not in TYPES:
        raise UserError(f"no ONNX quantization '{quantization}'", did_you_mean(quantization, TYPES))
    together: dict[str, Quantizable] = {}
    each = []
    for index, model in enumerate(models):
        own = {f"{index}:{name}": info for name, info in quantizable_nodes(model).items()}
        together |= own
        each.append(own)
    chosen = node_types(together, quantization, types=types)
    return [{info.name: chosen[name] for name, info in own.items()} for own in each]
