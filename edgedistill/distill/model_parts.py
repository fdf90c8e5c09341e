"""The two parts of a causal language model that training needs apart: its body and its head."""

from __future__ import annotations

import math

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.tasks.causal_lm import Window

EVALUATION_TOKENS = 4096  # of one evaluation batch


def output_head(model: nn.Module) -> Tensor:
    """The output head's weight [V, H], tied or not."""
    weight: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    return weight


def final_hidden(model: nn.Module, inputs: Tensor, low_precision: bool) -> Tensor:
    """Hidden states after the final norm [S·T, H] of ids [S, T]."""
    weight = output_head(model)
    with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=low_precision):
        hidden: Tensor = model.get_decoder()(input_ids=inputs.to(weight.device), use_cache=False).last_hidden_state  # type: ignore[operator]
    return hidden.flatten(0, 1)


@torch.no_grad()
def perplexity(model: nn.Module, windows: list[Window], *, low_precision: bool) -> float:
    """exp of the mean negative log-likelihood (nats) over the windows' scored tokens; inf where it is not finite.

    Windows of equal length go together, so nothing is padded.
    """
    model.eval()
    head = output_head(model)
    total, count = 0.0, 0
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.ids), []).append(window)
    for length, group in sorted(by_length.items()):
        size = max(1, EVALUATION_TOKENS // length)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            ids = torch.stack([torch.from_numpy(w.ids.astype("int64")) for w in part]).to(head.device)
            hidden = final_hidden(model, ids[:, :-1], low_precision)
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=low_precision):
                logits = hidden @ head.T
            nll = nn.functional.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="none")
            firsts = torch.tensor([w.first for w in part], device=ids.device).unsqueeze(1)
            keep = (torch.arange(length - 1, device=ids.device).unsqueeze(0) >= firsts).reshape(-1)
            total += float(nll[keep].sum(dtype=torch.float64))
            count += int(keep.sum())
    mean = total / max(1, count)
    return math.exp(min(700.0, mean)) if math.isfinite(mean) else math.inf
