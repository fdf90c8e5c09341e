"""Bounds that this process puts on itself, in the child: `begin` at once, `seal` between libraries and artifact.

Layers that a system lacks are left out and said: the report names each layer and what became of it. What is always
there: the kernel's limits on memory, time and files, a private folder, and an environment of our own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.runtimes import landlock, seccomp
from edgedistill.runtimes.bounds import HOME, LOG_BYTES, OPEN_FILES

PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_SET_DUMPABLE = 38, 24, 4
CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITY_VERSION_3 = 0x2008_0522
# Root reads files of others by it, and a bundle may be somebody else's; Landlock says which.
CAP_DAC_READ_SEARCH = 2
LAST_CAPABILITY = 40
DONE = "on"

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
SYSTEM_FOLDERS = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc", "/opt", "/proc", "/sys", "/dev", "/nix", "/gnu", "/snap",
    "/run/current-system", "/run/opengl-driver", "/System", "/Library",
)  # fmt: skip
WRITABLE_DEVICES = ("/dev/null", "/dev/zero")


def begin(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """No core, few files, no new privileges, no network, and of the file system what is needed; what was done.

    The process has one thread yet. `files`: of the artifact, outside of the private `folder`.
    """
    report = {"limits": _limit_files()}
    report["no_new_privs"] = _tried(lambda: _prctl(PR_SET_NO_NEW_PRIVS, 1))
    report["network"] = _tried(_leave_network)
    report["landlock"] = _tried(lambda: _see_only(folder, files))
    return report


def seal(
    *, memory_bytes: int | None, address_bytes: int | None, cpu_s: float | None, isolated: bool, gpu: bool
) -> dict[str, str]:
    """Limits beyond what is used now, and the filter of system calls; what was done. `gpu`: one may be used."""
    report: dict[str, str] = {}
    if not gpu:
        _limit_memory(memory_bytes, address_bytes)
    if cpu_s is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + cpu_s) + 1
        # SIGXCPU at the first, which says why; SIGKILL at the second.
        _lower(resource.RLIMIT_CPU, seconds, seconds + 2)
    if isolated:
        report["system_calls"] = _tried(lambda: seccomp.install(writes=gpu))
        if gpu:
            report["memory"] = "off: a GPU's driver reserves more addresses than any limit"
            report["writing"] = "off in the filter of system calls: a GPU's driver opens its devices for writing"
        if report["system_calls"] != DONE:
            report["processes"] = _tried(_limit_processes)
    elif not gpu:
        # The user's own artifacts too need no network and no other process.
        report["no_new_privs"] = _tried(lambda: _prctl(PR_SET_NO_NEW_PRIVS, 1))
        report["system_calls"] = _tried(lambda: seccomp.install(writes=True))
    return report


def has_gpu() -> bool:
    """Whether a runtime here may open a GPU, whose driver needs more than the bounds leave."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(device).exists() for device in GPU_DEVICES)


def _tried(layer: Any) -> str:
    """DONE, or what a layer says of itself, or why it is not there."""
    try:
        said = layer()
    except OSError as error:
        return f"off: {error.strerror or error}"
    return said if isinstance(said, str) else DONE


def _lower(which: int, value: int, hard: int | None = None) -> None:
    """Both limits, never above what they are: not even root's."""
    now = [one for one in resource.getrlimit(which) if one != resource.RLIM_INFINITY]
    lowest = min([value, *now])
    resource.setrlimit(which, (lowest, lowest if hard is None else min([hard, *now[-1:]])))


def _limit_files() -> str:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    # What a library prints goes to the log; nothing else is written.
    _lower(resource.RLIMIT_FSIZE, LOG_BYTES)
    return DONE


def _limit_memory(memory_bytes: int | None, address_bytes: int | None) -> None:
    used = _memory_now()
    if memory_bytes is not None and "VmData" in used and hasattr(resource, "RLIMIT_DATA"):
        _lower(resource.RLIMIT_DATA, used["VmData"] + memory_bytes)
    if address_bytes is not None:
        _lower(resource.RLIMIT_AS, used.get("VmSize", 0) + address_bytes)


def _memory_now() -> dict[str, int]:
    """Bytes of addresses (VmSize) and of private memory (VmData) of this process; empty where it cannot be told."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        rows = [line.split() for line in text.splitlines()]
        return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row and row[0] in ("VmSize:", "VmData:")}
    return {}


def _limit_processes() -> None:
    """As many threads as this user has now and some: where no filter keeps the process from starting others."""
    count = sum(1 for _ in Path("/proc").glob("[0-9]*/task/*"))
    _lower(resource.RLIMIT_NPROC, count + 64)


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        raise OSError(0, f"not on {sys.platform}")
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _leave_network() -> None:
    """A network namespace with nothing in it; then without the rights that made it."""
    if sys.platform != "linux":
        raise OSError(0, f"not on {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) != 0:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    _drop_capabilities(libc)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    machine = platform.machine()
    if machine not in SYS_CAPSET:
        return
    for one in range(LAST_CAPABILITY + 1):
        if one != CAP_DAC_READ_SEARCH:
            libc.prctl(PR_CAPBSET_DROP, one, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    held = (ctypes.c_uint32 * 6)()
    reading = 1 << CAP_DAC_READ_SEARCH if _holds(CAP_DAC_READ_SEARCH) else 0
    held[0] = held[1] = reading  # effective and permitted of the first 32
    libc.syscall(ctypes.c_long(SYS_CAPSET[machine]), header, held)


def _holds(capability: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("CapPrm:"):
                return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def _see_only(folder: Path, files: Sequence[Path]) -> str:
    """The installed software, the private folder and the artifact's files; written are devices alone."""
    software = [*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(None, sys.path)]
    libraries = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path.startswith("/")]
    package = Path(__file__).resolve().parents[1]
    readable = [Path(path).resolve() for path in [*software, *libraries] if Path(path).is_absolute()]
    devices = GPU_DEVICES if has_gpu() else ()
    writable = [Path("/dev")] if devices else [Path(path) for path in WRITABLE_DEVICES]
    return landlock.restrict([*readable, package, folder, *files], writable=writable, owned=[folder / HOME])


def layers_off(report: Mapping[str, str]) -> list[str]:
    """Of a report, the layers that are not there, with the reason."""
    return [f"{layer} {what}" for layer, what in report.items() if what.startswith("off")]
