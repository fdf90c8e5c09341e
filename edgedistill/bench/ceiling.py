"""The decode ceiling: no runtime makes tokens faster than memory can deliver the bytes that one needs.

tokens/s ≤ bandwidth ÷ bytes read a token, where those are the weights, read once a token, and the KV
cache. An embedding table that only looks rows up (not tied to the output head) is not read as a whole:
one row counts. Activations and the tokens' own new cache rows are left out, so it stays a ceiling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgedistill.errors import UserError
from edgedistill.records.figures import Figure

GGUF_EMBEDDING = "token_embd.weight"
FOLDER_EMBEDDING = "model.embed_tokens.weight"
GGUF_HEAD = "output.weight"
KV_CACHE_BYTES = 2  # llama.cpp's default cache is F16
BFLOAT16_BYTES = 2  # transformers' cache has the model's type
ONNX_LOOKUPS = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class BytesRead:
    """What one decoded token reads at `context_tokens`. `left_out`: weights that are not read, and why."""

    weights: int
    kv_cache: int
    left_out: str

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache


def ceiling(bandwidth: Figure, read: BytesRead, *, context_tokens: int) -> Figure:
    """Decode tokens/s ≤ `bandwidth` (bytes/s) ÷ bytes read a token, as a derived figure."""
    left_out = f" ({read.left_out})" if read.left_out else ""
    source = (
        f"bandwidth {bandwidth.value:.4g} {bandwidth.unit} ({bandwidth.basis}: {bandwidth.source}) ÷ "
        f"{read.total:,} bytes a token: weights {read.weights:,}{left_out}, "
        f"KV cache {read.kv_cache:,} at {context_tokens} tokens"
    )
    return Figure(value=bandwidth.value / read.total, unit="tokens/s", basis="derived", source=source)


class Described(Protocol):
    """What of an artifact it takes to find its weights."""

    @property
    def format(self) -> str: ...

    @property
    def entry(self) -> str: ...


def bytes_read_a_token(artifact: Described, folder: Path, *, context_tokens: int) -> BytesRead:
    """Read from the artifact's own files, by headers; an ONNX graph takes its package. UserError where they lack it."""
    if artifact.format == "gguf":
        return _gguf(folder / artifact.entry, context_tokens)
    if artifact.format == "bitsandbytes":
        return _bitsandbytes(folder / artifact.entry, context_tokens)
    entry = folder / artifact.entry
    return _onnx(entry / "model.onnx" if entry.is_dir() else entry, context_tokens)


def _gguf(path: Path, context_tokens: int) -> BytesRead:
    """Of all files of a split one."""
    from edgedistill.guards.gguf import check_ggufs

    weights: dict[str, int] = {}
    rows: dict[str, int] = {}
    parts = check_ggufs(path)
    head = parts[0]
    for part in parts:
        weights |= part.tensors
        rows |= {name: dims[1] for name, (_, dims) in part.kinds.items() if len(dims) > 1}
    total = sum(weights.values())
    left_out = ""
    if GGUF_HEAD in weights and GGUF_EMBEDDING in weights:
        total -= weights[GGUF_EMBEDDING] - weights[GGUF_EMBEDDING] // rows[GGUF_EMBEDDING]
        left_out = f"without {GGUF_EMBEDDING}, of which one row is read"
    width = sum(
        count
        for name, count in rows.items()
        if name.endswith(("attn_k.weight", "attn_v.weight")) and name.startswith("blk.")
    )
    values = head.values
    kind = values.get("general.architecture")
    if any(name.endswith("attn_qkv.weight") for name in rows):
        heads, size = (int(values.get(f"{kind}.attention.{key}", 0)) for key in ("head_count_kv", "key_length"))
        width = 2 * int(values.get(f"{kind}.block_count", 0)) * heads * size
    # where some layers slide, all are counted as if they did: a ceiling may be too high, not too low
    tokens = min(context_tokens, int(values.get(f"{kind}.attention.sliding_window", context_tokens)))
    return BytesRead(weights=total, kv_cache=width * tokens * KV_CACHE_BYTES, left_out=left_out)


def _bitsandbytes(folder: Path, context_tokens: int) -> BytesRead:
    from edgedistill.models.safetensors_header import read_safetensors_header
    from edgedistill.models.shapes import shape_from_config
    from edgedistill.strict import read_json

    config = read_json(folder / "config.json", what="config.json")
    config.pop("quantization_config", None)  # what makes it an artifact and no model to be exported again
    shape = shape_from_config(config, where=str(folder))
    total, left_out = 0, ""
    for path in sorted(folder.glob("*.safetensors")):
        names = read_safetensors_header(path).tensors
        total += path.stat().st_size
        if FOLDER_EMBEDDING in names and not shape.tie_word_embeddings:
            total -= (shape.vocab_size - 1) * shape.hidden_size * BFLOAT16_BYTES
            left_out = f"without {FOLDER_EMBEDDING}, of which one row is read"
    width = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return BytesRead(weights=total, kv_cache=width * context_tokens * BFLOAT16_BYTES, left_out=left_out)


def _onnx(path: Path, context_tokens: int) -> BytesRead:
    import onnx

    from edgedistill.runtimes.ort import genai_config

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    # protobuf's DecodeError shares no base with OSError.
    except Exception as error:
        raise UserError(f"{path} cannot be read as ONNX: {error}", "export the artifact again") from error
    sizes = {
        tensor.name: _tensor_bytes(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize, list(tensor.dims))
        for tensor in graph.initializer
    }
    dims = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    looked_up = {node.input[0] for node in graph.node if node.op_type in ONNX_LOOKUPS}
    read_whole = {name for node in graph.node for name in node.input if node.op_type not in ONNX_LOOKUPS}
    tables = {name for name in (looked_up - read_whole) & set(sizes) if len(dims[name]) >= 2}
    total = sum(sizes.values()) - sum(sizes[name] - sizes[name] // dims[name][0] for name in tables)
    decoder = genai_config(path.parent).get("model", {}).get("decoder", {})
    cache = 0
    for node in graph.input:
        if node.name.startswith("past_key_values"):
            kind = node.type.tensor_type
            shape = [dim.dim_value for dim in kind.shape.dim]
            heads = shape[1] or int(decoder.get("num_key_value_heads", 0))
            width = shape[3] or int(decoder.get("head_size", 0))
            cache += heads * width * context_tokens * onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    left_out = f"without {', '.join(sorted(tables))}, of which one row is read" if tables else ""
    return BytesRead(weights=total, kv_cache=cache, left_out=left_out)


def _tensor_bytes(itemsize: int, dims: list[int]) -> int:
    return math.prod(dims) * itemsize
