"""Errors that a person can act on, and the exit codes.

An error is raised where its cause is known, says cause, value and remedy, and is printed once, by
`cli.main`. Anything else that escapes is a bug: exit code 1, traceback kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_GATE = 3
EXIT_LIMIT = 4
EXIT_HOST = 5
EXIT_INTERRUPTED = 130


class EdgedistillError(Exception):
    """Base of what the command line prints without a traceback: `cause`, then `remedy`."""

    exit_code = EXIT_BUG

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy
        self.results: Any = None  # what was finished when it was raised, for a caller that shows it

    def __reduce__(self) -> tuple[type[EdgedistillError], tuple[str, str]]:
        return type(self), (self.cause, self.remedy)


class UserError(EdgedistillError):
    """Bad usage, recipe, target or input, or a plan that cannot work (exit code 2)."""

    exit_code = EXIT_USER


class GateFailed(EdgedistillError):
    """A check of the gate failed, or there were too few documents to tell (exit code 3)."""

    exit_code = EXIT_GATE


class LimitBroken(EdgedistillError):
    """A finished artifact breaks a limit of its target (exit code 4)."""

    exit_code = EXIT_LIMIT


class HostUnreachable(EdgedistillError):
    """A host for benchmarking cannot be reached (exit code 5)."""

    exit_code = EXIT_HOST


class RuntimeCrashed(EdgedistillError):
    """A runtime's child process died or broke its protocol; not the user's mistake (exit code 1).

    `signal_name` is e.g. "SIGILL", or "" where the process ended by itself.
    """

    def __init__(self, cause: str, remedy: str = "", signal_name: str = "") -> None:
        super().__init__(cause, remedy)
        self.signal_name = signal_name


class RuntimeRefused(RuntimeCrashed):
    """A runtime that is well answered with an error: it does not take this artifact, or this input."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of what is known where nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}" if names else ""
