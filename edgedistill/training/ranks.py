"""The processes that train together: one, or those that torchrun or `accelerate launch` started.

accelerate sets up the process group, the device and data parallelism; sharding (FSDP2) is torch's own
`fully_shard`, asked for in accelerate's configuration (`--use_fsdp --fsdp_version 2`, or
ACCELERATE_USE_FSDP=true), so that one code path runs on GPUs and, with gloo, on CPUs. DeepSpeed's ZeRO likewise
(`--use_deepspeed`, see `zero`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch  # noqa: TID253  this module is imported by training alone
import torch.distributed as dist  # noqa: TID253
from pydantic import BaseModel

from edgedistill.errors import EdgedistillError, UserError
from edgedistill.launch import asked_world
from edgedistill.store import Store, Stored, Work

R = TypeVar("R", bound=BaseModel)
TIMEOUT = timedelta(hours=6)  # of one collective: rank 0 may be hashing, waiting for a lock, or writing a cache


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together. `sharded`: FSDP2 is asked for; `zero`: DeepSpeed."""

    rank: int
    world: int
    device: torch.device
    sharded: bool
    zero: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each number summed over all ranks, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with clear_errors(self):
            dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def barrier(self) -> None:
        if self.world > 1:
            with clear_errors(self):
                dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank (plain data)."""
        if self.world == 1:
            return value
        box = [value if self.main else None]
        with clear_errors(self):
            dist.broadcast_object_list(box, src=0)
        return box[0]


def ranks_here() -> Ranks:
    """Join the launch's processes (once), or stand alone.

    Raises UserError for FSDP of version 1, where DeepSpeed is asked for and not installed, and where several processes
    were asked for in a way that makes each one think it is alone.
    """
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(
            f"accelerate's configuration asks for FSDP version {os.environ['FSDP_VERSION']}",
            "edgedistill shards with FSDP2: accelerate launch --use_fsdp --fsdp_version 2 -m edgedistill ...",
        )
    if asked_world() == 1:
        if zero:
            raise UserError(
                "accelerate's configuration asks for DeepSpeed, and there is one process, which trains without it",
                "start several (--num_processes), or leave --use_deepspeed out",
            )
        _require_alone()
        return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), sharded=False)
    from accelerate import PartialState

    if zero:
        from edgedistill.training.zero import load_deepspeed

        load_deepspeed()  # before anything else imports it and has it write to standard output
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    return Ranks(state.process_index, state.num_processes, state.device, sharded=sharded, zero=zero)


def _require_alone() -> None:
    """Without WORLD_SIZE this process trains everything: refuse where a launcher was asked for more. UserError."""
    if "WORLD_SIZE" in os.environ:
        return
    several = "start the processes with torchrun --nproc-per-node N -m edgedistill ..."
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{os.environ[name]} processes were started by MPI, which edgedistill does not join", several
            )
    # accelerate sets the address for several processes, and with --cpu starts a single one
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch --cpu was asked for several processes, and started one",
            f"{several}, or accelerate launch with --multi_gpu (without GPUs it trains on the CPU)",
        )


def leave() -> None:
    """Take the process group down once all ranks are here; what follows is one process's work."""
    if asked_world() > 1 and dist.is_initialized():
        from accelerate.state import AcceleratorState, PartialState

        ranks_here().barrier()
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


@contextmanager
def clear_errors(ranks: Ranks) -> Iterator[None]:
    """A collective that breaks means that another rank died: say so."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world > 1 and any(sign in text for sign in ("Connection", "closed", "timed out", "NCCL", "gloo")):
            raise EdgedistillError(
                f"rank {ranks.rank} of {ranks.world} lost another rank: {_in_short(text)}",
                "look for the first error among the ranks' output; the last checkpoint is kept, the same command"
                " goes on from it, with any number of ranks",
            ) from error
        raise


def _in_short(text: str) -> str:
    """The first sentence, without the place in gloo's or NCCL's source that it begins with."""
    return re.sub(r"^\[\S+\] ", "", text.splitlines()[0]).split(". ")[0][:160]


def run_together(
    ranks: Ranks,
    store: Store,
    stage: str,
    inputs: Mapping[str, Any],
    build: Callable[[Work], R],
    result_type: type[R],
    on_wait: Callable[[str], None] | None = None,
) -> Stored[R]:
    """`Store.run` for all ranks: rank 0 holds the lock and writes the record, the others build beside it."""
    if ranks.world == 1:
        return store.run(stage, inputs, build, result_type, on_wait)

    def together(work: Work) -> R:
        # data parallelism and sharding exchange in many places: whichever notices first
        with clear_errors(ranks):
            return build(work)

    if ranks.main:
        told: list[bool] = []

        def lead(work: Work) -> R:
            told.append(True)
            ranks.broadcast({"out": str(work.out), "state": str(work.state), "key": work.key})
            return together(work)

        stored = store.run(stage, inputs, lead, result_type, on_wait)
        if not told:
            ranks.broadcast(None)
        ranks.barrier()
        return stored
    place = ranks.broadcast(None)
    if place is not None:
        together(Work(out=Path(place["out"]), state=Path(place["state"]), key=place["key"]))
    ranks.barrier()
    found = store.find(stage, inputs, result_type)
    if found is None:
        raise EdgedistillError(
            f"rank {ranks.rank} does not see the {stage} that rank 0 wrote to {store.root}",
            "all ranks need the same store: name a shared folder in EDGEDISTILL_STORE",
        )
    return found
