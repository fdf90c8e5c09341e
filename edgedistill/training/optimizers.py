"""Optimizers and the learning rate's schedule."""

from __future__ import annotations

import math

import torch  # noqa: TID253  this module is imported by training alone
from torch import nn  # noqa: TID253

from edgedistill.config.recipe import Training
from edgedistill.errors import UserError
from edgedistill.training.muon import FloatMuon


def rate_share(step: int, steps: int, settings: Training) -> float:
    """Learning rate of step 0 … steps − 1 as a share of its peak: linear warm-up, then cosine."""
    warmup = round(settings.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    low = settings.final_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(model: nn.Module, settings: Training) -> list[torch.optim.Optimizer]:
    """AdamW, its 8-bit form (Dettmers et al. 2021), or Muon (Jordan et al. 2024) for the layers' matrices with AdamW.

    Weight decay stays off norms, biases and embeddings. Parameters that are frozen get no state.
    Raises UserError where the 8-bit optimizer's library is missing.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and is_layer_matrix(name)]
    known = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in known]
    betas = (settings.beta1, settings.beta2)
    optimizers: list[torch.optim.Optimizer]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, settings.weight_decay), (rest, 0.0))
        if group
    ]
    if settings.optimizer == "muon" and matrices:
        muon = torch.optim.Muon if settings.precision == "bf16" else FloatMuon
        optimizers = [
            muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay),
        ]
        if rest:
            optimizers.append(
                torch.optim.AdamW(rest, lr=settings.learning_rate, betas=betas, weight_decay=0.0, fused=True)
            )
    elif settings.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError(
                "distill.optimizer is adamw8bit, and bitsandbytes is not installed",
                "pip install 'edgedistill[train]', or set distill.optimizer=adamw",
            ) from error
        optimizers = [bitsandbytes.optim.AdamW8bit(groups, lr=settings.learning_rate, betas=betas)]
    else:
        optimizers = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def is_layer_matrix(name: str) -> bool:
    """Whether a parameter belongs to the stack of layers (`model.layers.3…`, gpt2's `transformer.h.3…`)."""
    return ".layers." in name or ".h." in name


def set_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
