"""A large GGUF as several files, as llama.cpp's gguf-split writes them: `model-00001-of-00003.gguf`, ...

The first file holds all metadata, every file the keys `split.no`, `split.count` and `split.tensors.count`; llama.cpp
finds the others beside the first by their names. Tensors are copied, a few megabytes at a time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from edgedistill.errors import UserError
from edgedistill.gguf.reader import GgufFile, GgufTensor
from edgedistill.guards.gguf import split_files
from edgedistill.store import fsync_folder

MAGIC_AND_VERSION = b"GGUF" + struct.pack("<I", 3)
KEYS_AT = 24  # magic, version, u64 tensors, u64 keys
ALIGNMENT = 32
COPY_BYTES = 8 << 20
UINT16, INT32 = 2, 5  # GGUF's value types
MAX_FILES = 99_999
KEY_NO, KEY_COUNT, KEY_TENSORS = "split.no", "split.count", "split.tensors.count"


def split_gguf(source: Path, max_file_bytes: int) -> list[Path]:
    """Split `source` (model.gguf) beside it into files of at most `max_file_bytes`, and remove it; their paths.

    A file that is small enough stays as it is. Raises UserError where metadata or a tensor alone is larger. The parts
    are written under other names and renamed when all are whole; nothing remains of them on failure.
    """
    if source.stat().st_size <= max_file_bytes:
        return [source]
    reader = GgufFile(source)
    keys = _key_bytes(reader)
    groups = _groups(reader, len(keys), max_file_bytes, source)
    paths = [source.with_name(f"{source.stem}-{i + 1:05d}-of-{len(groups):05d}.gguf") for i in range(len(groups))]
    partial = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        for number, (group, path) in enumerate(zip(groups, partial, strict=True)):
            _write(path, source, group, number, len(groups), len(reader.tensors), keys if number == 0 else b"", reader)
        for written, path in zip(partial, paths, strict=True):
            written.replace(path)
    except OSError as error:
        for path in paths:
            path.unlink(missing_ok=True)
        raise UserError(f"{source} cannot be split: {error}", "free some space, or write elsewhere") from error
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    source.unlink()
    fsync_folder(source.parent)
    return paths


def open_gguf(first: Path) -> list[GgufFile]:
    """All files of a GGUF, opened. UserError where one is missing or is not sound."""
    return [GgufFile(path) for path in split_files(first)]


def _key_bytes(reader: GgufFile) -> bytes:
    """The metadata as it stands in the file; what comes after it are the tensors' descriptions."""
    with reader.path.open("rb") as file:
        file.seek(KEYS_AT)
        return file.read(reader.header.keys_end - KEYS_AT)


def _groups(reader: GgufFile, key_bytes: int, limit: int, source: Path) -> list[list[GgufTensor]]:
    """The tensors of each file, in the file's order, filled up to `limit`."""
    groups: list[list[GgufTensor]] = [[]]
    overhead = KEYS_AT + _split_key_bytes() + ALIGNMENT
    size = overhead + key_bytes
    if size > limit:
        raise UserError(
            f"{source.name}: its metadata (the tokenizer, mostly) has {key_bytes:,} bytes, more than a file of"
            f" {limit:,} bytes holds",
            "raise export.max_file_bytes",
        )
    for tensor in sorted(reader.tensors, key=lambda t: t.data_offset):
        needed = _padded(tensor.n_bytes) + len(_description(tensor, 0))
        if overhead + needed > limit:
            raise UserError(
                f"{source.name}: {tensor.name} has {tensor.n_bytes:,} bytes, more than a file of {limit:,} bytes holds",
                "raise export.max_file_bytes",
            )
        if size + needed > limit:
            groups.append([])
            size = overhead
        groups[-1].append(tensor)
        size += needed
    if len(groups) > MAX_FILES:
        raise UserError(f"{source.name} would be {len(groups):,} files", "raise export.max_file_bytes")
    return groups


def _write(
    path: Path,
    source: Path,
    tensors: Sequence[GgufTensor],
    number: int,
    count: int,
    all_tensors: int,
    keys: bytes,
    reader: GgufFile,
) -> None:
    own = _split_keys(number, count, all_tensors)
    key_count = (_key_count(reader) if keys else 0) + 3
    offset = 0
    descriptions = []
    for tensor in tensors:
        descriptions.append(_description(tensor, offset))
        offset += _padded(tensor.n_bytes)
    head = MAGIC_AND_VERSION + struct.pack("<QQ", len(tensors), key_count) + keys + own + b"".join(descriptions)
    with path.open("wb") as out, source.open("rb", buffering=0) as read:
        out.write(head.ljust(_padded(len(head)), b"\0"))
        for tensor in tensors:
            size = tensor.n_bytes
            _copy(read, out, tensor.data_offset, size)
            out.write(b"\0" * (_padded(size) - size))
        out.flush()
        os.fsync(out.fileno())


def _copy(read: IO[bytes], out: IO[bytes], offset: int, size: int) -> None:
    read.seek(offset)
    while size:
        block = read.read(min(size, COPY_BYTES))
        if not block:
            raise OSError(f"{read.name} ended early")
        out.write(block)
        size -= len(block)


def _key_count(reader: GgufFile) -> int:
    return len(reader.keys)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _split_keys(number: int, count: int, tensors: int) -> bytes:
    return b"".join(
        (
            _string(KEY_NO) + struct.pack("<IH", UINT16, number),
            _string(KEY_COUNT) + struct.pack("<IH", UINT16, count),
            _string(KEY_TENSORS) + struct.pack("<Ii", INT32, tensors),
        )
    )


def _split_key_bytes() -> int:
    return len(_split_keys(0, 0, 0))


def _description(tensor: GgufTensor, offset: int) -> bytes:
    return (
        _string(tensor.name)
        + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        + struct.pack("<IQ", int(tensor.tensor_type), offset)
    )


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
