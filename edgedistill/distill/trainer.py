"""The training loop: one for teacher and student, deterministic, resumable at any step.

What step n does is a function of the settings, the seed and n alone, so that a run which was killed
and goes on from its last checkpoint ends with the bytes of one that was not (same machine, same
number of threads).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import nn  # noqa: TID253

from edgedistill.distill.checkpoint import Position, load_checkpoint, parameters, save_checkpoint
from edgedistill.distill.losses import IGNORED, LossSpec, head_loss
from edgedistill.distill.model_parts import final_hidden, output_head, perplexity
from edgedistill.distill.signals import Signals
from edgedistill.errors import EdgedistillError
from edgedistill.progress import QUIET, Progress
from edgedistill.recipe import Training
from edgedistill.records import TrainResult
from edgedistill.tasks.causal_lm import Packed, Window


def total_steps(settings: Training, data: Packed) -> int:
    """Optimizer steps that the recipe's tokens, else its epochs, make; at least one."""
    tokens = settings.tokens or settings.epochs * data.sequences * data.context
    return max(1, round(tokens / (settings.batch_sequences * data.context)))


def rate_share(step: int, steps: int, settings: Training) -> float:
    """Learning rate of step 0 … steps − 1 as a share of its peak: linear warm-up, then cosine."""
    warmup = round(settings.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    low = settings.final_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(model: nn.Module, settings: Training) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (Jordan et al. 2024) for the layers' matrices with AdamW for the rest.

    Weight decay stays off norms, biases and embeddings.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    betas = (settings.beta1, settings.beta2)
    optimizers: list[torch.optim.Optimizer]
    if settings.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay),
            torch.optim.AdamW(rest, lr=settings.learning_rate, betas=betas, weight_decay=0.0, fused=True),
        ]
    else:
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(
    model: nn.Module,
    *,
    data: Packed,
    evaluation: list[Window],
    settings: Training,
    loss: LossSpec,
    signals: Signals | None,
    state: Path,
    progress: Progress = QUIET,
    label: str = "train",
) -> TrainResult:
    """Train `model` in place (left with its best weights by the evaluation windows' perplexity).

    Runs where the model is. `signals` gives the frozen teacher's; None where the loss has no KL. `state` is the folder
    of checkpoints.
    Raises EdgedistillError at a loss that is not finite; the last good checkpoint stays.
    """
    steps = total_steps(settings, data)
    every = max(1, round(settings.evaluate_every_share * steps))
    low_precision = settings.precision == "bf16"
    optimizers = make_optimizers(model, settings)
    position = Position(0, 0.0, 0, math.inf, 0, [])
    best = {name: value.clone() for name, value in parameters(model).items()}
    resumed = load_checkpoint(state, model=model, optimizers=optimizers)
    if resumed is not None:
        position, best = resumed
        progress.say(f"{label}: goes on from step {position.step:,} of {steps:,}")
    started = time.monotonic() - position.seconds
    saved_at = time.monotonic()
    stopped = _impatient(position, settings)
    batches = data.batches(settings.batch_sequences, position.step)
    last_terms: dict[str, float] = {}
    while position.step < steps and not stopped:
        share = rate_share(position.step, steps, settings)
        rows = next(batches)
        last_terms = _step(model, signals, data, rows, optimizers, settings, loss, share, low_precision)
        if not math.isfinite(last_terms["loss"]) or not math.isfinite(last_terms["gradient_norm"]):
            raise EdgedistillError(
                f"{label}: step {position.step} has a loss of {last_terms['loss']} and a gradient norm of"
                f" {last_terms['gradient_norm']}",
                "lower distill.learning_rate; the last good checkpoint is kept and the next run goes on from it",
            )
        step = position.step + 1
        position = Position(**{**position.__dict__, "step": step, "seconds": time.monotonic() - started})
        if step % every == 0 or step == steps:
            value = perplexity(model, evaluation, low_precision=low_precision)
            better = value < position.best_value
            if better:
                best = {name: tensor.clone() for name, tensor in parameters(model).items()}
            row = {"step": float(step), "perplexity": value, **{k: round(v, 6) for k, v in last_terms.items()}}
            position = Position(
                step=step,
                seconds=time.monotonic() - started,
                best_step=step if better else position.best_step,
                best_value=min(value, position.best_value),
                evaluations_without_better=0 if better else position.evaluations_without_better + 1,
                history=[*position.history, row],
            )
            stopped = _impatient(position, settings)
        speed = step * settings.batch_sequences * data.context / max(1e-9, position.seconds)
        shown = {name: f"{value:.3f}" for name, value in last_terms.items()}
        if position.history:
            shown["perplexity"] = f"{position.history[-1]['perplexity']:.2f}"
        left = (steps - step) * position.seconds / step
        progress.step(label, step, steps, **shown, speed=f"{speed:,.0f} tokens/s", left=f"{left:.0f} s")
        if step < steps and time.monotonic() - saved_at >= settings.checkpoint_every_s:
            save_checkpoint(state, model=model, optimizers=optimizers, best=best, position=position)
            saved_at = time.monotonic()
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            parameter.copy_(best[name])
    model.eval()
    tokens = position.step * settings.batch_sequences * data.context
    return TrainResult(
        steps=position.step,
        tokens=tokens,
        seconds=round(position.seconds, 3),
        tokens_per_s=round(tokens / max(1e-9, position.seconds), 1),
        best_step=position.best_step,
        stopped_early=stopped,
        history=position.history,
        loss=loss.name,
        precision=settings.precision,
    )


def _impatient(position: Position, settings: Training) -> bool:
    return settings.patience > 0 and position.evaluations_without_better >= settings.patience


def _step(
    model: nn.Module,
    signals: Signals | None,
    data: Packed,
    rows: NDArray[np.int64],
    optimizers: list[torch.optim.Optimizer],
    settings: Training,
    loss: LossSpec,
    share: float,
    low_precision: bool,
) -> dict[str, float]:
    """One optimizer step over the packed sequences `rows`, in micro-batches normalised by all valid tokens."""
    model.train()
    batch = torch.from_numpy(data.sequence_ids(rows))
    valid = int((batch[:, 1:] != IGNORED).sum())
    sums = {"loss": 0.0, "kl": 0.0, "ce": 0.0}
    size = settings.micro_batch_sequences or settings.batch_sequences
    for start in range(0, len(rows), size):
        part = batch[start : start + size]
        inputs, targets = part[:, :-1], part[:, 1:].reshape(-1).to(output_head(model).device)
        teacher = None if signals is None else signals.head(rows[start : start + size], inputs)
        hidden = final_hidden(model, inputs, low_precision)
        value, terms = head_loss(
            hidden, output_head(model), teacher, targets, loss, valid_total=valid, low_precision=low_precision
        )
        value.backward()  # type: ignore[no-untyped-call]
        sums["loss"] += float(value.detach())
        for name, term in terms.items():
            sums[name] += term
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm))
    if math.isfinite(norm) and math.isfinite(sums["loss"]):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if loss.forward_kl <= 0:
        del sums["kl"]
    return {**sums, "gradient_norm": norm}
