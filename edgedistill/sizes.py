"""Bytes of artifacts and of the KV cache, computed from a Shape. Everything here is `derived`.

GGUF follows llama.cpp's own choice of a type a tensor (src/llama-quant.cpp, without an importance matrix);
tests/test_sizes.py holds it to files that llama.cpp quantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from edgedistill.records import Shape

# type -> (weights a block, bytes a block), as in ggml
GGML_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_0": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
}
# What llama.cpp takes where a row is not a multiple of 256.
K_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BASE_TYPE = {"Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K"}
UNQUANTIZED = ("F32", "F16", "BF16")
# Names, dimensions and offsets in the header; the tokenizer's pieces, types, scores or merges.
GGUF_BYTES_A_TENSOR = 72
GGUF_BYTES_A_TOKEN = 40
GGUF_ALIGNMENT = 32
# bytes a weight of a MatMulNBits of 32-weight blocks: the weights, and a float32 scale a block
ONNX_MATMUL_BYTES = {"INT4": 0.5 + 4 / 32, "INT8": 1 + 4 / 32, "FP32": 4.0}
# The graph's float type: norms, rotary caches, the KV cache, and a token embedding that is a plain Gather.
ONNX_FLOAT_BYTES = {"INT4": 4, "INT8": 4, "FP32": 4}
# Where embedding and head are tied, the builder's INT4 reads both from one quantized table.
ONNX_SHARED_TABLE = ("INT4",)
ONNX_BYTES_A_LAYER = 8_000
ONNX_BYTES_A_TOKEN = 65
GGUF_KV_BYTES = 2
# llama.cpp's prompt batch: its compute buffer holds the logits of so many tokens in float32.
LLAMA_UBATCH = 512


class Tensor(NamedTuple):
    """A tensor of an artifact: `columns` is its contiguous row length."""

    name: str
    rows: int
    columns: int
    type: str

    @property
    def bytes(self) -> int:
        weights, size = GGML_BLOCKS[self.type]
        return self.rows * self.columns // weights * size


def gguf_tensors(shape: Shape, quantization: str) -> Iterator[Tensor]:
    """Every tensor of the GGUF of this shape with the type that llama.cpp gives it."""
    base = BASE_TYPE.get(quantization, quantization)
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size

    def matrix(name: str, rows: int, columns: int, wanted: str) -> Tensor:
        return Tensor(name, rows, columns, wanted if quantization in UNQUANTIZED else usable_type(wanted, columns))

    def vector(name: str, size: int) -> Tensor:
        return Tensor(name, 1, size, "F32")

    head = "Q6_K" if hidden % GGML_BLOCKS[base][0] == 0 else "Q8_0"
    head = base if quantization in (*UNQUANTIZED, "Q8_0") else head
    yield matrix("token_embd", shape.vocab_size, hidden, head if shape.tie_word_embeddings else base)
    if not shape.tie_word_embeddings:
        yield matrix("output", shape.vocab_size, hidden, head)
    yield vector("output_norm", hidden)
    layers = shape.num_hidden_layers
    for i in range(layers):
        more = _more_bits(i, layers)
        value = down = base
        if quantization in ("Q4_K_M", "Q5_K_M") and more:
            value = down = "Q6_K"
        if quantization == "Q4_K_S":
            value = "Q5_K" if i < 4 else base
            down = "Q5_K" if i < layers // 8 else base
        yield vector(f"blk.{i}.attn_norm", hidden)
        yield vector(f"blk.{i}.ffn_norm", hidden)
        yield matrix(f"blk.{i}.attn_q", query, hidden, base)
        yield matrix(f"blk.{i}.attn_k", key_value, hidden, base)
        yield matrix(f"blk.{i}.attn_v", key_value, hidden, value)
        yield matrix(f"blk.{i}.attn_output", hidden, query, base)
        yield matrix(f"blk.{i}.ffn_gate", inner, hidden, base)
        yield matrix(f"blk.{i}.ffn_up", inner, hidden, base)
        yield matrix(f"blk.{i}.ffn_down", hidden, inner, down)
        if shape.attention_bias:
            yield vector(f"blk.{i}.attn_q.bias", query)
            yield vector(f"blk.{i}.attn_k.bias", key_value)
            yield vector(f"blk.{i}.attn_v.bias", key_value)
        if shape.qk_norm:
            yield vector(f"blk.{i}.attn_q_norm", shape.head_dim)
            yield vector(f"blk.{i}.attn_k_norm", shape.head_dim)


def usable_type(wanted: str, columns: int) -> str:
    """The type asked for, or the one that fits rows of this length: K-quants need 256, the others 32, F16 none."""
    if columns % GGML_BLOCKS[wanted][0] and wanted in K_FALLBACK:
        wanted = K_FALLBACK[wanted]
    return "F16" if columns % GGML_BLOCKS[wanted][0] else wanted


def k_quant_fallbacks(shape: Shape, quantization: str) -> int:
    """How many matrices cannot have the K-quant that was asked for, because a width is no multiple of 256."""
    if quantization not in BASE_TYPE and quantization != "Q6_K":
        return 0
    return sum(tensor.rows > 1 and not tensor.type.endswith("_K") for tensor in gguf_tensors(shape, quantization))


def artifact_bytes(shape: Shape, format_: str, quantization: str) -> int:
    """Bytes of the artifact's files, tokenizer included."""
    if format_ == "gguf":
        tensors = list(gguf_tensors(shape, quantization))
        weights = sum(-(-t.bytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT for t in tensors)
        return weights + len(tensors) * GGUF_BYTES_A_TENSOR + shape.vocab_size * GGUF_BYTES_A_TOKEN
    table = shape.vocab_size * shape.hidden_size
    shared = shape.tie_word_embeddings and quantization in ONNX_SHARED_TABLE
    matmul = (_matmul_weights(shape) + table) * ONNX_MATMUL_BYTES[quantization]
    vectors = shape.parameters - shape.embedding_parameters - _matmul_weights(shape)
    rotary = shape.max_position_embeddings * shape.head_dim
    floats = (vectors + rotary + (0 if shared else table)) * ONNX_FLOAT_BYTES[quantization]
    graph = shape.num_hidden_layers * ONNX_BYTES_A_LAYER + shape.vocab_size * ONNX_BYTES_A_TOKEN
    return int(matmul) + floats + graph


def read_bytes_a_token(shape: Shape, format_: str, quantization: str) -> int:
    """Weight bytes that decoding one token must read: every layer and the head, of the embedding one row."""
    if format_ == "gguf":
        untied = not shape.tie_word_embeddings
        return sum(t.bytes for t in gguf_tensors(shape, quantization) if not (untied and t.name == "token_embd"))
    head = shape.vocab_size * shape.hidden_size
    return int((_matmul_weights(shape) + head) * ONNX_MATMUL_BYTES[quantization])


def kv_cache_bytes(shape: Shape, context_tokens: int, format_: str, quantization: str) -> int:
    """Keys and values of so many tokens: F16 in llama.cpp, the graph's float type in ONNX."""
    element = GGUF_KV_BYTES if format_ == "gguf" else ONNX_FLOAT_BYTES[quantization]
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * context_tokens * element


def compute_buffer_bytes(shape: Shape, context_tokens: int) -> int:
    """The runtime's scratch for a prompt batch: float32 logits, and the widest activations."""
    batch = min(LLAMA_UBATCH, context_tokens)
    return batch * 4 * (shape.vocab_size + 2 * shape.intermediate_size + 4 * shape.hidden_size)


def _matmul_weights(shape: Shape) -> int:
    query = shape.num_attention_heads * shape.head_dim
    key_value = shape.num_key_value_heads * shape.head_dim
    layer = 2 * shape.hidden_size * (query + key_value) + 3 * shape.hidden_size * shape.intermediate_size
    return shape.num_hidden_layers * layer


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
