"""The metadata that llama.cpp wants of each family, read from its config.json.

A function a family: it names every option of the config that changes what the model computes, writes those that
llama.cpp has a key for, and refuses the values of those for which it has none.
"""

from __future__ import annotations

import math
from typing import Any

from edgedistill.errors import UserError
from edgedistill.models.config import Config, Sizes
from edgedistill.models.rope import MetadataValue

Keys = dict[str, MetadataValue]

SILU = ("silu", "swish")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
SLIDING = "sliding_attention"
# llama.cpp takes another scale of the attention for the largest model of a family, by its number of layers.
GEMMA2_27B_LAYERS = 46
GEMMA3_27B_LAYERS = 62
SMOLLM3_NOPE_INTERVAL = 4  # every so many layers one has no rotary embedding; fixed in llama.cpp


def llama_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("hidden_act", SILU, "silu")
    return _rms(config, sizes)


def mistral_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("attention_bias", (False,), False)
    return {**llama_keys(config, sizes), **_capped(config, sizes, sliding=True)}


def qwen2_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("mlp_bias", (False,), False)
    sliding = config.flag("use_sliding_window") or SLIDING in (config.get("layer_types") or [])
    return {**llama_keys(config, sizes), **_capped(config, sizes, sliding=sliding)}


def qwen3_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("attention_bias", (False,), False)
    return qwen2_keys(config, sizes)


def gemma2_keys(config: Config, sizes: Sizes) -> Keys:
    keys = _gemma(config, sizes, largest=GEMMA2_27B_LAYERS, period=2)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in config.values and config.values[key] is None:
            # Without the key llama.cpp takes Gemma 2's own caps.
            config.only(key, ("a number",), None)
    keys["attn_logit_softcapping"] = config.number("attn_logit_softcapping", 50.0)
    keys["final_logit_softcapping"] = config.number("final_logit_softcapping", 30.0)
    return keys


def gemma3_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("attn_logit_softcapping", (None,))
    config.only("final_logit_softcapping", (None,))
    keys = _gemma(config, sizes, largest=GEMMA3_27B_LAYERS, period=6)
    keys["rope.freq_base_swa"] = _gemma3_local_theta(config)
    return keys


def phi3_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("hidden_act", SILU, "silu")
    config.only("attention_bias", (False,), False)
    # llama.cpp has Phi-3's sliding window switched off.
    return {**_rms(config, sizes, eps=1e-5), **_capped(config, sizes, sliding=True)}


def granite_keys(config: Config, sizes: Sizes) -> Keys:
    """Granite's four multipliers; the attention's replaces 1 / sqrt(head_dim)."""
    config.only("hidden_act", SILU, "silu")
    return {
        **_rms(config, sizes),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "attention.scale": config.number("attention_multiplier", 1.0),
        "logit_scale": config.number("logits_scaling", 1.0),
    }


def olmo2_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("hidden_act", SILU, "silu")
    config.only("attention_bias", (False,), False)
    _whole_heads(config, sizes)
    return _rms(config, sizes, eps=1e-5)


def smollm3_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("hidden_act", SILU, "silu")
    config.only("attention_bias", (False,), False)
    config.only("mlp_bias", (False,), False)
    config.only("use_sliding_window", (False,), False)
    config.only("no_rope_layer_interval", (SMOLLM3_NOPE_INTERVAL,), SMOLLM3_NOPE_INTERVAL)
    usual = [int((i + 1) % SMOLLM3_NOPE_INTERVAL != 0) for i in range(sizes.num_hidden_layers)]
    config.only("no_rope_layers", (usual, []), usual)
    return _rms(config, sizes)


def gpt2_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("activation_function", GELU_TANH, "gelu_new")
    config.only("scale_attn_weights", (True,), True)
    config.only("scale_attn_by_inverse_layer_idx", (False,), False)
    config.only("add_cross_attention", (False,), False)
    return {**_sizes(sizes), "attention.layer_norm_epsilon": config.small("layer_norm_epsilon", 1e-5)}


def stablelm_keys(config: Config, sizes: Sizes) -> Keys:
    config.only("hidden_act", SILU, "silu")
    _whole_heads(config, sizes)
    return {
        **_sizes(sizes),
        "attention.layer_norm_epsilon": config.small("layer_norm_eps", 1e-5),
        "use_parallel_residual": config.flag("use_parallel_residual"),
    }


def bert_keys(config: Config, sizes: Sizes) -> Keys:
    """llama.cpp computes GELU by its tanh approximation, which differs from BERT's exact one by under 5e-4."""
    config.only("hidden_act", ("gelu", *GELU_TANH), "gelu")
    config.only("position_embedding_type", ("absolute",), "absolute")
    config.only("is_decoder", (False,), False)
    config.only("add_cross_attention", (False,), False)
    return _encoder(config, sizes)


def nomic_keys(config: Config, sizes: Sizes) -> Keys:
    """The keys of nomic's own config (`activation_function`, `rotary_emb_*`, ...) and those of transformers 5."""
    config.only("hidden_act", SILU, "silu")
    config.only("activation_function", ("swiglu",), "swiglu")
    config.only("rotary_emb_fraction", (1, 1.0), 1.0)
    for key in ("rotary_emb_interleaved", "prenorm", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "use_rms_norm",
                "parallel_block"):  # fmt: skip
        config.only(key, (False,), False)
    for key in ("rotary_scaling_factor", "rotary_emb_scale_base", "moe_every_n_layers"):
        config.only(key, (None, 0), None)
    keys = _encoder(config, sizes)
    if config.get("max_trained_positions") is not None:
        keys["context_length"] = min(sizes.max_position_embeddings, config.size("max_trained_positions"))
    return keys


def _sizes(sizes: Sizes) -> Keys:
    return {
        "context_length": sizes.max_position_embeddings,
        "embedding_length": sizes.hidden_size,
        "block_count": sizes.num_hidden_layers,
        "feed_forward_length": sizes.intermediate_size,
        "attention.head_count": sizes.num_attention_heads,
        "attention.head_count_kv": sizes.num_key_value_heads,
        # Needed where head_dim is not hidden / heads; always written, so that no reader has to guess.
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "vocab_size": sizes.vocab_size,
    }


def _rms(config: Config, sizes: Sizes, eps: float = 1e-6) -> Keys:
    return {**_sizes(sizes), "attention.layer_norm_rms_epsilon": config.small("rms_norm_eps", eps)}


def _encoder(config: Config, sizes: Sizes) -> Keys:
    return {
        **_sizes(sizes),
        "attention.layer_norm_epsilon": config.small("layer_norm_eps", 1e-12),
        "attention.causal": False,
    }


def _capped(config: Config, sizes: Sizes, *, sliding: bool) -> Keys:
    """Up to the window's length, sliding attention is full attention; beyond it llama.cpp would differ."""
    if not sliding or config.get("sliding_window") is None:
        return {}
    return {"context_length": min(sizes.max_position_embeddings, config.size("sliding_window"))}


def _whole_heads(config: Config, sizes: Sizes) -> None:
    if sizes.head_dim * sizes.num_attention_heads != sizes.hidden_size:
        raise UserError(
            f"{config.where}: {sizes.num_attention_heads} heads of {sizes.head_dim} are not hidden_size"
            f" {sizes.hidden_size}",
            "in this family llama.cpp takes head_dim as hidden_size / num_attention_heads",
        )


def _gemma(config: Config, sizes: Sizes, *, largest: int, period: int) -> Keys:
    config.only("hidden_activation", GELU_TANH, "gelu_pytorch_tanh")
    config.only("attention_bias", (False,), False)
    config.only("use_bidirectional_attention", (None, False))
    scalar = config.number("query_pre_attn_scalar", 256)
    used = sizes.hidden_size // sizes.num_attention_heads if sizes.num_hidden_layers == largest else sizes.head_dim
    if not math.isclose(scalar, used):
        raise UserError(
            f"{config.where}: query_pre_attn_scalar is {scalar:g}, but llama.cpp scales this model's attention by"
            f" 1 / sqrt({used})",
            f"models with query_pre_attn_scalar {used} work",
        )
    return {
        **_rms(config, sizes),
        "attention.sliding_window": config.size("sliding_window", 4096),
        "attention.sliding_window_pattern": _sliding_layers(config, sizes, period),
    }


def _sliding_layers(config: Config, sizes: Sizes, period: int) -> list[bool]:
    """Which layers slide: as written, or every one but the last of each `period`."""
    written: Any = config.get("layer_types")
    if written is None:
        period = config.size("sliding_window_pattern", period)
        return [(layer + 1) % period != 0 for layer in range(sizes.num_hidden_layers)]
    known = (SLIDING, "full_attention")
    if (
        not isinstance(written, list)
        or len(written) != sizes.num_hidden_layers
        or any(kind not in known for kind in written)
    ):
        raise UserError(
            f"{config.where}: layer_types is {str(written)[:100]}",
            f"it names {' or '.join(known)} for each of the {sizes.num_hidden_layers} layers",
        )
    return [kind == SLIDING for kind in written]


def _gemma3_local_theta(config: Config) -> float:
    """The base of the sliding layers' rotary embedding, as transformers 5 (a table a kind of layer) or 4 writes it."""
    parameters = config.get("rope_parameters")
    local = parameters.get(SLIDING) if isinstance(parameters, dict) else None
    if not isinstance(local, dict):
        return config.number("rope_local_base_freq", 10000.0)
    inner = Config(local, where=f"{config.where}: rope_parameters.{SLIDING}")
    inner.only("rope_type", ("default",), "default")
    return inner.number("rope_theta", 10000.0)
