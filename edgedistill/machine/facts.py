"""What machine this is: named in every measurement, and part of the keys of what is probed on it.

Nothing here identifies a person or a network: no host name, no serial number.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
# Linux's names → the names that target profiles use; only what changes how fast or how right a kernel is.
ARM_ISA = {
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
X86_ISA = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
# MIDR part numbers of CPUs that the target profiles name: /proc/cpuinfo gives no model name on ARM.
ARM_PARTS = {
    (0x41, 0xD05): "Cortex-A55", (0x41, 0xD08): "Cortex-A72", (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715", (0x41, 0xD4E): "Cortex-X3", (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520", (0x41, 0xD81): "Cortex-A720", (0x41, 0xD82): "Cortex-X4",
}  # fmt: skip


def describe() -> dict[str, Any]:
    """The machine in words and numbers; None where a thing cannot be known.

    Keys: machine, cpu, gpu (names, of NVIDIA cards), arch, isa (sorted names as target profiles use them),
    cores (of the whole machine), usable_cores (that this process may run on), memory_bytes, os, python,
    governor, power_mode.
    """
    cpu, flags = _cpu()
    return {
        "machine": _machine_name(),
        "cpu": cpu,
        "gpu": _gpus(),
        "arch": arch(),
        "isa": _isa(flags),
        "cores": os.cpu_count(),
        "usable_cores": len(usable_cpus()),
        "memory_bytes": _memory_bytes(),
        "os": _os_name(),
        "python": platform.python_version(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "power_mode": _power_mode(),
    }


def fingerprint() -> str:
    """16 hex digits over CPU model, its flags and the architecture: the same on equal CPUs."""
    cpu, flags = _cpu()
    return hashlib.sha256("\n".join([arch(), cpu or "", *sorted(flags)]).encode()).hexdigest()[:16]


def training_precision() -> str:
    """ "bf16" where products of bfloat16 are fast: a GPU, or a CPU with instructions for them; else "fp32".

    A CPU with AVX2 alone takes six times as long for them as for float32.
    """
    fast = {"avx512_bf16", "amx_bf16", "bf16"}
    return "bf16" if _gpus() or Path("/dev/nvhost-gpu").exists() or fast & set(_cpu()[1]) else "fp32"


def arch() -> str:
    """The instruction set's name as target profiles write it: x86_64, aarch64, or what the system says."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def usable_cpus() -> list[int]:
    """Numbers of the CPUs that this process may run on, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu() -> tuple[str | None, list[str]]:
    """Model name and instruction-set flags."""
    if CPUINFO.is_file():
        return parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    if sys.platform == "darwin":
        flags = _output(["sysctl", "-n", "hw.optional"]) or ""
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]), sorted(flags.split())
    return platform.processor() or None, []


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Model name (clusters counted, on ARM) and the flags that every core has, from Linux's /proc/cpuinfo."""
    name: str | None = None
    clusters: dict[str, int] = {}
    flags: set[str] | None = None
    implementer = 0
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and name is None:
            name = value
        elif key in ("flags", "Features"):
            flags = set(value.split()) if flags is None else flags & set(value.split())
        elif key == "CPU implementer":
            implementer = int(value, 16)
        elif key == "CPU part":
            part = int(value, 16)
            known = ARM_PARTS.get((implementer, part), f"ARM part {implementer:#x}/{part:#x}")
            clusters[known] = clusters.get(known, 0) + 1
    if clusters:
        name = " + ".join(f"{count}× {part}" for part, count in clusters.items())
    return name, sorted(flags or ())


def _isa(flags: list[str]) -> list[str]:
    names = {ARM_ISA[flag] for flag in flags if flag in ARM_ISA}
    return sorted(names | (set(flags) & set(X86_ISA)))


def _gpus() -> list[str]:
    """Model names as NVIDIA's driver lists them; one that hangs on another bus is not found."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", _read(path) or "", re.MULTILINE)
        if model:
            found.append(model.group(1).strip())
    return found


def _machine_name() -> str:
    model = _read(Path("/proc/device-tree/model"))
    if model:
        return model
    dmi = Path("/sys/class/dmi/id")
    named = " ".join(part for part in (_read(dmi / "sys_vendor"), _read(dmi / "product_name")) if part)
    return named or f"{platform.system()} {arch()}"


def _memory_bytes() -> int | None:
    """Physical memory, or the control group's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = _read(Path("/sys/fs/cgroup/memory.max")) or ""
    return min(total, int(limit)) if limit.isdigit() else total


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident, mapped weights included.

    Not `ru_maxrss` where Linux gives better: a new process inherits that of the one which started it.
    """
    for line in (_read(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that a process could still take, within the control group's limit where there is one; None: unknown."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")) or "", re.MULTILINE)
    free = None if found is None else int(found.group(1)) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = _read(group / "memory.max") or "", _read(group / "memory.current") or ""
    if not (limit.isdigit() and used.isdigit()):
        return free
    # The group's page cache counts as used, and the system drops it where memory is wanted.
    cache = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat") or "", re.MULTILINE)
    left = int(limit) - int(used) + (int(cache.group(1)) if cache else 0)
    return left if free is None else min(free, left)


def _os_name() -> str:
    release = _read(Path("/etc/os-release")) or ""
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.MULTILINE)
    return f"{pretty.group(1) if pretty else platform.system()}, kernel {platform.release()}"


def _power_mode() -> str | None:
    """Jetson's nvpmodel, else the firmware's platform profile."""
    if shutil.which("nvpmodel"):
        mode = re.search(r"NV Power Mode: *(\S+)", _output(["nvpmodel", "-q"]) or "")
        if mode:
            return mode.group(1)
    return _read(Path("/sys/firmware/acpi/platform_profile"))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
