"""What benchmarks/trainer.py and trainer_gpu.py share: the barest loop, ours, TRL's in its own environment, ratios.

A job is a folder: `job.json`, `rows.npy` [steps · batch, context + 1] token ids in the order in which they are trained on,
and `student/`, the start. Every contender reads the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from edgedistill.config.recipe import Training
from edgedistill.losses.losses import LossSpec, TeacherHead, head_loss
from edgedistill.losses.model_parts import final_hidden, head_of
from edgedistill.records.training import TrainResult
from edgedistill.signals.signals import LiveSignals
from edgedistill.statistics import median
from edgedistill.tasks.causal_lm import Packed, Window
from edgedistill.training import trainer
from edgedistill.training.optimizers import is_layer_matrix, rate_share

HERE = Path(__file__).resolve().parent
ASIDE = ("perplexity", "save_best", "save_checkpoint", "load_best")  # of trainer.py: timed apart


def step_rows(data: Packed, settings: Training, steps: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of each step's sequences, as the trainer takes them."""
    batches = data.batches(settings.batch_sequences, 0)
    for _ in range(steps):
        yield next(batches)


def groups_of(model: torch.nn.Module, settings: Training) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on the layers' matrices alone, as the trainer has them."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim == 2 and is_layer_matrix(name)]
    known = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if id(p) not in known], "weight_decay": 0.0},
    ]


def fused_loss(student: Any, teacher: Any, inputs: torch.Tensor, targets: torch.Tensor, vocab: int, low: bool) -> Any:
    """The trainer's own arithmetic: hidden states of both, then the head and forward KL in chunks."""
    spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=vocab)
    with torch.no_grad():
        given = TeacherHead(final_hidden(teacher, inputs, low), head_of(teacher))
    hidden = final_hidden(student, inputs, low)
    loss, _ = head_loss(
        hidden, head_of(student), given, targets.reshape(-1), spec, valid_total=targets.numel(), low_precision=low
    )
    return loss


def full_logits_loss(
    student: Any, teacher: Any, inputs: torch.Tensor, targets: torch.Tensor, vocab: int, low: bool
) -> Any:
    """Forward KL as people write it: all logits of both models, fp32 from the softmax on."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=low):
        with torch.no_grad():
            t = teacher(input_ids=inputs, use_cache=False).logits[..., :vocab]
        s = student(input_ids=inputs, use_cache=False).logits[..., :vocab]
    log_q, log_p = F.log_softmax(s.flatten(0, 1).float(), -1), F.log_softmax(t.flatten(0, 1).float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / targets.numel()


def bare_loop(
    student: Any, teacher: Any, data: Packed, settings: Training, steps: int, vocab: int, loss_of: Callable[..., Any]
) -> tuple[float, float]:
    """The barest loop: no logging, evaluation, checkpoint or check. Its seconds from first step to last, its last loss.

    `settings` must have no micro-batches: one forward pass a step.
    """
    device = next(student.parameters()).device
    low = settings.precision == "bf16"
    optimizer = torch.optim.AdamW(
        groups_of(student, settings), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
    )
    parameters = list(student.parameters())
    student.train()
    started = time.perf_counter()
    for step, rows in enumerate(step_rows(data, settings, steps)):
        ids = torch.from_numpy(data.sequence_ids(rows))
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        loss = loss_of(student, teacher, ids[:, :-1], ids[:, 1:], vocab, low)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_share(step, steps, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    last = float(loss.detach())  # waits for a GPU
    return time.perf_counter() - started, last


def our_loop(
    student: Any, teacher: Any, data: Packed, settings: Training, vocab: int, state: Path,
    evaluation: list[Window] | None = None,
) -> tuple[TrainResult, dict[str, float]]:  # fmt: skip
    """`edgedistill.training.trainer.train` with its tracker on; the seconds of evaluation and of checkpoints, apart."""
    spent: dict[str, float] = {}
    with _timed_apart(spent):
        result = trainer.train(
            student, data=data, evaluation=evaluation or [], settings=settings,
            loss=LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=vocab),
            signals=LiveSignals(teacher, low_precision=settings.precision == "bf16"), state=state / "state",
            logs=state / "logs", label="benchmark",
        )  # fmt: skip
    return result, spent


@contextmanager
def _timed_apart(spent: dict[str, float]) -> Iterator[None]:
    originals = {name: getattr(trainer, name) for name in ASIDE}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return originals[name](*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

        return call

    for name in ASIDE:
        setattr(trainer, name, timed(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(trainer, name, original)


def write_job(
    folder: Path,
    *,
    student: Any,
    teacher: Path,
    data: Packed,
    settings: Training,
    steps: int,
    device: str,
    vocab: int,
    uncounted: int = 0,
) -> Path:
    """The job's folder, for our worker and TRL's. `uncounted`: first steps of TRL's that its clock leaves out."""
    folder.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(folder / "student")
    rows = np.concatenate([data.sequence_ids(rows) for rows in step_rows(data, settings, steps)])
    np.save(folder / "rows.npy", rows.astype(np.int32))
    job = {
        "teacher": str(teacher),
        "steps": steps,
        "uncounted": uncounted,
        "batch": settings.batch_sequences,
        "micro_batch": settings.micro_batch_sequences or settings.batch_sequences,
        "context": settings.context_tokens,
        "vocab": vocab,
        "device": device,
        "threads": torch.get_num_threads(),
        "bf16": settings.precision == "bf16",
        "learning_rate": settings.learning_rate,
        "rates": [rate_share(step, steps, settings) for step in range(steps)],
        "betas": [settings.beta1, settings.beta2],
        "weight_decay": settings.weight_decay,
        "decayed": [name for name, p in student.named_parameters() if p.ndim == 2 and is_layer_matrix(name)],
        "clip_norm": settings.clip_norm,
    }
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    return folder


def run_worker(command: list[str], out: Path) -> dict[str, Any]:
    """Run one contender in a process of its own; what it wrote to `out`/result.json."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return result


def run_trl(python: Path, kind: str, job: Path, out: Path) -> dict[str, Any]:
    """`kind`: "gkd" or "distillation". Raises SystemExit with TRL's own words where it fails."""
    return run_worker([str(python), str(HERE / "trainer_trl.py"), kind, str(job), str(out)], out)


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with the 95 % interval of that median, which assumes no shape."""

    value: float
    low: float  # infinite: too few pairs
    high: float
    pairs: int

    def __str__(self) -> str:
        ends = "too few" if self.high == float("inf") else f"{self.low:.3f}, {self.high:.3f}"
        return f"{self.value:.3f} [{ends}]"


def paired(ours: list[float], others: list[float]) -> Ratio:
    ratios = np.array([a / b for a, b in zip(ours, others, strict=True)])
    found = median(ratios)
    return Ratio(found.value, *(found.ci95 or (float("-inf"), float("inf"))), len(ratios))
