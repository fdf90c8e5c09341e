"""A transformers folder → GGUF: no torch, no transformers, a few megabytes of weights in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UserError
from edgedistill.gguf.generation_keys import with_generation
from edgedistill.gguf.pooling import pooling_of
from edgedistill.gguf.tokenizer import GgufTokenizer, add_tokenizer, general_name, read_tokenizer
from edgedistill.models.architectures import TIED_HEAD, Model, TensorSpec, as_modules, by_gguf_name, model_of
from edgedistill.models.folder import check_tied
from edgedistill.models.generation import generation_of
from edgedistill.models.rope import MetadataValue
from edgedistill.models.streaming import ELEMENT_BYTES, Dtype, write_tensor
from edgedistill.models.weights import StoredTensor, check_tensors, stored_tensors
from edgedistill.store import fsync_folder
from edgedistill.strict import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

QUANTIZATION_VERSION = 2
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")


def convert_to_gguf(checkpoint: Path, out: Path, *, dtype: Dtype = "F16", name: str = "") -> dict[str, Any]:
    """Write the checkpoint of a transformers folder to the GGUF file `out`, the same bytes for the same input.

    Matrices are stored as `dtype`, vectors as F32. Returns `architecture`, `task`, `parameters`, `vocab_size`,
    `context_length`, `bytes` and `notes` (where llama.cpp is known to differ).
    Raises UserError for whatever cannot be converted faithfully, before any work where the headers tell.
    Nothing is left at `out` on failure.
    """
    where = str(checkpoint)
    files = stored_tensors(checkpoint)
    model = model_of(read_json(checkpoint / "config.json", what="config.json"), where=where)
    stored = checked_tensors(files, model, where=where)
    tokenizer = tokenizer_of(checkpoint, model)
    keys = dict(model.keys)
    notes = [*tokenizer.notes, *model.notes]
    if model.family.task == "embedding":
        keys["pooling_type"], pooling_notes = pooling_of(checkpoint)
        notes += pooling_notes
    _write(out, model, keys, tokenizer, stored, dtype=dtype, name=name)
    return {
        "architecture": model.family.gguf,
        "task": model.family.task,
        "parameters": sum(prod(spec.shape) for spec in model.specs.values()),
        "vocab_size": model.sizes.vocab_size,
        "context_length": int(str(keys["context_length"])),
        "bytes": out.stat().st_size,
        "notes": notes,
    }


def tokenizer_of(checkpoint: Path, model: Model) -> GgufTokenizer:
    """What the GGUF of a model of the table says of its tokenizer; of a decoder, of where it stops too."""
    vocab_size = model.sizes.vocab_size
    tokenizer = read_tokenizer(checkpoint, vocab_size=vocab_size)
    if model.family.task != "causal-lm":
        return tokenizer
    return with_generation(tokenizer, generation_of(checkpoint, vocab_size=vocab_size), where=str(checkpoint))


def gguf_positions(checkpoint: Path, script: Path | None) -> int:
    """The longest context of the GGUF that a checkpoint becomes, from its config.json. UserError as in converting."""
    config = read_json(checkpoint / "config.json", what="config.json")
    if script is None:
        return model_of(config, where=str(checkpoint)).context_length
    nested = config.get("text_config")
    for table in (config, nested if isinstance(nested, dict) else {}):
        found = [table[key] for key in POSITION_KEYS if isinstance(table.get(key), int)]
        if found:
            return int(found[0])
    raise UserError(
        f"{checkpoint}: config.json has none of {', '.join(POSITION_KEYS)}", "state how many positions the model has"
    )


def checked_tensors(files: Mapping[str, StoredTensor], model: Model, *, where: str) -> dict[str, StoredTensor]:
    """The tensors that `model` is made of, under the torch modules' names; UserError where the files hold others."""
    stored = as_modules(files, model.family)
    if model.tied and model.family.task == "causal-lm" and TIED_HEAD in stored:
        check_tied(stored, model.family.embedding, where)
        del stored[TIED_HEAD]
    check_tensors(stored, {name: spec.shape for name, spec in model.specs.items()}, where=where)
    return stored


def _write(
    out: Path,
    model: Model,
    keys: Mapping[str, MetadataValue],
    tokenizer: GgufTokenizer,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: Dtype,
    name: str,
) -> None:
    from edgedistill.gguf.array_writer import ArrayWriter

    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(_bytes(spec, dtype, prod(spec.shape)) for spec in model.specs.values())
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out} needs {needed:,} bytes, and {out.parent} has {free:,} left", "free some space, or write elsewhere"
        )
    part = out.with_name(f"{out.name}.part")
    writer = ArrayWriter(part, model.family.gguf, use_temp_file=False)
    try:
        _add_metadata(writer, model, keys, tokenizer, dtype=dtype, name=name)
        _write_tensors(writer, model, stored, dtype)
        writer.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(out)
        fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}", "free some space, or write elsewhere") from error
    finally:
        for open_file in writer.fout or []:
            open_file.close()
        part.unlink(missing_ok=True)


def _stored_dtype(spec: TensorSpec, dtype: Dtype) -> Dtype:
    # Norms and biases: small, and llama.cpp computes with them in float32.
    return "F32" if spec.vector else dtype


def _bytes(spec: TensorSpec, dtype: Dtype, elements: int) -> int:
    return elements * ELEMENT_BYTES[_stored_dtype(spec, dtype)]


def _write_tensors(writer: GGUFWriter, model: Model, stored: Mapping[str, StoredTensor], dtype: Dtype) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    tensors = by_gguf_name(model.specs)
    for name, factors in model.rope.tensors.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for name, parts in tensors.items():
        spec = parts[0][1]
        size = _bytes(spec, dtype, prod(spec.stored_shape))
        kind = GGMLQuantizationType[_stored_dtype(spec, dtype)]
        writer.add_tensor_info(name, spec.stored_shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for factors in model.rope.tensors.values():
        writer.write_padding(file, file.tell())
        factors.tofile(file)
    for parts in tensors.values():
        writer.write_padding(file, file.tell())
        for torch_name, spec in parts:
            write_tensor(file, stored[torch_name], spec, _stored_dtype(spec, dtype), name=torch_name)
    writer.write_padding(file, file.tell())


def _add_metadata(
    writer: GGUFWriter,
    model: Model,
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
    writer.add_string("general.name", general_name(name, tokenizer))
    writer.add_uint32("general.file_type", int(file_type))
    writer.add_uint32("general.quantization_version", QUANTIZATION_VERSION)
    for key, value in keys.items():
        _add(writer, f"{model.family.gguf}.{key}", value)
    if model.sizes.token_types:
        writer.add_uint32("tokenizer.ggml.token_type_count", model.sizes.token_types)
    add_tokenizer(writer, tokenizer)


def _add(writer: GGUFWriter, key: str, value: MetadataValue) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
