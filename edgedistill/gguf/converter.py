"""A checkpoint → an unquantized GGUF: by the table of families, or by llama.cpp's own script that the user names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.gguf.reader import GgufFile
from edgedistill.models.streaming import Dtype
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.store import fsync_folder

TIMEOUT_S = 3 * 3600.0
LOG_LINES_SHOWN = 6
LOG_LINE_CHARS = 200
CHECKED_CONTEXT = 32


def to_gguf(checkpoint: Path, out: Path, *, dtype: Dtype, name: str, converter: Path | None) -> dict[str, Any]:
    """`out` and its facts, as `convert_to_gguf` says them; through the script `converter` where one is given."""
    if converter is None:
        return convert_to_gguf(checkpoint, out, dtype=dtype, name=name)
    return run_script(converter, checkpoint, out, dtype=dtype)


def run_script(
    script: Path, checkpoint: Path, out: Path, *, dtype: Dtype, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """`out` as llama.cpp's convert_hf_to_gguf.py (or a script with its arguments) writes it, in a child process.

    The result is opened in llama.cpp and runs two tokens before it is put in place. Raises UserError where the script
    fails, takes longer than `timeout_s` or writes something else; RuntimeCrashed where llama.cpp dies on the result.
    """
    if not script.is_file():
        raise UserError(
            f"no converter script {script}", "give the path of convert_hf_to_gguf.py in a checkout of llama.cpp"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        part = Path(scratch) / "model.gguf"
        log = Path(scratch) / "log.txt"
        command = [sys.executable, str(script.resolve()), str(checkpoint.resolve()), "--outfile", str(part)]
        _run([*command, "--outtype", dtype.lower()], log, script, timeout_s)
        if not part.is_file():
            raise UserError(
                f"{script.name} ended without an error, but wrote no GGUF{_tail(log)}", "it must take --outfile PATH"
            )
        facts = _facts(part, script)
        _runs(part, facts)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(out)
    fsync_folder(out.parent)
    return facts


def _run(command: list[str], log: Path, script: Path, timeout_s: float) -> None:
    with log.open("wb") as output:
        # A group of its own, so that whatever the script starts ends with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{script.name} did not finish in {timeout_s:g} s{_tail(log)}", "convert it by hand, then quantize"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        raise UserError(
            f"{script.name} failed with exit code {code}{_tail(log)}",
            "install what it asks for into this environment, or use the version that belongs to the model",
        )


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    kept = [line[:LOG_LINE_CHARS] for line in lines[-LOG_LINES_SHOWN:]]
    return "; its last lines:\n  " + "\n  ".join(kept) if kept else ""


def _facts(gguf: Path, script: Path) -> dict[str, Any]:
    try:
        reader = GgufFile(gguf)
    except UserError as error:
        raise UserError(
            f"{script.name} wrote a file that is not a GGUF: {error.cause}", "use llama.cpp's own script"
        ) from error
    architecture = str(reader.value("general.architecture"))
    return {
        "architecture": architecture,
        "task": "embedding" if reader.value(f"{architecture}.attention.causal") is False else "causal-lm",
        "parameters": sum(tensor.n_elements for tensor in reader.tensors),
        "vocab_size": reader.header.arrays.get("tokenizer.ggml.tokens", (0, 0))[1],
        "context_length": int(reader.value(f"{architecture}.context_length") or 0),
        "bytes": gguf.stat().st_size,
        "notes": [f"converted by {script.name}"],
    }


def _runs(gguf: Path, facts: dict[str, Any]) -> None:
    try:
        with RuntimeProcess(
            "llama.cpp", gguf, threads=1, context_tokens=CHECKED_CONTEXT, use_extra_bufts=False, logits_all=False
        ) as process:
            if facts["task"] == "embedding":
                process.embedding([0, 1])
            else:
                process.greedy([0, 1], 1)
    except RuntimeCrashed as error:
        raise RuntimeCrashed(
            f"llama.cpp cannot run what the converter wrote: {error.cause}", error.remedy, error.signal_name
        ) from error
