"""Commands in processes that are forked from one which has imported torch and transformers: the import takes longest.

Each command has a process, an environment, a folder and streams of its own, and ends as `python -m edgedistill` does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

from edgedistill.machine import waiting

HERE = Path(__file__).resolve().parent
# What edgedistill.cli.app.run sets before anything is imported, and Command for every command.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

if multiprocessing.current_process().name == "MainProcess" and "forkserver" in " ".join(sys.orig_argv):
    # In the server, which imports this module before it forks.
    os.environ.update(ENVIRONMENT)
    waiting.let_threads_sleep()
    import accelerate  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def run(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text; `arguments` are [interpreter, "-m", module, words …]."""
    context = multiprocessing.get_context("forkserver")
    _start_server()
    with tempfile.TemporaryDirectory() as streams:
        paths = [Path(streams, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_command, args=(list(arguments), folder, environment, paths))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in paths)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


def _start_server() -> None:
    """The server of this process, once. It finds this module by PYTHONPATH alone, and would go on without it."""
    forkserver.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parents[1]), str(HERE.parent), str(HERE), before])
    )
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _command(arguments: list[str], folder: Path, environment: dict[str, str], paths: list[Path]) -> None:
    for descriptor, path in zip((1, 2), paths, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [arguments[2], *arguments[3:]]
    runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
