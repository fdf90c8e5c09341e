"""The bench stage: a measurement kept per artifact, target settings and machine."""

from __future__ import annotations

from typing import Any

from edgedistill import statistics
from edgedistill.config.recipe import Bench
from edgedistill.config.targets import Target
from edgedistill.machine import facts
from edgedistill.progress import QUIET, Progress
from edgedistill.records.artifact import Artifact
from edgedistill.records.latency import Latency
from edgedistill.runtimes.facts import runtime_facts
from edgedistill.store import Store, Stored, Work, versions


def bench_artifact(
    exported: Stored[Artifact],
    target: Target,
    *,
    settings: Bench,
    seed: int,
    store: Store,
    progress: Progress = QUIET,
) -> Latency:
    """latency.json of an artifact on this machine: found in the store, or measured now."""
    here = facts.describe()
    inputs: dict[str, Any] = {
        "artifact": exported.result.sha256,
        # Not in the bytes of every format, and the memory depends on it.
        "context_tokens": exported.result.context_tokens,
        "target": target.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "intervals": statistics.METHOD,
        "seed": seed,
        "machine": {"fingerprint": facts.fingerprint()}
        | {name: here[name] for name in ("gpu", "usable_cores", "memory_bytes", "governor", "power_mode")},
        "runtime": runtime_facts(exported.result.runtime, store),
        "versions": versions("edgedistill", "onnxruntime", "onnxruntime-genai"),
    }

    def measure(work: Work) -> Latency:
        from edgedistill.bench.measure import bench

        progress.say(f"bench: {exported.result.runtime} with the settings of {target.name}")
        return bench(
            exported.result, exported.directory, target, settings=settings, seed=seed, store=store, progress=progress
        )

    stored = store.run("bench", inputs, measure, Latency, progress.say)
    latency = stored.result
    progress.say(
        f"bench: {latency.decode_tokens_per_s:,.0f} tokens/s decoding, first token after {latency.ttft_ms.p50:.1f} ms"
        f" ({latency.basis}{'' if latency.basis == 'measured' else ': not on the target, or without its GPU'})"
        f"{' (from the store)' if stored.reused else ''}"
    )
    return latency
