"""A checkpoint → model.pte for phones, by ExecuTorch in an interpreter of its own, held to torch in its own runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgedistill.errors import RuntimeCrashed, UserError, did_you_mean
from edgedistill.models.folder import require_sound
from edgedistill.models.shapes import refuse_family, shape_from_config
from edgedistill.records.artifact import Artifact, Parity
from edgedistill.runtimes.child import signal_name
from edgedistill.store import combined_sha256, file_entries, fsync_tree
from edgedistill.strict import read_json

INTERPRETER = "EDGEDISTILL_EXECUTORCH_PYTHON"
# Relative error of the logits against torch with the same (quantized) model. 8DA4W: a rounding of the activations
# that falls on the other side moves an 8-bit step; a wrong kernel costs about 1.
LIMITS = {"FP32": 1e-3, "8DA4W": 0.2}
GROUP = 32
EXPORT_TIMEOUT_S = 3600.0
LOG_LINES_SHOWN = 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INSTALL = (
    "pip install 'edgedistill[executorch]', or make an environment of its own with executorch, torch and transformers"
    f" and name its interpreter in {INTERPRETER}"
)


def interpreter() -> str:
    """The Python that has ExecuTorch: the one that the environment names, else this one. UserError without."""
    named = os.environ.get(INTERPRETER)
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise UserError(f"{INTERPRETER} is {named}, which is not a program", "name the interpreter, not its folder")
        return named
    if importlib.util.find_spec("executorch") is None:
        raise UserError(f"ExecuTorch is not installed in {sys.executable}", INSTALL)
    return sys.executable


def export_executorch(
    checkpoint: Path,
    out: Path,
    *,
    quantization: str,
    context_tokens: int,
    threads: int,
    calibration: Any = None,
) -> Artifact:
    """Write `out`/model.pte (XNNPACK) and the tokenizer, and describe them. Nothing is left in `out` on failure.

    Raises UserError for a quantization or width that cannot be, without ExecuTorch, or where its logits are not
    torch's; RuntimeCrashed where the exporter dies.
    """
    from edgedistill.runtimes.parity import INVALID, real_inputs

    if quantization not in LIMITS:
        raise UserError(f"no ExecuTorch quantization '{quantization}'", did_you_mean(quantization, LIMITS))
    shape = shape_from_config(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    refuse_family(shape, "executorch", where=str(checkpoint))
    widths = (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    odd = [width for width in widths if width % GROUP]
    if quantization == "8DA4W" and odd:
        raise UserError(
            f"{checkpoint}: matrices with {odd[0]} columns; 8DA4W groups {GROUP} weights",
            "export executorch:FP32, or train a student of such widths",
        )
    require_sound(checkpoint)
    python = interpreter()
    context = min(context_tokens, shape.max_position_embeddings)
    name, sequences = real_inputs(checkpoint, calibration, context_tokens=context)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".executorch.", dir=out.parent) as scratch_name:
        scratch = Path(scratch_name)
        made = scratch / "out"
        made.mkdir()
        report = _run(
            python, scratch, checkpoint=str(checkpoint.absolute()), quantization=quantization, context=context,
            sequences=[ids.tolist() for ids in sequences], out=str(made), threads=threads,
        )  # fmt: skip
        found = report["stored"]
        if not found["relative_rms"] <= LIMITS[quantization]:
            raise UserError(
                f"model.pte: ExecuTorch's logits differ by {found['relative_rms']:.3g} of the spread of torch's, more"
                f" than {LIMITS[quantization]:g}",
                INVALID,
            )
        for file in TOKENIZER_FILES:
            if (checkpoint / file).is_file():
                shutil.copyfile(checkpoint / file, made / file)
        fsync_tree(made)
        for path in sorted(made.iterdir()):
            path.replace(out / path.name)
    files = file_entries(out)
    size = next(file.bytes for file in files if file.path == "model.pte")
    versions = report["versions"]
    return Artifact(
        format="executorch", quantization=quantization, runtime="executorch", entry="model.pte", files=files,
        bytes=sum(file.bytes for file in files), sha256=combined_sha256(files), parameters=shape.parameters,
        bits_per_weight=8 * size / shape.parameters,
        tensor_types={"F32" if quantization == "FP32" else "INT4": int(report["delegates"])},
        context_tokens=context, vocab_size=int(report["vocab_size"]), tool_versions=versions,
        parity=Parity(
            runtime=f"executorch {versions['executorch']} (Python runtime, XNNPACK)",
            inputs=f"{len(sequences)} sequences, {sum(map(len, sequences))} tokens: {name}",
            reference="stored", values=found["values"], max_abs_difference=found["max_abs"],
            mean_abs_difference=found["mean_abs"], relative_rms=found["relative_rms"], limit=LIMITS[quantization],
        ),
        notes=[
            "the program has no KV cache: it takes all tokens so far and gives the logits of each",
            f"its logits differ from the original's by {report['original']['relative_rms']:.3g} of their spread",
            "bits a weight are of the whole file; tensor_types counts XNNPACK's subgraphs",
        ],
    )  # fmt: skip


def _run(python: str, scratch: Path, **request: Any) -> dict[str, Any]:
    report, log = scratch / "report.json", scratch / "log.txt"
    asked = scratch / "request.json"
    asked.write_text(json.dumps({**request, "report": str(report)}), encoding="utf-8")
    command = [python, "-P", "-W", "ignore", str(Path(__file__).with_name("executorch_child.py")), str(asked)]
    # the other environment's packages are its own: nothing of this one's path may come before them
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, check=False,
                timeout=EXPORT_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeCrashed(f"ExecuTorch did not finish in {EXPORT_TIMEOUT_S:g} s", "export as GGUF") from error
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return answer
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if any("ModuleNotFoundError" in line for line in lines):
        raise UserError(f"{python} lacks what the export needs: {lines[-1].strip()}", INSTALL)
    died = signal_name(done.returncode)
    raise RuntimeCrashed(
        f"ExecuTorch {f'died of {died}' if died else 'failed'} on {request['checkpoint']}: "
        + " | ".join(line.strip()[:200] for line in lines[-LOG_LINES_SHOWN:]),
        "free memory if it was killed (SIGKILL), or export as GGUF",
        died,
    )
