"""Training beside other work: how many tokens a second are left when other processes want the same cores.

One training process (the quickstart's teacher, on random tokens), started again for every measurement, since OpenMP reads its
settings when it is loaded. Ways of waiting:
  spin     OpenMP's own default, what the program had before it chose
  ours     what edgedistill.waiting sets
  passive  OMP_WAIT_POLICY=PASSIVE: waiting threads sleep at once
Idle: alone on the machine, in rounds whose order alternates. Busy: beside as many endless loops as there are CPUs, each of
which the scheduler owes as much as a training thread.

Claims: idle, ours is at least 0.98 of spin (median of the rounds' ratios); busy, ours is at least 0.25 of its own idle rate.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import Bound, finish, parser

from edgedistill import machine, waiting

WAYS = ("spin", "ours", "passive")
OTHERS_WORK = "while True:\n    pass"
WARMUP_STEPS = 2


def environment(way: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in (*waiting.USERS, waiting.MARK)}
    if way == "ours":
        return waiting.asleep(plain)
    return plain | ({"OMP_WAIT_POLICY": "PASSIVE"} if way == "passive" else {})


def tokens_per_s(way: str, seconds: float, *, of: Callable[[list[float]], float]) -> float:
    """Of a training process of its own that runs for about so many seconds, from its third step on; `of` its steps'
    seconds: the median where the machine is idle (what else it does now and then is not ours), the mean beside others."""
    command = [sys.executable, __file__, "--worker", str(seconds)]
    done = subprocess.run(command, env=environment(way), check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["tokens"] / of(found["step_s"]))


def train_for(seconds: float) -> None:
    """What the training process does: whole optimizer steps of the quickstart's teacher until the time is over."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgedistill.distill.loss_module import LossModule
    from edgedistill.distill.losses import LossSpec
    from edgedistill.distill.optimizers import make_optimizers
    from edgedistill.distill.ranks import ranks_here
    from edgedistill.distill.step import Step
    from edgedistill.distill.teacher import teacher_shape
    from edgedistill.progress import QUIET
    from edgedistill.recipe import load_recipe
    from edgedistill.shapes import config_from_shape
    from edgedistill.tasks.causal_lm import pack

    settings = load_recipe("quickstart").teacher.train
    shape = teacher_shape(settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config_from_shape(shape, bos_token_id=0, eos_token_id=1))
    )
    ids = np.random.default_rng(0).integers(2, shape.vocab_size, 100_000).astype(np.int32)
    data = pack([ids], context=settings.context_tokens, seed=0, eos=1, bos=0)
    spec = LossSpec({"cross_entropy": 1.0}, temperature=1.0, vocab=shape.vocab_size)
    module = LossModule(model, spec, low_precision=settings.precision == "bf16")
    optimizers = make_optimizers(module, settings)
    step = Step(module, None, data, optimizers, settings, ranks_here(), QUIET, "teacher")
    batches = data.batches(settings.batch_sequences, 0)
    taken: list[float] = []
    while len(taken) <= WARMUP_STEPS or sum(taken[WARMUP_STEPS:]) < seconds:
        started = time.perf_counter()
        step.run(
            next(batches), rate_share=0.01, micro=settings.batch_sequences, taid_t=1.0, spike=float("inf"),
            report_kl=False,
        )  # fmt: skip
        taken.append(time.perf_counter() - started)
    print(json.dumps({"tokens": settings.batch_sequences * settings.context_tokens, "step_s": taken[WARMUP_STEPS:]}))


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", OTHERS_WORK]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=5, help="of the idle measurement")
    asked.add_argument("--busy-rounds", type=int, default=2)
    asked.add_argument("--seconds", type=float, default=8.0, help="of a measurement")
    asked.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    arguments = asked.parse_args()
    if arguments.worker is not None:
        train_for(arguments.worker)
        return
    cpus = len(machine.usable_cpus())
    idle: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in WAYS[:: 1 if number % 2 else -1]:
            idle[way].append(tokens_per_s(way, arguments.seconds, of=statistics.median))
    with other_work(cpus):
        for number in range(arguments.busy_rounds):
            for way in WAYS[:: 1 if number % 2 else -1]:
                busy[way].append(tokens_per_s(way, arguments.seconds, of=statistics.mean))
    report(arguments, idle, busy, cpus)


def report(arguments: Any, idle: dict[str, list[float]], busy: dict[str, list[float]], cpus: int) -> None:
    of_today = {
        way: statistics.median(one / other for one, other in zip(idle[way], idle["spin"], strict=True)) for way in WAYS
    }
    left = {way: statistics.median(busy[way]) / statistics.median(idle[way]) for way in WAYS}
    finish(
        "busy",
        arguments,
        figures={
            way: {
                "idle_tokens_per_s": idle[way],
                "busy_tokens_per_s": busy[way],
                "idle_ratio_to_spin": of_today[way],
                "busy_share_of_idle": left[way],
            }
            for way in WAYS
        }
        | {"busy_processes": cpus, "set": waiting.OURS},
        header=("way of waiting", "idle (tokens/s)", "÷ spin", f"beside {cpus} others (tokens/s)", "of idle"),
        rows=[
            (
                way, f"{statistics.median(idle[way]):,.0f}", f"{of_today[way]:.3f}",
                f"{statistics.median(busy[way]):,.0f}", f"{left[way]:.3f}",
            )
            for way in WAYS
        ],
        bounds=[
            Bound("idle rate, ours ÷ spin", of_today["ours"], ">=", 0.98),
            Bound("busy rate of ours ÷ its idle rate", left["ours"], ">=", 0.25),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
