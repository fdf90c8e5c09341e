"""A transformers folder with quantized weights: its config.json rebuilt, its weights' headers read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.guards.allowed import (
    REMEDY,
    Check,
    boolean,
    either,
    integer,
    known_fields,
    list_of,
    number,
    one_of,
    text,
)
from edgedistill.guards.genai import FILE_NAME
from edgedistill.models.safetensors_header import read_safetensors_header
from edgedistill.strict import read_json, shown

CONFIG_FILE = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_DEPTH = 6
MAX_FILES = 1024
MAX_TOKENS = 1 << 30

_name = text(r"[A-Za-z0-9_.\-/ ]{0,200}", "a name")
_size = integer(0, 1 << 24)
_token = either(one_of(None), integer(-1, 1 << 24), list_of(integer(0, 1 << 24), 256))
_flag = either(one_of(None), boolean)
_names = either(one_of(None), list_of(_name, 4096))
_factors = list_of(number(-1e9, 1e9), 4096)
_rope = known_fields(
    {
        **dict.fromkeys(("rope_type", "type"), _name),
        **dict.fromkeys(
            ("rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "mscale",
             "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor", "mscale_all_dim"),
            either(one_of(None), number(-1e12, 1e12)),
        ),
        **dict.fromkeys(("short_factor", "long_factor"), _factors),
        "truncate": boolean,
    }
)  # fmt: skip
QUANTIZATION: dict[str, Check] = {
    "quant_method": one_of("bitsandbytes"),
    **dict.fromkeys(
        ("_load_in_8bit", "_load_in_4bit", "load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant",
         "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
        boolean,
    ),
    "llm_int8_threshold": number(0, 1e6),
    "llm_int8_skip_modules": _names,
    "bnb_4bit_quant_type": one_of("nf4", "fp4"),
    "bnb_4bit_compute_dtype": one_of("float32", "float16", "bfloat16"),
    "bnb_4bit_quant_storage": one_of("uint8", "float16", "bfloat16", "float32", "int8"),
}  # fmt: skip
CONFIG: dict[str, Check] = {
    "model_type": one_of("llama", "mistral", "qwen2", "qwen3"),
    "architectures": list_of(text(r"(Llama|Mistral|Qwen2|Qwen3)ForCausalLM", "a class of this model"), 1),
    "quantization_config": known_fields(QUANTIZATION, required=("quant_method",)),
    "transformers_version": _name,
    **dict.fromkeys(("dtype", "torch_dtype"), either(one_of(None), one_of("float32", "float16", "bfloat16"))),
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), _size
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "head_dim", "pretraining_tp", "max_window_layers"), either(one_of(None), _size)
    ),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), either(one_of(None), integer(0, MAX_TOKENS))),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout"), number(0, 1e12)),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _flag),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), _token),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), either(one_of(None), _rope)),
    "hidden_act": one_of("silu", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh"),
    "layer_types": either(one_of(None), list_of(one_of("full_attention", "sliding_attention"), 1024)),
}
_config = known_fields(CONFIG, required=("model_type", "architectures", "quantization_config", "vocab_size"))


def rebuilt_folder(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """(files to write anew, names of the weights' files). Raises UserError naming what is not allowed."""
    where = folder / CONFIG_FILE
    tree = read_json(where, what=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_DEPTH)
    written = {CONFIG_FILE: json.dumps(_config(tree, str(where)), sort_keys=True, allow_nan=False).encode()}
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        weights = [WEIGHTS]
    elif index.is_file():
        weight_map = _weight_map(index)
        weights = sorted(set(weight_map.values()))
        written[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}, sort_keys=True).encode()
    else:
        raise UserError(f"{folder} has no {WEIGHTS}: other kinds of weights may hold code and are not opened", REMEDY)
    for name in weights:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}", "copy all files of the model")
        read_safetensors_header(folder / name)
    return written, weights


def _weight_map(index: Path) -> dict[str, Any]:
    tree = read_json(index, what=INDEX, max_bytes=MAX_INDEX_BYTES, max_depth=4)
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map", REMEDY)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(FILE_NAME, file) or not file.endswith(".safetensors"):
            raise UserError(
                f"{index} names {shown(file)} for {shown(name)}, which is not a safetensors file beside it", REMEDY
            )
    if len(set(weight_map.values())) > MAX_FILES:
        raise UserError(f"{index} names more than {MAX_FILES} files", REMEDY)
    return weight_map
