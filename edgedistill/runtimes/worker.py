"""The child process that holds a runtime: `main` with READ_FD WRITE_FD DIE_WITH_PARENT BOUNDS as last arguments.

Started by `child.Child`. It reads frames from one pipe and answers on the other; whatever the C++
libraries print goes to the log file that is its standard output and error. It needs numpy and the
runtime that it is told to open, nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.machine.facts import peak_rss_bytes
from edgedistill.runtimes import confine, frames
from edgedistill.runtimes.backend import Backend, Embedder
from edgedistill.runtimes.bounds import HOME

if TYPE_CHECKING:
    from edgedistill.runtimes.ort import GraphSession

BACKENDS = {
    "llama.cpp": "edgedistill.runtimes.llama:LlamaBackend",
    "onnxruntime": "edgedistill.runtimes.ort:OrtBackend",
    "onnxruntime-genai": "edgedistill.runtimes.genai:GenaiBackend",
    "transformers": "edgedistill.runtimes.folder:FolderBackend",
}
# What each runtime brings, loaded before the process is sealed: loading may start threads and programs.
LIBRARIES = {
    "llama.cpp": ("llama_cpp",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime_genai",),
    "transformers": ("torch", "transformers.generation.utils", "bitsandbytes", "accelerate", "safetensors.torch"),
}
EXTRAS = {
    "llama_cpp": "llama", "onnxruntime": "onnx", "onnxruntime_genai": "onnx", "bitsandbytes": "train",
    "torch": "build", "transformers": "build", "accelerate": "build",
}  # fmt: skip
PR_SET_PDEATHSIG = 1

Answer = tuple[dict[str, Any], dict[str, frames.Array]]


def main() -> None:
    read_fd, write_fd, die_with_parent = (int(argument) for argument in sys.argv[-4:-1])
    bounds = json.loads(sys.argv[-1])
    # Ctrl-C reaches the whole process group; the parent decides what becomes of this child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _no_core_file()
    if die_with_parent:
        _die_with_parent()
    report = {}
    if bounds["isolated"]:
        # Python tries where it can write when it first wants to, and then, sealed, it cannot.
        tempfile.tempdir = str(Path(bounds["folder"]) / HOME)
        report = confine.begin(Path(bounds["folder"]), [Path(path) for path in bounds["files"]])
    Worker(read_fd, write_fd, isolated=bounds["isolated"], report=report).serve()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the destructors of C++ libraries may crash, and there is nothing left to lose.
    os._exit(0)


def _no_core_file() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _die_with_parent() -> None:
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


class Worker:
    """Answers frames until the parent closes its end."""

    def __init__(self, read_fd: int, write_fd: int, *, isolated: bool, report: dict[str, str]) -> None:
        self.isolated = isolated
        self.report = report
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.backend: Backend | None = None
        self.graph: GraphSession | None = None

    def serve(self) -> None:
        while (frame := frames.receive(self.read_fd)) is not None:
            params, arrays = frame
            try:
                for answer, answered in self._handle(str(params.pop("op", "")), params, arrays):
                    frames.send(self.write_fd, answer, answered)
            except BrokenPipeError:
                return
            except ModuleNotFoundError as error:
                self._send_error(_not_installed(error), "user")
            except UserError as error:
                self._send_error(error, "user")
            # Whatever a runtime raises is carried to the parent, which names artifact and operation.
            except Exception as error:
                traceback.print_exc()
                self._send_error(UserError(f"{type(error).__name__}: {error}"), "runtime")

    def _send_error(self, error: UserError, kind: str) -> None:
        frames.send(self.write_fd, {"error": kind, "cause": error.cause[:4000], "remedy": error.remedy}, {})

    def _handle(self, op: str, params: dict[str, Any], arrays: dict[str, frames.Array]) -> Iterator[Answer]:
        if op == "open":
            yield self._open(**params), {}
        elif op == "quantize":
            from edgedistill.runtimes.llama_quantize import quantize

            yield {"log": quantize(**params)}, {}
        elif op == "open_graph":
            from edgedistill.runtimes.ort import GraphSession

            self.graph = GraphSession(Path(params.pop("path")), **params)
            yield self.graph.info(), {}
        elif op == "run_graph":
            yield {}, self._graph().run(arrays)
        elif op == "time_graph":
            yield {"ms": self._graph().timed(arrays, **params)}, {}
        elif op == "observe_begin":
            self._graph().observe_begin(**params)
            yield {}, {}
        elif op == "observe_bins":
            self._graph().observe_bins()
            yield {}, {}
        elif op == "observe":
            self._graph().observe(arrays)
            yield {}, {}
        elif op == "observed":
            yield self._graph().observed()
        elif op == "peak_rss":
            yield {"bytes": peak_rss_bytes()}, {}
        elif op == "tokenize":
            yield {"tokens": self._opened().tokenize(**params)}, {}
        elif op == "tokenize_many":
            tokenize, texts = self._opened().tokenize, params.pop("texts")
            yield {"tokens": [tokenize(text, **params) for text in texts]}, {}
        elif op == "generation":
            backend: Any = self._opened()
            yield backend.generation(), {}
        elif op == "render":
            from edgedistill.runtimes.template import render

            yield {"text": render(**params)}, {}
        elif op == "timed":
            new_tokens = int(params["new_tokens"])
            yield self._opened().timed(self._checked(arrays["tokens"], new_tokens), new_tokens), {}
        elif op == "embedding":
            yield {}, {"embedding": self._embedder().embedding(self._checked(arrays["tokens"], 0))}
        elif op == "logits":
            yield from self._logits(self._checked(arrays["tokens"], 0))
        elif op == "trace":
            yield from self._trace(self._checked(arrays["tokens"], 0), params["names"])
        else:
            raise ValueError(f"no operation '{op}'")

    def _open(
        self, runtime: str, artifact: str, cpus: list[int] | None, limits: dict[str, Any], **options: Any
    ) -> dict[str, Any]:
        if cpus:
            # Before the runtime is loaded: threads inherit the mask of the thread that starts them.
            os.sched_setaffinity(0, cpus)
        if runtime not in BACKENDS:
            raise UserError(
                f"{runtime} cannot be run here: its artifacts are exported and compared with torch, no more",
                f"verify, bench and bundle take what {', '.join(BACKENDS)} open",
            )
        module, _, name = BACKENDS[runtime].partition(":")
        backend_class = getattr(importlib.import_module(module), name)
        for library in LIBRARIES[runtime]:
            importlib.import_module(library)
        self.report |= confine.seal(**limits, isolated=self.isolated, gpu=_may_use_gpu(runtime))
        self.backend = backend_class(Path(artifact), **options)
        return {**self._opened().info(), "pid": os.getpid(), "bounds": self.report}

    def _logits(self, tokens_T: NDArray[np.int32]) -> Iterator[Answer]:
        backend = self._opened()
        row_bytes = backend.vocab_size * 4
        rows = max(1, frames.CHUNK_BYTES // row_bytes)
        sent = 0
        for block in backend.logits(tokens_T):
            for start in range(0, len(block), rows):
                part = block[start : start + rows]
                yield {"row": sent}, {"logits": part}
                sent += len(part)
        yield {"done": sent}, {}

    def _embedder(self) -> Embedder:
        backend = self._opened()
        if not isinstance(backend, Embedder):
            raise UserError(f"{type(backend).__name__} gives no embeddings", "open a GGUF of an encoder")
        return backend

    def _trace(self, tokens_T: NDArray[np.int32], names: list[str]) -> Iterator[Answer]:
        backend: Any = self._opened()
        for name, values in backend.trace(tokens_T, names):
            yield {"name": name}, {"values": values}
        yield {"done": True}, {}

    def _graph(self) -> GraphSession:
        if self.graph is None:
            raise ValueError("no graph is open")
        return self.graph

    def _opened(self) -> Backend:
        if self.backend is None:
            raise ValueError("no artifact is open")
        return self.backend

    def _checked(self, tokens_T: frames.Array, new_tokens: int) -> NDArray[np.int32]:
        backend = self._opened()
        if tokens_T.ndim != 1 or len(tokens_T) == 0:
            raise UserError(f"a sequence of shape {list(tokens_T.shape)}", "give at least one token")
        low, high = int(tokens_T.min()), int(tokens_T.max())
        if low < 0 or high >= backend.vocab_size:
            raise UserError(
                f"token {low if low < 0 else high} is outside of the artifact's vocabulary of {backend.vocab_size}",
                "use the tokenizer that belongs to this artifact",
            )
        if len(tokens_T) + new_tokens > backend.context_tokens:
            raise UserError(
                f"{len(tokens_T)} + {new_tokens} tokens are more than the context of {backend.context_tokens} tokens",
                "open the artifact with a larger context_tokens, or give fewer tokens",
            )
        return tokens_T.astype(np.int32)


def _may_use_gpu(runtime: str) -> bool:
    """Whether the runtime is built for GPUs, and one may be here: its driver needs more than the bounds leave."""
    if not confine.has_gpu():
        return False
    if runtime == "llama.cpp":
        import llama_cpp

        return bool(llama_cpp.llama_supports_gpu_offload())
    return runtime == "transformers"


def _not_installed(error: ModuleNotFoundError) -> UserError:
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    if extra is None:
        return UserError(f"{error} in {sys.executable}", "install it into that environment")
    return UserError(
        f"the runtime's package {error.name} is not installed in {sys.executable}",
        f"pip install 'edgedistill[{extra}]'",
    )


if __name__ == "__main__":
    main()
