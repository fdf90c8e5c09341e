"""What may stand in a configuration: each key with a check of its value; the result is built of nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from edgedistill.errors import UserError
from edgedistill.strict import shown

REMEDY = "export the artifact again"
MAX_KEYS_SHOWN = 12

# What makes transformers run or fetch code.
CODE = frozenset(
    [
        "auto_map",
        "custom_pipelines",
        "custom_generate",
        "trust_remote_code",
        "code_revision",
        "use_kernels",
        "kernel_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "transformers_weights",
    ]
)

# Takes a value and where it stands; gives the value to hand over, or raises UserError.
Check = Callable[[Any, str], Any]


def refused(where: str, why: str) -> UserError:
    return UserError(f"{where} {why}", REMEDY)


def integer(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refused(where, f"is {shown(value)}, not a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any, where: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise refused(where, f"is {shown(value)}, not a number from {low:g} to {high:g}")
        return float(value) if type(value) is float else value

    return check


def boolean(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise refused(where, f"is {shown(value)}, not true or false")
    return value


def text(pattern: str, meaning: str) -> Check:
    compiled = re.compile(pattern)

    def check(value: Any, where: str) -> str:
        if type(value) is not str or not compiled.fullmatch(value):
            raise refused(where, f"is {shown(value)}, not {meaning}")
        return value

    return check


def one_of(*values: Any) -> Check:
    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise refused(where, f"is {shown(value)}, not {' or '.join(map(shown, values))}")
        return value

    return check


def list_of(item: Check, most: int) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise refused(where, f"is {shown(value)}, not a list of at most {most}")
        return [item(one, f"{where}[{i}]") for i, one in enumerate(value)]

    return check


def either(*checks: Check) -> Check:
    """The first that passes; the last one's complaint where none does."""

    def check(value: Any, where: str) -> Any:
        for one in checks[:-1]:
            try:
                return one(value, where)
            except UserError:
                continue
        return checks[-1](value, where)

    return check


def fields(known: Mapping[str, Check], required: tuple[str, ...] = ()) -> Check:
    """An object with no other keys than these."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refused(where, f"is {shown(value)}, not an object")
        for key in value:
            if key not in known:
                listed = ", ".join(sorted(known)[:MAX_KEYS_SHOWN]) or "none"
                raise refused(f"{where}.{shown(key)[1:-1]}", f"is not among what is allowed there ({listed})")
        for key in required:
            if key not in value:
                raise refused(where, f"lacks {key}")
        return {key: known[key](one, f"{where}.{key}") for key, one in value.items()}

    return check


def known_fields(known: Mapping[str, Check], required: tuple[str, ...] = ()) -> Check:
    """An object of which these keys are handed over and no others; what asks for code is refused by its name."""
    strict = fields(known, required)

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refused(where, f"is {shown(value)}, not an object")
        for key in value:
            if key in CODE:
                raise refused(f"{where}.{key}", "asks for code that is not the runtime's own")
        kept: dict[str, Any] = strict({key: one for key, one in value.items() if key in known}, where)
        return kept

    return check
