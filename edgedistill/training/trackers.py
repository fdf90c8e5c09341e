"""Where every step's figures go: TensorBoard, or another tracker that accelerate knows."""

from __future__ import annotations

import atexit
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone

from edgedistill.errors import UserError, did_you_mean
from edgedistill.machine.facts import peak_rss_bytes
from edgedistill.progress import Progress
from edgedistill.training.ranks import Ranks

FLUSH_EVERY_S = 1.0


class Tracker:
    """Logs one step's numbers; without a tracker it does nothing.

    TensorBoard's are written as one event a step, on disk once a second and when the process ends: accelerate's way,
    an event a number and the disk at every step, costs most of a millisecond, in which a GPU would wait.
    """

    def __init__(self, inner: Any | None) -> None:
        self.inner = inner
        writer = getattr(inner, "writer", None)
        # tensorboardX, which accelerate takes where torch finds no TensorBoard, goes accelerate's way
        self.events = writer if type(writer).__module__.startswith("torch.utils.tensorboard") else None
        self.flushed_at = time.monotonic()
        if self.events is not None:
            atexit.register(self.events.flush)

    def log(self, values: dict[str, float], step: int) -> None:
        if self.events is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self.events.file_writer.add_summary(Summary(value=entries), step)
            if time.monotonic() - self.flushed_at >= FLUSH_EVERY_S:
                self.events.flush()
                self.flushed_at = time.monotonic()
        elif self.inner is not None:
            self.inner.log(values, step=step)

    def close(self) -> None:
        if self.events is not None:
            atexit.unregister(self.events.flush)
        if self.inner is not None:
            self.inner.finish()


def open_tracker(name: str | None, folder: Path, *, run: str, ranks: Ranks, progress: Progress) -> Tracker:
    """The recipe's tracker, writing below `folder`; rank 0 alone writes.

    Raises UserError for a name that accelerate does not know, or whose package is missing. TensorBoard, the default,
    is done without where it is not installed, and that is said.
    """
    if name is None or name == "none" or not ranks.main:
        return Tracker(None)
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(key.value if hasattr(key, "value") else key): kind for key, kind in LOGGER_TYPE_TO_CLASS.items()}
    if name not in known:
        raise UserError(f"distill.tracker is {name!r}, which accelerate does not know", did_you_mean(name, known))
    if name == "tensorboard" and not (
        importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX")
    ):
        progress.say("tracker: tensorboard is not installed (pip install tensorboard), so steps are not logged")
        return Tracker(None)
    kind: Any = known[name]
    try:
        if getattr(kind, "requires_logging_directory", False):
            folder.mkdir(parents=True, exist_ok=True)
            inner = kind(run, logging_dir=folder)
        else:
            inner = kind(run)
        start = getattr(inner, "start", None)
        if start is not None:
            start()
    except ImportError as error:
        raise UserError(
            f"distill.tracker is {name}, and its package is not installed: {error}",
            f"pip install {name}, or set distill.tracker=tensorboard or none",
        ) from error
    progress.say(f"tracker: {name} in {folder}" if getattr(kind, "requires_logging_directory", False) else "")
    return Tracker(inner)


def memory_bytes(ranks: Ranks) -> float:
    """Peak memory so far: of the GPU's allocator, else the process's resident set."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(ranks.device))
    return float(peak_rss_bytes())
