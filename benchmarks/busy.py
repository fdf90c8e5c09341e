"""Training beside other work: how many tokens a second are left when other processes want the same cores.

Three processes that train the quickstart's teacher on random tokens, in short turns: one trains, the others sleep.
  spin     OpenMP's own default, what the program had before it chose
  ours     what edgedistill.machine.waiting sets, by the load that it sees when the process starts
  passive  OMP_WAIT_POLICY=PASSIVE: waiting threads sleep at once
Idle: nothing else on the machine, in rounds whose order alternates. Busy: beside as many endless loops as there are CPUs,
each of which the scheduler owes as much as a training thread.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common import Bound, finish, parser

from edgedistill.machine import facts, waiting

WAYS = ("spin", "ours", "passive")
OTHERS_WORK = "while True:\n    pass"
WARMUP_STEPS = 3


class Training:
    """A process that trains when it is asked to, and sleeps otherwise."""

    def __init__(self, way: str) -> None:
        plain = {name: value for name, value in os.environ.items() if name not in (*waiting.USERS, waiting.MARK)}
        plain |= {"OMP_WAIT_POLICY": "PASSIVE"} if way == "passive" else {}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", way], env=plain, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )  # fmt: skip
        self.spin_count = self._read()

    def tokens_per_s(self, seconds: float) -> float:
        """Of whole steps for about so many seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def rounds(number: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Tokens a second of each way in each round, and the spin count that each process had. The order alternates."""
    trainings = {way: Training(way) for way in WAYS}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(number):
        for way in WAYS[:: 1 if index % 2 else -1]:
            found[way].append(trainings[way].tokens_per_s(seconds))
    for each in trainings.values():
        each.end()
    return found, {way: each.spin_count for way, each in trainings.items()}


def train(way: str) -> None:
    """What the training process does: whole optimizer steps of the quickstart's teacher, for the seconds that a line
    of standard input says."""
    if way == "ours":
        waiting.let_threads_sleep(look=True)
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgedistill.config.recipe import load_recipe
    from edgedistill.losses.losses import LossSpec
    from edgedistill.models.shapes import config_from_shape
    from edgedistill.progress import QUIET
    from edgedistill.tasks.causal_lm import pack
    from edgedistill.teacher.stage import teacher_shape
    from edgedistill.training.loss_module import LossModule
    from edgedistill.training.optimizers import make_optimizers
    from edgedistill.training.ranks import ranks_here
    from edgedistill.training.step import Step

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

    def one() -> None:
        step.run(
            next(batches), rate_share=0.01, micro=settings.batch_sequences, taid_t=1.0, spike=float("inf"),
            report_kl=False,
        )  # fmt: skip

    for _ in range(WARMUP_STEPS):
        one()
    print(json.dumps(os.environ.get("GOMP_SPINCOUNT")), flush=True)
    for line in sys.stdin:
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < float(line):
            one()
            steps += 1
        seconds = time.perf_counter() - started
        print(json.dumps(steps * settings.batch_sequences * settings.context_tokens / seconds), flush=True)


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
    asked.add_argument("--rounds", type=int, default=40, help="of the idle measurement")
    asked.add_argument("--busy-rounds", type=int, default=10)
    asked.add_argument("--seconds", type=float, default=1.5, help="of a measurement; where busy, four times as long")
    asked.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    arguments = asked.parse_args()
    if arguments.worker is not None:
        train(arguments.worker)
        return
    idle, idle_spins = rounds(arguments.rounds, arguments.seconds)
    cpus = len(facts.usable_cpus())
    with other_work(cpus):
        busy, busy_spins = rounds(arguments.busy_rounds, 4 * arguments.seconds)
    report(arguments, idle, busy, {"idle": idle_spins, "busy": busy_spins}, cpus)


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def report(
    arguments: Any, idle: dict[str, list[float]], busy: dict[str, list[float]], spins: dict[str, Any], cpus: int
) -> None:
    of_today = {way: ratio(idle[way], idle["spin"]) for way in WAYS}
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
        | {"busy_processes": cpus, "spin_counts": spins},
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
