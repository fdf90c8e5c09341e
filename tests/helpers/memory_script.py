"""Trains a few steps in this process and prints, as JSON, how much memory that took: the resident set's high-water mark
less what stood after the imports, phase by phase; on a GPU the most that torch's allocator had given out there.

    python tests/helpers/memory_script.py '{"student": {...}, "training": {...}, "steps": 3, ...}'

`case_of` says what a case holds. Linux only: the kernel's mark is set back through /proc/self/clear_refs.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.config.recipe import Distill, Recipe, Teacher
from edgedistill.fit.training import blocks_of
from edgedistill.fit.training_memory import Prediction, Teaching, predict
from edgedistill.records.shape import Shape

ROOT = Path(__file__).resolve().parents[2]

# What a training process imports before and while it trains; some of it only inside of functions.
IMPORTS = (
    "torch", "torch._dynamo", "torch.utils.checkpoint", "safetensors.torch", "accelerate", "transformers",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3", "edgedistill.strategies.distill", "edgedistill.student.start",
    "edgedistill.teacher.cached", "edgedistill.teacher.live", "edgedistill.training.trainer",
    "edgedistill.student.lora",
)  # fmt: skip
SEQUENCES = 32  # of data
EVALUATED = 4  # windows


def main() -> None:
    case: dict[str, Any] = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    settings = Distill(**case["training"])
    named = list(IMPORTS)
    if settings.lora.rank:
        # peft imports bitsandbytes where it is installed, when the first adapter is made
        named += ["peft", "peft.tuners.lora.bnb", "bitsandbytes"]
    if (
        settings.optimizer == "adamw8bit"
        or settings.lora.base != "fp32"
        or case["teacher_precision"] in ("int8", "nf4")
    ):
        named.append("bitsandbytes")
    for name in named:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(dir=case.get("folder")) as folder:
        teacher = Shape(**case["teacher"]) if case["teacher"] else None
        if teacher is not None:
            _in_a_fork(lambda: _write_teacher(teacher, Path(folder) / "teacher", case["weights"]))
        before, after_imports = settled(), status()
        phases = _train(case, settings, Path(folder))
        print(
            json.dumps(
                {
                    "after_imports_bytes": before,
                    "peak_bytes": max(phases.values()) - before,
                    "phases": {name: value - before for name, value in phases.items()},
                    "files_mapped_bytes": status()["RssFile"] - after_imports["RssFile"],
                }
            )
        )


def device() -> str:
    """Where a case trains: "cuda" where torch has a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settled() -> int:
    """What is taken now, after free memory was given back and the high-water mark was set to it: bytes."""
    if device() == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status()["VmRSS"]


def status() -> dict[str, int]:
    """VmRSS, VmHWM, RssAnon, RssFile of this process, bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _in_a_fork(work: Callable[[], None]) -> None:
    """Run it in a process of its own, so that nothing of it stays here."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("the teacher could not be written")


def model_of(shape: Shape, seed: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgedistill.models.shapes import config_from_shape

    torch.manual_seed(seed)
    config = config_from_shape(shape, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float()


def _write_teacher(shape: Shape, folder: Path, weights: str) -> None:
    import torch

    model_of(shape, 1).to(getattr(torch, weights)).save_pretrained(folder)


def _train(case: dict[str, Any], settings: Distill, folder: Path) -> dict[str, int]:
    """The stage's own steps on random text: the student's start, the teacher's signals, training."""
    import torch

    from edgedistill.signals.cache_reader import open_cache
    from edgedistill.signals.signals import CachedSignals, Signals
    from edgedistill.strategies.distill import loss_of
    from edgedistill.student.lora import add_adapters
    from edgedistill.tasks.causal_lm import Packed, Window
    from edgedistill.teacher.cached import fill
    from edgedistill.teacher.live import live_teacher
    from edgedistill.training.ranks import ranks_here
    from edgedistill.training.trainer import train

    phases: dict[str, int] = {}

    def mark(name: str) -> None:
        if device() == "cuda":
            phases[name] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return
        phases[name] = status()["VmHWM"]
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    shape, context = Shape(**case["student"]), settings.context_tokens
    rng = np.random.default_rng(0)
    count = max(SEQUENCES, settings.batch_sequences) * context + 1
    starts = np.arange(0, count, max(2, context // 3), dtype=np.int64)
    data = Packed(rng.integers(0, shape.vocab_size, count, dtype=np.int32), context=context, seed=0, starts=starts)
    windows = [
        Window(i, rng.integers(0, shape.vocab_size, context, dtype=np.int32), 0)
        for i in range(max(EVALUATED, settings.micro_batch_sequences or settings.batch_sequences))
    ]
    ranks = ranks_here()
    if case.get("sharded"):
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        ranks = replace(ranks, sharded=True)
    model = model_of(shape, 0)
    if settings.lora.rank:
        model = add_adapters(model, settings.lora, folder=folder / "start", device=torch.device("cpu"), seed=0)
    mark("start")
    loss = loss_of(settings, shape.vocab_size)
    signals: Signals | None = None
    low = settings.precision == "bf16"
    ask = Teacher(precision=case["teacher_precision"])
    if case["signals"] == "live":
        signals = live_teacher(folder / "teacher", ask, low_precision=low, ranks=ranks)
    elif case["signals"] == "cached":
        cache = settings.cache
        key = {
            "kind": cache.kind, "vocab": shape.vocab_size, "temperature": settings.temperature, "draws": cache.draws,
            "top_k": cache.top_k, "seed": 0, "attention": settings.attention, "hidden_layers": [],
            "attention_layers": [],
        }  # fmt: skip
        live = live_teacher(folder / "teacher", ask, low_precision=low, ranks=ranks)
        fill(str(folder / "cache"), key, lambda: live, data, ranks, _quiet())
        head = live.head() if cache.kind == "hidden" else None
        del live
        signals = CachedSignals(open_cache(str(folder / "cache"), key=key, head=head, device=ranks.device))
    mark("signals")
    train(
        model, data=data, evaluation=windows, settings=settings, loss=loss, signals=signals, state=folder / "state",
        label="distill", ranks=ranks,
    )  # fmt: skip
    mark("train")
    return phases


def _quiet() -> Any:
    from edgedistill.progress import QUIET

    return QUIET


def case_of(
    student: Shape, teacher: Shape | None = None, *, signals: str = "none", teacher_precision: str = "fp32",
    weights: str = "float32", steps: int = 3, sharded: bool = False, **training: Any,
) -> dict[str, Any]:  # fmt: skip
    """A case: shapes; `signals` none, live or cached; the live teacher's precision; what its file holds; `sharded`:
    the student through FSDP2, on this one device; settings.

    Steps, evaluations and checkpoints: `steps` optimizer steps, an evaluation after every one, a checkpoint after
    every one but the last.
    """
    settings = {"context_tokens": 128, "batch_sequences": 4, "precision": "fp32", **training}
    settings |= {
        "tokens": steps * settings["context_tokens"] * settings["batch_sequences"],
        "evaluate_every_share": 1 / steps,
        "checkpoint_every_s": 1e-9,
    }
    if signals == "none":
        settings |= {"forward_kl": 0.0, "cross_entropy": 1.0}
    return {
        "student": student.model_dump(), "teacher": teacher.model_dump() if teacher else None, "signals": signals,
        "teacher_precision": teacher_precision, "weights": weights, "training": settings, "sharded": sharded,
    }  # fmt: skip


def measure(case: dict[str, Any], *, threads: int = 1) -> dict[str, Any]:
    """What a process of its own measures for the case; its words where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(case)], capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the case failed: {done.stderr[-3000:]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def predicted(case: dict[str, Any]) -> Prediction:
    """What edgedistill.fit.training_memory says of the case."""
    settings = Distill(**case["training"])
    teaching = None
    if case["teacher"] is not None:
        stored = {"float32": "fp32", "bfloat16": "bf16"}[case["weights"]]
        teaching = Teaching(
            Shape(**case["teacher"]), signals=case["signals"], precision=case["teacher_precision"], stored=stored,
            kind=settings.cache.kind,
        )  # fmt: skip
    recipe = Recipe(distill=settings)
    return predict(
        Shape(**case["student"]), settings, teaching, lora=settings.lora, blocks=blocks_of(recipe), device=device()
    )  # fmt: skip


if __name__ == "__main__":
    main()
