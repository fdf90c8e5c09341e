"""ONNX artifacts of what is no decoder: encoders, classifiers, embeddings, vision, text2text, and any torch module.

A float32 graph is traced and fused (float_export.py), converted or quantized, reloaded in onnxruntime and held to torch
(parity.py); only then is it put in place.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import UserError, did_you_mean
from edgedistill.onnx.calibration import Samples, file_samples, given_samples, text_samples
from edgedistill.onnx.float_export import FloatExport, export_graphs, module_graph, trace
from edgedistill.onnx.inputs import (
    LONGEST_TOKENS,
    TEXTS,
    Batch,
    Compared,
    greedy_text2text,
    longest_compared,
    parity_batches,
)
from edgedistill.onnx.ort_format import to_ort
from edgedistill.onnx.parity import LIMITS, check_parity
from edgedistill.onnx.precision import NOTES, convert
from edgedistill.onnx.processors import open_tokenizer, require_same_tokens, ship
from edgedistill.onnx.quantizable import STATIC
from edgedistill.onnx.quantized_graph import require_static
from edgedistill.onnx.tasks import TaskModel, open_task
from edgedistill.onnx.tensorrt import NOTE as TENSORRT_NOTE
from edgedistill.onnx.tensorrt import OPSET as TENSORRT_OPSET
from edgedistill.onnx.tensorrt import write_engine_script
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.options import DEFAULT_OPTIONS, ExportOptions
from edgedistill.records.artifact import Artifact, Parity
from edgedistill.runtimes.graph import GraphProcess
from edgedistill.runtimes.speed import compare_graphs, report
from edgedistill.store import combined_sha256, file_entries, fsync_tree, versions

# quantization → "module:function", called with (list of FloatExport, folder to write the graphs of the same names into,
# keywords quantization, samples (calibration.Samples or None), threads, options, progress); it gives a dict of further
# fields of the artifact's record.
QUANTIZERS: dict[str, str] = dict.fromkeys(
    ("INT8", "INT8-DYNAMIC", "INT8-WEIGHTS", "INT4"), "edgedistill.onnx.quantize:quantize"
)
FOLDER = "."


def export_encoder(
    checkpoint: Path,
    out: Path,
    *,
    quantization: str,
    context_tokens: int | None = None,
    threads: int = 1,
    options: ExportOptions = DEFAULT_OPTIONS,
    progress: Progress = QUIET,
) -> Artifact:
    """Write model.onnx (text2text: encoder.onnx, decoder.onnx) and what preprocesses for it into the folder `out`.

    The same checkpoint gives the same bytes, but for model.ort, which onnxruntime writes as it likes.
    `context_tokens` is the longest text that the record names and that the graph is compared on. Raises
    UserError for what cannot be exported and for a graph that does not compute what torch does; on failure `out` is as
    it was.
    """
    _require_quantization(quantization, options)
    opened = open_task(checkpoint, options.task)
    if quantization == STATIC:
        require_static(len(opened.graphs), options.calibration is not None or options.calibration_path is not None)
    if options.tensorrt and opened.task == "text2text":
        raise UserError(
            f"{checkpoint} has a decoder with a cache, for which there is no TensorRT script",
            "export it without export.tensorrt, for onnxruntime",
        )
    texts = None if options.calibration is None else ["\n".join(block) for block in options.calibration]
    with _scratch(out) as scratch:
        opset = options.opset or (TENSORRT_OPSET if options.tensorrt else None)
        exports = export_graphs(opened, scratch / "float", opset=opset, standard=options.tensorrt)
        progress.say(f"export: {opened.task}, {', '.join(export.path.name for export in exports)} traced", level=2)
        longest, notes = longest_compared(opened, context_tokens) if opened.reads_text else (0, [])
        built = scratch / "built"
        built.mkdir()
        # First, for what is compared comes through the files that ship.
        ship([opened.folder, checkpoint], built, tokenizer=opened.tokenizer, max_tokens=longest)
        shipped = open_tokenizer(built) if opened.tokenizer is not None else None
        require_same_tokens(opened.tokenizer, shipped, TEXTS, checkpoint)
        compared, said = parity_batches(
            built, opened, exports, texts, options.calibration_source, tokenizer=shipped, longest=longest
        )
        needed = quantization == STATIC or options.mixed_retention is not None
        samples = _samples(built, opened, exports[0], texts, options, longest) if needed else None
        timed = [_timing_batch(part.batches[0], longest) for part in compared]
        fields = _finish(
            exports, built, compared, said, samples=samples, timed=timed, quantization=quantization, threads=threads,
            options=options, progress=progress,
        )  # fmt: skip
        fields["notes"] = [*fields["notes"], *opened.notes, *notes]
        if opened.task == "text2text":
            source = compared[0].batches[0]
            fields["parity"] = _with_greedy(fields["parity"], exports, built, source, opened.model, threads)
        if options.tensorrt:
            parity = fields["parity"]
            write_engine_script(
                built, built / exports[0].path.name, inputs=exports[0].inputs, outputs=exports[0].outputs,
                batches=compared[0].batches, longest=longest, limit=parity.limit, threads=threads,
            )  # fmt: skip
            fields["notes"] = [*fields["notes"], TENSORRT_NOTE]
        artifact = _describe(
            built, exports, quantization=quantization, task=opened.task, context=longest,
            vocab_size=opened.vocab_size, fields=fields,
        )  # fmt: skip
        _move(built, out)
    return artifact


def export_module(
    module: Any,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    out: Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    quantization: str = "FP32",
    batches: Sequence[Batch] | None = None,
    threads: int = 1,
    options: ExportOptions = DEFAULT_OPTIONS,
    progress: Progress = QUIET,
) -> Artifact:
    """Any `torch.nn.Module` in evaluation mode as model.onnx in the folder `out`, through torch.export.

    `example_inputs`: a tensor for each parameter of `forward`, by name or in order. `dynamic`: input → axis → name of
    the axes that vary; default: the first of every input, `batch`. `input_names` rename the graph's inputs, in order.
    `batches`: named arrays that the graph is held to torch on, and calibrated with; default: the examples, which are
    too few to calibrate on. `options.calibration_path`: an .npz of what it is calibrated with instead.

    Raises UserError for a module that torch.export does not take, weights that are not finite, and a graph that does
    not compute what the module does; on failure `out` is as it was.
    """
    _require_quantization(quantization, options)
    if quantization == STATIC:
        require_static(1, bool(batches) or options.calibration_path is not None)
    graph = module_graph(module, example_inputs, dynamic=dynamic, input_names=input_names, output_names=output_names)
    with _scratch(out) as scratch:
        parameters = sum(parameter.numel() for parameter in module.parameters())
        export = trace(graph, module, scratch / "float", opset=options.opset, parameters=parameters)
        given = list(batches or [{name: value.numpy() for name, value in graph.examples.items()}])
        said = f"{len(given)} batches of the caller's" if batches else "the example inputs"
        samples = None
        needed = quantization == STATIC or options.mixed_retention is not None
        if needed and options.calibration_path is not None:
            samples = file_samples(options.calibration_path, export.inputs, options=options)
        elif needed:
            samples = given_samples(given, export.inputs, options=options)
        built = scratch / "built"
        built.mkdir()
        fields = _finish(
            [export], built, [Compared(given)], said, samples=samples, timed=[given[0]], quantization=quantization,
            threads=threads, options=options, progress=progress,
        )  # fmt: skip
        artifact = _describe(
            built, [export], quantization=quantization, task="module", context=0, vocab_size=0, fields=fields
        )
        _move(built, out)
    return artifact


def _require_quantization(quantization: str, options: ExportOptions) -> None:
    if quantization not in LIMITS:
        raise UserError(
            f"no ONNX quantization '{quantization}' for a non-decoder model", did_you_mean(quantization, LIMITS)
        )
    if options.mixed_retention is not None and quantization not in QUANTIZERS:
        raise UserError(
            f"export.mixed_retention with the quantization {quantization}, which quantizes nothing",
            f"quantize with {', '.join(QUANTIZERS)}",
        )
    if options.tensor_types and quantization not in QUANTIZERS:
        raise UserError(
            f"export.tensor_types with the quantization {quantization}",
            f"quantize with {', '.join(QUANTIZERS)} and give FP32 to the nodes that should stay float",
        )


def _samples(
    folder: Path, opened: TaskModel, export: FloatExport, texts: Sequence[str] | None, options: ExportOptions,
    longest: int,
) -> Samples:  # fmt: skip
    """What static INT8 is calibrated on: a file of inputs, else the texts. UserError."""
    if options.calibration_path is not None:
        return file_samples(options.calibration_path, export.inputs, options=options)
    if not opened.reads_text:
        raise UserError(
            f"{options.calibration_source or 'text'} cannot calibrate a model of images",
            f"give an .npz or .npy of {export.inputs[0].name} {export.inputs[0].shape}, preprocessed",
        )
    names = [spec.name for spec in export.inputs]
    return text_samples(folder, texts or (), names, max_tokens=longest, options=options)


def _timing_batch(batch: Batch, max_tokens: int) -> Batch:
    """One sequence of 128 tokens, or the longest, where the graph takes nothing but sequences; else the batch."""
    if any(value.dtype != np.int64 or value.ndim != 2 for value in batch.values()) or "attention_mask" not in batch:
        return batch
    length = min(LONGEST_TOKENS, max_tokens)
    real = int(batch["attention_mask"][0].sum())
    return {name: np.resize(value[0, :real], (1, length)) for name, value in batch.items()}


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out`: what is finished is moved from it without crossing a file system."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        yield Path(name)


def _finish(
    exports: Sequence[FloatExport],
    built: Path,
    compared: Sequence[Compared],
    said: str,
    *,
    samples: Samples | None,
    timed: Sequence[Batch],
    quantization: str,
    threads: int,
    options: ExportOptions,
    progress: Progress,
) -> dict[str, Any]:
    """The graphs as they ship, in `built`, each held to torch. Gives fields of the record: parity, notes, ..."""
    if quantization != "FP32":
        _require_lengths(exports, compared, said, threads)
    fields: dict[str, Any] = {"notes": [NOTES[quantization]] if quantization in NOTES else []}
    if quantization in QUANTIZERS:
        module, _, name = QUANTIZERS[quantization].partition(":")
        quantize = getattr(importlib.import_module(module), name)
        fields |= quantize(
            exports, built, quantization=quantization, samples=samples, threads=threads, options=options,
            progress=progress,
        )  # fmt: skip
    else:
        for export in exports:
            target = built / export.path.name
            if quantization == "FP32":
                for file in export.path.parent.glob(f"{export.path.name}*"):
                    shutil.copyfile(file, built / file.name)
            else:
                convert(export.path, target, quantization)
    shipped = {export.path.name: export.path.name for export in exports}
    if options.ort_format:
        shipped = dict(zip(sorted(shipped), (path.name for path in to_ort(built)), strict=True))
    checked = [
        check_parity(
            export,
            built / file,
            part.batches,
            lengths=part.lengths,
            quantization=quantization,
            inputs=said,
            threads=threads,
        )
        for export, part in zip(exports, compared, strict=True)
        for file in dict.fromkeys((export.path.name, shipped[export.path.name]))
    ]
    fields["parity"] = _together(checked)
    if quantization in QUANTIZERS and options.compare_speed:
        files = [export.path.name for export in exports]
        fields["speed"] = compare_graphs(
            [export.path for export in exports], [built / file for file in files], timed, threads=threads
        )
        report(fields["speed"], quantization, progress)
    return fields


def _require_lengths(exports: Sequence[FloatExport], compared: Sequence[Compared], said: str, threads: int) -> None:
    """UserError where a float graph is wrong at some length: rounded, it may be within what rounding explains."""
    for export, part in zip(exports, compared, strict=True):
        if part.lengths:
            check_parity(
                export, export.path, part.batches, lengths=part.lengths, quantization="FP32", inputs=said,
                threads=threads,
            )  # fmt: skip


def _together(parts: Sequence[Parity]) -> Parity:
    values = sum(part.values for part in parts)
    return parts[0].model_copy(
        update={
            "values": values,
            "max_abs_difference": max(part.max_abs_difference for part in parts),
            "mean_abs_difference": sum(part.mean_abs_difference * part.values for part in parts) / max(1, values),
            "relative_rms": max(part.relative_rms for part in parts),
        }
    )


def _with_greedy(
    parity: Parity, exports: Sequence[FloatExport], built: Path, source: Batch, model: Any, threads: int
) -> Parity:
    """Greedy text of both, token by token. A first difference of text makes all that follows differ."""
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    specs = exports[1].inputs
    expected = np.asarray(greedy_text2text([export.reference for export in exports], specs, source, start))
    with (
        GraphProcess(built / exports[0].path.name, threads=threads) as encoder,
        GraphProcess(built / exports[1].path.name, threads=threads) as decoder,
    ):
        found = np.asarray(greedy_text2text([encoder.run, decoder.run], specs, source, start))
    return parity.model_copy(
        update={"greedy_tokens": int(expected.size), "greedy_tokens_equal": int((found == expected).sum())}
    )


def _describe(
    folder: Path,
    exports: Sequence[FloatExport],
    *,
    quantization: str,
    task: str,
    context: int,
    vocab_size: int,
    fields: dict[str, Any],
) -> Artifact:
    types, stored_bytes = _stored_types(folder)
    files = file_entries(folder)
    # Of text2text both graphs, whose head or embedding they share, are stored: bits are of the parameters, once.
    parameters = exports[0].parameters
    return Artifact(
        format="onnx",
        quantization=quantization,
        runtime="onnxruntime",
        task=task,
        entry=FOLDER,
        files=files,
        bytes=sum(file.bytes for file in files),
        sha256=combined_sha256(files),
        parameters=parameters,
        bits_per_weight=8 * stored_bytes / max(1, parameters),
        tensor_types=types,
        context_tokens=context,
        vocab_size=vocab_size,
        inputs=list(exports[-1].inputs) if len(exports) > 1 else list(exports[0].inputs),
        outputs=list(exports[-1].outputs) if len(exports) > 1 else list(exports[0].outputs),
        tool_versions=versions("onnxruntime", "onnx", "onnx-ir", "onnxscript", "torch", "transformers"),
        **fields,
    )


def _stored_types(folder: Path) -> tuple[dict[str, int], int]:
    """How many weights of each type the graphs hold, and their bytes."""
    import onnx

    counts: dict[str, int] = {}
    size = 0
    for path in sorted(folder.glob("*.onnx")):
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if len(tensor.dims) == 0 or tensor.data_type == onnx.TensorProto.INT64:
                continue
            name = onnx.TensorProto.DataType.Name(tensor.data_type)
            counts[name] = counts.get(name, 0) + 1
            bits = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}.get(name)
            width = bits or 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
            size += int(np.prod(tensor.dims)) * width // 8
    return dict(sorted(counts.items())), size


def _move(built: Path, out: Path) -> None:
    fsync_tree(built)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(built.iterdir()):
        file.replace(out / file.name)
