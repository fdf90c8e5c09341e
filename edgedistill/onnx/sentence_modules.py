"""The modules of a sentence-transformers folder in torch. Imported only where a model is exported.

Shapes: B batch, T tokens, D width of a token's vector, E width of the embedding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.onnx.sentence import Pipeline, Step, pooling_modes

WEIGHTS = "model.safetensors"
ACTIVATIONS = "torch.nn."


class Sentence(nn.Module):
    """A text's embedding: the transformer, then the pooling and what follows it.

    The transformer gets the inputs that it takes; the pooling reads `attention_mask` whether or not that is one.
    """

    def __init__(self, model: nn.Module, pipeline: Pipeline, *, left_padded: bool = False) -> None:
        super().__init__()
        self.model = model
        self.taken = frozenset(inspect.signature(model.forward).parameters)
        self.steps = nn.ModuleList(_module(step, left_padded) for step in pipeline.steps)
        self.dimensions = pipeline.dimensions

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if name in self.taken}
        states = self.model(**given).last_hidden_state
        for step in self.steps:
            states = step(states, inputs["attention_mask"]) if isinstance(step, Pooling) else step(states)
        return {"sentence_embedding": states if self.dimensions is None else states[:, : self.dimensions]}


class Pooling(nn.Module):
    """[B, T, D] and the mask [B, T] → [B, D], or several such side by side."""

    def __init__(self, modes: tuple[str, ...], *, left_padded: bool) -> None:
        super().__init__()
        self.modes = modes
        self.left_padded = left_padded

    def forward(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        pooled = [self._pooled(mode, states_BTD, mask_BT) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)

    def _pooled(self, mode: str, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        mask_BT1 = mask_BT.to(states_BTD.dtype).unsqueeze(-1)
        # Counted from the first token that is no padding
        place_BT = mask_BT.to(torch.int64).cumsum(1)
        if mode == "cls" and not self.left_padded:
            return states_BTD[:, 0]
        if mode == "cls":
            return (states_BTD * ((place_BT == 1) & (mask_BT > 0)).to(states_BTD.dtype).unsqueeze(-1)).sum(1)
        if mode == "lasttoken":
            last_BT = (place_BT == place_BT[:, -1:]) & (mask_BT > 0)
            return (states_BTD * last_BT.to(states_BTD.dtype).unsqueeze(-1)).sum(1)
        if mode == "max":
            return states_BTD.masked_fill(mask_BT1 == 0, torch.finfo(states_BTD.dtype).min).amax(1)
        if mode == "weightedmean":
            mask_BT1 = mask_BT1 * place_BT.to(states_BTD.dtype).unsqueeze(-1)
        count_B1 = mask_BT1.sum(1).clamp(min=1e-9)
        return (states_BTD * mask_BT1).sum(1) / (count_B1.sqrt() if mode == "mean_sqrt_len_tokens" else count_B1)


class Dense(nn.Module):
    """[B, D] → [B, E]: activation(x W + b), and x beside it where the layer has a residual."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        width, out = int(step.settings["in_features"]), int(step.settings["out_features"])
        self.linear = nn.Linear(width, out, bias=bool(step.settings.get("bias", True)))
        self.activation = activation(step.settings.get("activation_function", "torch.nn.Tanh"), str(step.folder))
        self.use_residual = bool(step.settings.get("use_residual", False))
        if self.use_residual and width != out:
            self.residual = nn.Linear(width, out, bias=False)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(embedding_BD))
        if not self.use_residual:
            return found
        return found + (self.residual(embedding_BD) if hasattr(self, "residual") else embedding_BD)


class Normalize(nn.Module):
    def forward(self, embedding_BE: Tensor) -> Tensor:
        return nn.functional.normalize(embedding_BE, dim=-1)


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding_BE: Tensor) -> Tensor:
        found: Tensor = self.norm(embedding_BE)
        return found


class Reranked(nn.Module):
    """A classifier's `logits`, and `scores`: what sentence-transformers' CrossEncoder gives of them."""

    def __init__(self, model: nn.Module, activation_function: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.activation = activation_function

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.model(**inputs).logits
        return {"logits": logits, "scores": self.activation(logits)}


def activation(name: Any, where: str) -> nn.Module:
    """The module of torch that a config names. UserError for code from elsewhere."""
    if name is None:
        return nn.Identity()
    found = getattr(nn, str(name).rpartition(".")[2], None)
    if not str(name).startswith(ACTIVATIONS) or not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(f"{where}: the activation is {name!r}", "name a class of torch.nn.modules.activation")
    made: nn.Module = found()
    return made


def _module(step: Step, left_padded: bool) -> nn.Module:
    if step.kind == "Pooling":
        return Pooling(pooling_modes(step.settings), left_padded=left_padded)
    if step.kind == "Normalize":
        return Normalize()
    if step.kind == "Dropout":
        return nn.Identity()  # of training
    try:
        made = Dense(step) if step.kind == "Dense" else LayerNorm(int(step.settings["dimension"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{step.folder}/config.json is not that of a {step.kind}: {error!r}", "replace it with the model's own"
        ) from error
    _load(made, step)
    return made.eval()


def _load(module: nn.Module, step: Step) -> None:
    """Weights from the step's folder. UserError where they are missing, pickled, of another shape or not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = step.folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"the {step.kind} module has no {path}",
            "save the model again with sentence-transformers: save_pretrained(folder, safe_serialization=True)",
        )
    try:
        weights = {name: value.float() for name, value in load_file(str(path)).items()}
        module.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} does not fit its config.json: {reason}", "replace both with the model's own"
        ) from error
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: tensor {name} holds values that are NaN or infinite", "download the model again")
