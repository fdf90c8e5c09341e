"""One float graph → one graph with INT8 (static or dynamic), or with weights of 8 or 4 bits, node by node.

`quantize_graph` quantizes all but the nodes that it is told to keep, with ranges that were found once
(`static_tensors`, calibration.observe_ranges): a search may call it many times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.onnx.calibration import NEITHER, ranges_of
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.int8_scheme import Scheme, scheme_of
from edgedistill.onnx.qdq import Int8Writer, Range
from edgedistill.onnx.quantizable import (
    DYNAMIC,
    FLOAT,
    INT4,
    STATIC,
    WEIGHTS,
    Quantizable,
    integer_chain,
    node_types,
    quantizable_nodes,
    stored_type,
)  # fmt: skip
from edgedistill.onnx.rewriting import Rewriter
from edgedistill.onnx.weights_only import block_product, block_table
from edgedistill.quantization.histogram import Observed
from edgedistill.quantization.options import DEFAULT_OPTIONS, ExportOptions
from edgedistill.records.artifact import Fallback

# Of MatMulNBits: 0 multiplies in float32, 4 rounds the activations to int8 first.
ACCURACY_LEVEL = 0
# A float matrix at least this large that stays float is said.
NOTABLE_WEIGHT = 4096


@dataclass(frozen=True)
class QuantizedGraph:
    """What was written. `types`: node → the type that it got; `fallbacks`: weights that got another than was asked."""

    types: dict[str, str]
    fallbacks: list[Fallback]


def require_static(graphs: int, given: bool) -> None:
    """UserError where static INT8 cannot be: several graphs, or nothing to calibrate on."""
    if graphs > 1:
        raise UserError(
            "static INT8 of a text2text model: its decoder's ranges depend on a cache that calibration does not fill",
            "export with quantization INT8-DYNAMIC or INT8-WEIGHTS",
        )
    if not given:
        raise UserError(
            "static INT8 has nothing to be calibrated on",
            f"give text or an .npz of inputs with --calibration FILE; {NEITHER}",
        )


def quantize_graph(
    export: FloatExport,
    out: Path,
    *,
    quantization: str,
    observed: Mapping[str, Observed] | None = None,
    keep: Collection[str] = (),
    options: ExportOptions = DEFAULT_OPTIONS,
) -> QuantizedGraph:
    """Write `export` with all quantizable nodes but `keep` (their names, from `quantizable_nodes(load(export))`).

    `quantization`: INT8, INT8-DYNAMIC, INT8-WEIGHTS or INT4; `options.tensor_types` gives nodes another. INT8 needs
    `observed`: what observe_ranges saw of `static_tensors(export)`, the same for every `keep`. UserError.
    """
    scheme, _ = scheme_of(options.int8_scheme)
    chosen = node_types(quantizable_nodes(load(export)), quantization, types=options.tensor_types, keep=keep)
    ranges: dict[str, Range] = {}
    if STATIC in chosen.values():
        if observed is None:
            require_static(1, given=False)
        assert observed is not None
        ranges = ranges_of(observed, options.calibration_method, symmetric=scheme.signed_activations)
    return write_graph(export, out, chosen, ranges=ranges, scheme=scheme)


def load(export: FloatExport) -> Any:
    """The float graph as an onnx ModelProto, its weights where they lie apart left on disk."""
    import onnx

    return onnx.load(str(export.path), load_external_data=False)


def static_tensors(export: FloatExport) -> list[str]:
    """The tensors whose ranges static INT8 may need, whatever is kept in float, in the graph's order."""
    model = load(export)
    nodes = quantizable_nodes(model)
    static = {name for name, info in nodes.items() if stored_type(STATIC, info.op_type) == STATIC}
    found = [nodes[name].input for name in nodes if name in static]
    found += integer_chain(model, static).values()
    return list(dict.fromkeys(found))


def write_graph(
    export: FloatExport, out: Path, types: Mapping[str, str], *, ranges: Mapping[str, Range], scheme: Scheme,
    folded: bool = True,
) -> QuantizedGraph:  # fmt: skip
    """Write `export` with each quantizable node in its type; `folded`: see Int8Writer.stored_weight."""
    graph = Rewriter(export.path)
    nodes = quantizable_nodes(graph.model)
    got = {name: stored_type(kind, nodes[name].op_type) for name, kind in types.items()}
    static = {name for name, kind in got.items() if kind == STATIC}
    writer = Int8Writer(graph, scheme, ranges, integer_chain(graph.model, static))
    fallbacks = []
    for node in graph.model.graph.node:
        info = nodes.get(node.name)
        kind = got.get(node.name, FLOAT)
        if info is None or kind == FLOAT:
            writer.plain(node)
        elif kind == STATIC:
            writer.static(node, info)
        elif kind == DYNAMIC:
            writer.dynamic(node, info)
        elif info.op_type == "Conv":
            writer.stored_weight(node, info, folded=folded)
        elif info.op_type == "Gather" and (kind == WEIGHTS or graph.weight(info.weight).shape[1] % 2):
            writer.table(node, info)
        elif info.op_type == "Gather":
            block_table(graph, node, info)
        else:
            block_product(graph, node, info, 4 if kind == INT4 else 8, accuracy_level=ACCURACY_LEVEL)
        writer.behind(node)
        if info is not None and types[node.name] == INT4 and kind != INT4:
            fallbacks.append(
                Fallback(tensor=info.weight, wanted=INT4, got=kind, why="onnxruntime has no INT4 convolution")
            )
    fallbacks += _left(graph, nodes, types)
    graph.save(out)
    return QuantizedGraph(types=got, fallbacks=fallbacks)


def _left(graph: Rewriter, nodes: Mapping[str, Quantizable], types: Mapping[str, str]) -> list[Fallback]:
    """Matrices that no operator of the table reads, and that stay float."""
    wanted = next((kind for kind in types.values() if kind != FLOAT), None)
    if wanted is None:
        return []
    known = {info.weight for info in nodes.values()}
    found = []
    for node in graph.model.graph.node:
        for name in node.input:
            if graph.is_float_matrix(name, NOTABLE_WEIGHT) and name not in known:
                known.add(name)
                why = f"edgedistill quantizes no {node.op_type} that reads it in this way"
                found.append(Fallback(tensor=name, wanted=wanted, got=FLOAT, why=why))
    return found
