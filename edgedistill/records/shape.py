"""The sizes that define a decoder."""

from __future__ import annotations

from math import prod
from typing import Annotated

from pydantic import Field

from edgedistill.records.base import Count, Record

# A tensor's GGUF name, and its dimensions in letters (`Shape.dimensions`), as the GGUF has them.
Tensors = Annotated[
    tuple[tuple[Annotated[str, Field(max_length=100)], Annotated[str, Field(pattern="^[VHFGQKADPNM]{1,2}$")]], ...],
    Field(max_length=64, exclude_if=lambda tensors: not tensors, json_schema_extra={"leftOutWhereEmpty": True}),
]
# A layer's tensors in Llama; Qwen2 has biases on q, k and v beside them, Qwen3 norms of q and k.
LLAMA_MATRICES = (
    ("attn_q.weight", "QH"), ("attn_k.weight", "KH"), ("attn_v.weight", "KH"), ("attn_output.weight", "HQ"),
    ("ffn_gate.weight", "FH"), ("ffn_up.weight", "FH"), ("ffn_down.weight", "HF"),
)  # fmt: skip
LLAMA_NORMS = (("attn_norm.weight", "H"), ("ffn_norm.weight", "H"))
QKV_BIASES = (("attn_q.bias", "Q"), ("attn_k.bias", "K"), ("attn_v.bias", "K"))
HEAD_NORMS = (("attn_q_norm.weight", "D"), ("attn_k_norm.weight", "D"))
FINAL_NORM = (("output_norm.weight", "H"),)
OF_HEADS = "NM"  # a row of these for each head: no matrix that anything is multiplied by


class Shape(Record):
    """The sizes that define a decoder, and which tensors it has.

    `layer_tensors` are those of a layer, `other_tensors` those outside of the layers but the embedding and the head;
    empty in the families whose tensors follow from the other fields (Llama, Qwen2, Qwen3).
    """

    family: str = "llama"
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    tie_word_embeddings: bool = True
    max_position_embeddings: Count = 2048
    attention_bias: bool = False
    qk_norm: bool = False
    layer_tensors: Tensors = ()
    other_tensors: Tensors = ()

    @property
    def parameters(self) -> int:
        """Exact number of parameters of the transformers model of this shape."""
        others = self._elements(self.other_tensors or FINAL_NORM)
        return self.embedding_parameters + self.num_hidden_layers * self.layer_parameters + others

    @property
    def embedding_parameters(self) -> int:
        """Token embedding, and the output head where it is not tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def layer_parameters(self) -> int:
        """One decoder layer: its matrices, norms, and biases where they are."""
        return self._elements(self.in_a_layer)

    @property
    def matrix_parameters(self) -> int:
        """What a layer's matrices have of them."""
        return self._elements(self.matrices)

    @property
    def in_a_layer(self) -> tuple[tuple[str, str], ...]:
        """GGUF name and dimensions of each tensor of a layer."""
        if self.layer_tensors:
            return self.layer_tensors
        biases = QKV_BIASES if self.attention_bias else ()
        return LLAMA_MATRICES + LLAMA_NORMS + biases + (HEAD_NORMS if self.qk_norm else ())

    @property
    def matrices(self) -> tuple[tuple[str, str], ...]:
        """Those of a layer's tensors that activations are multiplied by."""
        return tuple((name, dims) for name, dims in self.in_a_layer if len(dims) > 1 and dims[0] not in OF_HEADS)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two halves (SwiGLU, GeGLU), and not one (GELU)."""
        return any(dims == "GH" or name == "ffn_gate.weight" for name, dims in self.in_a_layer)

    @property
    def dimensions(self) -> dict[str, int]:
        """By letter: V vocabulary, H width, F feed-forward, G = 2 F, Q and K rows of query and key heads, A = Q + 2 K,
        D a head, N query heads, M key heads, P positions."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "V": self.vocab_size, "H": self.hidden_size, "F": self.intermediate_size, "G": 2 * self.intermediate_size,
            "Q": query, "K": key, "A": query + 2 * key, "D": self.head_dim, "N": self.num_attention_heads,
            "M": self.num_key_value_heads, "P": self.max_position_embeddings,
        }  # fmt: skip

    def _elements(self, tensors: tuple[tuple[str, str], ...]) -> int:
        sizes = self.dimensions
        return sum(prod([sizes[letter] for letter in dims]) for _, dims in tensors)
