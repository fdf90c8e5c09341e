"""A config.json read strictly: every value is checked where it is used, and errors name it.

`Sizes` are what the shapes of a family's tensors are made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import UserError
from edgedistill.models.whole_size import whole_size


@dataclass(frozen=True)
class Sizes:
    """What a table of tensors refers to by letters: V, H, F, Q, K, D, P, T, N, M (see families.py).

    `flags`: the conditions of the table that hold for this model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    token_types: int = 0
    flags: frozenset[str] = frozenset()

    def of(self, letter: str) -> int:
        query = self.num_attention_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.intermediate_size,
            "G": 2 * self.intermediate_size,
            "Q": query,
            "K": key,
            "A": query + 2 * key,
            "D": self.head_dim,
            "P": self.max_position_embeddings,
            "T": self.token_types,
            "N": self.num_attention_heads,
            "M": self.num_key_value_heads,
        }[letter]


class Config:
    """A parsed config.json; `where` names it in errors. `other_names`: older keys of the same values."""

    def __init__(self, values: Mapping[str, Any], *, where: str, other_names: Mapping[str, str] | None = None) -> None:
        self.values = values
        self.where = where
        self._other_names = other_names or {}

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.values.get(self._other_names[key]) if value is None and key in self._other_names else value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where}: {key} is missing", "a config.json as transformers writes it has it")
        return whole_size(value, key, self.where)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        return positive(default if value is None else value, key, self.where)

    def small(self, key: str, default: float) -> float:
        """An epsilon."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise UserError(f"{self.where}: {key} is {value!r}", "it is a small positive number, e.g. 1e-6")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} is {value!r}", "it is true or false")
        return value

    def only(self, key: str, allowed: Sequence[Any], default: Any = None) -> None:
        """Refuse what llama.cpp would run differently: it has no such option in this family."""
        value = self.get(key)
        value = default if value is None else value
        if value not in allowed:
            raise UserError(
                f"{self.where}: {key} is {value!r}, which llama.cpp cannot run in this family",
                f"models with {key} {' or '.join(repr(a) for a in allowed)} work",
            )


def positive(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
        raise UserError(f"{where}: {name} is {value!r}", "it is a positive number")
    return float(value)
