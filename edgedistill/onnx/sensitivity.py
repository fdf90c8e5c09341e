"""What quantizing a graph's nodes costs, layer by layer, and which stay float so that `export.mixed_retention` holds.

Groups are the parts of a layer (attention, feed-forward, ...), a table, a head. A mix is the very graph that would
ship, written and run in onnxruntime, against the float graph on the calibration inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.export_options import ExportOptions
from edgedistill.onnx.calibration import Samples
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.histogram import Observed
from edgedistill.onnx.inputs import Batch
from edgedistill.onnx.quantizable import FLOAT, INT4, WEIGHTS, Quantizable, node_types, stored_type
from edgedistill.progress import QUIET, Progress
from edgedistill.records import Sensitivity
from edgedistill.runtimes.graph import GraphProcess
from edgedistill.sensitivity import Group, Measured, Steps, find_mix, say_result
from edgedistill.statistics import by_unit, positive_mean

BLOCK = 32
CLASSES = "mean KL from the float graph, nats"
VECTORS = "1 - cosine to the float graph's outputs"
REMEDY = "lower export.mixed_retention, or quantize less"


def kept_nodes(
    export: FloatExport,
    nodes: Mapping[str, Quantizable],
    samples: Samples,
    *,
    quantization: str,
    observed: Mapping[str, Observed] | None,
    options: ExportOptions,
    threads: int = 1,
    progress: Progress = QUIET,
) -> tuple[set[str], Sensitivity]:
    """The nodes to keep float, fewest bytes, so that retention is `options.mixed_retention`; and the table.

    Retention of a classifier (2 axes of logits, or 3 with tokens) is the smaller of the share of inputs whose likeliest
    class stays and exp(-mean KL); of anything else the mean cosine of its outputs. Nodes that `options.tensor_types`
    names keep their type. Raises UserError where even a float graph keeps too little.
    """
    types = node_types(nodes, quantization, types=options.tensor_types)
    groups: dict[str, list[str]] = {}
    for name, info in nodes.items():
        if types[name] == quantization:
            groups.setdefault(group_of(info), []).append(name)
    ladders = [_ladder(group, [nodes[name] for name in names], quantization) for group, names in groups.items()]
    with tempfile.TemporaryDirectory(dir=export.path.parent, prefix=".mixes.") as folder:
        scored = _Scored(export, samples, Path(folder), quantization, observed, options, threads)

        def measure(steps: Steps) -> Measured:
            return scored.measure({n for g, names in groups.items() if steps.get(g, 1) == 1 for n in names})

        assert options.mixed_retention is not None
        mix = find_mix(
            ladders, measure, target=options.mixed_retention, metric=CLASSES if scored.classes else VECTORS,
            source=samples.record.source or "calibration inputs", examples=len(scored.owner),
            documents=scored.documents, remedy=REMEDY, progress=progress,
        )  # fmt: skip
    say_result(mix.record, progress)
    return {name for group, names in groups.items() if mix.steps[group] == 1 for name in names}, mix.record


def group_of(info: Quantizable) -> str:
    """ "encoder.layer.3.attention" of "bert.encoder.layer.3.attention.self.query": up to the part behind its number."""
    parts = (info.module or info.name).split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts if place is None else parts[: place + 2])


def _ladder(name: str, members: list[Quantizable], quantization: str) -> Group:
    values = sum(info.values for info in members)
    stored = sum(_bytes(info, quantization) for info in members)
    return Group(
        name=name, types=(quantization, FLOAT), bytes=(stored, 4 * values), errors=(1.0, 0.0), float_bytes=4 * values
    )


def _bytes(info: Quantizable, quantization: str) -> int:
    """Of a node's weight: a byte each, or half of one and a scale a block; scales by channel are left out."""
    kind = stored_type(quantization, info.op_type)
    if kind == INT4:
        return info.values // 2 + 4 * -(-info.values // BLOCK)
    return info.values + (4 * -(-info.values // BLOCK) if kind == WEIGHTS and info.op_type != "Conv" else 0)


class _Scored:
    """Graphs of one export on the same inputs."""

    def __init__(
        self,
        export: FloatExport,
        samples: Samples,
        folder: Path,
        quantization: str,
        observed: Mapping[str, Observed] | None,
        options: ExportOptions,
        threads: int,
    ) -> None:
        self.export, self.samples, self.folder, self.threads = export, samples, folder, threads
        self.quantization, self.observed, self.options = quantization, observed, options
        self.output = export.outputs[0].name
        self.classes = self.output == "logits"
        with GraphProcess(export.path, threads=threads) as process:
            self.references = [_rows(process.run(batch)[self.output], batch) for batch in samples.batches()]
        owners, self.documents = [], 0
        for batch, rows in zip(samples.batches(), self.references, strict=True):
            count = len(next(iter(batch.values())))
            owners.append(self.documents + np.repeat(np.arange(count), len(rows) // count))
            self.documents += count
        self.owner = np.concatenate(owners)

    def measure(self, keep: Collection[str]) -> Measured:
        from edgedistill.onnx.quantize import quantize_graph

        path = self.folder / self.export.path.name
        quantize_graph(
            self.export, path, quantization=self.quantization, observed=self.observed, keep=keep, options=self.options
        )
        costs, same = [], []
        try:
            with GraphProcess(path, threads=self.threads) as process:
                for batch, reference in zip(self.samples.batches(), self.references, strict=True):
                    found = _rows(process.run(batch)[self.output], batch)
                    costs.append(_kl(reference, found) if self.classes else _distance(reference, found))
                    same.append(reference.argmax(-1) == found.argmax(-1))
        finally:
            for file in self.folder.iterdir():
                file.unlink()
        cost = positive_mean(by_unit(np.concatenate(costs), self.owner))
        if not np.isfinite(cost.value):
            raise UserError(f"a mix of {self.quantization} gives values that are NaN or infinite", REMEDY)
        agreement = float(np.concatenate(same).mean())
        retention = min(agreement, float(np.exp(-cost.value))) if self.classes else 1.0 - cost.value
        return Measured(cost, retention)


def _rows(values: NDArray[Any], batch: Batch) -> NDArray[np.float64]:
    """[rows, values]: one row an input, or one a token where the output has an axis of tokens."""
    tokens = values.ndim == 3 and "attention_mask" in batch and values.shape[:2] == batch["attention_mask"].shape
    return values.reshape(-1, values.shape[-1]).astype(np.float64) if tokens else _flat(values)


def _flat(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.reshape(len(values), -1).astype(np.float64)


def _kl(reference: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    p, q = _log_softmax(reference), _log_softmax(found)
    kl: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1).clip(min=0.0)
    return kl


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def _distance(reference: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(found, axis=-1)
    cosine = (reference * found).sum(-1) / np.maximum(norms, 1e-30)
    distance: NDArray[np.float64] = np.clip(1.0 - cosine, 0.0, None)
    return distance
