"""What quantizing a graph's nodes costs, layer by layer, and which stay float so that `export.mixed_retention` holds.

Groups are the parts of a layer (attention, feed-forward, ...), a table, a head. A mix is the very graph that would
ship, written and run in onnxruntime, against the float graph on the calibration inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from edgedistill.errors import UserError
from edgedistill.onnx.calibration import Samples
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.quantizable import FLOAT, INT4, WEIGHTS, Quantizable, node_types, stored_type
from edgedistill.onnx.quantized_graph import quantize_graph
from edgedistill.onnx.scoring import METRICS, Rows, meanings_of, rows_of, score
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.histogram import Observed
from edgedistill.quantization.options import ExportOptions
from edgedistill.quantization.sensitivity import Group, Measured, Steps, find_mix, say_result
from edgedistill.records.artifact import Sensitivity
from edgedistill.runtimes.graph import GraphProcess
from edgedistill.statistics import positive_mean

BLOCK = 32
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

    What a cost and retention are depends on what the outputs hold: scoring.py. Nodes that `options.tensor_types` names
    keep their type. Raises UserError where even a float graph keeps too little.
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
            ladders, measure, target=options.mixed_retention, metric=scored.metric,
            source=samples.record.source or "calibration inputs", examples=scored.examples,
            documents=sum(scored.documents), remedy=REMEDY, progress=progress,
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
        self.meanings = meanings_of(export.outputs, export.meanings)
        self.metric = " + ".join(dict.fromkeys(METRICS[meaning] for meaning in self.meanings.values()))
        with GraphProcess(export.path, threads=threads) as process:
            self.references = list(self._outputs(process))
        self.documents = [len(next(iter(batch.values()))) for batch in samples.batches()]
        first = next(iter(self.meanings))
        self.examples = sum(len(part[first].owner) for part in self.references)

    def _outputs(self, process: GraphProcess) -> Iterator[dict[str, Rows]]:
        for batch in self.samples.batches():
            found = process.run(batch)
            yield {name: rows_of(found[name], batch, meaning) for name, meaning in self.meanings.items()}

    def measure(self, keep: Collection[str]) -> Measured:
        path = self.folder / self.export.path.name
        quantize_graph(
            self.export, path, quantization=self.quantization, observed=self.observed, keep=keep, options=self.options
        )
        try:
            with GraphProcess(path, threads=self.threads) as process:
                found = score(self.meanings, self.references, self._outputs(process), self.documents)
        finally:
            for file in self.folder.iterdir():
                file.unlink()
        cost = positive_mean(found.cost)
        if not np.isfinite(cost.value):
            raise UserError(f"a mix of {self.quantization} gives values that are NaN or infinite", REMEDY)
        return Measured(cost, found.retention)
