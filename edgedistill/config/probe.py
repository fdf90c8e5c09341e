"""Drafts a profile of this machine, with its memory bandwidth measured."""

from __future__ import annotations

import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgedistill.config.targets import BenchSettings, Cluster, Cpu, Identify, Limits, Target
from edgedistill.records.figures import Figure

# Several times larger than the usual last-level cache, so that a copy goes through memory.
BUFFER_BYTES = 256 << 20
MOST_BUFFER_BYTES = 1 << 29
REPEATS = 5


def targets_probe(machine: dict[str, Any] | None = None, *, buffer_bytes: int | None = None) -> Target:
    """A draft profile of this machine, valid as it is; its limits and artifacts are for the user to edit.

    Memory and bandwidth are measured, the rest is derived from them. Takes a few seconds, longer
    where the system is slow to hand out memory.
    """
    if machine is None:
        from edgedistill.machine.facts import describe

        machine = describe()
    cores = int(machine.get("usable_cores") or machine.get("cores") or 1)
    memory = int(machine.get("memory_bytes") or 0) or 4 << 30
    arch = "aarch64" if machine.get("arch") == "aarch64" else "x86_64"
    size = buffer_bytes or _buffer_bytes(memory)
    bandwidth = measure_copy_bandwidth(size, threads=cores)
    usable = int(memory * 0.75)
    arm = arch == "aarch64"
    cpu = str(machine.get("cpu") or "CPU")
    machine_name = str(machine.get("machine") or "")
    # "Linux x86_64" is what a machine without a name is called: then its CPU identifies it better.
    known_as = cpu if machine_name.startswith(("Linux", "Darwin", "Windows")) else machine_name or cpu
    return Target(
        name=re.sub(r"[^a-z0-9]+", "-", known_as.lower()).strip("-")[:48].strip("-") or "this-machine",
        title=f"{machine_name or 'this machine'} ({cpu})",
        arch=arch,
        cpu=Cpu(clusters=[Cluster(name=cpu, cores=cores)], isa=sorted(machine.get("isa") or [])),
        memory_bytes=Figure(value=memory, unit="B", basis="measured", source="reported by the operating system"),
        usable_memory_bytes=Figure(
            value=usable, unit="B", basis="derived", source="three quarters of the memory; the rest is the system's"
        ),
        runtime_bytes=Figure(
            value=150_000_000, unit="B", basis="derived", source="allowance for the runtime's process and threads"
        ),
        bandwidth_bytes_per_s=Figure(
            value=round(bandwidth),
            unit="B/s",
            basis="measured",
            source=f"numpy copy of {size / 1e6:.0f} MB, {cores} threads, best of {REPEATS}, read + write counted",
        ),
        runtimes=["llama.cpp", "onnxruntime", "onnxruntime-genai"],
        # As the shipped ARM and x86 profiles choose, for the reasons that stand there.
        default_artifacts=["gguf:Q4_0" if arm else "gguf:Q4_K_M"],
        allowed_artifacts=[
            "gguf:Q4_0", "gguf:Q4_K_M", "gguf:Q5_K_M", "gguf:Q6_K", "gguf:Q8_0", "gguf:F16", "onnx:INT4", "onnx:INT8",
        ],
        encoder_artifacts=["onnx:INT8"],
        context_tokens=2048,
        bench=BenchSettings(threads=cores, prompt_tokens=128, new_tokens=64, warmup=2, repeats=5),
        limits=Limits(
            max_artifact_bytes=usable // 2,
            max_memory_bytes=usable,
            rationale="drafted: no more than the usable memory; state what your application needs",
        ),
        identify=Identify(
            arch=arch,
            isa=sorted(machine.get("isa") or []),
            machine=re.escape(known_as[:90]),
            # hypervisors and kernels take another share of the memory now and then
            min_memory_bytes=int(memory * 0.9),
        ),
        notes=[
            "Drafted by `edgedistill targets probe`: edit name, limits, artifacts, and threads (big cores only).",
            *(["A GPU is present, and is not part of this draft."] if machine.get("gpu") else []),
        ],
    )  # fmt: skip


def measure_copy_bandwidth(buffer_bytes: int, *, threads: int, repeats: int = REPEATS) -> float:
    """Bytes/s that all threads together read and write while copying; the best of `repeats`.

    The bytes that a cache fetches before it overwrites a line are not counted, so it is a lower bound.
    """
    import numpy as np

    words = max(threads, buffer_bytes // 8)
    source = np.ones(words, dtype=np.float64)
    copy = np.zeros_like(source)
    edges = [words * i // threads for i in range(threads + 1)]
    parts = [slice(low, high) for low, high in itertools.pairwise(edges)]

    def copy_part(part: slice) -> None:
        np.copyto(copy[part], source[part])  # releases the interpreter's lock

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(copy_part, parts))
            best = min(best, time.perf_counter() - started)
    return 2.0 * source.nbytes / best


def _buffer_bytes(memory: int) -> int:
    """Twice the last-level cache at least, a sixteenth of the memory at most."""
    caches = [_cache_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    wanted = max(BUFFER_BYTES, 2 * max(caches, default=0))
    return max(1 << 20, min(wanted, MOST_BUFFER_BYTES, memory // 16))


def _cache_bytes(path: Path) -> int:
    try:
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
    except (OSError, UnicodeDecodeError):
        return 0
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0
