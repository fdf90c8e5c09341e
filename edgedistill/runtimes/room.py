"""Where a runtime's process runs: its command, environment, private folder and bounds, as the parent gives them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.machine import waiting
from edgedistill.runtimes.bounds import HOME, OWN, Bounds, Limits, limits_of
from edgedistill.runtimes.interpreter import STANDARD_FIRST, package_parent, search_paths, users_path
from edgedistill.runtimes.staging import PrivateFolder, Staged, stage, stage_graph

# This package from where it is; then the parent's paths, so that both find the same runtime. Where the environment is
# the user's own, what it adds (PYTHONPATH) comes before other packages, as it does for any program.
BOOT = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); import edgedistill; del sys.path[0]; "
    "given = sys.argv[2].split(os.pathsep); "
    "sys.path[:] = given if sys.flags.isolated else [*sys.path, *(p for p in given if p not in sys.path)]; "
    f"{STANDARD_FIRST}"
    "from edgedistill.runtimes.worker import main; main()"
)
# Of the user's environment, what an isolated process keeps: languages, libraries, and how threads wait.
KEPT = (
    "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH",
    "LLAMA_CPP_LIB_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", waiting.MARK,
    *waiting.USERS,
)  # fmt: skip
OURS = {
    # llama.cpp's abort would start a debugger to print where it is.
    "GGML_NO_BACKTRACE": "1",
    # numpy's own thread pool would spin beside the runtime's.
    "OPENBLAS_NUM_THREADS": "1",
    # onnxruntime and onnxruntime-genai keep a diary of every model in the user's home, and send it to their maker.
    "ORT_DISABLE_TELEMETRY": "1",
}
GRAPH = "graph"  # beside the runtimes' names: any ONNX graph, and no decoder
NO_LIMITS = Limits(None, None, None, None)


@dataclass
class Room:
    """A private folder with what is opened in it. Without one (`Room()`): this process's own folder and environment."""

    folder: PrivateFolder | None = None
    staged: Staged | None = None
    shown: Path | None = None  # the artifact as the user knows it
    bounds: Bounds = OWN
    limits: Limits = field(default=NO_LIMITS)
    spin: bool = False  # its waiting threads spin as the runtime has it: speed is measured

    @property
    def isolated(self) -> bool:
        return self.bounds.isolated

    def path(self) -> Path | None:
        return self.staged.path if self.staged is not None else None

    def require_unchanged(self) -> None:
        if self.staged is not None:
            self.staged.require_unchanged()

    def working_folder(self) -> Path | None:
        return self.folder.root if self.folder is not None and self.isolated else None

    def environment(self) -> dict[str, str]:
        given = waiting.spinning(os.environ) if self.spin else waiting.asleep(os.environ)
        if self.folder is not None and self.isolated:
            return _isolated_environment(self.folder.root, given)
        return {**given, "PYTHONPATH": users_path(given), **OURS}

    def command(self) -> list[str]:
        """What starts the worker; its four arguments follow."""
        paths = os.pathsep.join(search_paths())
        return [sys.executable, "-I" if self.isolated else "-P", "-c", BOOT, package_parent(), paths]

    def bounds_json(self) -> str:
        folder = self.folder.root if self.folder is not None else Path()
        files = [str(path) for path in self.staged.real] if self.staged is not None else []
        return json.dumps({"isolated": self.isolated, "folder": str(folder), "files": files})

    def limits_sent(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.limits).items() if name != "wall_s"}

    def named(self, text: str) -> str:
        """A message of the process: with the artifact's own path for the private one, and nothing unprintable."""
        if self.staged is not None and self.folder is not None and self.shown is not None:
            text = text.replace(str(self.staged.path), str(self.shown))
            beside = self.shown if self.shown.is_dir() else self.shown.parent
            text = text.replace(str(self.folder.content), str(beside))
        return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()


def room_for(
    runtime: str, artifact: Path, bounds: Bounds, *, context_tokens: int, threads: int, spin: bool = False
) -> Room:
    """Read the artifact, lay it out, bound its process. Raises UserError for what is not allowed in it."""
    try:
        folder = PrivateFolder()
    except OSError as error:
        raise UserError(
            f"no private folder for {runtime} can be made in {tempfile.gettempdir()}: {error.strerror}",
            "free some space there, or let TMPDIR name another folder",
        ) from error
    try:
        graph = runtime == GRAPH
        staged = stage_graph(artifact, folder.content) if graph else stage(runtime, artifact, folder.content)
    except BaseException:
        folder.close()
        raise
    limits = limits_of(bounds, artifact_bytes=staged.bytes, context_tokens=context_tokens, threads=threads)
    return Room(folder, staged, artifact, bounds, limits, spin)


def _isolated_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    kept = {name: environment[name] for name in KEPT if name in environment}
    home = {
        name: str(folder / HOME) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **home, **offline, **OURS, "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
