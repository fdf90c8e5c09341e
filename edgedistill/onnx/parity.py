"""A graph in its runtime against the torch module that it came from; where they part, the first tensor that does.

The graph runs in a child process, the module in this one, on the same inputs. Where an output differs by more than
rounding, the graph is run again with the output of every module exposed that can be matched (nodes keep the name of
the module that they were traced in), and the first of them that departs is named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import RuntimeRefused, UserError
from edgedistill.onnx.float_export import ATTENTION, MODULE_KEY, FloatExport
from edgedistill.records.artifact import Parity
from edgedistill.runtimes.graph import GraphProcess

Arrays = Mapping[str, NDArray[Any]]
# Root mean square of the difference over that of the output about its mean, beyond which it is no rounding: of
# float32 sums in another order, of half precision's 11 bits and bfloat16's 8 through tens of layers.
LIMITS = {
    "FP32": 1e-4, "FP16": 2e-2, "BF16": 1e-1, "INT8": 0.5, "INT8-DYNAMIC": 0.5, "INT8-WEIGHTS": 0.2, "INT4": 0.8,
}  # fmt: skip
# What computes something else is off by about 1 or more.
MOST_OF_ONE = 0.9
PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


@dataclass(frozen=True)
class Departure:
    """The first tensor of a graph that is not the module's: `tensor` in the graph, `module` in torch."""

    tensor: str
    module: str
    relative_rms: float


def check_parity(
    export: FloatExport,
    graph: Path,
    batches: Sequence[Arrays],
    *,
    lengths: Sequence[Arrays] = (),
    quantization: str,
    inputs: str,
    limit: float | None = None,
    threads: int = 1,
) -> Parity:
    """Compare `graph` with the module of `export` on every batch; `inputs` says what they are, for the record.

    `lengths`: further batches, from short to long, that have to agree by themselves: in a sum with the others a text
    that is wrong beyond a window would be one of many. A single text may be off by more of rounding than the mean of
    several (`_of_one`).
    Raises UserError where an output's relative difference is over `limit`, naming the first tensor that departs.
    """
    limit = LIMITS[quantization] if limit is None else limit
    values, largest, total = 0, 0.0, 0.0
    # Of all usual batches together: two logits of a single text have hardly a spread to hold a difference to.
    usual = _Differences()
    each = [_Differences() for _ in lengths]
    with GraphProcess(graph, threads=threads) as process:
        version = str(process.info["runtime_version"])
        for batch, kept in [*((batch, usual) for batch in batches), *zip(lengths, each, strict=True)]:
            expected, found = _both(export, process, batch, graph)
            for name, reference in expected.items():
                ours, theirs = _real(found[name], batch), _real(reference, batch)
                difference = np.abs(ours - theirs)
                values += difference.size
                largest = max(largest, float(difference.max(initial=0.0)))
                total += float(difference.sum())
                kept.add(name, ours, theirs, batch)
    errors = usual.errors()
    wrong = next((name for name, error in errors.items() if not error <= limit), None)
    if wrong is not None:
        first = first_departure(export, graph, usual.worst[wrong], limit=limit, threads=threads)
        raise _differs(quantization, graph, wrong, errors[wrong], limit, first)
    for part in each:
        for name, error in part.errors(usual).items():
            if not error <= _of_one(quantization, limit):
                raise _differs_at(quantization, graph, name, error, limit, part.worst[name], (*batches, *lengths))
            errors[name] = max(errors[name], error)
    return Parity(
        runtime=version, inputs=inputs, reference="original", values=values, max_abs_difference=largest,
        mean_abs_difference=total / max(1, values), relative_rms=max(errors.values(), default=0.0), limit=limit,
    )  # fmt: skip


def _both(
    export: FloatExport, process: GraphProcess, batch: Arrays, graph: Path
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The module's outputs and the graph's. UserError where one of them does not take the batch."""
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
    try:
        expected = export.reference(batch)
    except Exception as error:  # whatever a model raises for a size that it does not take
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"the model itself does not run on {shapes}: {reason}",
            "calibrate with texts that it takes, or bound them with --context-tokens",
        ) from error
    try:
        return expected, process.run(batch)
    except RuntimeRefused as error:
        reason = " ".join(str(error).split()).partition(f"{graph.name}: ")[2][:200]
        raise UserError(
            f"the graph {graph.name} does not run on {shapes}, on which the model does: {reason}",
            "its tracing fixed a size; export the module for the sizes that you use, with"
            " edgedistill.onnx.encoder.export_module, or as another format",
        ) from error


def _of_one(quantization: str, limit: float) -> float:
    """The limit for a single input. In FP32 there is nothing but rounding in the last place, whatever the input."""
    return limit if quantization == "FP32" else max(limit, min(2 * limit, MOST_OF_ONE))


class _Differences:
    """Outputs of some batches, the graph's beside the module's."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[list[NDArray[Any]], list[NDArray[Any]]]] = {}
        self.worst: dict[str, Arrays] = {}
        self.largest: dict[str, float] = {}

    def add(self, name: str, ours: NDArray[Any], theirs: NDArray[Any], batch: Arrays) -> None:
        kept = self.pairs.setdefault(name, ([], []))
        kept[0].append(ours.ravel())
        kept[1].append(theirs.ravel())
        error = relative_rms(ours, theirs)
        if name not in self.worst or not error <= self.largest[name]:
            self.worst[name], self.largest[name] = batch, error

    def errors(self, spread: _Differences | None = None) -> dict[str, float]:
        """Each output's difference over its spread, or over that of `spread` where it is the larger."""
        found = {}
        for name, (ours, theirs) in self.pairs.items():
            error = relative_rms(np.concatenate(ours), np.concatenate(theirs))
            if spread is not None and name in spread.pairs and np.isfinite(error):
                own, other = _spread(np.concatenate(theirs)), _spread(np.concatenate(spread.pairs[name][1]))
                error = error * own / max(own, other) if own > 0 else error / other if other > 0 else error
            found[name] = error
        return found


def _differs(
    quantization: str, graph: Path, output: str, error: float, limit: float, first: Departure | None
) -> UserError:
    named = (
        "; without the runtime's own optimizations it does"
        if first is None
        else f"; the first tensor that departs is {first.tensor} of {first.module or 'the whole model'},"
        f" by {first.relative_rms:.2g}"
    )
    return UserError(
        f"the {quantization} ONNX graph {graph.name} does not compute what torch does: {output} differs by"
        f" {error:.2g} of its own size (at most {limit:g} is rounding){named}",
        "report this with the model's config.json; another opset (--set export.opset=) or format may be right",
    )


def _differs_at(
    quantization: str, graph: Path, output: str, error: float, limit: float, batch: Arrays, others: Sequence[Arrays]
) -> UserError:
    """Of a graph that is right on usual batches: the length where it is not, and the longest below it that is."""

    def tokens(arrays: Arrays) -> int:
        return max((value.shape[1] for value in arrays.values() if value.ndim == 2), default=0)

    at = tokens(batch)
    if quantization != "FP32":  # whose float graph was held to torch at this length before
        return UserError(
            f"the {quantization} ONNX graph {graph.name} is wrong for {at:,} tokens: {output} differs from torch by"
            f" {error:.2g} of its own size (at most {_of_one(quantization, limit):g} is rounding of one text)",
            "choose a larger quantization, or keep nodes float with export.tensor_types",
        )
    right = max((tokens(other) for other in others if tokens(other) < at), default=0)
    return UserError(
        f"the {quantization} ONNX graph {graph.name} does not compute what torch does for {at:,} tokens: {output}"
        f" differs by {error:.2g} of its own size (at most {limit:g} is rounding). For {right:,} it does: beyond"
        " a window its attention is computed differently, and a graph is traced for only one of the two ways",
        f"export it for that length: --context-tokens {right}" if right else "report this with config.json",
    )


def _spread(values: NDArray[Any]) -> float:
    return float(np.std(values.astype(np.float64))) if values.size > 1 else float(np.abs(values).max(initial=0))


def relative_rms(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square of the difference over that of `expected` about its mean; infinite where a value is none."""
    if not np.isfinite(found).all():
        return float("inf")
    error = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - expected)))) if found.size else 0.0
    scale = _spread(expected)
    return error / scale if scale > 0 else error


def first_departure(
    export: FloatExport, graph: Path, batch: Arrays, *, limit: float, threads: int = 1
) -> Departure | None:
    """The first output of a module, in the graph's order, that differs by more than `limit` from torch's."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    modules = dict(export.module.named_modules())
    candidates = _candidates(model, modules)
    outputs = {value.name for value in model.graph.output}
    for tensor, _ in candidates:
        if tensor not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    with tempfile.NamedTemporaryFile(dir=graph.parent, prefix=".exposed.", suffix=".onnx") as exposed:
        exposed.write(model.SerializeToString())
        exposed.flush()
        # As they are: the runtime's own fusions would remove what is to be compared.
        with GraphProcess(Path(exposed.name), threads=threads, optimize=False) as process:
            found = process.run(batch)
    with _recorded(modules) as recorded:
        expected = export.reference(batch)
    for tensor, module in candidates:
        values = recorded.get(module, [])
        if len(values) != 1:
            continue
        # A layer that was narrowed to the first token (first_token.py) is compared with torch's first.
        only_first = values[0].ndim == 3 and found[tensor].shape == values[0][:, :1].shape
        reference = values[0][:, :1] if only_first else values[0]
        if reference.shape == found[tensor].shape:
            error = relative_rms(_real(found[tensor], batch), _real(reference, batch))
            if not error <= limit:
                return Departure(tensor, module.removeprefix("model."), error)
    for name, value in expected.items():
        error = relative_rms(_real(found[name], batch), _real(value, batch))
        if not error <= limit:
            return Departure(name, "", error)
    return None


def _candidates(model: Any, modules: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tensors of the graph that are a module's output, in order: (tensor, module)."""
    last: dict[str, int] = {}
    deepest: dict[str, int] = {}
    nodes = list(model.graph.node)
    for index, node in enumerate(nodes):
        name = next((p.value for p in node.metadata_props if p.key == MODULE_KEY), None)
        if not name:
            continue
        last[name] = index
        for end in (i for i, c in enumerate(name + ".") if c == "."):
            deepest[name[:end]] = index
    # A convolution that took its batch norm in is not what torch's convolution gives: the next module is compared.
    folded = any(type(m).__name__.startswith("BatchNorm") for m in modules.values()) and not any(
        node.op_type == "BatchNormalization" for node in nodes
    )
    found = []
    for name, index in last.items():
        node, module = nodes[index], modules.get(name)
        if module is None or deepest[name] != index:
            continue
        leaf = next(module.children(), None) is None
        # Its bias went into the node behind it.
        absorbed = node.op_type in PRODUCTS and getattr(module, "bias", None) is not None
        if (
            leaf and not absorbed and not (folded and type(module).__name__.startswith("Conv"))
        ) or node.op_type in ATTENTION:
            found.append((index, node.output[0], name))
    return [(tensor, name) for _, tensor, name in sorted(found)]


@contextmanager
def _recorded(modules: Mapping[str, Any]) -> Iterator[dict[str, list[NDArray[Any]]]]:
    """What every module gives while it lasts: the first tensor of each call."""
    import torch

    kept: dict[str, list[NDArray[Any]]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            first = output if isinstance(output, torch.Tensor) else next(iter(_tensors(output)), None)
            if first is not None and first.is_floating_point():
                kept.setdefault(name, []).append(first.detach().float().numpy().copy())

        return hook

    def _tensors(output: Any) -> list[Any]:
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        return [part for part in parts if isinstance(part, torch.Tensor)]

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items() if name]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _real(values: NDArray[Any], batch: Arrays) -> NDArray[Any]:
    """Without the positions that are padding: [batch, sequence, ...] where the mask has that shape."""
    mask = batch.get("attention_mask")
    if mask is None or values.ndim < 3 or values.shape[:2] != mask.shape:
        return values
    kept: NDArray[Any] = values[mask.astype(bool)]
    return kept
