"""Whatever gives logits, behind one Protocol: torch here, the shipped artifact in its runtime's own process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.models.loading import LOADING
from edgedistill.runtimes.process import RuntimeProcess

UNUSED = "pooler."  # an encoder's, on which no embedding depends


class Scorer(Protocol):
    """Logits [S, T, V] fp32 of S sequences of T ids, each from its start."""

    runtime: str

    def logits(self, ids: NDArray[np.int64]) -> Tensor: ...


class TorchScorer:
    """A transformers model in fp32."""

    def __init__(self, model: nn.Module) -> None:
        from edgedistill.models.device import training_device

        self.device = training_device()
        self.model = model.eval().to(self.device)
        self.runtime = f"torch {torch.__version__} fp32 on {self.device.type}"

    @torch.no_grad()
    def logits(self, ids: NDArray[np.int64]) -> Tensor:
        output: Tensor = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).logits
        return output.float().cpu()


class ArtifactScorer:
    """The artifact's bytes in their own runtime."""

    def __init__(self, process: RuntimeProcess) -> None:
        self.process = process
        self.runtime = f"{process.info['runtime']} {process.info['runtime_version']}"

    def logits(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.stack([torch.from_numpy(self.process.logits(row)) for row in ids])


def load_torch(folder: Path, *, encoder: bool = False) -> nn.Module:
    """A model folder as a fp32 transformers model in eval: a causal language model, or an encoder without a head."""
    from transformers import AutoModel, AutoModelForCausalLM

    model: Any = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(
        folder, dtype=torch.float32, **LOADING
    )
    return model.eval()  # type: ignore[no-any-return]


def with_weights(
    folder: Path, weights: Iterable[tuple[str, NDArray[np.float32]]], *, encoder: bool = False
) -> nn.Module:
    """The model of a folder's config with these weights; one that is missing or unknown is a UserError.

    A tied model is untied where the artifact stores a head of its own.
    """
    model: Any = load_torch(folder, encoder=encoder)
    own = {name: tensor for name, tensor in model.named_parameters() if not name.startswith(UNUSED)}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    missing = set(own)
    with torch.no_grad():
        for name, values in weights:
            tensor = torch.from_numpy(np.array(values, dtype=np.float32))
            if name == "lm_head.weight" and tied:
                model.lm_head.weight = nn.Parameter(tensor, requires_grad=False)
                continue
            if name not in own:
                raise UserError(f"the artifact holds {name}, which {folder} does not have", "export the artifact again")
            own[name].copy_(tensor)
            missing.discard(name)
    if missing:
        raise UserError(
            f"the artifact lacks {len(missing)} tensors of {folder}: {sorted(missing)[0]}", "export the artifact again"
        )
    return model  # type: ignore[no-any-return]
