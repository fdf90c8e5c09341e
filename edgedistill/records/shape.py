"""The sizes that define a decoder."""

from __future__ import annotations

from edgedistill.records.base import Count, Record


class Shape(Record):
    """The sizes that define a decoder (Llama, Qwen2, Qwen3 families)."""

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

    @property
    def parameters(self) -> int:
        """Exact number of parameters of the transformers model of this shape."""
        return self.embedding_parameters + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Token embedding, and the output head where it is not tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def layer_parameters(self) -> int:
        """One decoder layer: q, k, v, o, gate, up, down, two norms, biases and q/k norms where they are."""
        q_width = self.num_attention_heads * self.head_dim
        kv_width = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * q_width + 2 * self.hidden_size * kv_width
        bias = q_width + 2 * kv_width if self.attention_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return attention + bias + 3 * self.hidden_size * self.intermediate_size + norms
