"""The student's perplexity while it trains."""

from __future__ import annotations

import math

import torch  # noqa: TID253  this module is imported by training alone
from torch import nn  # noqa: TID253

from edgedistill.fit.chunks import EVALUATION_TOKENS
from edgedistill.losses.losses import IGNORED, LossSpec
from edgedistill.tasks.causal_lm import Window
from edgedistill.training.loss_module import bare, settle
from edgedistill.training.ranks import Ranks


@torch.no_grad()
def perplexity(
    module: nn.Module, windows: list[Window], ranks: Ranks, *, batch_tokens: int = EVALUATION_TOKENS
) -> float:
    """exp of the mean negative log-likelihood (nats) over the windows' scored tokens; inf where it is not finite.

    `module` is the wrapped loss module. Windows of equal length go together, so nothing is padded; the ranks
    share the batches.
    """
    module.eval()
    spec = LossSpec({"cross_entropy": 1.0}, temperature=1.0, vocab=bare(module).spec.vocab)
    batches = _batches(windows, min(batch_tokens, EVALUATION_TOKENS))
    total, count = 0.0, 0.0
    for first in range(0, len(batches), ranks.world):
        mine = first + ranks.rank
        # a sharded model's forward pass needs every rank: one without a batch of its own repeats the last, uncounted
        part = batches[min(mine, len(batches) - 1)]
        ids = torch.stack([torch.from_numpy(w.ids.astype("int64")) for w in part])
        targets = ids[:, 1:].clone()
        for row, window in enumerate(part):
            targets[row, : window.first] = IGNORED
        value, _ = module(
            ids[:, :-1].to(ranks.device), targets.reshape(-1).to(ranks.device), None, None, valid_total=1, spec=spec
        )
        if mine < len(batches):
            total += float(value)
            count += float((targets != IGNORED).sum())
    settle(module)
    total, count = ranks.sum([total, count])
    mean = total / max(1.0, count)
    return math.exp(min(700.0, mean)) if math.isfinite(mean) else math.inf


def _batches(windows: list[Window], batch_tokens: int) -> list[list[Window]]:
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.ids), []).append(window)
    batches = []
    for length, group in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches
