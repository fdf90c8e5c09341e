"""Reads a transformers folder's safetensors without torch: checked whole before any work, then one tensor at a time.

Headers are read in safetensors_header.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.safetensors_header import read_safetensors_header
from edgedistill.strict import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "model."
EMBEDDING = f"{PREFIX}embed_tokens.weight"
HEAD = "lm_head.weight"
# BF16 has no numpy type: it is the upper half of a float32.
DTYPES: dict[str, tuple[str, int]] = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2), "F64": ("<f8", 8)}
# Tables of whole numbers and masks that older versions of transformers saved beside the weights and today's compute:
# positions, token types, the causal triangle. No output depends on what a file says of them.
BUFFERS = re.compile(r"(?:^|\.)(?:position_ids|token_type_ids|(?:attn|attention)\.(?:bias|masked_bias))$")
BUFFER_DTYPES = frozenset({"BOOL", "U8", "I32", "I64"})
MISMATCHES_SHOWN = 3
# Bits of a type's magnitude, and the first that is infinite: whatever stands above it is NaN.
MAGNITUDES: dict[str, tuple[str, int, int]] = {
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}
READ_AT_A_TIME = 1 << 22
# What a name has in it where a model was saved through something around it, and how the model itself is reached.
WRAPPERS = {
    "_orig_mod.": "torch.compile: save model._orig_mod, not the compiled model",
    "module.": "DataParallel or DistributedDataParallel: save model.module",
    "_fsdp_wrapped_module.": "FSDP: save its full state_dict",
    "_checkpoint_wrapped_module.": "activation checkpointing: save the model without it",
    "base_model.model.": "peft: call merge_and_unload(), and save what it gives",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, absolute byte offset, its dtype's safetensors name, shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPES[self.dtype][1]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every weight of a checkpoint folder by its name in the whole model, from the headers of its safetensors files.

    Buffers of whole numbers are left out. Raises UserError for a folder without weights, with only a pickle, with a
    missing shard or one that its index contradicts, and for a file that is cut short or whose header does not fit its
    data.
    """
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}", "give a folder as transformers' save_pretrained writes it")
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return _whole_names(folder, *_stored(folder / SINGLE_FILE))
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index, what=INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} has no usable weight_map", f"replace it with a whole {INDEX_FILE}")
    found: dict[str, StoredTensor] = {}
    shared: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UserError(f"shard {shard!r} of {index} is missing", "download or copy all shards of the model")
        tensors, metadata = _stored(folder / shard)
        for name, tensor in tensors.items():
            # Whoever goes by the index reads one, whoever reads the shards the other.
            if name in found or weight_map.get(name, shard) != shard:
                other = found[name].path.name if name in found else weight_map[name]
                raise UserError(
                    f"{index}: tensor {name} is in {shard}, and in {other} too",
                    "the shards come from two saves: take the index and all shards of one save",
                )
            found[name] = tensor
        shared |= metadata
    for name, shard in weight_map.items():
        if name not in found and not BUFFERS.search(name):
            raise UserError(
                f"{index}: tensor {name} is not in {shard}", "replace the index and all shards by those of one save"
            )
    return _whole_names(folder, found, shared)


def _whole_names(folder: Path, found: dict[str, StoredTensor], shared: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors under the names that the whole causal language model has, where they were saved under others.

    Without its prefix, by what is within the head alone; a weight that two names share under one of them, which
    safetensors' save_model notes in the file (dropped name → kept name). transformers loads both.
    """
    if EMBEDDING not in found and EMBEDDING.removeprefix(PREFIX) in found:
        found = {name if name.startswith("lm_head.") else f"{PREFIX}{name}": found[name] for name in found}
    found |= {name: found[kept] for name, kept in shared.items() if kept in found and name not in found}
    if HEAD in found and EMBEDDING not in found and _says_tied(folder / "config.json"):
        found[EMBEDDING] = found[HEAD]
    return found


def _says_tied(config: Path) -> bool:
    return config.is_file() and read_json(config, what="config.json").get("tie_word_embeddings") is True


def read_tensor(tensor: StoredTensor) -> NDArray[np.float32]:
    """Its values as float32, in its shape; only this tensor is read."""
    numpy_type, _ = DTYPES[tensor.dtype]
    raw = np.fromfile(tensor.path, dtype=numpy_type, count=tensor.elements, offset=tensor.offset)
    if raw.size != tensor.elements:
        raise UserError(f"{tensor.path} ended early, at {raw.size} of {tensor.elements} values", "copy the file again")
    if tensor.dtype == "BF16":
        values = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.astype(np.float32, copy=False)
    return values.reshape(tensor.shape)


def require_finite(tensor: StoredTensor, name: str, *, where: str) -> None:
    """Read a tensor, a few megabytes at a time. UserError for NaN, infinity, and what float32 cannot hold."""
    numpy_type, size = DTYPES[tensor.dtype]
    bad, first = 0, -1
    for start in range(0, tensor.elements, READ_AT_A_TIME):
        count = min(READ_AT_A_TIME, tensor.elements - start)
        raw = np.fromfile(tensor.path, dtype=numpy_type, count=count, offset=tensor.offset + start * size)
        if tensor.dtype == "F64":
            wrong = ~(np.abs(raw) <= np.finfo(np.float32).max)
        else:
            bits_type, mask, infinite = MAGNITUDES[tensor.dtype]
            bits = raw.view(bits_type) & mask
            if int(bits.max(initial=0)) < infinite:
                continue
            wrong = bits >= infinite
        if wrong.any():
            first = first if bad else start + int(np.argmax(wrong))
            bad += int(wrong.sum())
    if bad:
        at = [int(index) for index in np.unravel_index(first, tensor.shape)] if tensor.shape else []
        raise UserError(
            f"{where}: tensor {name} in {tensor.path.name} holds {bad:,} value{'s' if bad > 1 else ''} that"
            f" {'are' if bad > 1 else 'is'} NaN or infinite, the first at {at}",
            "take an undamaged copy of the model: weights beyond 65,504 become infinite in float16, but not in the"
            " bfloat16 or float32 original; if training diverged, take an earlier checkpoint",
        )


def refuse_wrapped(names: Iterable[str], expected: Iterable[str], *, where: str) -> None:
    """Refuse a checkpoint whose names are `expected` but for what a wrapper put into them. UserError that names it."""
    found, wanted = set(names), set(expected)
    missing = wanted - found
    for word, what in WRAPPERS.items():
        wrapped = {name.replace(word, "") for name in found if word in name}
        if missing and missing <= wrapped:
            one = next(name for name in sorted(found) if word in name)
            raise UserError(
                f"{where}: {len(wrapped)} of {len(found)} tensors have {word!r} in their names, e.g. {one}",
                f"they were saved through {what}",
            )


def check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Refuse what is missing, unexpected, or of a shape that disagrees with config.json."""
    wrong = [
        f"{name} is {list(stored[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if wrong:
        raise UserError(f"{where}: {_some(wrong)}", "config.json and the weights must come from the same model")
    refuse_wrapped(stored, expected, where=where)
    missing = [name for name in expected if name not in stored]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} tensor(s) missing, e.g. {_some(missing)}",
            "use the whole checkpoint of a causal language model, not an adapter or a base model without its head",
        )
    extra = [name for name in stored if name not in expected]
    if extra:
        raise UserError(
            f"{where}: {len(extra)} tensor(s) that this architecture does not have, e.g. {_some(extra)}",
            "merge adapters and remove additions before the export; config.json must describe all weights",
        )


def _some(items: list[str]) -> str:
    rest = len(items) - MISMATCHES_SHOWN
    return ", ".join(items[:MISMATCHES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".th"})
    if pickles:
        return UserError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when it is loaded",
            "load it once where you trust it, and save it with save_pretrained(..., safe_serialization=True)",
        )
    adapters = sorted(p.name for p in folder.glob("adapter_model.*"))
    if adapters:
        return UserError(
            f"{folder} holds only an adapter ({adapters[0]})",
            "merge it into its base model (peft: merge_and_unload), and save that with save_pretrained",
        )
    return UserError(f"{folder} holds no weights", f"it needs {SINGLE_FILE}, or {INDEX_FILE} with its shards")


def _stored(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file that are weights, in floating point, and its metadata."""
    found = {}
    header = read_safetensors_header(path)
    for name, entry in header.tensors.items():
        if entry.dtype in BUFFER_DTYPES and BUFFERS.search(name):
            continue
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry.dtype}",
                f"use the model's original weights; {', '.join(DTYPES)} work",
            )
        found[name] = StoredTensor(path=path, offset=entry.begin, dtype=entry.dtype, shape=entry.shape)
    return found, header.metadata
