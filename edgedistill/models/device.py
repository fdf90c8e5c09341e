"""Where training and torch's part of verification run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_kind() -> str:
    """ "cuda" where torch has a GPU, else "cpu"; part of what a trained model's key is made of."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def training_device() -> torch.device:
    """The GPU where torch has one, else the CPU."""
    import torch

    return torch.device(device_kind())
