"""The families that have a converter: tensor names and shapes, and the metadata that llama.cpp wants.

Adding a family is a line in `ARCHITECTURES` (and its tensors in `tensor_map` where it has others).
Names on the left are transformers', names on the right GGUF's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError, did_you_mean
from edgedistill.records import Shape
from edgedistill.shapes import shape_from_config

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6
# llama.cpp's own constants of YaRN; a model that was trained with others would be run wrongly.
YARN_BETA_FAST = 32.0
YARN_BETA_SLOW = 1.0

MetadataValue = int | float | str | bool


@dataclass(frozen=True)
class Architecture:
    """A family: llama.cpp's name for it, and whether its q and k are stored with rotary pairs interleaved."""

    gguf: str
    interleaved_rope: bool
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint: its GGUF name and shape (row-major, as stored by torch).

    `rope_heads`: the number of heads whose rows are permuted for llama.cpp; 0 where none are.
    """

    gguf_name: str
    shape: tuple[int, ...]
    rope_heads: int = 0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as llama.cpp has it: metadata keys (after `<arch>.rope.`) and per-pair factors.

    `frequency_factors` [head_dim / 2]: what each frequency is divided by (Llama 3), or None.
    """

    metadata: dict[str, MetadataValue]
    frequency_factors: NDArray[np.float32] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(gguf="llama", interleaved_rope=True),
    "MistralForCausalLM": Architecture(gguf="llama", interleaved_rope=True),
    "Qwen2ForCausalLM": Architecture(gguf="qwen2", interleaved_rope=False, qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(gguf="qwen3", interleaved_rope=False, qk_norm=True),
}
GGUF_FAMILIES: dict[str, Architecture] = {a.gguf: a for a in ARCHITECTURES.values()}

IN_A_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def architecture_of(config: Mapping[str, Any], *, where: str) -> Architecture:
    """The table's entry for a parsed config.json; UserError with what works where there is none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UserError(
            f"{where}: 'architectures' is {names!r}", f"name the model class there, one of {', '.join(ARCHITECTURES)}"
        )
    found = ARCHITECTURES.get(names[0])
    if found is None:
        raise UserError(
            f"{where}: no GGUF converter for architecture '{names[0]}'",
            f"{did_you_mean(names[0], ARCHITECTURES)} (works: {', '.join(ARCHITECTURES)})",
        )
    if shape_from_config(config, where=where).family != found.gguf:
        raise UserError(
            f"{where}: architecture '{names[0]}' does not go with model_type {config.get('model_type')!r}",
            "mend config.json; both name the same family",
        )
    return found


def tensor_map(shape: Shape, architecture: Architecture) -> dict[str, TensorSpec]:
    """transformers name → TensorSpec, in the order in which the GGUF holds them."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q_rows = shape.num_attention_heads * shape.head_dim
    kv_rows = shape.num_key_value_heads * shape.head_dim
    q_heads = shape.num_attention_heads if architecture.interleaved_rope else 0
    kv_heads = shape.num_key_value_heads if architecture.interleaved_rope else 0
    in_a_layer: dict[str, tuple[tuple[int, ...], int]] = {
        "input_layernorm.weight": ((hidden,), 0),
        "self_attn.q_proj.weight": ((q_rows, hidden), q_heads),
        "self_attn.k_proj.weight": ((kv_rows, hidden), kv_heads),
        "self_attn.v_proj.weight": ((kv_rows, hidden), 0),
        "self_attn.o_proj.weight": ((hidden, q_rows), 0),
        "post_attention_layernorm.weight": ((hidden,), 0),
        "mlp.gate_proj.weight": ((ffn, hidden), 0),
        "mlp.up_proj.weight": ((ffn, hidden), 0),
        "mlp.down_proj.weight": ((hidden, ffn), 0),
    }
    if architecture.qkv_bias:
        in_a_layer["self_attn.q_proj.bias"] = ((q_rows,), q_heads)
        in_a_layer["self_attn.k_proj.bias"] = ((kv_rows,), kv_heads)
        in_a_layer["self_attn.v_proj.bias"] = ((kv_rows,), 0)
    if architecture.qk_norm:
        in_a_layer["self_attn.q_norm.weight"] = ((shape.head_dim,), 0)
        in_a_layer["self_attn.k_norm.weight"] = ((shape.head_dim,), 0)

    specs = {"model.embed_tokens.weight": TensorSpec("token_embd.weight", (shape.vocab_size, hidden))}
    for layer in range(shape.num_hidden_layers):
        for name, (dims, heads) in in_a_layer.items():
            specs[f"model.layers.{layer}.{name}"] = TensorSpec(f"blk.{layer}.{IN_A_LAYER[name]}", dims, heads)
    specs["model.norm.weight"] = TensorSpec("output_norm.weight", (hidden,))
    if not shape.tie_word_embeddings:
        specs["lm_head.weight"] = TensorSpec("output.weight", (shape.vocab_size, hidden))
    return specs


def metadata(config: Mapping[str, Any], shape: Shape, *, where: str) -> dict[str, MetadataValue]:
    """Metadata keys (after `<arch>.`) that llama.cpp needs to run the model, without those of the rope."""
    eps = config.get("rms_norm_eps", DEFAULT_RMS_NORM_EPS)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise UserError(f"{where}: rms_norm_eps is {eps!r}", "it is a small positive number, e.g. 1e-6")
    return {
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_hidden_layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(eps),
        # Needed where head_dim is not hidden / heads; always written, so that no reader has to guess.
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocab_size,
    }


def rope_of(config: Mapping[str, Any], shape: Shape, *, where: str) -> Rope:
    """The rotary embedding of a config, written by transformers 4 (`rope_theta`, `rope_scaling`) or 5.

    Raises UserError for a kind of scaling that llama.cpp would run differently.
    """
    written = _rope_parameters(config, where)
    kind = written.get("rope_type", written.get("type", "default"))
    theta = written.get("rope_theta", config.get("rope_theta", DEFAULT_ROPE_THETA))
    common: dict[str, MetadataValue] = {"freq_base": _positive(theta, "rope_theta", where)}
    partial = written.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is {partial!r}", "models that rotate whole heads work")
    kinds = {"default": _plain_rope, "linear": _linear_rope, "llama3": _llama3_rope, "yarn": _yarn_rope}
    if kind not in kinds:
        raise UserError(f"{where}: rope_type is {kind!r}", f"models with rope_type {', '.join(kinds)} work")
    return kinds[kind](written, common, shape, where)


def _rope_parameters(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} is {value!r}", "it is a table with rope_type and its numbers")
        return value
    return {}


def _plain_rope(written: Mapping[str, Any], common: dict[str, MetadataValue], shape: Shape, where: str) -> Rope:
    return Rope(common)


def _linear_rope(written: Mapping[str, Any], common: dict[str, MetadataValue], shape: Shape, where: str) -> Rope:
    factor = _positive(written.get("factor"), "rope factor", where)
    return Rope({**common, "scaling.type": "linear", "scaling.factor": factor})


def _yarn_rope(written: Mapping[str, Any], common: dict[str, MetadataValue], shape: Shape, where: str) -> Rope:
    """YaRN (arXiv 2309.00071). llama.cpp computes the attention factor itself, as 1 + 0.1 ln(factor)."""
    factor = _positive(written.get("factor"), "rope factor", where)
    usual: dict[str, Any] = {
        "beta_fast": YARN_BETA_FAST,
        "beta_slow": YARN_BETA_SLOW,
        "truncate": True,
        "attention_factor": 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0,
        "mscale": None,
        "mscale_all_dim": None,
    }
    for key, value in usual.items():
        seen = written.get(key)
        same = seen == value or (
            isinstance(seen, int | float) and isinstance(value, float) and math.isclose(seen, value, rel_tol=1e-6)
        )
        if seen is not None and not same:
            raise UserError(f"{where}: yarn rope with {key} {seen!r}", f"yarn with {key} left out (or {value}) works")
    original = _positive(
        written.get("original_max_position_embeddings", shape.max_position_embeddings),
        "original_max_position_embeddings",
        where,
    )
    yarn: dict[str, MetadataValue] = {
        "scaling.type": "yarn",
        "scaling.factor": factor,
        "scaling.original_context_length": int(original),
    }
    return Rope({**common, **yarn})


def _llama3_rope(written: Mapping[str, Any], common: dict[str, MetadataValue], shape: Shape, where: str) -> Rope:
    """Llama 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a ramp in between."""
    factor, low, high, original = (
        _positive(written.get(key), key, where)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if high <= low:
        raise UserError(
            f"{where}: high_freq_factor {high} is not above low_freq_factor {low}", "Llama 3.1 has 4.0 and 1.0"
        )
    theta = float(common["freq_base"])
    pairs = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    wavelengths = 2 * math.pi * theta**pairs
    kept_share = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    factors = 1.0 / ((1.0 - kept_share) / factor + kept_share)
    return Rope(common, factors.astype(np.float32))


def _positive(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
        raise UserError(f"{where}: {name} is {value!r}", "it is a positive number")
    return float(value)


def to_interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k from transformers' order (a head's two halves) to llama.cpp's (its pairs, interleaved).

    `weight`: [heads * head_dim, ...]. transformers rotates (i, i + head_dim/2) together, llama.cpp (2i, 2i+1).
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def from_interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `to_interleaved`."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
