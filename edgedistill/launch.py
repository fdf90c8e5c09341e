"""Whether this process is one of several that torchrun or `accelerate launch` started; needs no torch."""

from __future__ import annotations

import os


def asked_world() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether another process of this launch does what one alone must do: print, export, verify, bundle."""
    return asked_world() > 1 and int(os.environ.get("RANK", "0")) > 0
