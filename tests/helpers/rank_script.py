"""Trains under torchrun: `rank_script.py FOLDER MODE STEPS [STOP_AT]`.

MODE: "ddp", "fsdp", "zero1", "zero2" or "zero3"; with "-shard" the teacher is sharded too, with "-lora" the student has
adapters, with "-skip" a step is bad. Rank 0 writes losses.json and final.safetensors.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_models import KL, model, run

from edgedistill.config.recipe import Lora, Teacher
from edgedistill.signals.signals import LiveSignals
from edgedistill.student.lora import add_adapters, merge_adapters
from edgedistill.teacher.live import live_teacher
from edgedistill.training.checkpoint import whole_parameters
from edgedistill.training.ranks import leave, ranks_here
from edgedistill.training.step import Step


def with_a_loss_that_is_no_number(gradients):
    """The eighth batch's gradients come with a loss of NaN."""
    calls: list[int] = []

    def spoilt(self, *arguments):
        calls.append(1)
        sums, valid = gradients(self, *arguments)
        return {**sums, "loss": math.nan if len(calls) == 8 else sums["loss"]}, valid

    return spoilt


def main() -> None:
    folder, mode, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    stop_at = int(sys.argv[4]) if len(sys.argv) > 4 else None
    torch.set_num_threads(1)
    if mode.startswith("zero"):
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": mode[4]}
    if mode.startswith("fsdp"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    ranks = ranks_here()
    original = Step.run
    seen: list[int] = []

    def stopping(self, *arguments, **named):
        if stop_at is not None and len(seen) == stop_at:
            os._exit(0)  # as a kill would: no leave-taking
        seen.append(1)
        return original(self, *arguments, **named)

    Step.run = stopping
    if mode.endswith("-skip"):
        Step._gradients = with_a_loss_that_is_no_number(Step._gradients)
    student = model()
    teacher = model(seed=5, hidden=48)
    signals = LiveSignals(teacher, low_precision=False)
    if mode.endswith("-shard"):
        if ranks.main:
            teacher.save_pretrained(folder / "teacher")
        ranks.barrier()
        signals = live_teacher(folder / "teacher", Teacher(placement="shard"), low_precision=False, ranks=ranks)
        rows = sum(p.to_local().numel() for p in signals.teacher.parameters())
        assert rows < 0.6 * sum(p.numel() for p in teacher.parameters()), "this rank holds more than its share"
    if mode.endswith("-lora"):
        student = add_adapters(student, Lora(rank=4), folder=folder, device=ranks.device, seed=0, sharded=ranks.sharded)
    result = run(
        student, folder / "state", loss=KL, signals=signals,
        ranks=ranks, tokens=16 * 8 * steps, batch_sequences=8, micro_batch_sequences=2, optimizer="adamw",
        evaluate_every_share=1 / steps, checkpoint_every_s=1e-9, on_bad_step="skip",
    )  # fmt: skip
    weights = whole_parameters(merge_adapters(student, model(seed=9)) if mode.endswith("-lora") else student)
    if ranks.main:
        (folder / "losses.json").write_text(json.dumps([[row["loss"], row["perplexity"]] for row in result.history]))
        save_file(weights, folder / "final.safetensors")
    leave()


if __name__ == "__main__":
    main()
    # As edgedistill's own command ends where there are several ranks: Python's end sometimes aborts in gloo's threads.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
