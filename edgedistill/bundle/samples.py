"""samples/: code that runs the bundle's model with nothing but its runtime. Copied as it is tested here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from edgedistill.records import Artifact

GENAI_CONFIG = "genai_config.json"
SAMPLES = {"gguf": "sample_llama.py", "onnx": "sample_genai.py", "bitsandbytes": "sample_transformers.py"}
PACKAGES = {
    "gguf": "llama-cpp-python",
    "onnx": "onnxruntime-genai",
    "bitsandbytes": "torch transformers accelerate bitsandbytes",
}


def write_samples(root: Path, artifacts: Sequence[Artifact]) -> None:
    """`samples/python/run.py` for the first format, `run_<format>.py` for a second, and a README of a line each."""
    lines = ["# Samples", "", "From the bundle's folder:", ""]
    formats: list[str] = []
    for artifact in artifacts:
        if artifact.format in formats:
            continue
        formats.append(artifact.format)
        if artifact.format == "onnx" and not any(entry.path.endswith(GENAI_CONFIG) for entry in artifact.files):
            lines.append(f"- onnx: no sample, as the model has no {GENAI_CONFIG}; open it with onnxruntime.")
            continue
        name = "run.py" if len(formats) == 1 else f"run_{artifact.format}.py"
        source = resources.files("edgedistill.bundle") / SAMPLES[artifact.format]
        text = source.read_text(encoding="utf-8").replace("samples/python/run.py", f"samples/python/{name}")
        path = root / "samples" / "python" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        install = f"`pip install {PACKAGES[artifact.format]}`"
        lines.append(f'- {artifact.format}: {install}, then `python samples/python/{name} "Once upon a time"`.')
    (root / "samples").mkdir(exist_ok=True)
    (root / "samples" / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
