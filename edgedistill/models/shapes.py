"""config.json ⇄ `Shape`: the sizes of a decoder, read strictly and written for transformers.

Families: llama (mistral reads as llama: the same tensors), qwen2, qwen3. Written by transformers 4 or 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedistill.errors import UserError
from edgedistill.records.shape import Shape
from edgedistill.strict import shown

# model_type -> family of the Shape
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What transformers takes where config.json is silent; None: as many as there are query heads.
DEFAULT_KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
DEFAULT_QWEN3_HEAD_DIM = 128
# Far above any model: what is counted by these sizes stays finite, and is over in a second.
LARGEST = {"num_hidden_layers": 2048, "num_attention_heads": 8192, "num_key_value_heads": 8192, "vocab_size": 1 << 24}
LARGEST_SIZE = 1 << 27  # positions are the largest of the others


def shape_from_config(config: Mapping[str, Any], *, where: str) -> Shape:
    """The Shape of a transformers config.json (parsed); `where` names it in errors.

    Raises UserError for another architecture, for a size that is missing or not a positive whole number,
    and for options that a Shape cannot say (biases outside q, k, v; another activation).
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{where}: architecture {model_type!r} is not supported",
            f"models of model_type {', '.join(FAMILIES)} work",
        )
    family = FAMILIES[model_type]
    _refuse_unsayable(config, model_type, where)
    hidden = _size(config, "hidden_size", where)
    heads = _size(config, "num_attention_heads", where)
    kv_heads = _size(config, "num_key_value_heads", where, default=DEFAULT_KV_HEADS[model_type] or heads)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            "correct config.json; query heads share key/value heads in equal groups",
        )
    if family == "qwen3":
        head_dim = _size(config, "head_dim", where, default=DEFAULT_QWEN3_HEAD_DIM)
    else:
        # transformers refuses such a Llama even where head_dim is stated.
        if hidden % heads and (config.get("head_dim") is None or model_type == "llama"):
            raise UserError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}",
                "correct config.json: these heads do not divide the hidden size",
            )
        head_dim = _size(config, "head_dim", where, default=hidden // heads)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd", "rotary embeddings turn pairs: use an even head_dim")
    return Shape(
        family=family,
        vocab_size=_size(config, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", where),
        num_hidden_layers=_size(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=_positions(config, model_type, where),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def config_from_shape(
    shape: Shape,
    *,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None = None,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
) -> dict[str, Any]:
    """The config of this shape as a dict for `AutoConfig.for_model(**d)` or `LlamaConfig(**d)` (transformers 5)."""
    if shape.family not in ARCHITECTURES:
        raise UserError(
            f"a shape of family {shape.family!r} has no transformers model", f"use {', '.join(ARCHITECTURES)}"
        )
    config: dict[str, Any] = {
        "model_type": shape.family,
        "architectures": [ARCHITECTURES[shape.family]],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rope_theta)},
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if shape.family in ("llama", "qwen3"):
        # Qwen2 has no such field: its q, k and v always carry a bias.
        config["attention_bias"] = False
    return config


def _refuse_unsayable(config: Mapping[str, Any], model_type: str, where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise UserError(f"{where}: hidden_act is {activation!r}", "models with silu (SwiGLU) work")
    for key in ("attention_bias", "mlp_bias"):
        # In Llama and Qwen3 this flag also puts a bias on the output projection, which no converter here writes.
        if config.get(key) and not (key == "attention_bias" and model_type == "qwen2"):
            raise UserError(f"{where}: {key} is {config[key]!r}", "only Qwen2's biases on q, k and v work")
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the weights are already quantized (quantization_config is set)",
            "use the model's original weights in bf16, fp16 or fp32",
        )


def _positions(config: Mapping[str, Any], model_type: str, where: str) -> int:
    positions = _size(config, "max_position_embeddings", where, default=DEFAULT_MAX_POSITIONS[model_type])
    window = config.get("sliding_window")
    sliding = model_type == "mistral" or bool(config.get("use_sliding_window"))
    if sliding and window is not None:
        # Up to the window's length, sliding attention is full attention; beyond it the runtimes differ.
        positions = min(positions, _size(config, "sliding_window", where))
    return positions


def _size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{where}: {key} is missing", "a config.json as transformers writes it has it")
    return whole_size(value, key, where)


def whole_size(value: Any, key: str, where: str) -> int:
    """A size of a config.json: a positive whole number that some model could have. UserError otherwise."""
    most = LARGEST.get(key, LARGEST_SIZE)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} is {shown(value)}", "it is a positive whole number")
    if value > most:
        raise UserError(f"{where}: {key} is {shown(value)}", f"no model that can be read here has more than {most:,}")
    return value
