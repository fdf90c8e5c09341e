"""llama.cpp's quantizer, in a child process; the result is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.runtimes.child import Child
from edgedistill.store import fsync_folder


def quantize_in_child(
    source: Path,
    out: Path,
    *,
    quantization: str,
    threads: int,
    types: Mapping[str, str] | None = None,
    importance: Path | None = None,
    timeout_s: float = 6 * 3600.0,
    log: Path | None = None,
) -> list[str]:
    """Quantize a GGUF of F32, F16 or BF16 to `quantization` (Q4_K_M, Q8_0, ...); llama.cpp's log lines.

    `types`: GGUF tensor name → ggml type, instead of the mix's choice. `importance`: a safetensors file of GGUF tensor
    name → [columns] float32, the weight of each column's squared error. The lines tell which tensors fell back to
    another type. It writes beside `out` and renames, so that a run that is killed leaves no half-written `out`. Raises
    UserError for an unknown type, a damaged source or one that llama.cpp refuses; RuntimeCrashed where it dies.
    """
    if source.resolve() == out.resolve():
        raise UserError(f"{out} is both source and result", "write the result beside the source")
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent}", "make it first")
    # One name for all tries: what a killed one left is written over by the next.
    partial = out.with_name(f".{out.name}.partial")
    child = Child(runtime="llama.cpp", artifact=source.absolute(), timeout_s=timeout_s, log=log)
    params = {
        "source": str(source.absolute()),
        "out": str(partial.absolute()),
        "quantization": quantization,
        "threads": threads,
        "types": dict(types or {}),
        "importance": None if importance is None else str(importance.absolute()),
    }
    try:
        lines = child.call("quantize", f"quantizing to {quantization}", params)["log"]
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
        fsync_folder(out.parent)
    finally:
        child.close()
        partial.unlink(missing_ok=True)
    return [str(line) for line in lines]
