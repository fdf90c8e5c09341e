"""The training loop: one for teacher and student, one process or many, resumable at any step.

What step n does is a function of the settings, the seed and n alone, so that a run which was killed
and goes on from its last checkpoint ends with the bytes of one that was not (same machine, same number
of threads and ranks; with another number of ranks it differs by rounding).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import nn  # noqa: TID253

from edgedistill.config.recipe import Training
from edgedistill.errors import EdgedistillError, UserError
from edgedistill.losses.losses import LossSpec
from edgedistill.losses.model_parts import require_separate_documents
from edgedistill.progress import QUIET, Progress
from edgedistill.records.training import TrainResult
from edgedistill.signals.signals import Signals
from edgedistill.store import write_durably
from edgedistill.tasks.causal_lm import Packed, Window
from edgedistill.training import zero
from edgedistill.training.checkpoint import Position, load_best, load_checkpoint, save_best, save_checkpoint
from edgedistill.training.evaluate import perplexity
from edgedistill.training.interrupt import Interrupt, after_the_step
from edgedistill.training.loss_module import LossModule, bare, wrap
from edgedistill.training.optimizers import make_optimizers
from edgedistill.training.optimizers import rate_share as rate_share
from edgedistill.training.ranks import Ranks, ranks_here
from edgedistill.training.step import Figures, Step
from edgedistill.training.trackers import Tracker, memory_bytes, open_tracker

RECENT_LOSSES = 64
FEWEST_FOR_SPIKE = 16
MOST_SKIPPED_IN_A_ROW = 10
KL_EVERY = 10  # steps between measurements of the KL at T = 1 where the loss does not give it anyway
TAID_RATE, TAID_DECAY = 5e-4, 0.99  # alpha and beta of Shing et al. 2025, algorithm 1


def total_steps(settings: Training, data: Packed) -> int:
    """Optimizer steps that the recipe's tokens, else its epochs, make; at least one."""
    tokens = settings.tokens or settings.epochs * data.sequences * data.context
    return max(1, round(tokens / (settings.batch_sequences * data.context)))


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
    ranks: Ranks | None = None,
    taid: tuple[float, float] = (1.0, 1.0),
    logs: Path | None = None,
    weights: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TrainResult:
    """Train `model` in place (left with its best weights by the evaluation windows' perplexity).

    Runs where the model is. `signals` gives the frozen teacher's; None where the loss needs none. `state` is the
    folder of checkpoints, `logs` that of the tracker (None: no tracker). `taid`: the teacher's share at the first
    and the last step. `weights` puts into the model what passes over it shall compute with, evaluations included, and
    takes it out again; what is updated, kept and saved is what was there before. Under several ranks every one of them
    calls it with the same arguments.
    Raises EdgedistillError at a loss that is not finite or leaps, UserError where memory or the disk does not
    suffice; the last good checkpoint stays.
    """
    ranks = ranks or ranks_here()
    _require_divisible(settings, ranks)
    if settings.attention == "documents":
        require_separate_documents(model)
    steps = total_steps(settings, data)
    every = max(1, round(settings.evaluate_every_share * steps))
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    module = wrap(LossModule(model, loss, low_precision=settings.precision == "bf16"), ranks)
    if settings.compile:
        _compile_body(model, ranks.device)
    optimizers = make_optimizers(module, settings)
    local = settings.batch_sequences // ranks.world
    position = Position(micro_batch_sequences=min(local, settings.micro_batch_sequences or local), taid_share=taid[0])
    if ranks.zero and ranks.world > 1:
        module = zero.start_engine(module, optimizers, settings, position.micro_batch_sequences)
        optimizers = [module.optimizer]
    resumed = load_checkpoint(state, model=bare(module).student, optimizers=optimizers, ranks=ranks)
    if resumed is not None:
        position = replace(resumed, micro_batch_sequences=min(local, resumed.micro_batch_sequences))
        progress.say(f"{label}: goes on from step {position.step:,} of {steps:,}")
    tracker = open_tracker(
        settings.tracker if logs is not None else None, logs or state, run=label, ranks=ranks, progress=progress
    )
    step = Step(module, signals, data, optimizers, settings, ranks, progress, label, weights)
    started = time.monotonic() - position.seconds
    saved_at = time.monotonic()
    stopped = _impatient(position, settings)
    batches = data.batches(settings.batch_sequences, position.step)
    # Of several ranks each gets its own SIGINT, at a step of its own: they end where they are.
    with after_the_step(progress) if ranks.world == 1 else nullcontext(Interrupt()) as interrupt:
        while position.step < steps and not stopped:
            before = time.monotonic()
            rows = next(batches)
            figures, micro = step.run(
                rows,
                rate_share=rate_share(position.step, steps, settings),
                micro=position.micro_batch_sequences,
                taid_t=position.taid_share,
                spike=_spike_limit(position, settings),
                report_kl=position.step % KL_EVERY == 0,
            )
            bad = _what_is_bad(figures, position, settings)
            if bad:
                _report_bad_step(bad, position, rows, data, figures, state, label, settings, ranks, progress)
            position = _advance(position, figures, bad=bool(bad), micro=micro, steps=steps, taid=taid)
            if position.step % every == 0 or position.step == steps:
                with weights():
                    value = _perplexity(module, evaluation, position, ranks, data.context, settings.compile)
                position = _evaluated(module, value, position, figures, state, ranks)
                stopped = _impatient(position, settings)
            now = time.monotonic()
            position = replace(position, seconds=now - started)
            _tell(tracker, progress, label, figures, position, steps, settings, data, now - before, ranks)
            due = now - saved_at >= settings.checkpoint_every_s
            if interrupt.asked or (position.step < steps and not stopped and ranks.broadcast(due)):
                save_checkpoint(
                    state, model=bare(module).student, optimizers=optimizers, position=position, ranks=ranks
                )
                saved_at = time.monotonic()
            if interrupt.asked:
                raise KeyboardInterrupt
    tracker.close()
    ranks.barrier()
    _require_trained(position, label, settings)
    if position.best_step != position.step:
        load_best(state, model=bare(module).student, step=position.best_step)
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
        skipped_steps=position.skipped_steps,
        micro_batch_sequences=position.micro_batch_sequences,
        ranks=ranks.world,
    )


def _require_divisible(settings: Training, ranks: Ranks) -> None:
    if settings.batch_sequences % ranks.world:
        raise UserError(
            f"distill.batch_sequences is {settings.batch_sequences}, which {ranks.world} ranks cannot share evenly",
            f"set it to a multiple of {ranks.world}, or start another number of processes",
        )


def _compile_body(model: nn.Module, device: torch.device) -> None:
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError(
            "compile is true, and there is no C++ compiler, which torch.compile needs on a CPU",
            "install g++, or set compile=false: on a CPU it gains nothing that was measured",
        )
    body = model.get_decoder()  # type: ignore[operator]
    body.compile(dynamic=False)


def _advance(
    position: Position, figures: Figures, *, bad: bool, micro: int, steps: int, taid: tuple[float, float]
) -> Position:
    step = position.step + 1
    recent = position.recent_losses if bad else [*position.recent_losses, figures.loss][-RECENT_LOSSES:]
    share, momentum = _taid_share(position, figures.loss, step / steps, taid) if not bad else (
        position.taid_share, position.taid_momentum
    )  # fmt: skip
    return replace(
        position,
        step=step,
        recent_losses=recent,
        skipped_steps=[*position.skipped_steps, position.step] if bad else position.skipped_steps,
        micro_batch_sequences=micro,
        taid_share=share,
        taid_momentum=momentum,
        tokens=position.tokens + figures.valid,
    )


def _taid_share(position: Position, loss: float, done: float, taid: tuple[float, float]) -> tuple[float, float]:
    """The teacher's share for the next step and the momentum (Shing et al. 2025, algorithm 1).

    It rises at least linearly from start to end, and faster while the loss falls.
    """
    start, end = taid
    linear = start + (end - start) * done
    if start == end or not position.recent_losses:
        return max(position.taid_share, linear), position.taid_momentum
    last = position.recent_losses[-1]
    change = (last - loss) / (abs(last) + 1e-15)
    momentum = TAID_DECAY * position.taid_momentum + (1 - TAID_DECAY) * change
    leap = TAID_RATE / (1 + math.exp(-momentum)) * (1 - position.taid_share)
    return min(end, max(linear, position.taid_share + leap)), momentum


def _spike_limit(position: Position, settings: Training) -> float:
    """The largest loss that is no spike; infinite until enough steps have been seen."""
    if len(position.recent_losses) < FEWEST_FOR_SPIKE:
        return math.inf
    return settings.spike_factor * max(1e-3, statistics.median(position.recent_losses))


def _what_is_bad(figures: Figures, position: Position, settings: Training) -> str:
    if not figures.finite:
        return f"a loss of {figures.loss} and a gradient norm of {figures.gradient_norm}"
    limit = _spike_limit(position, settings)
    if figures.loss > limit:
        return f"a loss of {figures.loss:.4g}, more than {settings.spike_factor:g} times the median of the steps before"
    return ""


def _require_trained(position: Position, label: str, settings: Training) -> None:
    """A run of nothing but skipped steps is no training, however few they were."""
    if settings.on_bad_step == "skip" and position.step and set(range(position.step)) <= set(position.skipped_steps):
        raise EdgedistillError(
            f"{label}: each of its {position.step} steps was skipped: the model is as it was before",
            f"lower {'teacher.train' if label == 'teacher' else 'distill'}.learning_rate; where the first loss is not"
            " finite already, look at the teacher and the text",
        )


def _report_bad_step(
    what: str, position: Position, rows: NDArray[np.int64], data: Packed, figures: Figures, state: Path, label: str,
    settings: Training, ranks: Ranks, progress: Progress,
) -> None:  # fmt: skip
    """Write what the batch was; stop, or say that it is skipped."""
    path = state / f"bad-step-{position.step:09d}.json"
    if ranks.main:
        state.mkdir(parents=True, exist_ok=True)
        record = {
            "step": position.step,
            "sequences": rows.tolist(),
            "loss": str(figures.loss),
            "terms": {name: str(value) for name, value in figures.terms.items()},
            "gradient_norm": str(figures.gradient_norm),
            "token_ids": data.sequence_ids(rows).tolist(),
        }
        write_durably(path, json.dumps(record))
    before = range(position.step - MOST_SKIPPED_IN_A_ROW, position.step)
    too_many = set(before) <= set(position.skipped_steps)
    if settings.on_bad_step == "stop" or too_many:
        section = "teacher.train" if label == "teacher" else "distill"
        raise EdgedistillError(
            f"{label}: step {position.step} has {what}; its batch (sequences {', '.join(map(str, rows[:8]))}"
            f"{', …' if len(rows) > 8 else ''}) is in {path}",
            f"lower {section}.learning_rate, or set {section}.on_bad_step=skip to go on without such batches; the last"
            " good checkpoint is kept and the next run goes on from it"
            + (f" ({MOST_SKIPPED_IN_A_ROW} steps in a row were skipped already)" if too_many else ""),
        )
    progress.warn(f"{label}: step {position.step} has {what}; skipped, its batch is in {path}")


def _perplexity(
    module: nn.Module, evaluation: list[Window], position: Position, ranks: Ranks, context: int, compiled: bool
) -> float:
    # a batch that training had memory for is one that evaluation has memory for
    # windows have many lengths: compiled, each of them would be compiled anew
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        return perplexity(module, evaluation, ranks, batch_tokens=position.micro_batch_sequences * context)


def _evaluated(
    module: nn.Module, value: float, position: Position, figures: Figures, state: Path, ranks: Ranks
) -> Position:
    better = value < position.best_value or position.best_step == 0
    if better:
        save_best(state, model=bare(module).student, step=position.step, ranks=ranks)
    row = {"step": float(position.step), "perplexity": value, "loss": round(figures.loss, 9)}
    row |= {name: round(term, 9) for name, term in figures.terms.items()}
    row["gradient_norm"] = round(figures.gradient_norm, 6)
    return replace(
        position,
        best_step=position.step if better else position.best_step,
        best_value=min(value, position.best_value),
        evaluations_without_better=0 if better else position.evaluations_without_better + 1,
        history=[*position.history, row],
    )


def _tell(
    tracker: Tracker, progress: Progress, label: str, figures: Figures, position: Position, steps: int,
    settings: Training, data: Packed, seconds: float, ranks: Ranks,
) -> None:  # fmt: skip
    tokens = settings.batch_sequences * data.context
    logged = {f"loss/{name}": value for name, value in figures.terms.items()}
    logged |= {
        "loss/total": figures.loss,
        "gradient_norm": figures.gradient_norm,
        "tokens_per_s": tokens / max(1e-9, seconds),
        "memory_bytes": memory_bytes(ranks),
    }
    if position.history and position.history[-1]["step"] == position.step:
        logged["perplexity"] = position.history[-1]["perplexity"]
    tracker.log(logged, position.step)
    shown = {name: f"{value:.3f}" for name, value in {"loss": figures.loss, **figures.terms}.items()}
    if position.history:
        shown["perplexity"] = f"{position.history[-1]['perplexity']:.2f}"
    speed = position.step * tokens / max(1e-9, position.seconds)
    left = (steps - position.step) * position.seconds / max(1, position.step)
    progress.step(label, position.step, steps, **shown, speed=f"{speed:,.0f} tokens/s", left=f"{left:.0f} s")


def _impatient(position: Position, settings: Training) -> bool:
    return settings.patience > 0 and position.evaluations_without_better >= settings.patience
