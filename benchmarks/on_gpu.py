"""The steps of on_gpu.sh: what waits for a GPU, each in a process of its own, bounded, its result written when it ends.

OUT/results.jsonl gets a line a step (name, exit code, seconds, and the step's own figures where it has any), OUT/NAME.log what
it printed. A step that fails or runs out of time is named and the next one runs. `--check` exits 1 where one did.

    benchmarks/on_gpu.sh --out OUT                 all steps
    benchmarks/on_gpu.sh --out OUT --only head_loss,memory
    benchmarks/on_gpu.sh --out OUT --tiny          any device, tiny sizes: tries the steps, gives no result
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.machine import facts

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
ALL_STEPS_S = 470
TINY_FACTOR = 6  # a slow CPU that has other work
# No runtime and no command of another process: what a GPU can change is losses, signals, optimizers, adapters, training.
TESTS = (
    "test_losses",
    "test_signal_cache",
    "test_muon",
    "test_lora",
    "test_teacher_model",
    "test_trainer",
    "test_checkpoint",
)


@dataclass(frozen=True)
class Step:
    """A command and the most seconds that it may take; `json`: it prints its figures as one JSON document."""

    seconds: int
    command: list[str]
    json: bool = True


def steps(*, tiny: bool) -> dict[str, Step]:
    def script(name: str, *words: str) -> list[str]:
        return [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *words]

    liger = _folder_of("liger_kernel")
    with_liger = ["--liger", str(liger)] if liger and not tiny else []
    trl = ["--trl-python", sys.executable] if _folder_of("trl") and not tiny else []
    few = {
        "teacher.train.tokens": 8192,
        "distill.tokens": 8192,
        "verify.max_tokens": 4096,
        "data.min_document_chars": 20000,
    }
    training = [word for name, value in few.items() for word in ("--set", f"{name}={value}")] if tiny else []
    tests = ["test_muon"] if tiny else TESTS
    return {
        "machine": Step(30, [sys.executable, str(Path(__file__)), "--describe"]),
        "head_loss": Step(70, script("head_loss", *(["--tokens", "64", "--rounds", "1", "--cases", "0"] if tiny else []),
                                     *with_liger)),
        "trainer": Step(130, script("trainer_gpu", *(["--device", "cpu", "--tiny", "--context", "64", "--steps", "2"]
                                                     if tiny else []), *trl)),
        "quickstart_training": Step(80, [sys.executable, "-m", "edgedistill", "distill", "quickstart", "--target", "jetson",
                                         "--json", *training]),
        "memory": Step(100, script("gpu_memory", *(["--tiny", "--only", "bf16 teacher, FSDP2"] if tiny else []))),
        "tests": Step(110, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
                            *(str(path) for name in tests for path in (ROOT / "tests").rglob(f"{name}.py"))], json=False),
    }  # fmt: skip


def _folder_of(package: str) -> Path | None:
    """The folder that holds an installed package, without importing it."""
    import importlib.util

    found = importlib.util.find_spec(package)
    return Path(found.origin).parent.parent if found is not None and found.origin else None


def describe() -> dict[str, Any]:
    """The machine, its GPU, and the two rates that the other figures are held against."""
    import torch

    found: dict[str, Any] = {"machine": facts.describe(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        found["matrix_flops_per_s"] = 2 * 8192**3 / _best_s(lambda: a @ a)
        b = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
        found["copy_bytes_per_s"] = 2 * b.numel() / _best_s(b.clone)
    return found


def _best_s(work: Callable[[], Any]) -> float:
    import torch

    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def run(name: str, step: Step, out: Path, environment: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Run a step to its end or its limit (seconds); whatever it started is killed with it."""
    log, answer = out / f"{name}.log", out / f"{name}.out"
    started = time.monotonic()
    with log.open("wb") as said, answer.open("wb") as printed:
        process = subprocess.Popen(
            step.command, cwd=environment["TMPDIR"], env=environment, stdin=subprocess.DEVNULL, stdout=printed,
            stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    text = answer.read_text(encoding="utf-8", errors="replace")
    row: dict[str, Any] = {"step": name, "code": code, "seconds": round(time.monotonic() - started, 1)}
    if code is None:
        row["ended"] = f"out of time: {limit_s:.0f} s"
    if step.json and code == 0:
        row["result"] = json.loads(text)
        answer.unlink()
    elif not step.json:
        row["result"] = text.strip().splitlines()[-1:]
    return row


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--out", type=Path, help="folder for the results")
    asked.add_argument("--only", default="", help="steps, by commas: all otherwise")
    asked.add_argument("--tiny", action="store_true", help="tiny sizes on any device: tries the steps, gives no result")
    asked.add_argument("--check", action="store_true", help="exit 1 where a step failed")
    asked.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    arguments = asked.parse_args()
    if arguments.describe:
        print(json.dumps(describe()))
        return
    if arguments.out is None:
        asked.error("--out FOLDER says where the results go")
    import torch

    if not torch.cuda.is_available() and not arguments.tiny:
        print(
            "on_gpu: torch finds no CUDA device, and this measures one: nothing was measured.\n"
            "Run it on a machine with a GPU of 40 GB or more, or try the steps themselves with --tiny.",
            file=sys.stderr,
        )
        sys.exit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="edgedistill-on-gpu-") as work:
        environment = {**os.environ, "EDGEDISTILL_STORE": f"{work}/store", "TMPDIR": work}
        chosen = steps(tiny=arguments.tiny)
        only = arguments.only.split(",") if arguments.only else list(chosen)
        if unknown := set(only) - set(chosen):
            asked.error(f"no step {', '.join(sorted(unknown))}: there are {', '.join(chosen)}")
        for name in only:
            factor = TINY_FACTOR if arguments.tiny else 1
            left = factor * ALL_STEPS_S - (time.monotonic() - begun)
            if left < 5:
                row: dict[str, Any] = {"step": name, "code": None, "seconds": 0.0, "ended": "no time was left for it"}
            else:
                row = run(name, chosen[name], arguments.out, environment, min(factor * chosen[name].seconds, left))
            row["tiny"] = arguments.tiny
            with (arguments.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if row["code"] != 0:
                failed.append(name)
            print(f"{name}: {'done' if row['code'] == 0 else row.get('ended', 'exit code ' + str(row['code']))}"
                  f" ({row['seconds']} s)", flush=True)  # fmt: skip
    print(f"{arguments.out / 'results.jsonl'}: {len(only) - len(failed)} of {len(only)} steps ended well")
    if failed and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
