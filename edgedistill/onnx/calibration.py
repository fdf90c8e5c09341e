"""What static INT8 is calibrated on, and the ranges that it finds: samples streamed twice past an unoptimized graph."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.onnx.float_export import FloatExport
from edgedistill.onnx.inputs import Batch
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.histogram import METHODS, PERCENTILE, Method, Observed, chosen_range
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Calibration, TensorSpec
from edgedistill.runtimes.graph import GraphProcess

MINIMUM = 2
REMEDY = (
    f"give at least {MINIMUM} different samples with --calibration FILE, better some hundred: text, or .npz of inputs"
)
NEITHER = "INT8-DYNAMIC and INT8-WEIGHTS need none"
NUMPY_TYPES = {"float": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_, "double": np.float64}


@dataclass(frozen=True)
class Samples:
    """Inputs of a graph, of which only the inputs are kept: `batches` starts a pass over them."""

    batches: Callable[[], Iterator[Batch]]
    record: Calibration


def text_samples(
    checkpoint: Path, texts: Sequence[str], names: Sequence[str], *, max_tokens: int, options: ExportOptions
) -> Samples:
    """Texts through the checkpoint's tokenizer, in batches of sequences of one length: none is padded.

    At most `calibration_samples` of them, drawn with the seed, cut to `calibration_tokens`. Raises UserError for fewer
    than 2 different sequences and where there is no tokenizer.
    """
    from edgedistill.onnx.processors import open_tokenizer

    tokenizer = open_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint} has no tokenizer that can be opened, so that text cannot calibrate it",
            "give its inputs as an .npz file",
        )
    order = np.random.default_rng(options.seed).permutation(len(texts))[: options.calibration_samples]
    longest = min(options.calibration_tokens, max_tokens)
    made = (
        tokenizer([texts[i] for i in order], truncation=True, max_length=longest) if len(order) else {"input_ids": []}
    )
    missing = [name for name in names if name not in made]
    if missing:
        raise UserError(
            f"{checkpoint}: its tokenizer does not give {', '.join(missing)}",
            "save the tokenizer that the model was trained with into the folder",
        )
    rows = [{name: np.asarray(made[name][i], dtype=np.int64) for name in names} for i in range(len(made["input_ids"]))]
    rows = [row for row in rows if len(row["input_ids"])]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row["input_ids"]).to_bytes(8, "little") + row["input_ids"].tobytes())
    _require_distinct(len({row["input_ids"].tobytes() for row in rows}), len(rows), options.calibration_source)
    tokens = sum(len(row["input_ids"]) for row in rows)

    by_length = sorted(rows, key=lambda row: (len(row["input_ids"]), row["input_ids"].tobytes()))

    def batches() -> Iterator[Batch]:
        start = 0
        while start < len(by_length):
            length = len(by_length[start]["input_ids"])
            end = start
            while end < len(by_length) and end - start < options.calibration_batch:
                if len(by_length[end]["input_ids"]) != length:
                    break
                end += 1
            yield {name: np.stack([row[name] for row in by_length[start:end]]) for name in names}
            start = end

    return Samples(batches, _record(options, options.calibration_source, len(rows), tokens, digest.hexdigest()))


def file_samples(path: Path, inputs: Sequence[TensorSpec], *, options: ExportOptions) -> Samples:
    """An .npz of arrays by the inputs' names, or an .npy for a graph with one input; their first axis is the samples.

    Raises UserError for other names, types and shapes than the graph's, NaN, fewer than 2 different samples.
    """
    arrays = _read(path, inputs)
    counts = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: {counts} samples", "give every input the same number of samples")
    count = next(iter(counts.values()), 0)
    for spec in inputs:
        _require_input(arrays[spec.name][:1], spec, str(path))
    order = np.random.default_rng(options.seed).permutation(count)[: options.calibration_samples]
    digest, distinct = hashlib.sha256(), set()
    for index in order:
        one = hashlib.sha256()
        for spec in inputs:
            one.update(np.ascontiguousarray(arrays[spec.name][index]).tobytes())
        distinct.add(one.digest())
        digest.update(one.digest())
    _require_distinct(len(distinct), len(order), str(path))
    for spec in inputs:
        _require_finite(arrays[spec.name], spec, str(path))
    fixed = [spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
    size = min(fixed) if fixed else options.calibration_batch

    def batches() -> Iterator[Batch]:
        kept = np.sort(order)
        for start in range(0, len(kept), size):
            yield {spec.name: np.ascontiguousarray(arrays[spec.name][kept[start : start + size]]) for spec in inputs}

    source = options.calibration_source or path.name
    return Samples(batches, _record(options, source, len(order), None, digest.hexdigest()))


def given_samples(given: Sequence[Batch], inputs: Sequence[TensorSpec], *, options: ExportOptions) -> Samples:
    """Batches of a caller's, as they are. UserError for other inputs than the graph's, NaN, fewer than 2 samples."""
    digest, distinct, count = hashlib.sha256(), set(), 0
    for batch in given:
        for spec in inputs:
            if spec.name not in batch:
                raise UserError(f"a calibration batch without {spec.name}", f"give {', '.join(s.name for s in inputs)}")
            _require_input(batch[spec.name], spec, "a calibration batch")
            _require_finite(batch[spec.name], spec, "a calibration batch")
        rows = next((len(batch[s.name]) for s in inputs if s.shape and not isinstance(s.shape[0], int)), 1)
        for index in range(rows):
            one = hashlib.sha256()
            for spec in inputs:
                values = batch[spec.name]
                moves = bool(spec.shape) and not isinstance(spec.shape[0], int)
                one.update(np.ascontiguousarray(values[index] if moves else values).tobytes())
            distinct.add(one.digest())
            digest.update(one.digest())
        count += rows
    _require_distinct(len(distinct), count, "the batches given")
    source = options.calibration_source or "batches of the caller's"
    return Samples(lambda: iter(given), _record(options, source, count, None, digest.hexdigest()))


def observe_ranges(
    export: FloatExport,
    samples: Samples,
    tensors: Collection[str],
    *,
    method: Method,
    threads: int = 1,
    progress: Progress = QUIET,
) -> dict[str, Observed]:
    """What each of `tensors` holds while the graph runs on all samples; padding does not count.

    One pass for `minmax`, two for the rest. The graph runs in a process of its own, its optimizations off, and only
    extremes and counts come back. Raises UserError where a tensor is not finite.
    """
    import onnx

    model = onnx.load(str(export.path), load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in outputs)
    with tempfile.NamedTemporaryFile(dir=export.path.parent, prefix=".observed.", suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        with GraphProcess(Path(file.name), threads=threads, optimize=False) as process:
            process.observe_begin([name for name in tensors if name not in _names(model.graph.input)])
            for number in range(1 if method == "minmax" else 2):
                if number:
                    process.observe_bins()
                for batch in samples.batches():
                    process.observe(batch)
            found = process.observed()
    # What a graph is given is seen here: it is no output of a node.
    for name in tensors:
        if name in _names(model.graph.input):
            found[name] = _observed_input(samples, name, method)
    for name, seen in found.items():
        if not seen.finite or not seen.values:
            raise UserError(
                f"calibration: tensor {name} " + ("holds NaN or infinity" if seen.values else "held no value"),
                "check the samples; a model that overflows in float32 cannot be quantized",
            )
    progress.say(
        f"export: calibrated {len(found)} tensors on {samples.record.samples} samples of {samples.record.source}",
        level=2,
    )
    return found


def ranges_of(observed: Mapping[str, Observed], method: Method, *, symmetric: bool) -> dict[str, tuple[float, float]]:
    """The range to quantize of each tensor."""
    return {name: chosen_range(seen, method, symmetric=symmetric) for name, seen in observed.items()}


def _names(values: Any) -> set[str]:
    return {value.name for value in values}


def _observed_input(samples: Samples, name: str, method: Method) -> Observed:
    from edgedistill.quantization.histogram import observe

    seen = Observed()
    for number in range(1 if method == "minmax" else 2):
        if number:
            seen.begin_bins()
        for batch in samples.batches():
            observe({name: seen}, batch, batch.get("attention_mask"))
    return seen


def _record(options: ExportOptions, source: str, samples: int, tokens: int | None, order: str) -> Calibration:
    method = options.calibration_method
    if method not in METHODS:
        raise UserError(f"no calibration method '{method}'", f"use {', '.join(METHODS)}")
    named = f"{method} {PERCENTILE:g}" if method == "percentile" else method
    return Calibration(
        method=named, source=source, samples=samples, tokens=tokens, seed=options.seed, order_sha256=order
    )


def _require_distinct(distinct: int, count: int, source: str) -> None:
    if distinct < MINIMUM:
        what = f"{count} samples that are all the same" if count > 1 else f"{count} sample{'' if count else 's'}"
        raise UserError(f"static INT8 would be calibrated on {what} of {source or 'nothing'}", f"{REMEDY}; {NEITHER}")


def _read(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    names = [spec.name for spec in inputs]
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as numpy's: {error}", "save it with numpy.savez or numpy.save"
        ) from error
    if isinstance(loaded, np.ndarray):
        if len(names) != 1:
            raise UserError(
                f"{path} holds one array, the graph takes {', '.join(names)}", "save them by name in an .npz"
            )
        return {names[0]: loaded}
    with loaded:
        missing, more = sorted(set(names) - set(loaded.files)), sorted(set(loaded.files) - set(names))
        if missing or more:
            raise UserError(
                f"{path} holds {', '.join(sorted(loaded.files)) or 'nothing'}", f"save the inputs {', '.join(names)}"
            )
        return {name: loaded[name] for name in names}


def _require_input(values: NDArray[Any], spec: TensorSpec, source: str) -> None:
    wanted = NUMPY_TYPES.get(spec.dtype)
    shape = list(values.shape)
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(dim, int) or dim == got or (axis == 0 and got == 1 and dim > 1)
        for axis, (got, dim) in enumerate(zip(shape, spec.shape, strict=True))
    )
    if not fits:
        raise UserError(
            f"{source}: {spec.name} has the shape {shape} for one sample", f"the graph takes {list(spec.shape)}"
        )
    if wanted is not None and values.dtype != wanted:
        raise UserError(f"{source}: {spec.name} holds {values.dtype}", f"the graph takes {np.dtype(wanted).name}")


def _require_finite(values: NDArray[Any], spec: TensorSpec, source: str) -> None:
    if values.dtype.kind != "f":
        return
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise UserError(f"{source}: {spec.name} holds {bad} values that are NaN or infinite", "leave those samples out")
    if values.size and float(values.min()) == float(values.max()):
        raise UserError(f"{source}: all of {spec.name} is {float(values.min()):g}", REMEDY)
