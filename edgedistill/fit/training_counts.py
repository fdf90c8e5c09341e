"""What the tensors of training count, from a shape: weights, adapters, what autograd keeps, a chunk of logits.

Legend: N tokens of a micro-batch, H width, V vocabulary rows, F feed-forward width, Q and K widths of all query and of
all key heads.
"""

from __future__ import annotations

from edgedistill.config.recipe import Lora
from edgedistill.fit.chunks import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES, CUDA_CHUNK_TOKENS, FEWEST_CHUNK_TOKENS
from edgedistill.records.shape import Shape

# Bytes a weight, with bitsandbytes' scales: NF4 half a byte, and a byte and more a block of 64.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.516}
NOT_FUSED = ("gemma2",)  # its attention's scores pass through a tanh, which torch's fused attention has not


def matrix_parameters(shape: Shape) -> int:
    """Weights of the layers' matrices."""
    return shape.num_hidden_layers * shape.matrix_parameters


def adapted_sizes(shape: Shape, lora: Lora) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's linear layers that have an adapter."""
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes = {
        "q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    return [size for name, size in sizes.items() if not lora.targets or name in lora.targets]


def adapter_parameters(shape: Shape, lora: Lora) -> int:
    """Weights of the adapters: r · (in + out) a linear layer that has one."""
    return shape.num_hidden_layers * lora.rank * sum(sum(size) for size in adapted_sizes(shape, lora))


def teacher_bytes(shape: Shape, precision: str) -> float:
    """Weights while it teaches: bitsandbytes quantizes the layers' matrices and leaves the rest in bf16."""
    matrices = matrix_parameters(shape)
    rest = shape.parameters - matrices
    return WEIGHT_BYTES[precision] * matrices + max(2.0, WEIGHT_BYTES[precision]) * rest


def kept_bytes(shape: Shape, *, context: int, low: bool, documents: bool, adapters: int = 0) -> float:
    """Bytes a token that autograd keeps of one layer of transformers' Llama, Qwen2 or Qwen3 (fused attention).

    fp32: of each norm its input, what was normalised and its output; q, k, v, attention's output; gate, its SiLU, up,
    their product. bf16: norms stay fp32, and each linear layer keeps a bf16 copy of its input of its own. With a mask
    (documents) keys and values are repeated to all heads, and each layer keeps the mask as numbers. With adapters of
    that rank the norms are frozen and keep only their input, and each adapter keeps its rank.

    Other families are counted alike, by how many norms they have and whether the feed-forward is gated; where attention
    is not fused, the tanh of its scores and their softmax come to it.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    element = 2 if low else 4
    over_width = sum(name.endswith("_norm.weight") and dims == "H" for name, dims in shape.in_a_layer)
    norms = (8.0 * hidden + (5.0 if low else 4.0) * hidden) * over_width
    if adapters:
        norms -= 4.0 * hidden * over_width
    attention = element * (2.0 * query + 2.0 * (query if documents else key)) + (element * context if documents else 0)
    heads = 4.0 * shape.num_attention_heads + 8
    if shape.family in NOT_FUSED:
        heads += 8.0 * shape.num_attention_heads * context
    if shape.qk_norm:
        heads += (6.0 if low else 8.0) * (query + key) + 4.0 * (shape.num_attention_heads + shape.num_key_value_heads)
    return norms + attention + (4.0 if shape.gated else 5.0) * element * inner + heads + 7.0 * element * adapters


def forward_bytes(shape: Shape, tokens: int, low: bool) -> float:
    """What lives at once in a forward pass without gradients: the residual stream and the widest part of a layer."""
    element = 2 if low else 4
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    feed_forward = element * (3.0 * shape.intermediate_size + (shape.hidden_size if low else 0))
    attention = 4.0 * (2.0 * query + key) + element * (query + 2.0 * key)
    weights = 2.0 * shape.hidden_size * shape.intermediate_size if low else 0.0
    return tokens * (8.0 * shape.hidden_size + max(feed_forward, attention)) + weights


def chunk_rows(tokens: int, vocab: int, *, teachers: int, low: bool, device: str) -> int:
    """Tokens of a chunk of logits, as `losses._chunk_rows` (a GPU's free memory taken to suffice)."""
    per_row = vocab * (2 if low else 4) * (1 + teachers)
    if device == "cuda":
        fitting = CUDA_CHUNK_BYTES * 2 // (per_row + 16 * vocab)
        return max(1, min(max(CUDA_CHUNK_TOKENS, tokens // 8), fitting))
    rows = max(1, min(CPU_CHUNK_BYTES // per_row, max(FEWEST_CHUNK_TOKENS, -(-tokens // 4))))
    return min(rows, tokens)
