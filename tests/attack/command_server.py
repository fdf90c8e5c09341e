"""Commands in processes forked from one that has imported what is heavy, with what each of them cost.

Run as a script it is that process: a request a line on standard input, an answer a line on standard output, JSON.
A command runs in a session of its own, with a limit of CPU seconds; what is left of its session when it has ended is
killed, and told of.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CPU_SECONDS = 20
DATA_BYTES = 6 << 30  # what goes beyond is refused by the system: the machine that runs this has other work


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is negative for a signal; `peak_bytes` above what the process began with."""

    code: int
    out: str
    err: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    left_running: bool
    timed_out: bool


class Server:
    """The process that forks; `with Server() as run: run([...], folder)`."""

    def __init__(self, heavy: bool = True) -> None:
        paths = os.pathsep.join([str(ROOT), str(HERE.parent), str(HERE.parent / "helpers")])
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "command_server.py"), "heavy" if heavy else "light"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(
        self, words: list[str], folder: Path, environment: dict[str, str], *, streams: str = "", wall_s: float = 60.0
    ) -> Ended:
        """Run a command in `folder`. `streams`: "", or "full", "closed", "pipe" for a standard output that is so."""
        assert self._process.stdin and self._process.stdout
        request = {
            "words": words,
            "folder": str(folder),
            "environment": environment,
            "streams": streams,
            "wall": wall_s,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks commands has died")
        return Ended(**json.loads(answer))


def _serve(heavy: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import edgedistill.bundle.check
    import edgedistill.bundle.report
    import edgedistill.cli.app
    import edgedistill.data.documents
    import edgedistill.pipeline
    import edgedistill.stages  # noqa: F401

    if heavy:
        import pyarrow.parquet  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from edgedistill.machine.facts import peak_rss_bytes

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _command(request, paths)
        ended, status, usage = _wait(child, begun + request["wall"])
        left = _end_session(child)
        out, err = (path.read_text("utf-8", "replace") if path.exists() else "" for path in paths)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code, "out": out, "err": err, "wall_s": time.monotonic() - begun,
        "cpu_s": usage.ru_utime + usage.ru_stime, "left_running": left, "timed_out": not ended,
        "peak_bytes": max(0, usage.ru_maxrss * 1024 - peak_rss_bytes()),
    }  # fmt: skip


def _wait(child: int, until: float) -> tuple[bool, int, resource.struct_rusage]:
    handle = os.pidfd_open(child)
    try:
        ended = bool(select.select([handle], [], [], max(0.0, until - time.monotonic()))[0])
    finally:
        os.close(handle)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return ended, status, usage


def _end_session(session: int) -> bool:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _command(request: dict[str, Any], paths: list[Path]) -> None:
    """In the fork: does not return."""
    import io
    import runpy

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for descriptor, path in zip((1, 2), paths, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
    streams, environment = request["streams"], request["environment"]
    if streams == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif streams == "pipe":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
        os.close(write)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding, "strict")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding, "backslashreplace", line_buffering=True)
    if streams == "closed":
        sys.stdout = sys.__stdout__ = None  # type: ignore[misc, assignment]
        os.close(1)
    sys.argv = ["edgedistill", *request["words"]]
    code = 1
    try:
        runpy.run_module("edgedistill", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                code = 120
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1] == "heavy")
