"""Does quantizing pay? The float artifact and the quantized one, interleaved, in their runtime on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill import statistics
from edgedistill.machine import facts
from edgedistill.progress import Progress
from edgedistill.records.artifact import SpeedComparison
from edgedistill.runtimes.graph import GraphProcess
from edgedistill.runtimes.process import RuntimeName, RuntimeProcess
from edgedistill.store import Store

PAIRS = 12
WARMUP = 2
PROMPT_TOKENS = 32
NEW_TOKENS = 24
SAMPLE_MS = 20.0
MOST_REPEATS = 200

Arrays = Mapping[str, NDArray[Any]]


def compare_decoders(
    float_artifact: Path,
    quantized_artifact: Path,
    *,
    runtime: RuntimeName,
    vocab_size: int,
    context_tokens: int,
    threads: int,
    seed: int = 0,
    store: Store | None = None,
) -> SpeedComparison:
    """Milliseconds a decoded token of both, each in a process of its own on the same CPUs.

    Raises UserError where the context is too short for a decoded token after the prompt; RuntimeCrashed.
    """
    context = min(context_tokens, PROMPT_TOKENS + NEW_TOKENS)
    prompt_tokens = max(1, min(PROMPT_TOKENS, context // 2))
    prompt = np.random.default_rng(seed).integers(0, vocab_size, prompt_tokens)

    def opened(artifact: Path, stack: ExitStack) -> tuple[Callable[[], float], dict[str, Any]]:
        process = stack.enter_context(
            RuntimeProcess(
                runtime,
                artifact,
                threads=threads,
                context_tokens=context,
                logits_all=False,
                pin=True,
                spin=True,
                store=store,
            )
        )
        return lambda: float(np.mean(process.timed(prompt, context - prompt_tokens)["token_ms"])), process.info

    with ExitStack() as both:
        float_run, info = opened(float_artifact, both)
        quantized_run, _ = opened(quantized_artifact, both)
        return compare(float_run, quantized_run, runtime=str(info["runtime_version"]), threads=threads)


def compare_graphs(
    float_graphs: Sequence[Path],
    quantized_graphs: Sequence[Path],
    inputs: Sequence[Arrays],
    *,
    threads: int,
) -> SpeedComparison:
    """Milliseconds of a run of both, each graph on its inputs in a process of its own; several graphs are summed.

    A sample is the mean of so many runs as take SAMPLE_MS.
    """
    with ExitStack() as both:

        def opened(paths: Sequence[Path]) -> tuple[Callable[[], float], str]:
            parts = [both.enter_context(GraphProcess(path, threads=threads, spin=True)) for path in paths]
            first = [min(part.timed(arrays, 3)) for part, arrays in zip(parts, inputs, strict=True)]
            repeats = int(np.clip(SAMPLE_MS / max(1e-3, sum(first)), 1, MOST_REPEATS))

            def run() -> float:
                return sum(
                    float(np.mean(part.timed(arrays, repeats))) for part, arrays in zip(parts, inputs, strict=True)
                )

            return run, str(parts[0].info["runtime_version"])

        float_run, version = opened(float_graphs)
        quantized_run, _ = opened(quantized_graphs)
        return compare(float_run, quantized_run, runtime=version, threads=threads)


def compare(
    float_run: Callable[[], float], quantized_run: Callable[[], float], *, runtime: str, threads: int
) -> SpeedComparison:
    """Two ways to do the same work, each giving its milliseconds, run in pairs whose order alternates.

    `ratio` is the median over the pairs of quantized ÷ float, with its 95 % interval; it pays where the whole interval
    lies below 1: quantizing that may cost time has to be worth its size.
    """
    float_ms: list[float] = []
    quantized_ms: list[float] = []
    for pair in range(WARMUP + PAIRS):
        for run, samples in ((float_run, float_ms), (quantized_run, quantized_ms))[:: 1 if pair % 2 else -1]:
            samples.append(run())
    float_P, quantized_P = np.array(float_ms[WARMUP:]), np.array(quantized_ms[WARMUP:])
    ratio = statistics.median(quantized_P / float_P)
    return SpeedComparison(
        machine=facts.describe() | {"threads": threads},
        runtime=runtime,
        float_ms=float(np.median(float_P)),
        quantized_ms=float(np.median(quantized_P)),
        ratio=ratio.value,
        ratio_ci95=ratio.ci95,
        pairs=ratio.units,
        pays=ratio.ci95 is not None and ratio.ci95[1] < 1,
    )


def report(found: SpeedComparison, name: str, progress: Progress) -> None:
    """Say what was found: a warning where quantizing costs time here, a line where the interval holds 1."""
    certain = found.ratio_ci95
    interval = (
        statistics.too_few(found.pairs, found.pairs, "pairs")
        if certain is None
        else f"95 % {certain[0]:.2f} to {certain[1]:.2f}"
    )
    figures = (
        f"{name} takes {found.ratio:.2f} times ({interval}) as long as float in {found.runtime} on"
        f" {found.machine['cpu']}: {found.quantized_ms:.3g} against {found.float_ms:.3g} ms"
    )
    if certain is not None and certain[0] >= 1:
        progress.warn(f"quantizing does not pay here: {figures}; ship float where its size fits")
    elif not found.pays:
        progress.say(f"export: quantizing makes no certain difference here: {figures}")
    else:
        progress.say(f"export: quantizing pays: {figures}")
