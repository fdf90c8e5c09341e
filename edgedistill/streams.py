"""Whose words a person sees: this program's on the streams that it was given, those of libraries only when asked for.

While a command runs, `sys.stdout` and `sys.stderr` are a sink for what libraries print, log and warn of: with -v it is
standard error, else its last lines are kept, to be shown with a bug. What is ours goes to `out()` and `err()`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

KEPT_BYTES = 8 << 10
_aside: list[tuple[TextIO, TextIO]] = []  # the real streams, while a command runs


def out() -> TextIO:
    """Standard output, for results."""
    return _aside[-1][0] if _aside else sys.stdout


def err() -> TextIO:
    """Standard error, for what this program has to say."""
    return _aside[-1][1] if _aside else sys.stderr


class _Sink(io.RawIOBase):
    """Takes bytes: to standard error where `shown`, else the last of them are kept."""

    def __init__(self, real: TextIO, *, shown: bool) -> None:
        self._real = real
        self._shown = shown
        self.kept = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._real.fileno()  # for a library that starts a process with its standard error

    def write(self, data: object) -> int:
        raw = bytes(memoryview(data))  # type: ignore[arg-type]
        if self._shown:
            with suppress(OSError, ValueError):  # nobody reads it
                self._real.write(raw.decode("utf-8", errors="replace"))
                self._real.flush()
        else:
            self.kept = (self.kept + raw)[-KEPT_BYTES:]
        return len(raw)


@contextmanager
def libraries_aside(*, shown: bool, kept: list[str]) -> Iterator[None]:
    """Within, libraries write to the sink; at the end `kept` gets the last lines of what was not shown."""
    real = (sys.stdout, sys.stderr)
    sink = _Sink(real[1], shown=shown)
    stream = io.TextIOWrapper(
        io.BufferedWriter(sink), encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
    )
    _aside.append(real)
    sys.stdout = sys.stderr = stream
    try:
        yield
    finally:
        sys.stdout, sys.stderr = real
        _aside.pop()
        stream.flush()
        kept += sink.kept.decode("utf-8", errors="replace").splitlines()
