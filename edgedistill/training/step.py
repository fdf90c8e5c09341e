"""One optimizer step over some packed sequences, whatever the ranks and the memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import nn  # noqa: TID253

from edgedistill.config.recipe import Training
from edgedistill.errors import UserError
from edgedistill.losses.losses import IGNORED
from edgedistill.progress import Progress
from edgedistill.signals.signals import Signals
from edgedistill.tasks.causal_lm import Packed
from edgedistill.training import zero
from edgedistill.training.loss_module import clip_gradients, local_gradients
from edgedistill.training.optimizers import set_rates
from edgedistill.training.ranks import Ranks, clear_errors


@dataclass(frozen=True)
class Figures:
    """One step, whole over all ranks: the loss, its terms, the gradient's norm; which tokens it saw."""

    loss: float
    terms: dict[str, float]
    gradient_norm: float
    valid: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class Step:
    """One optimizer step over the packed sequences `rows`, whatever the ranks and the memory."""

    module: nn.Module
    signals: Signals | None
    data: Packed
    optimizers: list[torch.optim.Optimizer]
    settings: Training
    ranks: Ranks
    progress: Progress
    label: str
    weights: Callable[[], AbstractContextManager[None]] = nullcontext  # what forward and backward compute with

    def run(
        self, rows: NDArray[np.int64], *, rate_share: float, micro: int, taid_t: float, spike: float, report_kl: bool
    ) -> tuple[Figures, int]:
        """Forward, backward, clip and, where the figures are good, update. Returns them and the micro-batch used."""
        self.module.train()
        while True:
            try:
                with self.weights():
                    sums, valid = self._gradients(rows, micro, taid_t, report_kl)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                message = str(error).splitlines()[0][:200]
            # outside of the handler, whose traceback holds on to the tensors of the failed pass
            self._clear()
            micro = self._smaller(micro, message)
        if zero.is_engine(self.module):
            return self._engine_step(sums, valid, rate_share, spike), micro
        norm = clip_gradients(self.module, self.settings.clip_norm)
        figures = _figures(sums, norm, valid)
        if figures.finite and figures.loss <= spike:
            set_rates(self.optimizers, rate_share)
            for optimizer in self.optimizers:
                optimizer.step()
        self._clear()
        return figures, micro

    def _engine_step(self, sums: dict[str, torch.Tensor], valid: int, rate_share: float, spike: float) -> Figures:
        """DeepSpeed clips and steps at once, and makes no step where the gradient is not finite."""
        engine: Any = self.module
        terms = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        loss = terms.pop("loss")
        if not (math.isfinite(loss) and loss <= spike):
            zero.discard_gradients(engine)
            return Figures(loss, terms, math.nan, valid)
        set_rates(self.optimizers, rate_share)
        with clear_errors(self.ranks):
            engine.step()
        return Figures(loss, terms, float(engine.get_global_grad_norm()), valid)

    def _gradients(
        self, rows: NDArray[np.int64], micro: int, taid_t: float, report_kl: bool
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Gradients of the whole batch, normalised by its valid tokens over all micro-batches and ranks.

        Returns the loss and its terms, whole over the ranks and still on the device, and the valid tokens.
        """
        documents = self.settings.attention == "documents"
        ranks = self.ranks
        labels = self.data.targets(rows, documents=documents)
        valid = int((labels != IGNORED).sum())
        mine = rows[ranks.rank :: ranks.world]
        inputs = _on(ranks.device, self.data.sequence_ids(mine)[:, :-1])
        targets = _on(ranks.device, labels[ranks.rank :: ranks.world])
        positions = _on(ranks.device, self.data.positions(mine)) if documents else None
        sums: dict[str, torch.Tensor] = {}
        for start in range(0, len(mine), micro):
            part = slice(start, start + micro)
            where = None if positions is None else positions[part]
            teacher = None if self.signals is None else self.signals.batch(mine[part], inputs[part], where)
            with local_gradients(self.module, ranks, last=start + micro >= len(mine)):
                value, terms = self.module(
                    inputs[part], targets[part].reshape(-1), where, teacher,
                    valid_total=max(1, valid), taid_t=taid_t, report_kl=report_kl,
                )  # fmt: skip
                with clear_errors(ranks):
                    # data parallelism and sharding average over the ranks; the batch's own sum is wanted
                    whole = value * ranks.world if ranks.world > 1 else value
                    if zero.is_engine(self.module):
                        self.module.backward(whole, scale_wrt_gas=False)  # type: ignore[operator]
                    else:
                        whole.backward()
            for name, term in {"loss": value.detach(), **terms}.items():
                sums[name] = sums[name] + term if name in sums else term
            del value, terms, teacher
        names = sorted(sums)
        stacked = torch.stack([sums[name].double() for name in names])
        if ranks.world > 1:
            with clear_errors(ranks):
                torch.distributed.all_reduce(stacked)
        return dict(zip(names, stacked.unbind(), strict=True)), valid

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _smaller(self, micro: int, message: str) -> int:
        if micro == 1 or self.ranks.world > 1:
            remedy = (
                f"set {self._section()}.micro_batch_sequences={max(1, micro // 2)}: the batch stays what it is"
                if micro > 1
                else f"shorten {self._section()}.context_tokens, set {self._section()}.activation_checkpointing=true,"
                " or use a smaller model"
            )
            raise UserError(
                f"{self.label}: out of memory with {micro} sequences of {self.data.context} tokens a forward pass"
                f" ({message})",
                f"{remedy}; the last checkpoint is kept",
            )
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.warn(
            f"{self.label}: out of memory with {micro} sequences a forward pass; goes on with {micro // 2}, the batch"
            " stays what it is"
        )
        return micro // 2

    def _section(self) -> str:
        return "teacher.train" if self.label == "teacher" else "distill"


def _figures(sums: dict[str, torch.Tensor], norm: torch.Tensor, valid: int) -> Figures:
    """The step's numbers, read from the device at once: the one place in a step where the host waits for it."""
    names = sorted(sums)
    numbers = [torch.as_tensor(sums[name], dtype=torch.float64, device=norm.device) for name in names]
    *values, gradient_norm = torch.stack([*numbers, norm.double()]).tolist()
    terms = dict(zip(names, values, strict=True))
    return Figures(terms.pop("loss"), terms, gradient_norm, valid)


def _on(device: torch.device, numbers: NDArray[np.int64]) -> torch.Tensor:
    """On the device; from pinned memory to a GPU, since a copy from pageable memory waits for all work before it."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: CUDA's, or the CPU's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
