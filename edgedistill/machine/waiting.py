"""How long a thread that waits for another keeps its core busy: briefly, then it sleeps.

OpenMP's threads spin at the end of every parallel loop, GNU's (in torch and llama.cpp) for some milliseconds before
they sleep. Alone on the machine that costs nothing. Beside other work it costs nearly everything: the thread that is
waited for has lost its core to the other process, and the one that waits burns a time slice of its own until the
scheduler takes its core away as well. benchmarks/busy.py measures both.

The variables are read when the OpenMP library is loaded, so they are set before torch is. A variable that the user set
is the user's, and where one of them is set nothing is added. Where speed is measured (`bench`, `compare_*`) the
runtime gets its own defaults, as an app would have them: `spinning` takes away what `asleep` put in.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# GNU: turns of a loop with a pause, some 20 to 50 ns each; LLVM and Intel: milliseconds. Chosen on two EPYC cores:
# 20,000 keep an idle machine's rate and a seventh of it beside two other processes; 2,000 keep more than a third, at a
# cost of up to a tenth where idle; none at all (PASSIVE) two thirds, at a cost of a quarter.
OURS = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
BESIDE_OTHERS = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
USERS = ("OMP_WAIT_POLICY", *OURS)
ONNXRUNTIME_SPINS = "session.intra_op.allow_spinning"
MARK = "EDGEDISTILL_WAITING"  # "set": the variables are ours; "user": they are not
LOADAVG = Path("/proc/loadavg")  # its fourth word: threads that run or wait for a core / all
LOOKS, BETWEEN_LOOKS_S = 6, 0.01


def asleep(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what lets waiting threads sleep, unless it says itself how they wait."""
    made = dict(environment)
    if MARK not in made:
        said = any(name in made for name in USERS)
        made |= {MARK: "user"} if said else {MARK: "set", **OURS}
    return made


def spinning(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what `asleep` put in: for a process whose speed is measured."""
    ours = (OURS, BESIDE_OTHERS) if environment.get(MARK) == "set" else ()
    return {
        name: value
        for name, value in environment.items()
        if name != MARK and not any(each.get(name) == value for each in ours)
    }


def sleeps_soon(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process came by `asleep`: runtimes with switches of their own (onnxruntime) follow it."""
    return MARK in environment


def let_threads_sleep(*, look: bool = False) -> None:
    """`asleep` for this process and its children; for the process itself only where OpenMP is not loaded yet.

    `look`: whether other processes want the cores now is worth a moment; then threads sleep sooner.
    """
    os.environ.update(asleep(os.environ))
    if look and os.environ[MARK] == "set" and "torch" not in sys.modules:
        os.environ.update(BESIDE_OTHERS if others_run() else OURS)


def others_run() -> bool:
    """Whether another process than this one was running or waiting for a core at each of some looks (50 ms).

    False where the system does not say (Linux does).
    """
    for look in range(LOOKS):
        if look:
            time.sleep(BETWEEN_LOOKS_S)
        try:
            running, _, _ = LOADAVG.read_text(encoding="ascii").split()[3].partition("/")
            if int(running) <= 1:  # this thread
                return False
        except (OSError, ValueError, IndexError):
            return False
    return True
