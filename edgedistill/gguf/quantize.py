"""A checkpoint → the GGUF that ships: converted to F16, then quantized by llama.cpp in a child process."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from edgedistill.errors import UserError, did_you_mean
from edgedistill.export_options import DEFAULT_OPTIONS, ExportOptions
from edgedistill.gguf.architectures import Model, model_of
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.gguf.importance import (
    MIN_TOKENS,
    Importance,
    calibration_sequences,
    compute_importance,
    gguf_importance,
    read_importance,
)
from edgedistill.gguf.mixes import (
    BASE_TYPES,
    GGML_BLOCKS,
    MIXES_THAT_NEED_IMPORTANCE,
    UNQUANTIZED,
    needs_importance,
    quantizable,
    usable_type,
    uses_importance,
    wanted_types,
)
from edgedistill.gguf.split import split_gguf
from edgedistill.progress import QUIET, Progress
from edgedistill.records import Artifact, Fallback
from edgedistill.runtimes.quantize import quantize_in_child
from edgedistill.store import combined_sha256, file_entries, fsync_folder, versions
from edgedistill.weights import read_json

MODEL_FILE = "model.gguf"
# llama.cpp's mixes → the type that most of their matrices get.
QUANTIZATIONS = BASE_TYPES
FALLBACK_LINE = re.compile(
    r"(?P<tensor>\S+)\s+- ncols\s+(?P<columns>\d+) not divisible by\s+(?P<block>\d+)"
    r" \(required for type\s+(?P<wanted>\w+)\).*falling back to\s+(?P<got>\w+)"
)


@dataclass(frozen=True)
class Quantizing:
    """What is asked of llama.cpp. `types`: of every matrix where some are overridden, else empty (its own choice).

    `overrides`: GGUF tensor → the type that the user asked for.
    """

    quantization: str
    types: dict[str, str]
    overrides: dict[str, str]
    importance: Importance | None
    notes: list[str]


def export_gguf(
    checkpoint: Path,
    out: Path,
    *,
    quantization: str,
    context_tokens: int,
    threads: int,
    name: str,
    options: ExportOptions = DEFAULT_OPTIONS,
    progress: Progress = QUIET,
) -> Artifact:
    """Write `out`/model.gguf from a transformers folder and describe what is in it, read back from the file.

    `context_tokens` is capped at what the model was trained for. With `options.max_file_bytes` a larger file becomes
    model-00001-of-0000N.gguf and so on. Raises UserError, before any work, for a quantization that is unknown, for
    overrides that name no matrix or no type, for a type that needs an importance matrix where no calibration text is
    given, and for whatever cannot be converted; RuntimeCrashed where llama.cpp dies. Nothing half-written stays in
    `out` on failure.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"no GGUF quantization '{quantization}'", did_you_mean(quantization, QUANTIZATIONS))
    parsed = model_of(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    asked = _asked(checkpoint, parsed, quantization, options, progress)
    out.mkdir(parents=True, exist_ok=True)
    model = out / MODEL_FILE
    log: list[str] = []
    if quantization in UNQUANTIZED and not asked.types:
        dtype = cast(Literal["F32", "F16", "BF16"], quantization)
        facts = convert_to_gguf(checkpoint, model, dtype=dtype, name=name)
    else:
        whole = out / f".{MODEL_FILE}.whole"
        try:
            source = cast(Literal["F32", "F16", "BF16"], quantization if quantization in UNQUANTIZED else "F16")
            facts = convert_to_gguf(checkpoint, whole, dtype=source, name=name)
            log = _quantize(whole, model, asked, parsed, threads=threads)
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
    return _artifact(files, facts, described, asked, context_tokens=context_tokens, log=log)


def matrices_of(model: Model) -> dict[str, int]:
    """GGUF name → row length of every matrix that can be quantized."""
    return {
        spec.gguf_name: spec.stored_shape[-1]
        for spec in model.specs.values()
        if not spec.vector and quantizable(spec.gguf_name, len(spec.stored_shape))
    }


def chosen_overrides(columns: Mapping[str, int], tensor_types: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Matrix → type that the user asked for. `tensor_types`: regular expression searched in the name → ggml type; the
    first that matches counts.

    UserError for a pattern that is no regular expression or matches no matrix, and for a type that there is not.
    """
    found: dict[str, str] = {}
    for pattern, type_ in tensor_types:
        if type_.upper() not in GGML_BLOCKS:
            mix = BASE_TYPES.get(type_.upper())
            raise UserError(
                f"export.tensor_types: no ggml type '{type_}' (for {pattern!r})",
                f"{type_} is a mix; name a type of one tensor, e.g. {mix}" if mix else did_you_mean(type_, GGML_BLOCKS),
            )
        try:
            matching = [name for name in columns if re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"export.tensor_types: {pattern!r} is no regular expression: {error}", "e.g. ffn_down, or blk\\.0\\."
            ) from error
        if not matching:
            raise UserError(
                f"export.tensor_types: {pattern!r} matches no matrix of this model",
                f"its matrices are {', '.join(sorted({re.sub(r'^blk[.][0-9]+[.]', 'blk.N.', n) for n in columns}))}",
            )
        for name in matching:
            found.setdefault(name, type_.upper())
    return found


def planned_types(model: Model, quantization: str, overrides: Mapping[str, str], *, importance: bool) -> dict[str, str]:
    """Type that each matrix is to get, before any fallback: llama.cpp's choice for the mix, and the overrides."""
    sizes = model.sizes
    chosen = wanted_types(
        matrices_of(model),
        quantization,
        layers=sizes.num_hidden_layers,
        heads_a_key=sizes.num_attention_heads // sizes.num_key_value_heads,
        importance=importance,
    )
    return chosen | dict(overrides)


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


def _asked(checkpoint: Path, model: Model, quantization: str, options: ExportOptions, progress: Progress) -> Quantizing:
    columns = matrices_of(model)
    overrides = chosen_overrides(columns, options.tensor_types)
    needing = _needing(model, quantization, overrides)
    notes: list[str] = []
    importance = None
    if options.importance_file is not None and quantization not in UNQUANTIZED:
        importance = read_importance(options.importance_file)
    elif needing or uses_importance(quantization, options.importance_matrix):
        if needing and options.importance_matrix == "off":
            raise UserError(
                f"export.importance_matrix is off, but {needing}",
                "set it to auto, or choose IQ3_S, Q3_K_M or a larger quantization",
            )
        importance, notes = _computed(checkpoint, model, needing, options, progress)
    if importance is not None:
        gguf_importance(importance, model.specs)  # refused before any work where it is of another model
    types = planned_types(model, quantization, overrides, importance=importance is not None) if overrides else {}
    return Quantizing(quantization, types, overrides, importance, notes)


def _needing(model: Model, quantization: str, overrides: Mapping[str, str]) -> str:
    """Why an importance matrix is needed, in words; "" where it is not."""
    if quantization in MIXES_THAT_NEED_IMPORTANCE:
        return f"llama.cpp writes {quantization} with an importance matrix alone"
    columns = matrices_of(model)
    for name, type_ in planned_types(model, quantization, overrides, importance=False).items():
        if needs_importance(quantization, usable_type(type_, columns[name]), name):
            return f"{name} is to be {type_}, which llama.cpp writes with an importance matrix alone"
    return ""


def _computed(
    checkpoint: Path, model: Model, needing: str, options: ExportOptions, progress: Progress
) -> tuple[Importance | None, list[str]]:
    """The matrix of the calibration text; or None with a note that says why not, where it would only have helped."""
    forced = options.importance_matrix == "on"
    if not options.calibration and not (needing or forced):
        return None, ["quantized without an importance matrix: no calibration text was given"]
    try:
        sequences, record = calibration_sequences(checkpoint, options, task=model.family.task)
    except UserError as error:
        if needing:
            raise UserError(f"{needing}: {error.cause}", error.remedy) from error
        if forced:
            raise
        progress.warn(f"export: no importance matrix: {error.cause}")
        return None, [f"quantized without an importance matrix (less than {MIN_TOKENS:,} tokens): {error.cause}"]
    progress.say(f"export: importance matrix of {record.samples:,} sequences, {record.tokens or 0:,} tokens")
    return compute_importance(
        checkpoint, sequences, task=model.family.task, calibration=record, progress=progress
    ), []  # fmt: skip


def _quantize(whole: Path, out: Path, asked: Quantizing, model: Model, *, threads: int) -> list[str]:
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory(prefix=".importance.", dir=out.parent) as scratch:
        matrix = None
        if asked.importance is not None:
            matrix = Path(scratch) / "importance.safetensors"
            save_file(gguf_importance(asked.importance, model.specs), matrix)
        return quantize_in_child(
            whole, out, quantization=asked.quantization, threads=threads, types=asked.types, importance=matrix
        )


@dataclass(frozen=True)
class _Contents:
    counts: dict[str, int]
    matrices: dict[str, tuple[str, int]]
    bits_per_weight: float


def _contents(model: Path) -> _Contents:
    from gguf import GGUFReader

    reader = GGUFReader(model)
    bits = 8 * sum(int(t.n_bytes) for t in reader.tensors)
    return _Contents(
        counts=dict(sorted(Counter(t.tensor_type.name for t in reader.tensors).items())),
        matrices={
            t.name: (t.tensor_type.name, int(t.shape[0])) for t in reader.tensors if quantizable(t.name, len(t.shape))
        },
        bits_per_weight=bits / sum(int(t.n_elements) for t in reader.tensors),
    )


def _artifact(
    paths: Sequence[Path],
    facts: dict[str, Any],
    found: _Contents,
    asked: Quantizing,
    *,
    context_tokens: int,
    log: list[str],
) -> Artifact:
    names = {path.name for path in paths}
    files = [e for e in file_entries(paths[0].parent) if e.path in names]
    return Artifact(
        format="gguf",
        quantization=asked.quantization,
        runtime="llama.cpp",
        task=facts["task"],
        entry=paths[0].name,
        files=files,
        bytes=sum(file.bytes for file in files),
        sha256=combined_sha256(files),
        parameters=facts["parameters"],
        bits_per_weight=found.bits_per_weight,
        tensor_types=found.counts,
        fallbacks=fallbacks_of(found.matrices, log, quantization=asked.quantization, overrides=asked.overrides),
        context_tokens=min(context_tokens, facts["context_length"]),
        vocab_size=facts["vocab_size"],
        tool_versions=versions("gguf", "llama-cpp-python"),
        overrides=asked.overrides,
        calibration=None if asked.importance is None else asked.importance.calibration,
        notes=[*facts["notes"], *asked.notes],
    )
