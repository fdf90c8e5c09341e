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
from collections.abc import Mapping

# GNU: turns of a loop with a pause, some 20 to 50 ns each; LLVM and Intel: milliseconds. Chosen on two EPYC cores:
# 20,000 keep an idle machine's rate and a sixth of it beside two other processes, 6,000 a third, 3,000 two fifths, none
# (PASSIVE) two thirds, at a cost of a tenth to a quarter where idle.
OURS = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}
USERS = ("OMP_WAIT_POLICY", *OURS)
ONNXRUNTIME_SPINS = "session.intra_op.allow_spinning"
MARK = "EDGEDISTILL_WAITING"  # "set": the variables are ours; "user": they are not


def asleep(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what lets waiting threads sleep, unless it says itself how they wait."""
    made = dict(environment)
    if MARK not in made:
        said = any(name in made for name in USERS)
        made |= {MARK: "user"} if said else {MARK: "set", **OURS}
    return made


def spinning(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what `asleep` put in: for a process whose speed is measured."""
    ours = OURS if environment.get(MARK) == "set" else {}
    return {name: value for name, value in environment.items() if name != MARK and ours.get(name) != value}


def sleeps_soon(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process came by `asleep`: runtimes with switches of their own (onnxruntime) follow it."""
    return MARK in environment


def let_threads_sleep() -> None:
    """`asleep` for this process and its children; for the process itself only where OpenMP is not loaded yet."""
    os.environ.update(asleep(os.environ))
