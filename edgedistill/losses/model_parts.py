"""The parts of a causal language model that training needs apart: its body and its head."""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.losses.losses import Head

PROBE_TOKENS = 8  # of each of the two documents
MOST_LEAK = 0.1  # of what crosses in packed attention; 0 was seen in fp32, INT8 activations share outlier columns


def output_head(model: nn.Module) -> Tensor:
    """The output head's weight [V, H], tied or not."""
    weight: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    return weight


def head_of(model: nn.Module) -> Head:
    """The output head with what its family does to logits: bias, multiplier (Granite divides), soft cap (Gemma 2)."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    config: Any = model.config
    text = getattr(config, "text_config", None) or config
    scale = 1.0
    if getattr(text, "logits_scaling", None):
        scale = 1.0 / float(text.logits_scaling)
    elif getattr(text, "logit_scale", None):
        scale = float(text.logit_scale)
    cap = getattr(text, "final_logit_softcapping", None)
    return Head(layer.weight, bias=layer.bias, scale=scale, softcap=float(cap) if cap else None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs: where its weights are or, offloaded by accelerate, where its hooks fetch them."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
    return next(torch.device(hook.execution_device) for hook in hooks if getattr(hook, "execution_device", None))


def final_hidden(model: nn.Module, inputs: Tensor, low_precision: bool, positions: Tensor | None = None) -> Tensor:
    """Hidden states after the final norm [S·T, H] of ids [S, T].

    `positions` [S, T] that start again at 0 make each such run of tokens attend to itself alone.
    """
    device = device_of(model)
    extra = {} if positions is None else {"position_ids": positions.to(device)}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision):
        hidden: Tensor = model.get_decoder()(input_ids=inputs.to(device), use_cache=False, **extra).last_hidden_state  # type: ignore[operator]
    return hidden.flatten(0, 1)


@torch.no_grad()
def require_separate_documents(model: nn.Module) -> None:
    """Refuse a model in which positions that start again do not keep packed documents apart. UserError.

    Found by trying: does the second document's state move when the first one's tokens change? A family may ignore
    positions (Bloom, MPT), or carry a state over (Mamba), whatever its attention implementation.
    """
    was_training = model.training
    model.eval()
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.arange(2 * PROBE_TOKENS).repeat(2, 1) % vocab
    changed = ids.clone()
    changed[:, :PROBE_TOKENS] = (changed[:, :PROBE_TOKENS] + vocab // 2) % vocab
    positions = torch.arange(PROBE_TOKENS).repeat(2, 2)

    def moved(positions: Tensor | None) -> float:
        first, other = (
            final_hidden(model, tokens, False, positions).float().view(2, 2 * PROBE_TOKENS, -1)[:, PROBE_TOKENS:]
            for tokens in (ids, changed)
        )
        return float((first - other).norm() / first.norm())

    kept_apart, packed = moved(positions), moved(None)
    model.train(was_training)
    if kept_apart > MOST_LEAK * packed:
        config: Any = model.config
        raise UserError(
            f"distill.attention is documents, and {type(model).__name__} with {config._attn_implementation} attention"
            f" lets a document see the one before it (its states move by {kept_apart:.2g} of their size with it)",
            "set distill.attention=packed, or use a family that starts again when positions do (llama, qwen2, qwen3,"
            " mistral, gemma, phi3, gpt2)",
        )
