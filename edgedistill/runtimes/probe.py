"""Does llama.cpp survive its own extra buffers on this machine? Tried once, in child processes.

llama.cpp can keep quantized weights repacked in "extra buffers": on ARM they are what makes Q4_0 fast,
on x86 with AMX they feed the tile unit. Built with some compilers (seen: GCC, llama-cpp-python 0.3.36),
the AMX path dies: the stores that fill the tile configuration are optimised away, since the compiler
does not see that `ldtilecfg` reads them (llama.cpp PR 26954, open). What was seen there:

- it dies in `ggml_backend_amx_mul_mat` at `ldtilecfg` with SIGSEGV, or with SIGILL at the first tile
  instruction, by what happens to lie on the stack; so a build could also survive and be wrong, and the
  probe compares the results with those of the plain path;
- with Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K and IQ4_XS weights (so with every K-quant mix);
- from a batch of two tokens on: one token takes a path without tiles;
- never with F32, F16 or BF16 weights alone (F16 has an extra buffer too, but no tiles), nor with Q5_0.

The answer is kept in the store by CPU and by the bytes of the llama.cpp libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.machine import facts
from edgedistill.runtimes.bounds import OWN
from edgedistill.runtimes.child import logits_of, open_artifact
from edgedistill.runtimes.quantize import quantize_in_child
from edgedistill.store import Store, canonical_json, versions, write_durably

OVERRIDE = "EDGEDISTILL_LLAMA_EXTRA_BUFTS"
SCHEMA = "edgedistill.probe/1"
# Blocks of 32 (Q4_0, Q8_0) and of 256 (Q4_K_M: Q4_K and Q6_K) have kernels of their own.
PROBED = ("Q4_0", "Q8_0", "Q4_K_M")
PROBED_TOKENS = 48
# Both paths quantize the activations the same way; seen apart by 1e-3 at most. Garbage is apart by about 1.
MAX_RELATIVE_RMS = 0.05
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ExtraBufts:
    """Whether to use them, why, and the signal that the probe died with, if it did."""

    use: bool
    reason: str
    signal: str | None


def extra_bufts(store: Store) -> ExtraBufts:
    """The kept answer for this CPU and build of llama.cpp, or a probe of about two seconds.

    The environment variable EDGEDISTILL_LLAMA_EXTRA_BUFTS (0 or 1) overrides it. Raises UserError where
    llama-cpp-python is missing or the store cannot be written, RuntimeCrashed where llama.cpp does not
    even run without the buffers.
    """
    override = os.environ.get(OVERRIDE)
    if override is not None:
        if override not in ("0", "1"):
            raise UserError(f"{OVERRIDE}={override!r}", "set it to 0 or 1, or unset it")
        return ExtraBufts(use=override == "1", reason=f"set by {OVERRIDE}={override}", signal=None)
    build = llama_build(store)
    key = hashlib.sha256(canonical_json(build).encode()).hexdigest()[:16]
    path = store.root / "probes" / f"{facts.fingerprint()}-{key}.json"
    found = _read(path)
    if found is not None:
        return found
    with store.lock(f"probe-{path.stem}"):
        found = _read(path)
        if found is None:
            found = probe()
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"schema": SCHEMA, "answer": asdict(found), "build": build, "machine": facts.describe()}
            write_durably(path, json.dumps(kept, indent=1, sort_keys=True))
    return found


def llama_build(store: Store) -> dict[str, Any]:
    """What tells one build of llama.cpp from another: version, and hashes of its libraries.

    Raises UserError where llama-cpp-python is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("llama-cpp-python is not installed", "pip install 'edgedistill[llama]'")
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(spec.submodule_search_locations[0]) / "lib")
    libraries = sorted(p for pattern in ("lib*.so", "lib*.dylib") for p in folder.glob(pattern))
    return {**versions("llama-cpp-python"), "libraries": {p.name: store.hash_file(p) for p in libraries}}


def probe() -> ExtraBufts:
    """Decode a batch of each probed type with the extra buffers and without, in child processes."""
    with tempfile.TemporaryDirectory(prefix="edgedistill-probe-") as folder:
        source = Path(folder) / "f32.gguf"
        write_tiny_gguf(source)
        for quantization in PROBED:
            model = Path(folder) / f"{quantization}.gguf"
            quantize_in_child(source, model, quantization=quantization, threads=1, timeout_s=TIMEOUT_S)
            plain = _logits(model, use_extra_bufts=False)
            try:
                extra = _logits(model, use_extra_bufts=True)
            except RuntimeCrashed as crash:
                how = f"died with {crash.signal_name}" if crash.signal_name else "failed"
                reason = f"llama.cpp {how} at a batch of {quantization} in its extra buffers on this CPU: they are off"
                return ExtraBufts(use=False, reason=reason, signal=crash.signal_name or None)
            apart = relative_rms(extra, plain)
            if not apart <= MAX_RELATIVE_RMS:
                reason = (
                    f"llama.cpp's extra buffers give other results ({quantization}: {apart:.3g} apart): they are off"
                )
                return ExtraBufts(use=False, reason=reason, signal=None)
    return ExtraBufts(use=True, reason=f"probed with {', '.join(PROBED)}: they run, and agree", signal=None)


def relative_rms(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Root mean square of the difference, over that of `expected`; nan where either is not finite."""
    difference = np.sqrt(np.mean(np.square(found.astype(np.float64) - expected)))
    return float(difference / np.sqrt(np.mean(np.square(expected.astype(np.float64)))))


def _logits(model: Path, *, use_extra_bufts: bool) -> NDArray[np.float32]:
    tokens = np.random.default_rng(1).integers(0, TINY["vocabulary"], PROBED_TOKENS)
    child, room, info = open_artifact(
        "llama.cpp", model, bounds=OWN, threads=2, context_tokens=64, use_extra_bufts=use_extra_bufts,
        timeout_s=TIMEOUT_S,
    )  # fmt: skip
    try:
        return logits_of(child, tokens, info["vocab_size"])
    finally:
        child.close()
        room.close()


def _read(path: Path) -> ExtraBufts | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        answer = kept["answer"]
        if kept["schema"] == SCHEMA and isinstance(answer["use"], bool):
            return ExtraBufts(use=answer["use"], reason=str(answer["reason"]), signal=answer["signal"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no answer that can be used: probe again
    return None


TINY = {"vocabulary": 256, "width": 256, "feed_forward": 512, "heads": 4, "kv_heads": 2, "context": 64}
GGUF_UINT32, GGUF_FLOAT32, GGUF_STRING = 4, 6, 8
GGUF_ALIGNMENT = 32


def write_tiny_gguf(path: Path) -> None:
    """A Llama of one layer with seeded random F32 weights and no tokenizer.

    Written by hand (GGUF version 3), so that the probe needs nothing but numpy and llama.cpp.
    """
    width, feed_forward = TINY["width"], TINY["feed_forward"]
    kv_width = width // TINY["heads"] * TINY["kv_heads"]
    metadata: dict[str, int | float | str] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "none",
        "llama.vocab_size": TINY["vocabulary"],
        "llama.context_length": TINY["context"],
        "llama.embedding_length": width,
        "llama.block_count": 1,
        "llama.feed_forward_length": feed_forward,
        "llama.attention.head_count": TINY["heads"],
        "llama.attention.head_count_kv": TINY["kv_heads"],
        "llama.rope.dimension_count": width // TINY["heads"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (TINY["vocabulary"], width),
        "output.weight": (TINY["vocabulary"], width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (kv_width, width),
        "blk.0.attn_v.weight": (kv_width, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_gate.weight": (feed_forward, width),
        "blk.0.ffn_up.weight": (feed_forward, width),
        "blk.0.ffn_down.weight": (width, feed_forward),
    }
    random = np.random.default_rng(0)
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(metadata))
    for key, value in metadata.items():
        header += _gguf_string(key) + _gguf_value(value)
    data = b""
    for name, shape in shapes.items():
        # GGUF counts dimensions from the innermost; type 0 is F32.
        header += _gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, len(data))
        mean = 1.0 if len(shape) == 1 else 0.0
        data += (mean + 0.05 * random.standard_normal(shape)).astype("<f4").tobytes()
        data += b"\0" * (-len(data) % GGUF_ALIGNMENT)
    header += b"\0" * (-len(header) % GGUF_ALIGNMENT)
    path.write_bytes(header + data)


def _gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _gguf_value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", GGUF_STRING) + _gguf_string(value)
    if isinstance(value, int):
        return struct.pack("<II", GGUF_UINT32, value)
    return struct.pack("<If", GGUF_FLOAT32, value)
