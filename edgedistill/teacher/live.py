"""The teacher in memory while it teaches: its precision, and where its weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.config.recipe import Teacher
from edgedistill.errors import UserError
from edgedistill.losses.model_parts import final_hidden, require_separate_documents
from edgedistill.models.bitsandbytes import load_quantized
from edgedistill.models.loading import LOADING
from edgedistill.signals.signals import LiveSignals
from edgedistill.training.ranks import Ranks


class Body(nn.Module):
    """A teacher whose hidden states come from its own forward pass, where FSDP2 gathers its weights."""

    is_body = True

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, inputs: Tensor, positions: Tensor | None, low_precision: bool) -> Tensor:
        return final_hidden(self.student, inputs, low_precision, positions)


def precision_of(ask: Teacher, device: torch.device) -> str:
    """The weights' precision while it teaches: "fp32", "bf16", "int8" or "nf4"."""
    if ask.precision != "auto":
        return ask.precision
    return "bf16" if device.type == "cuda" else "fp32"


def live_teacher(
    folder: Path,
    ask: Teacher,
    *,
    low_precision: bool,
    ranks: Ranks,
    kept: Tensor | None = None,
    documents: bool = False,
) -> LiveSignals:
    """The teacher of a folder, ready to teach.

    Precision: fp32 or bf16 weights, or bitsandbytes' INT8 (Dettmers et al. 2022) or NF4 (2023). Placement: beside
    the student; "offload": weights on the CPU, each layer on the GPU while it runs; "shard": FSDP2 over the ranks.
    `documents`: packed documents are to be kept apart. Raises UserError where precision and placement do not go
    together, a library is missing, or the teacher cannot keep documents apart.
    """
    precision = precision_of(ask, ranks.device)
    if ask.placement == "shard" and ranks.world == 1:
        raise UserError(
            "teacher.placement is shard, and there is one process", "start several with torchrun, or set it to auto"
        )
    if ask.placement == "offload" and ranks.device.type != "cuda":
        raise UserError(
            "teacher.placement is offload, and there is no GPU to offload from", "set teacher.placement=auto"
        )
    if precision in ("int8", "nf4") and ask.placement != "auto":
        raise UserError(
            f"teacher.precision is {precision}, which cannot be combined with teacher.placement={ask.placement}",
            "set teacher.placement=auto, or teacher.precision=bf16",
        )
    model = _load(folder, precision, ranks)
    if documents:
        require_separate_documents(model)
    name = f"live, {precision}"
    low = low_precision or precision != "fp32"
    if ask.placement == "offload":
        return offloaded(model, ranks.device, low_precision=low, kept=kept, name=f"{name}, offloaded")
    if ask.placement == "shard":
        from edgedistill.training.loss_module import shard

        body = Body(model.to(ranks.device).eval().requires_grad_(False))
        shard(body, model)
        return LiveSignals(body, low_precision=low, device=ranks.device, kept=kept, name=f"{name}, sharded")
    if precision in ("fp32", "bf16"):
        model.to(ranks.device)
    return LiveSignals(model, low_precision=low, device=ranks.device, kept=kept, name=name)


def offloaded(
    model: Any, device: torch.device, *, low_precision: bool, kept: Tensor | None = None, name: str
) -> LiveSignals:
    """A teacher whose body's weights stay on the CPU, each layer's on `device` while it runs; its head stays there."""
    from accelerate import cpu_offload

    signals = LiveSignals(model, low_precision=low_precision, device=device, kept=kept, name=name)
    signals.head()  # while its weights, which may be the embedding's, can still be read
    cpu_offload(model.get_decoder(), device)
    return signals


def _load(folder: Path, precision: str, ranks: Ranks) -> Any:
    from transformers import AutoModelForCausalLM

    if precision in ("fp32", "bf16"):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **LOADING)
    return load_quantized(folder, precision, ranks.device)
