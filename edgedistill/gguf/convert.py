"""A transformers folder → GGUF, tensor by tensor: no torch, no transformers, one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.gguf.architectures import (
    MetadataValue,
    Rope,
    TensorSpec,
    architecture_of,
    metadata,
    rope_of,
    tensor_map,
    to_interleaved,
)
from edgedistill.gguf.tokenizer import GgufTokenizer, add_tokenizer, read_tokenizer
from edgedistill.shapes import shape_from_config
from edgedistill.weights import StoredTensor, check_tensors, read_json, read_tensor, stored_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

Dtype = Literal["F32", "F16", "BF16"]
FLOAT16_MAX = 65504.0
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
ROPE_FACTORS = "rope_freqs.weight"
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
QUANTIZATION_VERSION = 2
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a buffer that old checkpoints carry; computed from the config


def convert_to_gguf(checkpoint: Path, out: Path, *, dtype: Dtype = "F16", name: str = "") -> dict[str, Any]:
    """Write the checkpoint of a transformers folder to the GGUF file `out`, the same bytes for the same input.

    Matrices are stored as `dtype`, vectors as F32. Returns `architecture`, `parameters`, `vocab_size`,
    `context_length`, `bytes` and `notes` (where llama.cpp's tokenizer is known to differ).
    Raises UserError for whatever cannot be converted faithfully, before any work where the headers tell.
    Nothing is left at `out` on failure.
    """
    where = str(checkpoint)
    stored = stored_tensors(checkpoint)
    config = read_json(checkpoint / "config.json", what="config.json")
    architecture = architecture_of(config, where=where)
    shape = shape_from_config(config, where=where)
    specs = tensor_map(shape, architecture)
    stored = {k: v for k, v in stored.items() if not k.endswith(IGNORED_SUFFIX)}
    if shape.tie_word_embeddings and TIED_HEAD in stored:
        _check_tied(stored, where)
        del stored[TIED_HEAD]
    check_tensors(stored, {k: s.shape for k, s in specs.items()}, where=where)
    rope = rope_of(config, shape, where=where)
    tokenizer = read_tokenizer(checkpoint, vocab_size=shape.vocab_size)
    keys: dict[str, MetadataValue] = {
        **metadata(config, shape, where=where),
        **{f"rope.{k}": v for k, v in rope.metadata.items()},
    }
    _write(out, architecture.gguf, keys, tokenizer, specs, stored, rope, dtype=dtype, name=name)
    return {
        "architecture": architecture.gguf,
        "parameters": shape.parameters,
        "vocab_size": shape.vocab_size,
        "context_length": shape.max_position_embeddings,
        "bytes": out.stat().st_size,
        "notes": tokenizer.notes,
    }


def as_stored(values: NDArray[np.float32], dtype: Dtype, *, tensor: str) -> NDArray[Any]:
    """float32 → the array whose bytes a GGUF holds: float32, float16, or bfloat16's bits as uint16.

    Raises UserError for NaN, infinity, and for values that float16 cannot hold.
    """
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise UserError(
            f"{tensor} holds {bad} values that are NaN or infinite", "the training diverged: use an earlier checkpoint"
        )
    if dtype == "F32":
        return values
    if dtype == "BF16":
        bits = values.view(np.uint32)
        # Round to nearest, ties to even: add half of the last kept bit, less one where that bit is even.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > FLOAT16_MAX:
        raise UserError(
            f"{tensor} holds {largest:g}, more than float16's largest value {FLOAT16_MAX:g}",
            "export with quantization BF16 or F32",
        )
    return values.astype(np.float16)


def _check_tied(stored: Mapping[str, StoredTensor], where: str) -> None:
    if EMBEDDING in stored and not np.array_equal(read_tensor(stored[TIED_HEAD]), read_tensor(stored[EMBEDDING])):
        raise UserError(
            f"{where}: tie_word_embeddings is true, but {TIED_HEAD} differs from {EMBEDDING}",
            "set tie_word_embeddings to false in config.json if the model has a head of its own",
        )


def _write(
    out: Path,
    architecture: str,
    keys: Mapping[str, MetadataValue],
    tokenizer: GgufTokenizer,
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, StoredTensor],
    rope: Rope,
    *,
    dtype: Dtype,
    name: str,
) -> None:
    from gguf import GGUFWriter

    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(prod(s.shape) * ELEMENT_BYTES[_stored_dtype(s.shape, dtype)] for s in specs.values())
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out} needs {needed:,} bytes, and {out.parent} has {free:,} left", "free some space, or write elsewhere"
        )
    part = out.with_name(f"{out.name}.part")
    writer = GGUFWriter(part, architecture, use_temp_file=False)
    try:
        _add_metadata(writer, architecture, keys, tokenizer, dtype=dtype, name=name)
        _write_tensors(writer, specs, stored, rope, dtype)
        writer.close()
        part.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}", "free some space, or write elsewhere") from error
    finally:
        for file in writer.fout or []:
            file.close()
        part.unlink(missing_ok=True)


def _stored_dtype(shape: tuple[int, ...], dtype: Dtype) -> Dtype:
    # Norms and biases: small, and llama.cpp computes with them in float32.
    return dtype if len(shape) > 1 else "F32"


def _write_tensors(
    writer: GGUFWriter,
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, StoredTensor],
    rope: Rope,
    dtype: Dtype,
) -> None:
    from gguf import GGMLQuantizationType

    if rope.frequency_factors is not None:
        factors = rope.frequency_factors
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for spec in specs.values():
        kind = _stored_dtype(spec.shape, dtype)
        size = prod(spec.shape) * ELEMENT_BYTES[kind]
        writer.add_tensor_info(
            spec.gguf_name, spec.shape, np.dtype(np.float32), size, raw_dtype=GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope.frequency_factors is not None:
        writer.write_tensor_data(rope.frequency_factors)
    for hf_name, spec in specs.items():
        values = read_tensor(stored[hf_name])
        if spec.rope_heads:
            values = to_interleaved(values, spec.rope_heads)
        writer.write_tensor_data(as_stored(values, _stored_dtype(spec.shape, dtype), tensor=hf_name))


def _add_metadata(
    writer: GGUFWriter,
    architecture: str,
    keys: Mapping[str, MetadataValue],
    tokenizer: GgufTokenizer,
    *,
    dtype: Dtype,
    name: str,
) -> None:
    from gguf import LlamaFileType

    file_type = {
        "F32": LlamaFileType.ALL_F32,
        "F16": LlamaFileType.MOSTLY_F16,
        "BF16": LlamaFileType.MOSTLY_BF16,
    }[dtype]
    writer.add_string("general.type", "model")
    writer.add_string("general.name", name)
    writer.add_uint32("general.file_type", int(file_type))
    writer.add_uint32("general.quantization_version", QUANTIZATION_VERSION)
    for key, value in keys.items():
        _add(writer, f"{architecture}.{key}", value)
    add_tokenizer(writer, tokenizer)


def _add(writer: GGUFWriter, key: str, value: MetadataValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
