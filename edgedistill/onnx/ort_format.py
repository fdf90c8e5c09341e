"""ONNX Runtime's own file format for its mobile builds, and the list of operators that a reduced build needs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from edgedistill.errors import RuntimeCrashed
from edgedistill.runtimes.interpreter import module_command, users_path

TIMEOUT_S = 1800.0
OPERATORS_FILE = "required_operators.config"
LEVEL = "extended"
LINES_SHOWN = 4


def to_ort(folder: Path) -> list[Path]:
    """Every .onnx of `folder` as .ort beside it, and required_operators.config. Raises RuntimeCrashed.

    onnxruntime's converter runs in a process of its own, with its basic and extended optimizations written into the
    file: those of the layout, which depend on the CPU, are made when it is loaded.
    https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ort.") as scratch:
        command = module_command(
            "onnxruntime.tools.convert_onnx_models_to_ort", str(folder.absolute()), "--output_dir", scratch,
            "--optimization_style", "Fixed",
        )  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": users_path(os.environ),
            "ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL": LEVEL,
        }
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment,
            check=False,
        )  # fmt: skip
        made = sorted(Path(scratch).glob("*.ort"))
        config = next(iter(sorted(Path(scratch).glob("required_operators*.config"))), None)
        if done.returncode != 0 or len(made) != len(list(folder.glob("*.onnx"))) or config is None:
            lines = (done.stdout + done.stderr).strip().splitlines()[-LINES_SHOWN:]
            raise RuntimeCrashed(
                f"onnxruntime's converter made {len(made)} .ort files and ended with {done.returncode}: "
                + " | ".join(lines),
                "export without export.ort_format",
            )
        moved = []
        for path in made:
            moved.append(path.replace(folder / path.name.replace(f".{LEVEL}.ort", ".ort")))
        text = config.read_text(encoding="utf-8").splitlines()
        # Its remarks name the folder that it read.
        kept = [line for line in text if not line.startswith("#")]
        (folder / OPERATORS_FILE).write_text("\n".join(kept) + "\n", encoding="utf-8")
    return moved
