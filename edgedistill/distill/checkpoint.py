"""Training checkpoints: safetensors and JSON, whole or not there, the two newest kept while one is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn  # noqa: TID253

from edgedistill.store import fsync_folder, fsync_tree

FORMAT = "edgedistill.checkpoint/1"


@dataclass(frozen=True)
class Position:
    """Where training stands: everything but the tensors."""

    step: int
    seconds: float
    best_step: int
    best_value: float
    evaluations_without_better: int
    history: list[dict[str, float]]


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    best: dict[str, Tensor],
    position: Position,
) -> None:
    """Write `step-N` beside the last checkpoint, then rename, then remove older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({k: v.contiguous() for k, v in parameters(model).items()}, temporary / "model.safetensors")
    save_file({k: v.contiguous() for k, v in best.items()}, temporary / "best.safetensors")
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    scalars: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                key = f"{number}.{index}.{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value.contiguous()
                else:
                    scalars[key] = value
    save_file(tensors, temporary / "optimizer.safetensors")
    record = {"format": FORMAT, "scalars": scalars, "position": position.__dict__}
    (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")
    fsync_tree(temporary)
    final = folder / f"step-{position.step:09d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    fsync_folder(folder)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, *, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[Position, dict[str, Tensor]] | None:
    """Put the newest checkpoint into model, optimizers and the random state; None where there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            continue
        with torch.no_grad():
            stored = load_file(path / "model.safetensors")
            for name, parameter in parameters(model).items():
                parameter.copy_(stored[name])
        tensors = load_file(path / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng"))
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Any]] = {}
            for key, value in {**tensors, **record["scalars"]}.items():
                owner, index, name = key.split(".", 2)
                if int(owner) == number:
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return Position(**record["position"]), load_file(path / "best.safetensors")
    return None


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter data, tied ones once; live views, not copies."""
    return {name: parameter.data for name, parameter in model.named_parameters()}
