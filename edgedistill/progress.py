"""What a person sees while work goes on: a live line on a terminal, plain lines in a log.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import time
from typing import TextIO

from edgedistill import streams

PLAIN_EVERY_S = 10.0
LIVE_EVERY_S = 0.2


class Progress:
    """Reports of one command. `level`: -1 silent, 0 quiet (warnings alone), 1 normal, 2 verbose."""

    def __init__(self, stream: TextIO | None = None, level: int = 1) -> None:
        self.stream = stream if stream is not None else streams.err()
        self.level = level
        self.live = self.stream.isatty()
        self._started = time.monotonic()
        self._last = 0.0
        self._open_line = False

    def say(self, text: str, level: int = 1) -> None:
        """One line of news."""
        if self.level < level:
            return
        self._close_line()
        print(f"[{self._clock()}] {text}", file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """Something the user should know; shown even with -q."""
        if self.level < 0:
            return
        self._close_line()
        print(f"[{self._clock()}] warning: {text}", file=self.stream, flush=True)

    def step(self, what: str, done: int, total: int, **figures: str) -> None:
        """Where a long loop stands, with its figures and the time left; throttled."""
        now = time.monotonic()
        last_one = done >= total
        if self.level < 1 or (now - self._last < (LIVE_EVERY_S if self.live else PLAIN_EVERY_S) and not last_one):
            return
        self._last = now
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        line = f"[{self._clock()}] {what} {done:,}/{total:,}  {shown}"
        if self.live:
            print(f"\r\x1b[2K{line[:200]}", end="\n" if last_one else "", file=self.stream, flush=True)
            self._open_line = not last_one
        else:
            print(line, file=self.stream, flush=True)

    def _close_line(self) -> None:
        if self._open_line:
            print("\r\x1b[2K", end="", file=self.stream)
            self._open_line = False

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60:d}:{seconds % 60:02d}"


QUIET = Progress(level=0)
