"""genai_config.json: what onnxruntime-genai may be told, rebuilt from a list.

The library loads what `custom_ops_library` names, writes what `enable_profiling` says and prints with the names of
inputs as formats ("past_key_values.%d.key"). Nothing of that is in the list; it holds what the library's own model
builder writes for decoders that this program exports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgedistill.guards.allowed import Check, boolean, either, fields, integer, list_of, number, one_of, text
from edgedistill.strict import read_json

CONFIG = "genai_config.json"
MAX_BYTES = 1 << 20
MAX_DEPTH = 8
MAX_LAYERS = 1024
MAX_TOKENS = 1 << 30
MAX_VOCABULARY = 1 << 24
MAX_SIZE = 1 << 20
# A file's name and nothing else: no folder, nothing hidden.
FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}"
TENSOR_NAME = r"[A-Za-z0-9_][A-Za-z0-9_./\-]{0,199}"
# The library fills in the layer's number with printf.
LAYER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_./\-]{0,99}%d[A-Za-z0-9_./\-]{0,99}"
MODEL_TYPE = r"[a-z][a-z0-9_]{0,39}"

_tensor = text(TENSOR_NAME, "a tensor's name")
_per_layer = text(LAYER_NAME, "a tensor's name with one %d")
_token = integer(0, MAX_VOCABULARY)
_tokens = either(_token, list_of(_token, 256))

SESSION_OPTIONS: dict[str, Check] = {
    "log_id": text(r"[A-Za-z0-9_\-]{1,64}", "a short name"),
    "provider_options": list_of(one_of(), 0),
    "intra_op_num_threads": integer(0, 1024),
    "inter_op_num_threads": integer(0, 1024),
    "log_severity_level": integer(0, 4),
    "enable_cpu_mem_arena": boolean,
    "enable_mem_pattern": boolean,
}
DECODER: dict[str, Check] = {
    "session_options": fields(SESSION_OPTIONS),
    "filename": text(FILE_NAME, "the name of a file beside it"),
    "head_size": integer(1, MAX_SIZE),
    "hidden_size": integer(1, MAX_SIZE),
    "num_attention_heads": integer(1, MAX_SIZE),
    "num_hidden_layers": integer(1, MAX_LAYERS),
    "num_key_value_heads": integer(1, MAX_SIZE),
    "inputs": fields(
        {
            "input_ids": _tensor,
            "attention_mask": _tensor,
            "position_ids": _tensor,
            "past_key_names": _per_layer,
            "past_value_names": _per_layer,
        },
        required=("input_ids",),
    ),
    "outputs": fields(
        {"logits": _tensor, "present_key_names": _per_layer, "present_value_names": _per_layer}, required=("logits",)
    ),
    "sliding_window": fields(
        {
            "window_size": integer(1, MAX_TOKENS),
            "slide_key_value_cache": boolean,
            "slide_inputs": boolean,
            "layers": list_of(integer(0, MAX_LAYERS - 1), MAX_LAYERS),
            "cache_slack": integer(0, MAX_TOKENS),
        }
    ),
}
MODEL: dict[str, Check] = {
    "type": text(MODEL_TYPE, "the name of a kind of model"),
    "bos_token_id": _token,
    "eos_token_id": _tokens,
    "pad_token_id": _token,
    "bot_token_id": _token,
    "eot_token_id": _token,
    "bor_token_id": _token,
    "eor_token_id": _token,
    "context_length": integer(1, MAX_TOKENS),
    "vocab_size": integer(1, MAX_VOCABULARY),
    "decoder": fields(
        DECODER,
        required=("filename", "head_size", "num_hidden_layers", "num_key_value_heads", "inputs", "outputs"),
    ),
}
SEARCH: dict[str, Check] = {
    "diversity_penalty": number(-1e6, 1e6),
    "do_sample": boolean,
    "early_stopping": boolean,
    "length_penalty": number(-1e6, 1e6),
    "max_length": integer(1, MAX_TOKENS),
    "min_length": integer(0, MAX_TOKENS),
    "no_repeat_ngram_size": integer(0, MAX_TOKENS),
    "num_beams": integer(1, 1),
    "num_return_sequences": integer(1, 1),
    "past_present_share_buffer": boolean,
    "repetition_penalty": number(0.0, 1e6),
    "temperature": number(0.0, 1e6),
    "top_k": integer(0, MAX_VOCABULARY),
    "top_p": number(0.0, 1.0),
}
_config = fields(
    {"model": fields(MODEL, required=("type", "vocab_size", "decoder")), "search": fields(SEARCH)}, ("model",)
)


def rebuilt_config(path: Path) -> dict[str, Any]:
    """genai_config.json made of what is allowed in it. Raises UserError naming the first thing that is not."""
    config: dict[str, Any] = _config(read_json(path, what=CONFIG, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH), str(path))
    return config


def config_bytes(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=1, sort_keys=True, allow_nan=False).encode()
