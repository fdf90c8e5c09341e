"""An ONNX decoder's stored weights as float32 under transformers' names: what the torch model must hold to equal it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.shapes import shape_from_config
from edgedistill.onnx.graph import COMPUTED, EMBEDDING, attribute, load_graph, read_initializer
from edgedistill.records.shape import Shape

HEAD = "lm_head"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# The builder's names of what sits in a layer → transformers'.
IN_A_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "attn.q_norm.layernorm": "self_attn.q_norm",
    "attn.k_norm.layernorm": "self_attn.k_norm",
}
PART_END = re.compile(r"\.(MatMul\.weight.*|MatMulNBits\..*|Add\.bias|weight|bias)$")
FINAL_NORM = "final_norm_layernorm"
PACKED = "attn.qkv_proj"


def dequantized(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(transformers name, float32 values in torch's [out, in] layout), one matrix at a time; see `stored`."""
    return ((name, values) for name, _, values in stored(folder, config))


def stored(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """(transformers name, type: INT4, INT8, FP32 or FP16, float32 values in torch's layout), one matrix at a time.

    `config`: the checkpoint's parsed config.json. For a tied model `lm_head.weight` comes only where the file
    stores it differently from the embedding (INT8): then the torch model must be untied to equal the artifact.
    Raises UserError for a graph of another make.
    """
    shape = shape_from_config(config, where="config.json")
    graph = load_graph(folder).graph
    initializers = {t.name: t for t in graph.initializer}
    used: set[str] = set()
    has_embedding = EMBEDDING in initializers
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            parts = [read_initializer(initializers[name], folder) for name in node.input[1:4] if name]
            used.update(name for name in node.input[1:4] if name)
            values = unpack(
                parts[0],
                parts[1],
                parts[2] if len(parts) > 2 else None,
                columns=attribute(node, "K"),
                bits=attribute(node, "bits"),
                block_size=attribute(node, "block_size"),
            )
            kind = f"INT{attribute(node, 'bits')}"
            for named, part in _named(node.input[1], values, shape, has_embedding=has_embedding):
                yield named, kind, part
    for name, tensor in initializers.items():
        if name in used or name.startswith(COMPUTED) or not _is_weight(name):
            continue
        kept = read_initializer(tensor, folder)
        values = kept.astype(np.float32)
        # The builder stores float matrices as MatMul takes them, [in, out].
        values = values.T if ".MatMul.weight" in name else values
        for named, part in _named(name, np.ascontiguousarray(values), shape, has_embedding=has_embedding):
            yield named, f"FP{8 * kept.dtype.itemsize}", part


def unpack(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zero_points: NDArray[Any] | None,
    *,
    columns: int,
    bits: int,
    block_size: int,
) -> NDArray[np.float32]:
    """MatMulNBits' B [rows, blocks, block_size * bits / 8] as float32 [rows, columns].

    (q − zero point) · scale per block of a row; without zero points 2^(bits − 1). INT4 is packed low half
    first; rows are padded to whole blocks (com.microsoft MatMulNBits, onnxruntime's ContribOperators.md).
    """
    rows, blocks = packed.shape[0], packed.shape[1]
    if bits not in (4, 8):
        raise UserError(f"MatMulNBits of {bits} bits", "exports of INT4 and INT8 can be dequantized")
    whole = _nibbles(packed) if bits == 4 else packed
    values: NDArray[np.float32] = whole.reshape(rows, blocks, block_size).astype(np.float32)
    zero: NDArray[np.float32] = np.full((rows, blocks, 1), 1 << (bits - 1), dtype=np.float32)
    if zero_points is not None:
        packed_zeros = bits == 4 and zero_points.dtype == np.uint8
        plain = _nibbles(zero_points.reshape(rows, -1))[:, :blocks] if packed_zeros else zero_points
        zero = plain.reshape(rows, blocks, 1).astype(np.float32)
    values = (values - zero) * scales.reshape(rows, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(values.reshape(rows, blocks * block_size)[:, :columns])


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., n] bytes → [..., 2n] values of 4 bits, the low half of a byte first."""
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def modules_of(initializer: str) -> tuple[str, ...]:
    """The torch modules that a weight of the graph, or its scales, came from: q, k and v where they are packed."""
    if initializer == EMBEDDING:
        return (EMBEDDING.removesuffix(".weight"),)
    if initializer.startswith(HEAD):
        return (HEAD,)
    match = LAYER.fullmatch(initializer)
    if match is None:
        return ()
    layer, rest = match.groups()
    if rest.startswith(FINAL_NORM):
        return ("model.norm",)
    part = PART_END.sub("", rest)
    if part == PACKED:
        return tuple(f"model.layers.{layer}.self_attn.{letter}_proj" for letter in "qkv")
    return (f"model.layers.{layer}.{IN_A_LAYER[part]}",) if part in IN_A_LAYER else ()


def _is_weight(name: str) -> bool:
    return name == EMBEDDING or name.startswith(HEAD) or LAYER.fullmatch(name) is not None


def _named(
    initializer: str, values: NDArray[np.float32], shape: Shape, *, has_embedding: bool
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    if initializer == EMBEDDING:
        yield EMBEDDING, values
        return
    if initializer.startswith(HEAD):
        # Without an embedding of its own the graph looks tokens up in the head's matrix.
        yield ("lm_head.weight" if has_embedding else EMBEDDING), values
        return
    match = LAYER.fullmatch(initializer)
    if match is None:
        raise UserError(f"unexpected weight {initializer}", "dequantize what this version of edgedistill exported")
    layer, rest = match.groups()
    if rest.startswith(FINAL_NORM):
        yield "model.norm.weight", values
        return
    kind = "bias" if rest.endswith(".bias") else "weight"
    part = PART_END.sub("", rest)
    prefix = f"model.layers.{layer}"
    if part == PACKED:
        q_rows = shape.num_attention_heads * shape.head_dim
        kv_rows = shape.num_key_value_heads * shape.head_dim
        pieces = np.split(values, [q_rows, q_rows + kv_rows])
        for letter, piece in zip("qkv", pieces, strict=True):
            yield f"{prefix}.self_attn.{letter}_proj.{kind}", piece
        return
    if part not in IN_A_LAYER:
        raise UserError(f"unexpected weight {initializer}", "dequantize what this version of edgedistill exported")
    yield f"{prefix}.{IN_A_LAYER[part]}.{kind}", values
