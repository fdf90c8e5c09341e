"""A runtime in a child process: one that dies is reported, and takes nothing with it.

`RuntimeProcess` is what the stages use; `Child` is the process and its pipes, and knows no runtime.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import EdgedistillError, RuntimeCrashed, RuntimeRefused, UserError
from edgedistill.machine import usable_cpus
from edgedistill.runtimes import frames
from edgedistill.runtimes.bounds import OWN, Bounds
from edgedistill.runtimes.probe import OVERRIDE, ExtraBufts, extra_bufts
from edgedistill.runtimes.room import Room, room_for
from edgedistill.store import Store

RuntimeName = Literal["llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "executorch"]
IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float32]

LOG_LINES_SHOWN = 6
LOG_LINE_CHARS = 200
LOG_TAIL_BYTES = 64 << 10
POLL_MS = 200
TEXTS_PER_MESSAGE = 1000
CLOSE_S = 2.0
SYS_CPUS = Path("/sys/devices/system/cpu")
SPEED_FILES = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")


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


class RuntimeProcess:
    """An artifact open in its runtime, in a child process of its own. A context manager.

    threads         CPU threads; with `pin`, the child may only run on so many CPUs, the fastest ones (Linux)
    context_tokens  the longest sequence, prompt and answer together; llama.cpp with 0 reads the vocabulary alone
    use_extra_bufts llama.cpp's repacked and AMX weights; None: as the probe of this machine says
    spin            waiting threads spin as the runtime's defaults have it: where speed is measured
    logits_all      False where only `greedy` and `timed` are wanted: llama.cpp then keeps one row of logits
    timeout_s       of one operation, after which the child is killed
    log             a file for what the runtime prints; default: a temporary one
    bounds          what the process may use: `OWN`, or `replay_of(tokens)` for an artifact that is not trusted

    The artifact is read before it is opened (guards/), and what it says to the runtime is checked, whoever made it.
    Raises RuntimeCrashed where the child dies or hangs, UserError where the runtime refuses the
    artifact or the input.
    """

    def __init__(
        self,
        runtime: RuntimeName,
        artifact: Path,
        *,
        threads: int,
        context_tokens: int,
        use_extra_bufts: bool | None = None,
        logits_all: bool = True,
        pin: bool = False,
        spin: bool = False,
        timeout_s: float = 900.0,
        log: Path | None = None,
        store: Store | None = None,
        bounds: Bounds = OWN,
    ) -> None:
        artifact = artifact.absolute()
        if not artifact.exists():
            raise UserError(f"no artifact {artifact}", "give the path of an existing artifact")
        choice = _extra_bufts_choice(runtime, use_extra_bufts, store)
        cpus = _cpus_for(threads) if pin else None
        self._room = room_for(runtime, artifact, bounds, context_tokens=context_tokens, threads=threads, spin=spin)
        started = time.perf_counter()
        try:
            self._child = Child(runtime=runtime, artifact=artifact, timeout_s=timeout_s, log=log, room=self._room)
        except BaseException:
            self._room.close()
            raise
        try:
            if runtime == "llama.cpp" and choice.use:
                self._child.remedies.update(dict.fromkeys(("SIGILL", "SIGSEGV"), _extra_bufts_remedy()))
            self.info: dict[str, Any] = self._child.call(
                "open",
                "opening",
                {
                    "runtime": runtime,
                    "artifact": str(self._room.path()),
                    "cpus": cpus,
                    "limits": self._room.limits_sent(),
                    "threads": threads,
                    "context_tokens": context_tokens,
                    "use_extra_bufts": choice.use,
                    "logits_all": logits_all,
                },
            )
            self._room.require_unchanged()
        except BaseException:
            self.close()
            raise
        self.info["spawn_ms"] = (time.perf_counter() - started) * 1e3
        self.info["options"]["cpus"] = cpus
        if runtime == "llama.cpp":
            self.info["options"]["use_extra_bufts_reason"] = choice.reason

    def logits(self, tokens_T: IntArray | Sequence[int]) -> FloatArray:
        """[T, V] float32: row t is the prediction after tokens 0..t, from an empty KV cache."""
        tokens = _token_array(tokens_T)
        out = np.empty((len(tokens), self.info["vocab_size"]), dtype=np.float32)
        for params, arrays in self._child.stream(
            "logits", f"the logits of {len(tokens)} tokens", {}, {"tokens": tokens}
        ):
            if "done" in params:
                break
            rows = arrays["logits"]
            out[params["row"] : params["row"] + len(rows)] = rows
        return out

    def embedding(self, tokens_T: IntArray | Sequence[int]) -> FloatArray:
        """[H] float32 of an encoder: the sequence's embedding, pooled as the artifact says, of any length."""
        tokens = _token_array(tokens_T)
        what = f"the embedding of {len(tokens)} tokens"
        _, arrays = next(self._child.stream("embedding", what, {}, {"tokens": tokens}))
        return np.array(arrays["embedding"], dtype=np.float32)

    def trace(self, tokens_T: IntArray | Sequence[int], names: Sequence[str]) -> Iterator[tuple[str, FloatArray]]:
        """llama.cpp's intermediate tensors of these names, flat [T * width], in the order of their computation.

        A name that the graph gives to several tensors in turn comes several times, one that it lacks not at all.
        """
        tokens = _token_array(tokens_T)
        what = f"tracing {len(tokens)} tokens"
        for params, arrays in self._child.stream("trace", what, {"names": list(names)}, {"tokens": tokens}):
            if "done" in params:
                break
            yield str(params["name"]), arrays["values"]

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids by the artifact's own tokenizer. `parse_special`: control tokens in the text are tokens."""
        params = {"text": text, "add_special": add_special, "parse_special": parse_special}
        return [int(t) for t in self._child.call("tokenize", f"tokenizing {len(text)} characters", params)["tokens"]]

    def tokenize_many(
        self, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """`tokenize` of each text, a thousand texts a message."""
        found: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_PER_MESSAGE):
            part = list(texts[start : start + TEXTS_PER_MESSAGE])
            params = {"texts": part, "add_special": add_special, "parse_special": parse_special}
            found += self._child.call("tokenize_many", f"tokenizing {len(part)} texts", params)["tokens"]
        return found

    def generation(self) -> dict[str, Any]:
        """Where the runtime stops, as it says itself (`stops`: ids), and what else it takes from the artifact."""
        return self._child.call("generation", "asking where it stops", {})

    def render(self, template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]) -> str:
        """What a chat template makes of a conversation, a prompt for an answer at its end; see runtimes/template.py."""
        params = {"template": template, "messages": [dict(m) for m in messages], "variables": dict(variables)}
        return str(self._child.call("render", "rendering the chat template", params)["text"])

    def greedy(self, tokens: Sequence[int] | IntArray, new_tokens: int) -> list[int]:
        """The `new_tokens` most likely tokens one after another; an end-of-sequence token does not stop it."""
        if new_tokens < 1:
            return []
        return [int(t) for t in self.timed(tokens, new_tokens)["tokens"]]

    def timed(self, tokens: Sequence[int] | IntArray, new_tokens: int) -> dict[str, Any]:
        """Greedy decoding from an empty KV cache, timed in the child.

        `tokens`: the new ones; `ttft_ms`: from the call to the first new token; `token_ms`: of each
        later one, new_tokens - 1 of them.
        """
        prompt = _token_array(tokens)
        what = f"decoding {new_tokens} tokens after {len(prompt)}"
        return self._child.call("timed", what, {"new_tokens": new_tokens}, {"tokens": prompt})

    def peak_rss_bytes(self) -> int:
        """The most memory that the child ever had resident; of a mapped artifact, the pages that were touched count."""
        return int(self._child.call("peak_rss", "reading its memory use", {})["bytes"])

    def close(self) -> None:
        self._child.close()
        self._room.close()

    def __enter__(self) -> RuntimeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # It may be in the middle of something long; nothing of it is wanted any more.
            self._child.kill()
        self.close()


def _token_array(tokens: Sequence[int] | IntArray) -> NDArray[np.int64]:
    return np.asarray(tokens, dtype=np.int64)


def _extra_bufts_choice(runtime: str, asked: bool | None, store: Store | None) -> ExtraBufts:
    if runtime != "llama.cpp":
        return ExtraBufts(use=False, reason="not llama.cpp", signal=None)
    if asked is not None:
        return ExtraBufts(use=asked, reason="set by the caller", signal=None)
    return extra_bufts(store if store is not None else Store())


def _extra_bufts_remedy() -> str:
    return (
        "llama.cpp ran with its extra buffers (repacked or AMX weights), which some builds cannot: "
        f"set {OVERRIDE}=0 and run again"
    )


def _cpus_for(threads: int) -> list[int] | None:
    """The `threads` fastest CPUs; None where there are fewer, or where the system cannot pin."""
    cpus = usable_cpus()
    return fastest_first(cpus)[:threads] if hasattr(os, "sched_setaffinity") and threads <= len(cpus) else None


def fastest_first(cpus: Sequence[int], root: Path = SYS_CPUS) -> list[int]:
    """CPUs by what Linux says of their speed, equal ones by number: phones often number the little ones first."""
    for name in SPEED_FILES:
        speeds = {cpu: _whole_number(root / f"cpu{cpu}" / name) for cpu in cpus}
        # One that is not told of cannot be compared with the others.
        if all(speeds.values()):
            return sorted(cpus, key=lambda cpu: (-speeds[cpu], cpu))
    return sorted(cpus)


def _whole_number(path: Path) -> int:
    """What a file of the system says; 0 where it is not there or says something else."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
