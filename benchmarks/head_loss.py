"""Head projection and distillation loss, forward and backward: ours against full logits and against Liger's chunked loss.

One process, contenders in turn, the order rotated each round; a time is compared with the other's of the same round.
Workspace is peak memory beyond inputs, weights, their gradients and the fp32 accumulator of the head's gradient. On a
CPU it is the kernel's high-water mark of the resident set, reset before each run; on a GPU the allocator's peak.
Liger's loss (its chunked JSD, default chunk size, uncompiled on a CPU, compiled on a GPU) is read from a folder of its own:

    pip install --no-deps --target peers/liger liger-kernel && python benchmarks/head_loss.py --liger peers/liger

Claims, CPU, 2,048 tokens, student's width 1,024, teacher's 2,048: against full logits (the same loss) workspace <= 0.15x
and time <= 1.0x; against Liger's JSD workspace <= 0.5x and time <= 0.9x.
Claims, GPU, 8,192 tokens, widths 2,048 and 4,096, vocabulary 128,256, bf16: within 1.6x of the head's FLOPs at the matrix
rate of the same run, faster than Liger's, workspace <= 2 GB.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Bound, finish, parser
from torch import Tensor

from edgedistill.cli.show import with_interval
from edgedistill.losses.losses import Head, LossSpec, TeacherHead, head_loss
from edgedistill.statistics import median

BETA = 0.5
CPU_CASES = [(32_000, torch.float32), (32_000, torch.bfloat16), (128_256, torch.float32), (128_256, torch.bfloat16)]


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison: hidden states, heads and targets."""

    vocab: int
    dtype: torch.dtype
    h: Tensor
    w: Tensor
    h_t: Tensor
    w_t: Tensor
    targets: Tensor

    @property
    def name(self) -> str:
        return f"V={self.vocab:,} {str(self.dtype).removeprefix('torch.')}"


def make_case(vocab: int, dtype: torch.dtype, device: str, tokens: int, widths: tuple[int, int]) -> Case:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device=device, dtype=dtype)

    student, teacher = widths
    return Case(
        vocab, dtype, draw(tokens, student, scale=1.0).requires_grad_(True),
        draw(vocab, student, scale=student**-0.5).requires_grad_(True), draw(tokens, teacher, scale=1.0),
        draw(vocab, teacher, scale=teacher**-0.5), torch.randint(0, vocab, (tokens,), generator=g).to(device),
    )  # fmt: skip


def ours(name: str) -> Callable[[Case], Tensor]:
    def run(c: Case) -> Tensor:
        loss, _ = head_loss(
            c.h, Head(c.w), TeacherHead(c.h_t, Head(c.w_t)), c.targets,
            LossSpec({name: 1.0}, temperature=1.0, vocab=c.vocab, jsd_beta=BETA),
            valid_total=len(c.targets), low_precision=c.dtype == torch.bfloat16,
        )  # fmt: skip
        return loss

    return run


def full_logits(name: str) -> Callable[[Case], Tensor]:
    """The same loss by autograd over whole logits, in fp32 from the softmax on."""

    def run(c: Case) -> Tensor:
        log_q = F.log_softmax((c.h @ c.w.T).float(), -1)
        with torch.no_grad():
            log_p = F.log_softmax((c.h_t @ c.w_t.T).float(), -1)
        if name == "forward_kl":
            return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(c.targets)
        log_m = torch.log(BETA * log_p.exp() + (1 - BETA) * log_q.exp())
        teacher = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
        student = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
        return (BETA * teacher + (1 - BETA) * student) / len(c.targets)

    return run


def liger(folder: Path, compiled: bool) -> Callable[[Case], Tensor]:
    sys.path.insert(0, str(folder))
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=compiled)
    return lambda c: loss(c.h, c.w, c.h_t, c.w_t, c.targets)


def high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell VmHWM")


def measure(c: Case, run: Callable[[Case], Tensor]) -> tuple[float, int, float]:
    """Seconds of forward and backward, workspace in bytes, the loss."""
    c.h.grad = c.w.grad = None
    gc.collect()
    cuda = c.h.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
    begin = time.perf_counter()
    loss = run(c)
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if cuda else high_water()
    assert c.h.grad is not None and c.w.grad is not None
    gradients = c.h.grad.nbytes + c.w.grad.nbytes
    return seconds, peak - before - gradients, float(loss.detach())


def accumulator(c: Case) -> int:
    """Bytes of the fp32 head accumulator where it is not the gradient itself."""
    return 0 if c.dtype == torch.float32 else 4 * c.w.numel()


def median_ratio(a: list[float], b: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios a / b with its 95 % interval over the rounds."""
    found = median(np.array(a) / np.array(b))
    return {"value": found.value, "ci95": found.ci95, "rounds": found.units}


def compare(c: Case, contenders: dict[str, Callable[[Case], Tensor]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds, workspace and loss of each contender by round. Raises where two of one loss disagree."""
    seen: dict[str, dict[str, list[float]]] = {n: {"s": [], "bytes": [], "loss": []} for n in contenders}
    gradients: dict[str, Tensor] = {}
    names = list(contenders)
    for number in range(-1, rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        for name in turn:
            seconds, extra, loss = measure(c, contenders[name])
            if number < 0:
                assert c.h.grad is not None
                gradients[name] = c.h.grad.float().cpu()
                continue
            if name.startswith("ours"):
                extra -= accumulator(c)
            for key, value in (("s", seconds), ("bytes", float(max(0, extra))), ("loss", loss)):
                seen[name][key].append(value)
    for kind in ("forward_kl", "jsd"):
        group = [name for name in names if kind in name]
        for name in group[1:]:
            cosine = float(F.cosine_similarity(gradients[group[0]].flatten(), gradients[name].flatten(), dim=0))
            apart = abs(seen[name]["loss"][0] / seen[group[0]]["loss"][0] - 1)
            # where its inputs are bf16 Liger's softmax is too: its loss is a few percent off
            if cosine < 0.99 or apart > (0.1 if c.dtype == torch.bfloat16 else 1e-4):
                raise RuntimeError(f"{name} and {group[0]} are not the same loss: cosine {cosine}, {apart:.2g} apart")
    return seen


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of ten."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * 8192**3 / best


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--liger", type=Path, help="folder with liger-kernel; without it that comparison is left out")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--tokens", type=int)
    asked.add_argument("--cases", type=int, nargs="*", help="numbers of the CPU cases, all otherwise")
    arguments = asked.parse_args()
    cuda = torch.cuda.is_available()
    tokens = arguments.tokens or (8192 if cuda else 2048)
    widths = (2048, 4096) if cuda else (1024, 2048)
    cases = [(128_256, torch.bfloat16)] if cuda else CPU_CASES
    if arguments.cases:
        cases = [cases[number] for number in arguments.cases]
    figures: dict[str, Any] = {
        "tokens": tokens, "student_width": widths[0], "teacher_width": widths[1], "device": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(), "cases": {},
    }  # fmt: skip
    rows, bounds = [], []
    for vocab, dtype in cases:
        case = make_case(vocab, dtype, "cuda" if cuda else "cpu", tokens, widths)
        contenders = {f"{who} {kind}": make(kind) for kind in ("forward_kl", "jsd") for who, make in
                      (("ours", ours), ("full logits", full_logits))}  # fmt: skip
        if arguments.liger:
            contenders["Liger jsd"] = liger(arguments.liger, compiled=cuda)
        if cuda:  # whole logits of the JSD do not fit beside the rest
            contenders = {name: run for name, run in contenders.items() if name != "full logits jsd"}
        seen = compare(case, contenders, arguments.rounds)
        entry: dict[str, Any] = {
            name: {
                "median_s": statistics.median(got["s"]), "workspace_bytes": max(got["bytes"]), "seconds": got["s"],
            }
            for name, got in seen.items()
        }  # fmt: skip
        pairs = [("ours forward_kl", "full logits forward_kl", 0.15, 1.0), ("ours jsd", "full logits jsd", 0.15, 1.0),
                 ("ours jsd", "Liger jsd", 0.5, 0.9)]  # fmt: skip
        for name, other, most_memory, most_time in pairs:
            if other not in seen:
                continue
            times = median_ratio(seen[name]["s"], seen[other]["s"])
            memory = max(seen[name]["bytes"]) / max(seen[other]["bytes"])
            entry[f"{name} / {other}"] = {"time": times, "workspace": memory}
            rows.append([
                case.name, name, other, with_interval(times["value"], times["ci95"], ".2f"),
                f"{memory:.3f}", f"{statistics.median(seen[name]['s']):.2f} s", f"{max(seen[name]['bytes']) / 1e6:,.0f} MB",
            ])  # fmt: skip
            if not cuda:
                bounds.append(Bound(f"{case.name}: time of {name} / {other}", times["value"], "<=", most_time))
                bounds.append(Bound(f"{case.name}: workspace of {name} / {other}", memory, "<=", most_memory))
            elif other.startswith("Liger"):
                bounds.append(Bound(f"{case.name}: time of {name} / {other}", times["value"], "<=", 1.0))
        if cuda:
            rate = matrix_rate(dtype)
            floor = 2 * tokens * vocab * (3 * widths[0] + widths[1]) / rate
            entry["matrix_flops_per_s"], entry["floor_s"] = rate, floor
            for name in ("ours forward_kl", "ours jsd"):
                bounds.append(Bound(f"{name}: time / floor of the FLOPs", entry[name]["median_s"] / floor, "<=", 1.6))
                bounds.append(Bound(f"{name}: workspace, bytes", entry[name]["workspace_bytes"], "<=", 2e9))
        figures["cases"][case.name] = entry
        del case, seen
        gc.collect()
    if arguments.liger:
        from importlib.metadata import distributions

        figures["liger_kernel"] = next(
            d.version for d in distributions(path=[str(arguments.liger)]) if d.name.replace("_", "-") == "liger-kernel"
        )
    finish(
        "head_loss", arguments, figures=figures, rows=rows, bounds=bounds,
        header=("case", "loss", "against", "time, ratio [95 %]", "workspace, ratio", "time", "workspace"),
        notes=[f"{tokens:,} tokens; width {widths[0]:,} is the student's, {widths[1]:,} the teacher's"]
        + ([] if cuda else ["GPU: not measured"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
