"""A worker process and the frames to it: one that dies is reported, and takes nothing with it.

`Child` is the process and its pipes, and knows no runtime; `open_artifact` opens one in it. The stages use
process.RuntimeProcess.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import EdgedistillError, RuntimeCrashed, RuntimeRefused, UserError
from edgedistill.runtimes import frames
from edgedistill.runtimes.bounds import Bounds
from edgedistill.runtimes.room import Room, room_for

LOG_LINES_SHOWN = 6
LOG_LINE_CHARS = 200
LOG_TAIL_BYTES = 64 << 10
POLL_MS = 200
CLOSE_S = 2.0


class Child:
    """A worker process and the frames to it. `artifact` and `runtime` only name it in errors."""

    def __init__(
        self, *, runtime: str, artifact: Path, timeout_s: float, log: Path | None = None, room: Room | None = None
    ) -> None:
        """`room`: where and within which bounds it runs; None: here, as this process."""
        self.runtime = runtime
        self.artifact = artifact
        self.timeout_s = timeout_s
        self.remedies: dict[str, str] = {}
        self._room = room if room is not None else Room()
        wall_s = self._room.limits.wall_s
        self._deadline = math.inf if wall_s is None else time.monotonic() + wall_s
        self._log = _open_log(log)
        child_reads, self._write_fd = os.pipe()
        self._read_fd, child_writes = os.pipe()
        # A parent-death signal follows the thread that starts the child, so only the main one may ask for it.
        with_parent = threading.current_thread() is threading.main_thread()
        arguments = [str(child_reads), str(child_writes), str(int(with_parent)), self._room.bounds_json()]
        try:
            self.process = subprocess.Popen(
                [*self._room.command(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(child_reads, child_writes),
                cwd=self._room.working_folder(),
                env=self._room.environment(),
            )
        finally:
            os.close(child_reads)
            os.close(child_writes)
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._closed = False

    def call(
        self, op: str, what: str, params: Mapping[str, Any], arrays: Mapping[str, frames.Array] | None = None
    ) -> dict[str, Any]:
        """One operation with one answer. `what` names it in errors. Raises RuntimeCrashed, UserError."""
        return next(self.stream(op, what, params, arrays))[0]

    def stream(
        self, op: str, what: str, params: Mapping[str, Any], arrays: Mapping[str, frames.Array] | None = None
    ) -> Iterator[frames.Frame]:
        """One operation with many answers; the caller takes as many as the operation has."""
        deadline = min(time.monotonic() + self.timeout_s, self._deadline)
        try:
            frames.send(self._write_fd, {"op": op, **params}, arrays or {}, self._waiter(select.POLLOUT, deadline))
            while True:
                frame = frames.receive(self._read_fd, self._waiter(select.POLLIN, deadline))
                if frame is None:
                    raise self._died(what)
                self._raise_sent(frame[0], f"{self.runtime} failed in {what} of {self.artifact}")
                yield frame
        except TimeoutError:
            self.kill()
            if time.monotonic() > self._deadline:
                raise self._too_long(what, f"{self._room.limits.wall_s:.0f} s") from None
            raise RuntimeCrashed(
                f"{self.runtime} did not answer within {self.timeout_s:g} s in {what} of {self.artifact}; "
                f"it was killed{self._log_tail()}",
                "give it more time, fewer tokens or more threads; if it hangs every time, export the artifact again",
            ) from None
        except (frames.FrameError, BrokenPipeError, ConnectionResetError) as error:
            raise self._died(what) from error

    def _waiter(self, event: int, deadline: float) -> frames.Wait:
        def wait(fd: int) -> None:
            poll = select.poll()
            poll.register(fd, event)
            while not poll.poll(max(0.0, min(POLL_MS, 1e3 * (deadline - time.monotonic())))):
                if time.monotonic() > deadline:
                    raise TimeoutError
                # A forked copy of this process may hold the pipe open: then its end alone tells of a death.
                if self.process.poll() is not None and not poll.poll(0):
                    raise BrokenPipeError

        return wait

    def _too_long(self, what: str, limit: str) -> UserError:
        return UserError(
            f"{self.runtime} hung in {what} of {self.artifact}: it was stopped after {limit}, several times what such "
            f"an artifact needs{self._log_tail()}",
            "do not use the artifact; where the machine is very slow or busy, try again on another",
        )

    def _died(self, what: str) -> EdgedistillError:
        try:
            code = self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return RuntimeCrashed(
                f"{self.runtime} broke its protocol in {what} of {self.artifact}{self._log_tail()}",
                "report this as a bug",
            )
        name = signal_name(code)
        if name == "SIGXCPU":
            return self._too_long(what, f"{self._room.limits.cpu_s:.0f} s of processor time")
        how = f"died with {name}" if name else f"ended with exit code {code}"
        return RuntimeCrashed(
            f"{self.runtime} {how} in {what} of {self.artifact}{self._log_tail()}", self._remedy(name), name
        )

    def _remedy(self, name: str) -> str:
        if name in self.remedies:
            return self.remedies[name]
        if name == "SIGKILL":
            return "the system most likely ran out of memory: free some, or use a smaller context_tokens or model"
        if name == "SIGILL":
            return (
                f"this build of {self.runtime} uses instructions that the CPU lacks: install one that was built for it"
            )
        return f"export the artifact again; if it dies again, install another version of {self.runtime}"

    def _log_tail(self) -> str:
        self._log.flush()
        with Path(self._log.name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            text = file.read(LOG_TAIL_BYTES).decode("utf-8", errors="replace")
        lines = self._room.named(text).splitlines()
        kept = [line.strip()[:LOG_LINE_CHARS] for line in lines if line.strip()][-LOG_LINES_SHOWN:]
        return "; its last lines:\n  " + "\n  ".join(kept) if kept else ""

    def _raise_sent(self, params: dict[str, Any], where: str) -> None:
        """An error that the child met in Python, raised here."""
        cause = self._room.named(str(params.get("cause", "")))
        if params.get("error") == "user":
            raise UserError(cause, self._room.named(str(params["remedy"])))
        if "error" in params and self._room.isolated:
            raise UserError(
                f"{where}: {cause}", "the artifact is damaged, or asks for more than its bounds allow: do not use it"
            )
        if "error" in params:
            raise RuntimeRefused(
                f"{where}: {cause}",
                f"export the artifact again; if it fails again, install another version of {self.runtime}",
            )

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Let the process end, or kill it; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        os.close(self._write_fd)
        os.close(self._read_fd)
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.close()


def signal_name(returncode: int) -> str:
    """ "SIGSEGV" for a process that -11 tells of; "" where it ended by itself."""
    if returncode >= 0:
        return ""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _open_log(log: Path | None) -> IO[bytes]:
    if log is None:
        return tempfile.NamedTemporaryFile(prefix="edgedistill-runtime-", suffix=".log")
    return log.open("ab")


def open_artifact(
    runtime: str,
    artifact: Path,
    *,
    bounds: Bounds,
    threads: int,
    context_tokens: int,
    use_extra_bufts: bool,
    logits_all: bool = True,
    cpus: list[int] | None = None,
    spin: bool = False,
    timeout_s: float,
    log: Path | None = None,
    remedies: Mapping[str, str] | None = None,
) -> tuple[Child, Room, dict[str, Any]]:
    """The artifact open in its runtime: the process, the room that it lives in, and what the runtime says of itself.

    For the arguments see process.RuntimeProcess; `remedies`: signal → what to do where the child dies with it. Who asks
    closes the child and the room, in this order; where this raises, nothing is left.
    """
    room = room_for(runtime, artifact, bounds, context_tokens=context_tokens, threads=threads, spin=spin)
    started = time.perf_counter()
    try:
        child = Child(runtime=runtime, artifact=artifact, timeout_s=timeout_s, log=log, room=room)
    except BaseException:
        room.close()
        raise
    try:
        child.remedies.update(remedies or {})
        info = child.call(
            "open",
            "opening",
            {
                "runtime": runtime,
                "artifact": str(room.path()),
                "cpus": cpus,
                "limits": room.limits_sent(),
                "threads": threads,
                "context_tokens": context_tokens,
                "use_extra_bufts": use_extra_bufts,
                "logits_all": logits_all,
            },
        )
        room.require_unchanged()
    except BaseException:
        child.close()
        room.close()
        raise
    info["spawn_ms"] = (time.perf_counter() - started) * 1e3
    info["options"]["cpus"] = cpus
    return child, room, info


def logits_of(child: Child, tokens: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
    """[T, V] of an opened artifact: see process.RuntimeProcess.logits."""
    out = np.empty((len(tokens), vocab_size), dtype=np.float32)
    for params, arrays in child.stream("logits", f"the logits of {len(tokens)} tokens", {}, {"tokens": tokens}):
        if "done" in params:
            break
        rows = arrays["logits"]
        out[params["row"] : params["row"] + len(rows)] = rows
    return out
