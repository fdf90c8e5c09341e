"""What a check of an artifact against its model folder found: one thing that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgedistill.errors import UserError

Kind = Literal["tensor", "metadata", "tokenizer", "stops", "template", "context", "settings"]
SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """`name`: the tensor, key or file; `why`: how it differs from the model's, with both values."""

    kind: Kind
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.why}"


def require_none(found: Sequence[Finding], what: str, remedy: str) -> None:
    """UserError that names what was found, the first few in full."""
    if found:
        rest = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(f"{what}: " + "; ".join(str(finding) for finding in found[:SHOWN]) + rest, remedy)


def shown(value: object, chars: int = 60) -> str:
    """A value as an error shows it."""
    text = f"{value:.9g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= chars else text[:chars] + "…"


def difference_of(found: str, wanted: str) -> str:
    """Where two texts part, in words."""
    if not wanted:
        return f"is {shown(found)}, and the model has none"
    if not found:
        return "is missing"
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    window = slice(max(0, at - 10), at + 30)
    return f"is not the model's: at character {at} it says {found[window]!r}, the model's {wanted[window]!r}"
