"""A trained model on disk, as transformers writes it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.models.generation import GENERATION_FILE
from edgedistill.store import sha256_of

if TYPE_CHECKING:
    from edgedistill.training.ranks import Ranks


def save_model(model: Any, folder: Path, ranks: Ranks, *, dtype: Any = None) -> None:
    """The model as transformers writes it, by rank 0; a sharded one is gathered, and tied weights are written once."""
    from transformers import GenerationConfig

    from edgedistill.training.checkpoint import whole

    # a gathered tensor is a new one each time, so transformers could not see that two names are one weight
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    state = {name: whole(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    if not ranks.main:
        return
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        model.config.dtype = dtype
    # transformers loads settings that it refuses to save: a temperature without do_sample. They are copied as a file.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, state_dict=state)


def keep_generation(source: Path, folder: Path) -> None:
    """Copy generation_config.json of the model that another was made of: settings, and stop tokens it alone has."""
    if (source / GENERATION_FILE).is_file():
        (folder / GENERATION_FILE).write_bytes((source / GENERATION_FILE).read_bytes())


def weights_digest(folder: Path) -> str:
    """One hash over the safetensors that `save_pretrained` wrote."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
