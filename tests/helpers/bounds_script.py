"""Puts the bounds of a runtime's process on itself and tries one thing: `bounds_script.py ATTEMPT FOLDER [LAYERS]`.

Prints "stopped: why" or "done: what". LAYERS, with commas: those of landlock, system_calls and network that are put on
(default: all); nobody: as another user.
"""

from __future__ import annotations

import codecs
import ctypes
import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from edgedistill.runtimes import confine, landlock, seccomp

MIB = 1 << 20
NOBODY = 65534
FOLDER = Path(sys.argv[2])
LAYERS = sys.argv[3].split(",") if len(sys.argv) > 3 else ["landlock", "system_calls", "network"]
PARENT = os.getppid()


def connect(family: int) -> str:
    with socket.socket(family, socket.SOCK_DGRAM if family == socket.AF_INET else socket.SOCK_STREAM) as one:
        if family == socket.AF_INET:
            one.connect(("192.0.2.1", 53))
        return "a socket"


def uring() -> str:
    ctypes.set_errno(0)
    handle = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(425), 8, ctypes.create_string_buffer(120))
    if handle < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    return "io_uring"


def fork_bomb() -> str:
    children = []
    while len(children) < 50:
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
        children.append(child)
    return "fifty processes"


def write(path: Path) -> str:
    path.write_bytes(b"x" * MIB)
    return f"wrote {path.name}"


def in_a_thread(attempt: Callable[[], str]) -> Callable[[], str]:
    """By a thread that was there before the bounds."""
    go, said = threading.Event(), []

    def run() -> None:
        go.wait()
        try:
            said.append(attempt())
        except OSError as error:
            said.append(f"stopped: {error}")

    thread = threading.Thread(target=run)
    thread.start()

    def release() -> str:
        go.set()
        thread.join()
        if said[0].startswith("stopped"):
            raise OSError(said[0])
        return said[0]

    return release


def allocate() -> str:
    return f"{len(bytearray(100 << 30)) >> 30} GiB"


def allocate_by_and_by() -> str:
    held = []
    for _ in range(4096):
        block = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[:] = b"x" * MIB
        held.append(block)
    return "4 GiB, a megabyte at a time"


def threads() -> str:
    alive = [threading.Thread(target=time.sleep, args=(3,), daemon=True) for _ in range(20_000)]
    for thread in alive:
        thread.start()
    return "20,000 threads"


def spin() -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pass
    return "a minute of processor time"


def raise_limits() -> str:
    for which in (resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no limits"


def memory_file() -> str:
    os.close(os.memfd_create("x"))
    return "a file in memory"


def flood() -> str:
    for _ in range(64):
        os.write(1, b"x" * MIB)
    return "64 MiB of log"


ATTEMPTS: dict[str, Callable[[], str]] = {
    "inet": lambda: connect(socket.AF_INET),
    "inet6": lambda: connect(socket.AF_INET6),
    "unix": lambda: connect(socket.AF_UNIX),
    "uring": uring,
    "fork": fork_bomb,
    "exec": lambda: subprocess.run(["/bin/echo"], check=True) and "echo",
    "write": lambda: write(FOLDER / "written"),
    "write-private": lambda: write(FOLDER / "private" / "written"),
    "overwrite": lambda: write(FOLDER / "there"),
    "read": lambda: (FOLDER / "there").read_text(),
    "read-private": lambda: (FOLDER / "private" / "mine").read_text(),
    "read-artifact": lambda: (FOLDER / "artifact").read_text(),
    "unlink": lambda: (FOLDER / "there").unlink() or "unlinked",
    "rename": lambda: str((FOLDER / "there").rename(FOLDER / "moved")),
    "allocate": allocate,
    "allocate-by-and-by": allocate_by_and_by,
    "threads": threads,
    "spin": spin,
    "kill": lambda: os.kill(PARENT, 0) or "a signal",
    "raise-limits": raise_limits,
    "memory-file": memory_file,
    "flood": flood,
    "abort": lambda: os.abort(),
    "nothing": lambda: "nothing",
}


def main() -> None:
    name = sys.argv[1]
    attempt = ATTEMPTS[name.removeprefix("thread-")]
    if "landlock" not in LAYERS:
        landlock.restrict = lambda *_, **__: "left out"
    if "network" not in LAYERS:
        confine._leave_network = lambda: None
    if "nobody" in LAYERS:
        codecs.lookup("ascii")  # the environment may not be another user's to read
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    report = confine.begin(FOLDER / "private", [FOLDER / "artifact"])
    if name.startswith("thread-"):
        attempt = in_a_thread(attempt)
    if "system_calls" not in LAYERS:
        seccomp.install = lambda **_: None
    report |= confine.seal(memory_bytes=256 * MIB, address_bytes=1024 * MIB, cpu_s=1.0, isolated=True, gpu=False)
    print(report, flush=True)
    try:
        print("done:", attempt(), flush=True)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        print("stopped:", repr(error), flush=True)
    os._exit(0)


main()
