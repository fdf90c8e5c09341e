"""Bytes of artifacts and of the KV cache, computed from a Shape. Everything here is `derived`.

GGUF follows llama.cpp's own choice of a type a tensor (quantization/mixes.py), with an importance matrix where
exports use one by themselves; tests/fit/test_sizes.py holds it to files that llama.cpp quantized.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from edgedistill.quantization.mixes import (
    BASE_TYPES,
    GGML_BLOCKS,
    chosen_overrides,
    quantizable,
    types_of,
    usable_type,
    uses_importance,
)
from edgedistill.records.shape import FINAL_NORM, Shape

# Names, dimensions and offsets in the header; the tokenizer's pieces, types, scores or merges.
GGUF_BYTES_A_TENSOR = 72
GGUF_BYTES_A_TOKEN = 40
GGUF_ALIGNMENT = 32
K_QUANT_COLUMNS = 256
# bytes a weight of a MatMulNBits of 32-weight blocks: the weights, and a float32 scale a block
ONNX_MATMUL_BYTES = {"INT4": 0.5 + 4 / 32, "INT8": 1 + 4 / 32, "FP32": 4.0}
# The graph's float type: norms, rotary caches, the KV cache, and a token embedding that is a plain Gather.
ONNX_FLOAT_BYTES = {"INT4": 4, "INT8": 4, "FP32": 4}
# Where embedding and head are tied, the builder's INT4 reads both from one quantized table.
ONNX_SHARED_TABLE = ("INT4",)
ONNX_BYTES_A_LAYER = 8_000
GGUF_KV_BYTES = 2
# bitsandbytes: bytes a weight of a linear layer but the head: NF4 with a float32 scale of 64 weights, INT8 of a row.
BITSANDBYTES_BYTES = {"INT8": 1.0, "NF4": 0.5 + 4 / 64}
BITSANDBYTES_ROW_BYTES = {"INT8": 4, "NF4": 0}
# All else, the KV cache too, is bfloat16.
BFLOAT16_BYTES = 2
# A tensor's entry in the safetensors header; of a layer in NF4 also its table and the JSON of its state.
SAFETENSORS_BYTES_A_TENSOR = 130
BITSANDBYTES_BYTES_A_MATRIX = {"INT8": 260, "NF4": 780}
TOKENIZER_BYTES_A_TOKEN = 65
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


TensorTypes = Sequence[tuple[str, str]]


def gguf_tensors(
    shape: Shape, quantization: str, *, importance: bool | None = None, tensor_types: TensorTypes = ()
) -> Iterator[Tensor]:
    """Every tensor of the GGUF of this shape with the type that llama.cpp gives it.

    `importance`: whether an importance matrix is used; None: as `export.importance_matrix: auto` does.
    `tensor_types`: (regular expression, type) as `export.tensor_types` has it; UserError for one that cannot be.
    """
    sizes, matrices, vectors = shape.dimensions, {"token_embd": (shape.vocab_size, shape.hidden_size)}, {}
    if not shape.tie_word_embeddings:
        matrices["output"] = (shape.vocab_size, shape.hidden_size)
    layers = ((f"blk.{i}.{name}", dims) for i in range(shape.num_hidden_layers) for name, dims in shape.in_a_layer)
    for name, dims in (*(shape.other_tensors or FINAL_NORM), *layers):
        rows, columns = (1, *(sizes[letter] for letter in dims))[-2:]
        if quantizable(name, len(dims)):
            matrices[name.removesuffix(".weight")] = rows, columns
        else:
            vectors[name.removesuffix(".weight")] = rows * columns
    widths = {f"{name}.weight": columns for name, (_, columns) in matrices.items()}
    types = types_of(
        widths,
        quantization,
        layers=shape.num_hidden_layers,
        heads_a_key=shape.num_attention_heads // shape.num_key_value_heads,
        importance=uses_importance(quantization) if importance is None else importance,
    )
    for name, type_ in chosen_overrides(widths, tensor_types).items():
        types[name] = usable_type(type_, widths[name])
    for name, (rows, columns) in matrices.items():
        yield Tensor(name, rows, columns, types[f"{name}.weight"])
    for name, width in vectors.items():
        yield Tensor(name, 1, width, "F32")


def k_quant_fallbacks(shape: Shape, quantization: str) -> int:
    """How many matrices cannot have the mix's 256-wide blocks, because a width is no multiple of 256."""
    if GGML_BLOCKS[BASE_TYPES[quantization]][0] != K_QUANT_COLUMNS:
        return 0
    matrices = [tensor for tensor in gguf_tensors(shape, quantization) if tensor.rows > 1]
    return sum(GGML_BLOCKS[tensor.type][0] != K_QUANT_COLUMNS for tensor in matrices)


def artifact_bytes(
    shape: Shape, format_: str, quantization: str, *, importance: bool | None = None, tensor_types: TensorTypes = ()
) -> int:
    """Bytes of the artifact's files, tokenizer included. The rest: as `gguf_tensors` has it."""
    if format_ == "gguf":
        tensors = list(gguf_tensors(shape, quantization, importance=importance, tensor_types=tensor_types))
        weights = sum(-(-t.bytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT for t in tensors)
        return weights + len(tensors) * GGUF_BYTES_A_TENSOR + shape.vocab_size * GGUF_BYTES_A_TOKEN
    if format_ == "bitsandbytes":
        return _bitsandbytes_bytes(shape, quantization, embedding=True) + shape.vocab_size * TOKENIZER_BYTES_A_TOKEN
    table = shape.vocab_size * shape.hidden_size
    shared = shape.tie_word_embeddings and quantization in ONNX_SHARED_TABLE
    matmul = (_matmul_weights(shape) + table) * ONNX_MATMUL_BYTES[quantization]
    vectors = shape.parameters - shape.embedding_parameters - _matmul_weights(shape)
    rotary = shape.max_position_embeddings * shape.head_dim
    floats = (vectors + rotary + (0 if shared else table)) * ONNX_FLOAT_BYTES[quantization]
    graph = shape.num_hidden_layers * ONNX_BYTES_A_LAYER + shape.vocab_size * TOKENIZER_BYTES_A_TOKEN
    return int(matmul) + floats + graph


def read_bytes_a_token(
    shape: Shape, format_: str, quantization: str, *, importance: bool | None = None, tensor_types: TensorTypes = ()
) -> int:
    """Weight bytes that decoding one token must read: every layer and the head, of the embedding one row."""
    if format_ == "gguf":
        untied = not shape.tie_word_embeddings
        tensors = gguf_tensors(shape, quantization, importance=importance, tensor_types=tensor_types)
        return sum(t.bytes for t in tensors if not (untied and t.name == "token_embd"))
    if format_ == "bitsandbytes":
        return _bitsandbytes_bytes(shape, quantization, embedding=shape.tie_word_embeddings)
    head = shape.vocab_size * shape.hidden_size
    return int((_matmul_weights(shape) + head) * ONNX_MATMUL_BYTES[quantization])


def kv_cache_bytes(shape: Shape, context_tokens: int, format_: str, quantization: str) -> int:
    """Keys and values of so many tokens: F16 in llama.cpp, the graph's float type in ONNX, else bfloat16."""
    element = {"gguf": GGUF_KV_BYTES, "bitsandbytes": BFLOAT16_BYTES}.get(format_) or ONNX_FLOAT_BYTES[quantization]
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * context_tokens * element


def compute_buffer_bytes(shape: Shape, context_tokens: int) -> int:
    """The runtime's scratch for a prompt batch: float32 logits, and the widest activations."""
    batch = min(LLAMA_UBATCH, context_tokens)
    return batch * 4 * (shape.vocab_size + 2 * shape.intermediate_size + 4 * shape.hidden_size)


def predicted(format_: str, quantization: str) -> bool:
    """Whether the sizes of such an artifact of a decoder are known here."""
    known: dict[str, Container[str]] = {
        "gguf": BASE_TYPES,
        "onnx": ONNX_MATMUL_BYTES,
        "bitsandbytes": BITSANDBYTES_BYTES,
    }
    return quantization in known.get(format_, ())


def _bitsandbytes_bytes(shape: Shape, quantization: str, *, embedding: bool) -> int:
    """Linear layers but the head quantized, all else bfloat16; `embedding` False: without an untied embedding."""
    matmul = _matmul_weights(shape)
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    rows = shape.num_hidden_layers * (query + 2 * key_value + 2 * shape.hidden_size + 2 * shape.intermediate_size)
    floats = shape.parameters - matmul - (0 if embedding else shape.vocab_size * shape.hidden_size)
    matrices = 7 * shape.num_hidden_layers
    return (
        int(matmul * BITSANDBYTES_BYTES[quantization])
        + rows * BITSANDBYTES_ROW_BYTES[quantization]
        + floats * BFLOAT16_BYTES
        + matrices * BITSANDBYTES_BYTES_A_MATRIX[quantization]
        + (matrices + 2 * shape.num_hidden_layers + 2) * SAFETENSORS_BYTES_A_TENSOR
    )


def _matmul_weights(shape: Shape) -> int:
    return shape.num_hidden_layers * shape.matrix_parameters
