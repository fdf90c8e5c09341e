"""Which tensor is to blame: an artifact's files against their model, and what its runtime first makes wrong."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.records.artifact import Artifact
from edgedistill.records.retention import Departure
from edgedistill.runtimes.process import RuntimeProcess

TENSOR = re.compile(r"[\w.]+\.(?:weight|bias)")
FIRST = re.compile(r"the first tensor that departs is (\S+)")
NOT_FOUND = "no single tensor"
# Of the logits' spread. A fault that is small in each layer shows at the finer one alone.
FRACTIONS = (1.0, 0.1)


def against_model(artifact: Artifact, folder: Path, checkpoint: Path) -> list[Departure]:
    """Where the artifact's files are not `checkpoint`'s, by more than the rounding of its types explains."""
    from edgedistill.verify.faithful import check_faithful

    found = [
        Departure(
            found="file", rung="quantized" if finding.kind == "tensor" else "shipped", tensor=finding.name,
            said=finding.why,
        )
        for finding in check_faithful(artifact, folder, checkpoint)
    ]  # fmt: skip
    if found or artifact.format != "onnx":
        return found
    from edgedistill.onnx.decoder_parity import check_weights

    try:
        check_weights(checkpoint, folder / artifact.entry)
    except UserError as error:
        tensor = TENSOR.search(error.cause)
        name = tensor.group() if tensor else NOT_FOUND
        return [Departure(found="file", rung="quantized", tensor=name, said=error.cause)]
    return []


def in_runtime(
    artifact: Artifact,
    folder: Path,
    *,
    model: Any,
    checkpoint: Path,
    process: RuntimeProcess,
    ids_T: NDArray[np.int64],
) -> list[Departure]:
    """The first tensor that the runtime computes otherwise than `model`, torch with the artifact's stored weights."""
    for fraction in FRACTIONS:
        said = _first_departure(artifact, folder, model, checkpoint, process, ids_T, fraction)
        found = FIRST.search(said)
        if found:
            return [Departure(found="runtime", rung="shipped", tensor=found.group(1), said=said)]
    return [Departure(found="runtime", rung="shipped", tensor=NOT_FOUND, said=said)] if said else []


def _first_departure(
    artifact: Artifact,
    folder: Path,
    model: Any,
    checkpoint: Path,
    process: RuntimeProcess,
    ids_T: NDArray[np.int64],
    fraction: float,
) -> str:
    if artifact.format == "gguf":
        from edgedistill.gguf import layers

        floating = artifact.quantization in layers.FLOAT_TYPES
        limit = layers.FLOAT_LIMIT if floating else layers.QUANTIZED_LIMIT
        return layers.first_departure(model, checkpoint, process, ids_T, fraction * limit)
    if artifact.format == "onnx":
        from edgedistill.onnx import decoder_parity

        limit = decoder_parity.LIMITS.get(artifact.quantization, decoder_parity.LIMITS["INT8"])
        # the graph with its tensors exposed is written beside its weights: not into a folder that is the user's
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "model"
            shutil.copytree(folder / artifact.entry, copy, copy_function=_link)
            return decoder_parity.first_departure(model, checkpoint, copy, ids_T, fraction * limit)
    return ""


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
