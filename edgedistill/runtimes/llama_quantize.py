"""`llama_model_quantize`, in the child process: mixes, types by tensor, importance matrices."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import UserError, did_you_mean
from edgedistill.runtimes.llama import Log, check_magic

# Rows of a tensor in memory at once, as float32: more than a few megabytes are no faster, and llama.cpp's 8 GiB hold
# a whole embedding.
BUFFER_BYTES = 32 << 20
# Any quantized mix: llama.cpp heeds types by tensor in those alone. The file's own type is written by `FILE_TYPE`.
CARRIER = "Q8_0"
FLOATS = ("F32", "F16", "BF16")
FILE_TYPE = b"general.file_type"
KV_OVERRIDE_INT = 0  # LLAMA_KV_OVERRIDE_TYPE_INT


def quantization_types() -> dict[str, int]:
    """Names of mixes that `llama_model_quantize` takes → its numbers, as this build of llama.cpp has them."""
    import llama_cpp

    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    return {
        name.removeprefix(prefix): int(getattr(llama_cpp, name))
        for prefix in prefixes
        for name in dir(llama_cpp)
        if name.startswith(prefix)
    }


def quantize(
    source: str,
    out: str,
    quantization: str,
    threads: int,
    types: Mapping[str, str] | None = None,
    importance: str | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Write `source` (a GGUF of F32, F16 or BF16) quantized to `out`; llama.cpp's log lines, fallbacks included.

    `types`: tensor name → ggml type ("Q4_K"), instead of the mix's choice. `importance`: a safetensors file of GGUF
    tensor name → [columns] float32. `dry_run`: nothing is written, the lines say what would be.
    Raises UserError for an unknown type, or where llama.cpp refuses, with its own words.
    """
    import llama_cpp

    mixes = quantization_types()
    if quantization not in mixes:
        raise UserError(f"no quantization '{quantization}' in this llama.cpp", did_you_mean(quantization, mixes))
    check_magic(Path(source))
    log = Log()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = mixes[quantization]
    params.nthread = threads
    params.dry_run = dry_run
    params.max_buf_size = BUFFER_BYTES
    kept: list[Any] = []  # C reads these during the call
    if types:
        if quantization in FLOATS:
            params.ftype = mixes[CARRIER]
            params.kv_overrides = _keep(kept, _file_type(mixes[quantization]))
        params.tt_overrides = _keep(kept, _type_overrides(types))
    if importance is not None:
        params.imatrix = _keep(kept, _importance(Path(importance), kept))
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params) != 0:
        raise UserError(
            f"llama.cpp cannot quantize {source} to {quantization}: {log.complaint()}",
            "quantize an undamaged F32, F16 or BF16 GGUF; types below 3 bits need an importance matrix, which is"
            " computed from calibration text",
        )
    return log.finished_lines()


def _keep(kept: list[Any], array: Any) -> Any:
    kept.append(array)
    return array


def _type_overrides(types: Mapping[str, str]) -> Any:
    import llama_cpp
    from gguf import GGMLQuantizationType

    entry = llama_cpp.llama_model_tensor_override
    entries = [entry(_exactly(name), int(GGMLQuantizationType[type_])) for name, type_ in types.items()]
    return (entry * (len(entries) + 1))(*entries)


def _exactly(name: str) -> bytes:
    # std::regex's escapes are those of re for the characters that tensor names have.
    return f"^{re.escape(name)}$".encode()


def _file_type(number: int) -> Any:
    import llama_cpp

    array = (llama_cpp.llama_model_kv_override * 2)()
    array[0].tag = KV_OVERRIDE_INT
    array[0].key = FILE_TYPE
    array[0].value.val_i64 = number
    return array


def _importance(path: Path, kept: list[Any]) -> Any:
    import llama_cpp
    from safetensors.numpy import load_file

    entry = llama_cpp.llama_model_imatrix_data
    entries: Sequence[Any] = [
        entry(
            name.encode(),
            _keep(kept, np.ascontiguousarray(values, dtype=np.float32)).ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            values.size,
        )
        for name, values in load_file(path).items()
    ]
    return (entry * (len(entries) + 1))(*entries)
