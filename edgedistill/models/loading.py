"""How transformers loads a model here: safetensors alone, no code of the folder's, and run as this program runs it.

A config.json keeps how the program that saved it ran the model: tuples for outputs, hidden states beside them, an
attention kernel that only some GPU has. That is not what the model computes, and who opens the folder need not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# given to `from_pretrained`: what config.json must not decide, and what is decided instead
RUN_SETTINGS: dict[str, Any] = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "_attn_implementation": None,
}  # fmt: skip
LOADING: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, **RUN_SETTINGS}
_RUN_KEYS = frozenset({*RUN_SETTINGS, "attn_implementation", "use_return_dict", "torchscript"})


def without_run_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a program that loads it by itself: what the model is, and nothing of how it was run."""
    return {key: value for key, value in config.items() if key not in _RUN_KEYS}
