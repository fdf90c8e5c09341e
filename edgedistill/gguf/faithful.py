"""A GGUF against the folder that it was made of, without running it: every tensor, every key that is computed with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.gguf import ggml
from edgedistill.gguf.pooling import pooling_of
from edgedistill.gguf.reader import GgufFile, GgufTensor
from edgedistill.models.architectures import Model, TensorSpec, as_modules, by_gguf_name, to_interleaved
from edgedistill.models.rope import MetadataValue
from edgedistill.models.streaming import as_stored
from edgedistill.models.weights import StoredTensor, read_tensor, stored_tensors
from edgedistill.quantization.mixes import EMBEDDING, HEAD, UNQUANTIZED
from edgedistill.quantization.rounding import difference
from edgedistill.records.finding import Finding, shown

WIDTH = {"F32": 32, "F16": 16, "BF16": 16}
FLOAT_TOLERANCE = 1e-6  # of a key: the writer's float32
FACTOR_TOLERANCE = 1e-5  # of a rotary factor: another order of the same operations
# Keys that say nothing where they have such a value, and keys of which llama.cpp has the value without them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (False, True),
    "rope.scaling.attn_factor": (1.0,),
}
HARMLESS = frozenset({"vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count"})


def tensor_findings(
    readers: Sequence[GgufFile], model: Model, checkpoint: Path, *, quantization: str, weighted: bool
) -> Iterator[Finding]:
    """Tensors that are missing, too many, of another shape or type, or hold other values than the checkpoint's."""
    stored = as_modules(stored_tensors(checkpoint), model.family)
    tensors = by_gguf_name(model.specs)
    if model.tied and EMBEDDING in tensors and model.family.task == "causal-lm":
        # The quantizer may give a tied head bits of its own, and a converter may repeat it.
        _, spec = tensors[EMBEDDING][0]
        tensors[HEAD] = [(model.family.embedding, spec)]
    seen = set()
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        name = tensor.name
        if name in seen:
            yield Finding("tensor", name, "is in the file twice")
        seen.add(name)
        if name in model.rope.tensors:
            yield from _factors(tensor, model.rope.tensors[name])
        elif name in tensors:
            said = _compared(tensor, tensors[name], stored, quantization, weighted=weighted)
            if said:
                yield Finding("tensor", name, f"{said} ({_named(tensors[name])})")
        else:
            yield Finding("tensor", name, "is in the file, and the model has no such tensor")
    optional = {HEAD} if model.tied else set()
    for name in [*tensors, *model.rope.tensors]:
        if name not in seen and name not in optional:
            yield Finding("tensor", name, "is missing")


def key_findings(reader: GgufFile, model: Model, checkpoint: Path) -> Iterator[Finding]:
    """Keys that change what llama.cpp computes, held to the model's configuration."""
    family = model.family
    named = reader.value("general.architecture")
    if named != family.gguf:
        yield Finding("metadata", "general.architecture", f"is {shown(named)}, the model is a {family.gguf}")
        return
    expected: dict[str, MetadataValue] = dict(model.keys)
    if family.task == "embedding":
        expected["pooling_type"] = pooling_of(checkpoint)[0]
    written = {key.removeprefix(f"{named}."): key for key in reader.keys if key.startswith(f"{named}.")}
    for key, wanted in expected.items():
        found = reader.value(written[key]) if key in written else _silent(key, model)
        if key == "context_length":
            # Beyond a sliding window llama.cpp would differ: the shorter context is ours, the longer the converter's.
            allowed = {int(str(wanted)), model.sizes.max_position_embeddings}
            if found not in allowed:
                yield Finding("context", f"{named}.{key}", f"is {shown(found)}, the model has {shown(max(allowed))}")
        elif not _same(found, wanted, model.sizes.num_hidden_layers):
            yield Finding("metadata", f"{named}.{key}", f"is {shown(found)}, the model's is {shown(wanted)}")
    for key in sorted(written.keys() - expected.keys()):
        found = reader.value(written[key])
        usual = NEUTRAL.get(key, (None, 0, False, ""))
        if key not in HARMLESS and found not in usual:
            yield Finding("metadata", f"{named}.{key}", f"is {shown(found)}, and the model's configuration has none")


def _silent(key: str, model: Model) -> Any:
    """What llama.cpp takes where a GGUF lacks a key; None where it takes nothing, or another value a family."""
    sizes = model.sizes
    whole = sizes.hidden_size // sizes.num_attention_heads
    defaults: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "attention.head_count_kv": sizes.num_attention_heads,
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.causal": True,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": sizes.head_dim,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.original_context_length": sizes.max_position_embeddings,
        "use_parallel_residual": True,
    }
    period = {"gemma2": 2, "gemma3": 6}.get(model.family.gguf)
    if period is not None:
        defaults["attention.sliding_window_pattern"] = period
        defaults["rope.freq_base_swa"] = 10000.0
    if model.family.gguf == "gemma2":
        defaults |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return defaults.get(key)


def _same(found: Any, wanted: MetadataValue, layers: int) -> bool:
    if isinstance(wanted, list):
        if isinstance(found, int) and not isinstance(found, bool):
            found = [(layer + 1) % found != 0 for layer in range(layers)] if found > 0 else None
        return isinstance(found, list) and [bool(v) for v in found] == wanted
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return math.isclose(float(found), wanted, rel_tol=FLOAT_TOLERANCE)
    if isinstance(found, list) and found and isinstance(wanted, int):
        return all(value == wanted for value in found)  # one value a layer
    return bool(found == wanted)


def _factors(tensor: GgufTensor, wanted: NDArray[np.float32]) -> Iterator[Finding]:
    found = np.asarray(tensor.data)
    if found.dtype != np.float32 or found.shape != wanted.shape:
        yield Finding("tensor", tensor.name, f"is {tensor.tensor_type.name} of {list(found.shape)}")
    elif not np.allclose(found, wanted, rtol=FACTOR_TOLERANCE, atol=0):
        at = int(np.argmax(~np.isclose(found, wanted, rtol=FACTOR_TOLERANCE, atol=0)))
        yield Finding("tensor", tensor.name, f"differs at {at}: {found[at]:.7g}, the model's {wanted[at]:.7g}")


def _named(parts: Sequence[tuple[str, TensorSpec]]) -> str:
    return parts[0][0] if len(parts) == 1 else f"{parts[0][0]} and {len(parts) - 1} more"


def _compared(
    tensor: GgufTensor,
    parts: Sequence[tuple[str, TensorSpec]],
    stored: Mapping[str, StoredTensor],
    quantization: str,
    *,
    weighted: bool,
) -> str:
    spec = parts[0][1]
    kind = str(tensor.tensor_type.name)
    shape = tuple(reversed(tensor.shape))
    if shape != spec.stored_shape:
        return f"has the shape {list(shape)}, not {list(spec.stored_shape)}"
    if spec.vector and kind != "F32":
        return f"is stored as {kind}, not as F32"
    if not spec.vector and quantization in UNQUANTIZED and WIDTH.get(kind, 0) < WIDTH[quantization]:
        return f"is stored as {kind}, not as {quantization}"
    missing = next((name for name, _ in parts if name not in stored), None)
    if missing is not None:
        return f"has no {missing} in the checkpoint"
    values = np.concatenate([_converted(read_tensor(stored[name]), part) for name, part in parts])
    values = values.reshape(spec.stored_shape)
    if kind in UNQUANTIZED:
        rounded = as_stored(values, kind, tensor=tensor.name)  # type: ignore[arg-type]
        return difference(_floats(tensor.data, kind, shape), _floats(rounded, kind, shape), kind)
    data = np.ascontiguousarray(tensor.data).view(np.uint8)
    return difference(ggml.dequantize(data, kind, shape), values, kind, weighted=weighted)


def _converted(values: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    """As the GGUF has them, before they are rounded."""
    if spec.change == "plus_one":
        values = values + np.float32(1)
    elif spec.change == "transposed":
        values = np.ascontiguousarray(values.T)
    return to_interleaved(values, spec.rope_heads) if spec.rope_heads else values


def _floats(data: NDArray[Any], kind: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    raw = np.ascontiguousarray(data)
    if kind == "F32":
        return raw.view(np.float32).reshape(shape)
    if kind == "F16":
        return raw.view(np.float16).astype(np.float32).reshape(shape)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
