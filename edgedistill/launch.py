"""Whether this process is one of several that torchrun or `accelerate launch` started; needs no torch."""

from __future__ import annotations

import os

from edgedistill.errors import UserError


def asked_world() -> int:
    """How many processes the launcher started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def is_follower() -> bool:
    """Whether another process of this launch does what one alone must do: print, export, verify, bundle."""
    return asked_world() > 1 and _number("RANK", 0) > 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise UserError(f"the environment variable {name} is {text[:40]!r}", "a launcher sets it to a whole number")
    return int(text)
