"""Where the teacher's signals come from; the loss does not know.

`LiveSignals` runs the teacher on every batch. `CachedSignals` runs it once over the training sequences
and keeps the hidden states after its final norm (bf16, memory-mapped), from which the loss makes the
full logits again: what a live teacher under bf16 autocast gives, and smaller than logits by vocabulary ÷ width.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import Tensor, nn  # noqa: TID253

from edgedistill.distill.losses import TeacherHead
from edgedistill.distill.model_parts import final_hidden, output_head
from edgedistill.progress import QUIET, Progress
from edgedistill.store import write_durably
from edgedistill.tasks.causal_lm import Packed

CACHE_BATCH_TOKENS = 4096


class Signals(Protocol):
    """The teacher's hidden states and head for a batch."""

    name: str

    def head(self, rows: NDArray[np.int64], inputs: Tensor) -> TeacherHead:
        """`rows`: numbers of the packed sequences; `inputs` [S, T] their ids. Hidden is [S·T, H_t]."""
        ...


class LiveSignals:
    """The teacher itself, frozen and in eval."""

    name = "live"

    def __init__(self, teacher: nn.Module, *, low_precision: bool) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.low_precision = low_precision

    @torch.no_grad()
    def head(self, rows: NDArray[np.int64], inputs: Tensor) -> TeacherHead:
        return TeacherHead(final_hidden(self.teacher, inputs, self.low_precision), output_head(self.teacher))


class CachedSignals:
    """Hidden states of all packed sequences [sequences, T, H_t], computed before training in a fixed order.

    The order and the batches are fixed, so that a run which was killed and resumed sees the same bits.
    """

    name = "cached hidden states"

    def __init__(
        self, teacher: nn.Module, data: Packed, *, folder: Path, low_precision: bool, progress: Progress = QUIET
    ) -> None:
        teacher = teacher.eval().requires_grad_(False)
        self.weight = output_head(teacher)
        self.device = self.weight.device
        shape = (data.sequences, data.context, self.weight.shape[1])
        folder.mkdir(parents=True, exist_ok=True)
        path, mark = folder / "hidden.bf16", folder / "hidden.json"
        if not mark.is_file():
            _fill(path, teacher, data, shape, low_precision, progress)
            write_durably(mark, json.dumps({"shape": shape}))
        self.hidden = np.memmap(path, dtype=np.int16, mode="r", shape=shape)

    def head(self, rows: NDArray[np.int64], inputs: Tensor) -> TeacherHead:
        hidden = torch.from_numpy(np.ascontiguousarray(self.hidden[rows])).view(torch.bfloat16)
        return TeacherHead(hidden.flatten(0, 1).to(self.device), self.weight)


def cache_bytes(data: Packed, width: int) -> int:
    """Disk that `CachedSignals` takes."""
    return data.sequences * data.context * width * 2


@torch.no_grad()
def _fill(
    path: Path, teacher: nn.Module, data: Packed, shape: tuple[int, int, int], low_precision: bool, progress: Progress
) -> None:
    with path.open("wb") as file:  # a sparse file that meets a full disk ends the process with SIGBUS
        os.posix_fallocate(file.fileno(), 0, cache_bytes(data, shape[2]))
    table = np.memmap(path, dtype=np.int16, mode="r+", shape=shape)
    size = max(1, CACHE_BATCH_TOKENS // data.context)
    for start in range(0, data.sequences, size):
        rows = np.arange(start, min(start + size, data.sequences))
        inputs = torch.from_numpy(data.sequence_ids(rows)[:, :-1])
        hidden = final_hidden(teacher, inputs, low_precision).to(torch.bfloat16).cpu()
        table[rows] = hidden.view(torch.int16).view(len(rows), *shape[1:]).numpy()
        progress.step("teacher signals", int(rows[-1]) + 1, data.sequences)
    table.flush()
