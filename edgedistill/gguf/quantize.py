"""A checkpoint → the GGUF that ships: converted to F16, then quantized by llama.cpp in a child process."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, cast

from edgedistill.errors import UserError, did_you_mean
from edgedistill.gguf.architectures import FLOAT32_MATRICES
from edgedistill.gguf.converter import to_gguf
from edgedistill.records import Artifact, Fallback
from edgedistill.runtimes.quantize import quantize_in_child
from edgedistill.store import combined_sha256, file_entries, fsync_folder, versions

MODEL_FILE = "model.gguf"
UNQUANTIZED = ("F32", "F16", "BF16")
# llama.cpp's mixes that need no importance matrix → the type that most of their matrices get.
QUANTIZATIONS: dict[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
}
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
    converter: Path | None = None,
) -> Artifact:
    """Write `out`/model.gguf from a transformers folder and describe what is in it, read back from the file.

    `context_tokens` is capped at what the model was trained for. `converter`: llama.cpp's own script, for a family that
    has no converter here. Raises UserError for a quantization that is
    unknown and for whatever cannot be converted; RuntimeCrashed where llama.cpp dies. Nothing half-written
    stays in `out` on failure.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"no GGUF quantization '{quantization}'", did_you_mean(quantization, QUANTIZATIONS))
    out.mkdir(parents=True, exist_ok=True)
    model = out / MODEL_FILE
    log: list[str] = []
    if quantization in UNQUANTIZED:
        dtype = cast(Literal["F32", "F16", "BF16"], quantization)
        facts = to_gguf(checkpoint, model, dtype=dtype, name=name, converter=converter)
    else:
        whole = out / f".{MODEL_FILE}.f16"
        try:
            facts = to_gguf(checkpoint, whole, dtype="F16", name=name, converter=converter)
            log = quantize_in_child(whole, model, quantization=quantization, threads=threads)
        finally:
            whole.unlink(missing_ok=True)
    fsync_folder(out)
    return _describe(model, facts, quantization=quantization, context_tokens=context_tokens, log=log)


def fallbacks_of(types: dict[str, tuple[str, int]], log: list[str], *, quantization: str) -> list[Fallback]:
    """Matrices of another type than the mix wanted: what llama.cpp reported, held to the types in the file.

    `types`: matrix name → (type, columns). A matrix left in floating point without a word is reported too.
    """
    reported = {m["tensor"]: m for line in log if (m := FALLBACK_LINE.search(line))}
    found = []
    for tensor, (got, columns) in types.items():
        if got == "F32" and (tensor in FLOAT32_MATRICES or tensor.endswith("_norm.weight")):
            continue  # no matrix that a product is made with
        line = reported.get(tensor)
        if line is not None:
            wanted, why = line["wanted"].upper(), f"{columns} columns are not a multiple of {line['block']}"
        elif got in UNQUANTIZED and quantization not in UNQUANTIZED:
            wanted, why = QUANTIZATIONS[quantization], "llama.cpp left it in floating point"
        else:
            continue
        if got != wanted:
            found.append(Fallback(tensor=tensor, wanted=wanted, got=got, why=why))
    return found


def _describe(
    model: Path, facts: dict[str, Any], *, quantization: str, context_tokens: int, log: list[str]
) -> Artifact:
    from gguf import GGUFReader

    reader = GGUFReader(model)
    counts = Counter(t.tensor_type.name for t in reader.tensors)
    matrices = {t.name: (t.tensor_type.name, int(t.shape[0])) for t in reader.tensors if len(t.shape) > 1}
    bits = 8 * sum(int(t.n_bytes) for t in reader.tensors)
    files = [e for e in file_entries(model.parent) if e.path == model.name]
    return Artifact(
        format="gguf",
        quantization=quantization,
        runtime="llama.cpp",
        task=facts["task"],
        notes=facts["notes"],
        entry=model.name,
        files=files,
        bytes=files[0].bytes,
        sha256=combined_sha256(files),
        parameters=facts["parameters"],
        bits_per_weight=bits / sum(int(t.n_elements) for t in reader.tensors),
        tensor_types=dict(sorted(counts.items())),
        fallbacks=fallbacks_of(matrices, log, quantization=quantization),
        context_tokens=min(context_tokens, facts["context_length"]),
        vocab_size=facts["vocab_size"],
        tool_versions=versions("gguf", "llama-cpp-python"),
    )
