"""The student with its loss as one module, so that data parallelism and sharding see a single forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.losses.losses import LossSpec, Teacher, head_loss
from edgedistill.losses.model_parts import final_hidden, head_of
from edgedistill.training.ranks import Ranks


class LossModule(nn.Module):
    """forward → (loss, its terms). The head's weight is read inside, where FSDP2 has it whole."""

    def __init__(self, student: nn.Module, spec: LossSpec, *, low_precision: bool) -> None:
        super().__init__()
        self.student = student
        self.spec = spec
        self.low_precision = low_precision

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        positions: Tensor | None,
        teacher: Teacher | None,
        *,
        valid_total: int,
        taid_t: float = 1.0,
        report_kl: bool = False,
        spec: LossSpec | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`inputs` [S, T] ids, `targets` [S·T] with -100 where a token does not count, `positions` [S, T] or None."""
        hidden = final_hidden(self.student, inputs, self.low_precision, positions)
        return head_loss(
            hidden,
            head_of(self.student),
            teacher,
            targets,
            spec or self.spec,
            valid_total=valid_total,
            low_precision=self.low_precision,
            taid_t=taid_t,
            report_kl=report_kl,
        )


def wrap(module: LossModule, ranks: Ranks) -> nn.Module:
    """The module as the ranks train it: as it is, data-parallel (DDP), or sharded layer by layer (FSDP2)."""
    if ranks.world == 1 or ranks.zero:
        return module  # DeepSpeed's engine wants the optimizer too: see zero.start_engine
    if ranks.sharded:
        shard(module, module.student)
        return module
    from accelerate import Accelerator

    # autocast is the loss module's own, so that one process and many do the same arithmetic
    accelerator = Accelerator(cpu=ranks.device.type == "cpu", mixed_precision="no")
    return accelerator.prepare_model(module)  # type: ignore[no-any-return]


def shard(root: nn.Module, model: nn.Module) -> None:
    """FSDP2: every layer a unit of its own, the rest with the root. In place."""
    from torch.distributed.fsdp import fully_shard

    layers = set(getattr(model, "_no_split_modules", None) or [])
    found = [child for child in model.modules() if type(child).__name__ in layers]
    if not found:
        raise UserError(
            f"{type(model).__name__} does not say which of its modules are layers, so it cannot be sharded",
            "train it without --use_fsdp",
        )
    for child in found:
        fully_shard(child)
    fully_shard(root)


@contextmanager
def local_gradients(module: nn.Module, ranks: Ranks, *, last: bool) -> Iterator[None]:
    """Of an accumulated batch's parts only the last one exchanges gradients between the ranks."""
    if ranks.world == 1:
        yield
        return
    if ranks.zero:
        engine: Any = module
        engine.set_gradient_accumulation_boundary(last)
        yield
        return
    if ranks.sharded:
        sharded: Any = module
        sharded.set_requires_gradient_sync(last)
        yield
        return
    parallel: Any = module
    if last:
        yield
    else:
        with parallel.no_sync():
            yield


def bare(module: nn.Module) -> LossModule:
    """The loss module inside DDP's wrapper, or itself."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, LossModule)
    return inner


def settle(module: nn.Module) -> None:
    """Give back the whole weights that a sharded model's forward pass left gathered."""
    for child in module.modules():
        reshard = getattr(child, "reshard", None)
        if reshard is not None:
            reshard()


def clip_gradients(module: nn.Module, limit: float) -> Tensor:
    """Clip to a total norm; the norm before, whole over all ranks, a scalar on the device (reading it waits for it)."""
    norm: Any = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], limit)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
