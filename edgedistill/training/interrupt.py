"""Ctrl-C while a model trains: the step is finished and kept, then the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from edgedistill.progress import Progress

SAID = "interrupted: this step is finished, and a checkpoint written (Ctrl-C again: at once)"


class Interrupt:
    """Whether somebody asked the run to end."""

    asked = False


@contextmanager
def after_the_step(progress: Progress) -> Iterator[Interrupt]:
    """Within, the first SIGINT is noted and the second one is KeyboardInterrupt.

    Where SIGINT does not end the program as Python has it (it is ignored, or another handler is there), or outside of
    the main thread, nothing changes.
    """
    interrupt = Interrupt()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.asked = True
        progress.warn(SAID)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
