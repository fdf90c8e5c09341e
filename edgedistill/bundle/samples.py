"""samples/: code that runs the bundle's model with nothing but its runtime. Copied as it is tested here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from edgedistill.records.manifest import BundleArtifact

GENAI_CONFIG = "genai_config.json"
SAMPLES = {"gguf": "sample_llama.py", "onnx": "sample_genai.py", "bitsandbytes": "sample_transformers.py"}
PACKAGES = {
    "gguf": "llama-cpp-python",
    "onnx": "onnxruntime-genai",
    "bitsandbytes": "torch transformers accelerate bitsandbytes",
}


def sample_names(formats: Sequence[str]) -> list[str]:
    """The programs' paths in the bundle, by the formats of its artifacts: of the first `run.py`."""
    names = [f"samples/python/run_{format_}.py" for format_ in dict.fromkeys(formats)]
    return ["samples/python/run.py", *names[1:]]


def sample_texts(artifacts: Sequence[BundleArtifact]) -> dict[str, str]:
    """`samples/python/run.py` for the first format, `run_<format>.py` for a second, and a README of a line each."""
    lines = ["# Samples", "", "From the bundle's folder:", ""]
    texts: dict[str, str] = {}
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
        texts[f"samples/python/{name}"] = text
        install = f"`pip install {PACKAGES[artifact.format]}`"
        lines.append(f'- {artifact.format}: {install}, then `python samples/python/{name} "Once upon a time"`.')
    return {"samples/README.md": "\n".join(lines) + "\n", **texts}
