"""What the process of a runtime may use, computed from what it opens and what it is to compute.

`OWN` is for artifacts of the user of this machine: no network and no other process (where no GPU is), memory up to
what the machine has, any time. `replay_of` is for a bundle that somebody else may have made. There the process has no
network, starts no other, writes nothing, sees a folder of its own and the installed software, and its memory and its
time are what such an artifact needs, several times over. What is counted: memory and processor seconds beyond those
of the process with its libraries loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MIB = 1 << 20
# llama.cpp maps the artifact's bytes and may repack them, onnxruntime copies and prepacks them, transformers unpacks.
ARTIFACT_TIMES = 3
CONTEXT_TOKEN_BYTES = MIB  # a cache of 80 layers of 8 heads of 128 in F16 takes 0.3 MiB a token
BASE_BYTES = 512 * MIB
THREAD_BYTES = 16 * MIB  # its stack and its part of the allocator
ADDRESSES_TIMES = 2  # of all that; the allocator reserves 64 MiB of addresses a thread and uses little of it
THREAD_ADDRESSES = 192 * MIB
# A token reads the whole artifact. A Raspberry Pi 4 does about 1.5 GB of it a second and core.
OPEN_BYTES_A_SECOND = 100e6
TOKEN_BYTES_A_SECOND = 500e6
BASE_CPU_S = 4.0
# Where others use the machine, the clock runs ahead of the processor.
WALL_TIMES = 5.0
BASE_WALL_S = 90.0  # the libraries are loaded in it: torch takes half a minute on a machine that has much else to do
LOG_BYTES = 8 * MIB
# Of the private folder: where libraries may write while they are loaded.
HOME = "home"
OPEN_FILES = 1024


@dataclass(frozen=True)
class Bounds:
    """`isolated`: no network, no other process, nothing written, limits on memory and time. `tokens`: what it is to
    compute, prompts and continuations together."""

    isolated: bool
    tokens: int = 0


OWN = Bounds(isolated=False)


def replay_of(tokens: int) -> Bounds:
    """For an artifact that is not trusted, of which so many tokens are computed."""
    return Bounds(isolated=True, tokens=tokens)


@dataclass(frozen=True)
class Limits:
    """memory_bytes and cpu_s beyond those of the loaded libraries; None: no limit. wall_s of the whole process."""

    memory_bytes: int | None
    address_bytes: int | None
    cpu_s: float | None
    wall_s: float | None


def limits_of(bounds: Bounds, *, artifact_bytes: int, context_tokens: int, threads: int) -> Limits:
    """The limits for one artifact."""
    if not bounds.isolated:
        return Limits(_machine_bytes(), None, None, None)
    memory = (
        ARTIFACT_TIMES * artifact_bytes + CONTEXT_TOKEN_BYTES * context_tokens + BASE_BYTES + THREAD_BYTES * threads
    )
    machine = _machine_bytes()
    if machine is not None:
        memory = min(memory, machine)
    cpu = BASE_CPU_S + artifact_bytes / OPEN_BYTES_A_SECOND + bounds.tokens * artifact_bytes / TOKEN_BYTES_A_SECOND
    return Limits(
        memory_bytes=memory,
        address_bytes=ADDRESSES_TIMES * memory + artifact_bytes + THREAD_ADDRESSES * (threads + 4),
        cpu_s=cpu,
        wall_s=BASE_WALL_S + WALL_TIMES * cpu,
    )


def _machine_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
