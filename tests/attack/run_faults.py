"""Plants every fault that the generators know in healthy artifacts: for `benchmarks/attack.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgedistill.records.artifact import Artifact
from edgedistill.records.retention import Retention, Scored

# What a bundle holds: a quantized and a float artifact of each format.
BUNDLES = (("gguf", "Q4_0"), ("gguf", "F32"), ("onnx", "INT4"), ("onnx", "FP32"))


def of_float(artifact: Artifact) -> Retention:
    """A record of a float artifact: what the student keeps, it keeps."""
    from bundle_fixtures import neighbours, retention, rung

    digests = {"teacher": "a" * 64, "student": "b" * 64, "quantized": artifact.sha256, "shipped": artifact.sha256}
    rungs = [rung(name, 20.4 if name == "teacher" else 22.9, 20.4, digest) for name, digest in digests.items()]
    rungs[-1] = rungs[-1].model_copy(update={"runtime": artifact.runtime.removesuffix("-genai")})
    pairs = [neighbours("student", "quantized", 1e-7), neighbours("quantized", "shipped", 1e-7)]
    return retention(
        artifact,
        rungs=rungs,
        neighbours=pairs,
        retention=Scored(value=rungs[-1].retention, ci95=rungs[-1].retention_ci95),
    )


def attack(count: int, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Name of each fault (format first), and what was wrong: it was accepted, or stopped without being named.

    All of them are planted, of which there are more than `count` should ask for.
    """
    from bundle_fixtures import Ingredients

    from attack.stopped import outcomes

    planted = 0
    for format_, quantization in BUNDLES:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            made = Ingredients(place / "of")
            artifact = made.exported(quantization, onnx=format_ == "onnx")
            if quantization.startswith("F"):
                artifact = replace(artifact, retention=of_float(artifact.artifact))
            bundle = made.make(place / "out" / "tiny", artifacts=[artifact])
            for one in outcomes(bundle, place / "work", made.store, seed=seed):
                planted += 1
                wrong = "" if one.named else "stopped, not named" if one.stopped else "accepted"
                name = f"{format_} {quantization} {one.fault} ({one.kind}: {one.names})"
                yield name, [f"{wrong}: {one.said[:300]}"] if wrong else []
    if planted < count:
        raise RuntimeError(f"there are {planted} faults to plant, not {count}")
