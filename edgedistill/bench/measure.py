"""How fast an artifact's bytes run on this machine, with every sample kept.

A fresh process, pinned to as many CPUs as it has threads, the fastest ones; seeded random tokens; `warmup`
runs that are thrown away, then `repeats` that count, each from an empty KV cache. All samples of one artifact
come from one process: start-up differs from process to process, and `load_ms` tells of it separately.

The process is opened at the artifact's whole context, as it would be on the device, so the peak memory holds
a KV cache of that size however short the workload is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.bench.ceiling import bytes_read_a_token, ceiling
from edgedistill.config.recipe import Bench
from edgedistill.config.targets import Target, why_not
from edgedistill.errors import UserError
from edgedistill.machine import facts
from edgedistill.progress import QUIET, Progress
from edgedistill.records.artifact import Artifact
from edgedistill.records.figures import Basis
from edgedistill.records.latency import Latency, Percentiles, Workload
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.runtimes.unchanged import unchanged
from edgedistill.statistics import MIN_VALUES_FOR_P99, rate
from edgedistill.store import Store

MAPPED_WEIGHTS = (
    "peak_rss_bytes counts the pages of the mapped weights that were touched; "
    "the system can drop those under pressure, unlike the rest"
)


def bench(
    artifact: Artifact,
    folder: Path,
    target: Target,
    *,
    store: Store,
    settings: Bench | None = None,
    seed: int = 0,
    notes: Sequence[str] = (),
    progress: Progress = QUIET,
) -> Latency:
    """Measure `folder / artifact.entry` in `artifact.runtime` on this machine.

    `settings` override the target's. Basis `measured` where this machine is the target and, if the target
    has a GPU, the runtime offloaded to it; else `proxy`.
    Raises UserError where the workload does not fit the artifact, RuntimeCrashed where the runtime dies.
    """
    workload, asked_threads = _workload(artifact, target, settings or Bench())
    here = facts.describe()
    found_notes = [*notes, *_thread_notes(asked_threads)]
    threads = min(asked_threads, len(facts.usable_cpus()))
    ttft_ms: list[float] = []
    token_ms: list[list[float]] = []
    with (
        unchanged(artifact, folder, store),
        RuntimeProcess(
            artifact.runtime,
            folder / artifact.entry,
            threads=threads,
            context_tokens=artifact.context_tokens,
            logits_all=False,
            pin=True,
            spin=True,
            store=store,
        ) as runtime,
    ):
        vocabulary = min(artifact.vocab_size, int(runtime.info["vocab_size"]))
        prompt = np.random.default_rng(seed).integers(0, vocabulary, workload.prompt_tokens)
        for run in range(workload.warmup + workload.repeats):
            timed = runtime.timed(prompt, workload.new_tokens)
            if run >= workload.warmup:
                ttft_ms.append(float(timed["ttft_ms"]))
                token_ms.append([float(ms) for ms in timed["token_ms"]])
            progress.step("bench", run + 1, workload.warmup + workload.repeats)
        peak = runtime.peak_rss_bytes()
        info = runtime.info
    basis, basis_notes = basis_of(target, here, info, workload, threads)
    found_notes += [*basis_notes, _memory_note(workload, info), *_runtime_notes(here, info)]
    all_token_ms = [ms for run_ms in token_ms for ms in run_ms]
    # All tokens ÷ all time. The repeats are the independent units: tokens of one follow each other on one machine.
    prefill = rate(ttft_ms, np.full(len(ttft_ms), workload.prompt_tokens))
    decode = rate([sum(run_ms) for run_ms in token_ms], [len(run_ms) for run_ms in token_ms])
    read = bytes_read_a_token(artifact, folder, context_tokens=workload.prompt_tokens)
    return Latency(
        target=target.name,
        measured_on=here
        | {
            "runtime": info["runtime"],
            "runtime_version": info["runtime_version"],
            "threads": threads,
            "options": info["options"],
        },
        basis=basis,
        artifact_sha256=artifact.sha256,
        workload=workload,
        ttft_ms=percentiles(ttft_ms),
        token_ms=percentiles(all_token_ms),
        prefill_tokens_per_s=prefill.value,
        prefill_tokens_per_s_ci95=prefill.ci95,
        decode_tokens_per_s=decode.value,
        decode_tokens_per_s_ci95=decode.ci95,
        rate_units=decode.units,
        load_ms=float(info["load_ms"]),
        peak_rss_bytes=peak,
        drift=drift(all_token_ms),
        samples={
            "ttft_ms": ttft_ms,
            "token_ms": all_token_ms,
            "load_ms": [float(info["load_ms"])],
            "process_start_to_ready_ms": [float(info["spawn_ms"])],
        },
        ceiling=ceiling(target.bandwidth_bytes_per_s, read, context_tokens=workload.prompt_tokens),
        notes=found_notes,
    )


def percentiles(samples_ms: Sequence[float]) -> Percentiles:
    """p50, p90 and p99 (linear between samples); no p99 of fewer than 100 samples."""
    values = np.asarray(samples_ms)
    return Percentiles(
        p50=float(np.percentile(values, 50)),
        p90=float(np.percentile(values, 90)),
        p99=float(np.percentile(values, 99)) if len(values) >= MIN_VALUES_FOR_P99 else None,
    )


def drift(samples_ms: Sequence[float]) -> float:
    """Mean of the last quarter ÷ mean of the first, in the order measured: above 1, the machine slowed down.

    With fewer than four repeats it also holds the growth of the KV cache within a repeat.
    """
    quarter = max(1, len(samples_ms) // 4)
    return float(np.mean(samples_ms[-quarter:]) / np.mean(samples_ms[:quarter]))


def _workload(artifact: Artifact, target: Target, settings: Bench) -> tuple[Workload, int]:
    """The workload and the threads asked for: the recipe's where it says so, else the target's."""
    asked = {name: value for name, value in settings.model_dump().items() if value is not None}
    values = target.bench.model_dump() | asked
    threads = int(values.pop("threads"))
    workload = Workload(batch=1, **values)
    needed = workload.prompt_tokens + workload.new_tokens
    if needed > artifact.context_tokens:
        raise UserError(
            f"bench wants {workload.prompt_tokens} + {workload.new_tokens} tokens, and the artifact was exported for "
            f"a context of {artifact.context_tokens}",
            "set bench.prompt_tokens and bench.new_tokens to fewer, or export.context_tokens to more",
        )
    return workload, threads


def _thread_notes(asked_threads: int) -> list[str]:
    usable = len(facts.usable_cpus())
    if asked_threads <= usable:
        return []
    return [f"{asked_threads} threads were asked for and this machine has {usable} CPUs: {usable} threads were used"]


def basis_of(
    target: Target, here: dict[str, Any], info: dict[str, Any], workload: Workload, threads: int
) -> tuple[Basis, list[str]]:
    """`measured`: on the target, with its GPU where it has one, under the load that its profile asks for."""
    notes = []
    why = why_not(target, here)
    if why is not None:
        notes.append(f"this machine is not known to be {target.name}: {why}; the figures tell nothing of its speed")
    if target.gpu and not info["options"].get("n_gpu_layers"):
        notes.append(
            f"the target's GPU was not used: it ran on the CPU, {info['runtime_version']} has no GPU support here"
        )
    asked = target.bench.model_dump()
    ran = workload.model_dump() | {"threads": threads}
    other = [name for name in ("threads", "prompt_tokens", "new_tokens") if ran[name] != asked[name]]
    other += [name for name in ("warmup", "repeats") if ran[name] < asked[name]]
    if other:
        words = "; ".join(f"{name} {ran[name]}, not {asked[name]}" for name in other)
        notes.append(f"the load was not that of the profile: {words}")
    return ("proxy" if notes else "measured"), notes


def _memory_note(workload: Workload, info: dict[str, Any]) -> str:
    if info["runtime"] in ("onnxruntime", "transformers"):
        # Its cache is as long as the text so far.
        return f"peak_rss_bytes holds a KV cache of {workload.prompt_tokens + workload.new_tokens} tokens"
    return f"peak_rss_bytes holds a KV cache of {info['context_tokens']} tokens, the artifact's whole context"


def _runtime_notes(here: dict[str, Any], info: dict[str, Any]) -> list[str]:
    options = info["options"]
    found = []
    if info["runtime"] == "llama.cpp":
        found.append(MAPPED_WEIGHTS)
        if not options["use_extra_bufts"]:
            found.append(f"use_extra_bufts is off: {options['use_extra_bufts_reason']}")
    if options["cpus"] is None:
        found.append("the process could not be pinned to CPUs on this system")
    if here["governor"] not in (None, "performance"):
        found.append(f"the CPU governor is {here['governor']}: clocks may change while it runs")
    return found
