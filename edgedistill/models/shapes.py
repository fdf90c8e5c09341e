"""config.json ⇄ `Shape`: the sizes of a decoder, read strictly and written for transformers.

Llama (Mistral reads as llama: the same tensors), Qwen2 and Qwen3 have a Shape without tensors; the other families of
families.py bring those of their table. Written by transformers 4 or 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedistill.errors import UserError
from edgedistill.models.architectures import TIED_HEAD, Model, model_of
from edgedistill.models.families import DECODERS, Tensor
from edgedistill.models.whole_size import whole_size
from edgedistill.records.shape import Shape

# model_type -> family of the Shape
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What transformers takes where config.json is silent; None: as many as there are query heads.
DEFAULT_KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
DEFAULT_QWEN3_HEAD_DIM = 128


def shape_from_config(config: Mapping[str, Any], *, where: str) -> Shape:
    """The Shape of a transformers config.json (parsed); `where` names it in errors.

    Raises UserError for another architecture, for a size that is missing or not a positive whole number,
    and for options that a Shape cannot say (biases outside q, k, v; another activation).
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DECODERS:
        raise UserError(
            f"{where}: architecture {model_type!r} is not supported",
            f"models of model_type {', '.join(DECODERS)} work",
        )
    if model_type not in FAMILIES:
        return _shape_of(model_of(config, where=where))
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


def config_of_student(config: Mapping[str, Any], shape: Shape, special: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's config.json with the sizes of `shape` and the special tokens of the config `special`.

    Whatever else a family says of itself stays as it is; what it says layer by layer goes on in the same order.
    Raises UserError where the family's config cannot say such a shape.
    """
    family = DECODERS[shape.family]
    made = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "transformers_version")}
    made |= {key: value for key, value in special.items() if key.endswith("_token_id")}
    layers = shape.num_hidden_layers
    old = config.get(family.other_names.get("num_hidden_layers", "num_hidden_layers"))
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and value and len(value) == old:
            made[key] = [value[layer % len(value)] for layer in range(layers)]
    sizes = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_hidden_layers": layers,
        "intermediate_size": shape.intermediate_size, "num_attention_heads": shape.num_attention_heads,
    }  # fmt: skip
    made |= {family.other_names.get(key, key): value for key, value in sizes.items()}
    if not family.other_names:
        made["num_key_value_heads"] = shape.num_key_value_heads
        if family.heads != "whole":
            made["head_dim"] = shape.head_dim
        else:
            made.pop("head_dim", None)
    if "query_pre_attn_scalar" in made and shape.head_dim != config.get("head_dim", family.head_dim):
        made["query_pre_attn_scalar"] = shape.head_dim
    made["tie_word_embeddings"] = shape.tie_word_embeddings
    said = shape_from_config(made, where=f"a {shape.family} student")
    differs = [name for name in Shape.model_fields if getattr(said, name) != getattr(shape, name)]
    if differs:
        raise UserError(
            f"a {shape.family} model cannot have {differs[0]} {getattr(shape, differs[0])} beside {shape.hidden_size}"
            f" wide states and {shape.num_attention_heads} heads",
            "leave it out of student.shape",
        )
    return made


def refuse_family(shape: Shape, format_: str, *, where: str) -> None:
    """UserError for a decoder that this format was never held to its torch model in."""
    if shape.layer_tensors:
        raise UserError(
            f"{where}: a {shape.family} decoder becomes GGUF alone: as {format_} its weights cannot be compared here",
            f"export it as GGUF; as {format_} work {', '.join(FAMILIES)}",
        )


def _shape_of(model: Model) -> Shape:
    """Of a family whose tensors its table says: sizes, and names and dimensions as the GGUF has them."""
    family, sizes = model.family, model.sizes

    def listed(table: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (each.gguf, each.dims[::-1] if each.change == "transposed" else each.dims)
            for name, each in table.items()
            if (not each.when or (each.when.removeprefix("!") in sizes.flags) != each.when.startswith("!"))
            and name not in (family.embedding, TIED_HEAD)
        )

    return Shape(
        family=family.model_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        tie_word_embeddings=model.tied,
        max_position_embeddings=model.context_length,
        attention_bias=any(each.gguf == "attn_q.bias" for each in family.layer.values() if each.when in sizes.flags),
        qk_norm=any(each.gguf == "attn_q_norm.weight" and (not each.when or each.when in sizes.flags)
                    for each in family.layer.values()),
        layer_tensors=listed(family.layer),
        other_tensors=listed({**family.first, **family.last}),
    )  # fmt: skip


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
