"""Training checkpoints: safetensors and JSON, whole or not there; the best weights and the last.

    step-000000120/   model, optimizer (by parameter name), random states, state.json
    best-000000100/   the weights of the best evaluation that the newest step names

Tensors are whole, whatever the ranks: a run goes on with another number of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.store import fsync_folder, fsync_tree
from edgedistill.training import zero
from edgedistill.training.ranks import Ranks

FORMAT = "edgedistill.checkpoint/2"


@dataclass(frozen=True)
class Position:
    """Where training stands: everything but the tensors. `best_step` 0: no evaluation yet."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_value: float = float("inf")
    evaluations_without_better: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    micro_batch_sequences: int = 0
    taid_share: float = 0.0
    taid_momentum: float = 0.0
    tokens: int = 0


def save_checkpoint(
    folder: Path, *, model: nn.Module, optimizers: list[torch.optim.Optimizer], position: Position, ranks: Ranks
) -> None:
    """Write `step-N` beside the last one, rename it into place, then remove what it does not need. All ranks call it.

    Raises UserError where the disk is full; the checkpoint before it stays.
    """
    tensors, scalars = _optimizer_state(model, optimizers)
    weights = whole_parameters(model)
    states = _random_states(ranks)
    if not ranks.main:
        return
    temporary = _fresh(folder / "writing")
    record = {"format": FORMAT, "scalars": scalars, "position": asdict(position)}
    final = folder / f"step-{position.step:09d}"
    with _no_room(folder):
        save_file(weights, temporary / "model.safetensors")
        save_file({**tensors, **states}, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")
        _put(temporary, final)
    keep = {final.name, f"best-{position.best_step:09d}"}
    for old in [*folder.glob("step-*"), *folder.glob("best-*")]:
        if old.name not in keep:
            shutil.rmtree(old, ignore_errors=True)


def save_best(folder: Path, *, model: nn.Module, step: int, ranks: Ranks) -> None:
    """Write the weights as those of the best evaluation so far. All ranks call it."""
    weights = whole_parameters(model)
    if ranks.main:
        temporary = _fresh(folder / "writing-best")
        with _no_room(folder):
            save_file(weights, temporary / "model.safetensors")
            _put(temporary, folder / f"best-{step:09d}")


def load_best(folder: Path, *, model: nn.Module, step: int) -> None:
    """Put the best weights into the model, in place."""
    _fill_parameters(model, load_file(folder / f"best-{step:09d}" / "model.safetensors"))


def load_checkpoint(
    folder: Path, *, model: nn.Module, optimizers: list[torch.optim.Optimizer], ranks: Ranks
) -> Position | None:
    """Put the newest checkpoint into model, optimizers and the random state; None where there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            continue
        _fill_parameters(model, load_file(path / "model.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        for kind in ("cpu", "cuda"):
            state = tensors.get(f"rng.{kind}.{ranks.rank}")
            if state is not None and kind == "cpu":
                torch.set_rng_state(state)
            elif state is not None and ranks.device.type == "cuda":
                torch.cuda.set_rng_state(state, ranks.device)
        _fill_optimizers(model, optimizers, {**tensors, **record["scalars"]})
        return Position(**record["position"])
    return None


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name → trained parameter, tied ones once; frozen ones are not part of a checkpoint."""
    return {
        name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name → the whole parameter on the CPU, gathered from its shards where it has them (a collective)."""
    return {name: whole(parameter) for name, parameter in parameters(model).items()}


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous; a sharded one gathered from all ranks."""
    if zero.is_parted(tensor):
        return zero.gathered(tensor).cpu().contiguous()
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous()


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor laid out as `parameter` is: its device and, where it is sharded, its shards."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return value.to(parameter.device)


@torch.no_grad()
def _fill_parameters(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters(model).items():
        if zero.is_kept_twice(parameter):
            zero.fill_parameter(parameter, stored[name])
            continue
        parameter.copy_(_like(stored[name], parameter))


def _optimizer_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every optimizer's state as "optimizer|parameter|entry" → tensor, and what is not a tensor."""
    names = {id(parameter): name for name, parameter in parameters(model).items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    places: set[int] = set()
    for number, optimizer in enumerate(optimizers):
        if zero.is_zero(optimizer):
            return zero.optimizer_state(optimizer, parameters(model)), scalars
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                key = f"{number}|{names[id(parameter)]}|{entry}"
                if isinstance(value, Tensor):
                    kept = whole(value)
                    # 8-bit states share their tables, which a safetensors file refuses
                    tensors[key] = kept.clone() if kept.data_ptr() in places else kept
                    places.add(kept.data_ptr())
                else:
                    scalars[key] = value
    return tensors, scalars


def _fill_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], stored: Mapping[str, Tensor | Any]
) -> None:
    named = parameters(model)
    if zero.is_zero(optimizers[0]):
        zero.fill_optimizer(optimizers[0], named, stored)
        return
    for key, value in stored.items():
        if "|" not in key:
            continue
        number, name, entry = key.split("|")
        parameter = named[name]
        if isinstance(value, Tensor):
            value = _like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
        optimizers[int(number)].state[parameter][entry] = value


def _random_states(ranks: Ranks) -> dict[str, Tensor]:
    """Every rank's random states, "rng.cpu.0" …, on all ranks."""
    mine = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(ranks.device)
    everyone: list[Any] = [mine]
    if ranks.world > 1:
        import torch.distributed as dist

        everyone = [None] * ranks.world
        dist.all_gather_object(everyone, mine)
    return {f"rng.{kind}.{rank}": state for rank, states in enumerate(everyone) for kind, state in states.items()}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _put(temporary: Path, final: Path) -> None:
    fsync_tree(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    fsync_folder(final.parent)


class _no_room:
    """A full disk, said in words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        text = str(error)
        if getattr(error, "errno", None) in (28, 122) or "No space left" in text or "os error 28" in text:
            free = shutil.disk_usage(self.folder).free
            raise UserError(
                f"the disk is full: a checkpoint could not be written to {self.folder} ({free:,} bytes are free)",
                "free space or name another disk in EDGEDISTILL_STORE; the checkpoint before it is kept, and the same"
                " command goes on from it",
            ) from error
