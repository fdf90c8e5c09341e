"""A size of a config.json, checked: positive, whole, and one that some model could have."""

from __future__ import annotations

from typing import Any

from edgedistill.errors import UserError
from edgedistill.strict import shown

# Far above any model: what is counted by these sizes stays finite, and is over in a second.
LARGEST = {"num_hidden_layers": 2048, "num_attention_heads": 8192, "num_key_value_heads": 8192, "vocab_size": 1 << 24}
LARGEST_SIZE = 1 << 27  # positions are the largest of the others


def whole_size(value: Any, key: str, where: str) -> int:
    """A size of a config.json: a positive whole number that some model could have. UserError otherwise."""
    most = LARGEST.get(key, LARGEST_SIZE)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} is {shown(value)}", "it is a positive whole number")
    if value > most:
        raise UserError(f"{where}: {key} is {shown(value)}", f"no model that can be read here has more than {most:,}")
    return value
