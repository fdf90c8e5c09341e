"""A checkpoint → the GGUF that ships: converted to F16, then quantized by llama.cpp in a child process."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from edgedistill.errors import UserError, did_you_mean
from edgedistill.gguf.converter import to_gguf
from edgedistill.gguf.importance import gguf_importance
from edgedistill.gguf.reader import GgufFile
from edgedistill.gguf.request import Request, refuse_importance, request_of, request_of_file, with_importance
from edgedistill.gguf.sensitivity import choose_mix, refuse_mixed
from edgedistill.gguf.split import split_gguf
from edgedistill.models.architectures import Model, model_of
from edgedistill.models.streaming import Dtype
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.mixes import BASE_TYPES, UNQUANTIZED, quantizable
from edgedistill.quantization.options import DEFAULT_OPTIONS, ExportOptions
from edgedistill.records.artifact import Artifact, Fallback, Sensitivity
from edgedistill.records.base import FileEntry
from edgedistill.runtimes.quantize import quantize_in_child
from edgedistill.store import combined_sha256, fsync_folder, sha256_of, versions
from edgedistill.strict import read_json

MODEL_FILE = "model.gguf"
CONVERTER = "converter"  # in an artifact's tool_versions: the user's own script wrote it
# llama.cpp's mixes → the type that most of their matrices get.
QUANTIZATIONS = BASE_TYPES
FALLBACK_LINE = re.compile(
    r"(?P<tensor>\S+)\s+- ncols\s+(?P<columns>\d+) not divisible by\s+(?P<block>\d+)"
    r" \(required for type\s+(?P<wanted>\w+)\).*falling back to\s+(?P<got>\w+)"
)


def export_gguf(
    checkpoint: Path,
    out: Path,
    *,
    quantization: str,
    context_tokens: int,
    threads: int,
    name: str,
    options: ExportOptions = DEFAULT_OPTIONS,
    unquantized: Path | None = None,
    progress: Progress = QUIET,
) -> Artifact:
    """Write `out`/model.gguf from a transformers folder and describe what is in it, read back from the file.

    `unquantized`: where the F16 file is kept that was quantized, in `out`'s file system; it is removed without.
    `context_tokens` is capped at what the model was trained for. With `options.max_file_bytes` a larger file becomes
    model-00001-of-0000N.gguf and so on. Raises UserError, before any work, for a quantization that is unknown, for
    overrides that name no matrix or no type, for a type that needs an importance matrix (or a search for a mix) where
    no calibration text is given, and for whatever cannot be converted; after it, where no mix keeps
    `options.mixed_retention`; RuntimeCrashed where llama.cpp dies. Nothing half-written stays in
    `out` on failure.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"no GGUF quantization '{quantization}'", did_you_mean(quantization, QUANTIZATIONS))
    refuse_mixed(options, quantization)
    parsed, request, sensitivity = None, None, None
    if options.converter is None:
        parsed = model_of(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
        request = request_of(checkpoint, parsed, quantization, options, progress=progress)
    else:
        refuse_importance(quantization, {}, options)
    out.mkdir(parents=True, exist_ok=True)
    model, whole = out / MODEL_FILE, out / f".{MODEL_FILE}.whole"
    log: list[str] = []
    source = cast(Dtype, quantization if quantization in UNQUANTIZED else "F16")
    try:
        facts = to_gguf(checkpoint, whole, dtype=source, name=name, converter=options.converter)
        # After the conversion: what cannot be converted is refused before a model is loaded and run.
        if request is None or parsed is None:
            request = request_of_file(whole, quantization, options)
        else:
            request = with_importance(request, checkpoint, parsed, progress=progress)
            request, sensitivity = choose_mix(request, checkpoint, parsed, options, threads=threads, progress=progress)
        if quantization in UNQUANTIZED and not request.types:
            whole.replace(model)
        else:
            log = _quantize(whole, model, request, parsed, threads=threads)
            if unquantized is not None:
                whole.replace(unquantized)
    finally:
        whole.unlink(missing_ok=True)
    described = _contents(model)
    files = [model]
    if options.max_file_bytes is not None:
        try:
            files = split_gguf(model, options.max_file_bytes)
        except BaseException:
            model.unlink(missing_ok=True)
            raise
    fsync_folder(out)
    made = _artifact(files, facts, described, request, sensitivity, context_tokens=context_tokens, log=log)
    if options.converter is None:
        return made
    return made.model_copy(update={"tool_versions": {**made.tool_versions, CONVERTER: options.converter.name}})


def fallbacks_of(
    types: dict[str, tuple[str, int]], log: list[str], *, quantization: str, overrides: Mapping[str, str] = {}
) -> list[Fallback]:
    """Matrices of another type than the mix or an override wanted: what llama.cpp reported, held to the types in the
    file.

    `types`: matrix name → (type, columns). A matrix left in floating point without a word is reported too.
    """
    reported = {m["tensor"]: m for line in log if (m := FALLBACK_LINE.search(line))}
    found = []
    for tensor, (got, columns) in types.items():
        line = reported.get(tensor)
        if line is not None:
            wanted, why = line["wanted"].upper(), f"{columns} columns are not a multiple of {line['block']}"
        elif tensor in overrides:
            wanted, why = overrides[tensor], "llama.cpp chose another type"
        elif got in UNQUANTIZED and quantization not in UNQUANTIZED:
            wanted, why = QUANTIZATIONS[quantization], "llama.cpp left it in floating point"
        else:
            continue
        if got != wanted:
            found.append(Fallback(tensor=tensor, wanted=wanted, got=got, why=why))
    return found


def _quantize(whole: Path, out: Path, request: Request, model: Model | None, *, threads: int) -> list[str]:
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory(prefix=".importance.", dir=out.parent) as scratch:
        matrix = None
        if request.importance is not None and model is not None:
            matrix = Path(scratch) / "importance.safetensors"
            save_file(gguf_importance(request.importance, model.specs), matrix)
        return quantize_in_child(
            whole, out, quantization=request.quantization, threads=threads, types=request.types, importance=matrix
        )


@dataclass(frozen=True)
class _Contents:
    counts: dict[str, int]
    matrices: dict[str, tuple[str, int]]
    bits_per_weight: float


def _contents(model: Path) -> _Contents:
    reader = GgufFile(model)
    bits = 8 * sum(t.n_bytes for t in reader.tensors)
    return _Contents(
        counts=dict(sorted(Counter(t.tensor_type.name for t in reader.tensors).items())),
        matrices={
            t.name: (t.tensor_type.name, t.shape[0]) for t in reader.tensors if quantizable(t.name, len(t.shape))
        },
        bits_per_weight=bits / sum(t.n_elements for t in reader.tensors),
    )


def _artifact(
    paths: Sequence[Path],
    facts: dict[str, Any],
    found: _Contents,
    request: Request,
    sensitivity: Sensitivity | None,
    *,
    context_tokens: int,
    log: list[str],
) -> Artifact:
    files = [FileEntry(path=p.name, bytes=p.stat().st_size, sha256=sha256_of(p)) for p in sorted(paths)]
    return Artifact(
        format="gguf",
        quantization=request.quantization,
        runtime="llama.cpp",
        task=facts["task"],
        entry=paths[0].name,
        files=files,
        bytes=sum(file.bytes for file in files),
        sha256=combined_sha256(files),
        parameters=facts["parameters"],
        bits_per_weight=found.bits_per_weight,
        tensor_types=found.counts,
        fallbacks=fallbacks_of(found.matrices, log, quantization=request.quantization, overrides=request.overrides),
        context_tokens=min(context_tokens, facts["context_length"]),
        vocab_size=facts["vocab_size"],
        tool_versions=versions("gguf", "llama-cpp-python"),
        overrides=request.overrides,
        calibration=request.calibration,
        sensitivity=sensitivity,
        notes=[*facts["notes"], *request.notes],
    )
