"""What is asked of llama.cpp's quantizer: the mix, types by tensor, an importance matrix. Refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.gguf.importance import (
    Ids,
    Importance,
    calibration_sequences,
    compute_importance,
    gguf_importance,
    read_importance,
)
from edgedistill.gguf.reader import GgufFile
from edgedistill.models.architectures import Model
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.mixes import (
    MIXES_THAT_NEED_IMPORTANCE,
    UNQUANTIZED,
    chosen_overrides,
    needs_importance,
    quantizable,
    usable_type,
    uses_importance,
    wanted_types,
)
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Calibration


@dataclass(frozen=True, kw_only=True)
class Request:
    """`types`: of every matrix where some are overridden, else empty (llama.cpp's own choice). `overrides`: GGUF tensor
    → the type that the user asked for. `sequences`: what an importance matrix is still to be computed from, as
    `calibration` records it. `notes`: what was wanted and is not there.
    """

    quantization: str
    overrides: dict[str, str]
    types: dict[str, str] = field(default_factory=dict)
    importance: Importance | None = None
    sequences: list[Ids] | None = None
    calibration: Calibration | None = None
    notes: list[str] = field(default_factory=list)


def request_of(
    checkpoint: Path, model: Model, quantization: str, options: ExportOptions, *, progress: Progress = QUIET
) -> Request:
    """The request for a model of the table; no model is loaded yet, calibration text is tokenized.

    UserError for overrides that name no matrix or no type, for a type that needs an importance matrix where no
    calibration text is given, and for a matrix of another model.
    """
    columns = matrices_of(model)
    overrides = chosen_overrides(columns, options.tensor_types)
    needing = _needing(model, quantization, overrides)
    asked = Request(quantization=quantization, overrides=overrides)
    if options.importance_file is not None and quantization not in UNQUANTIZED:
        importance = read_importance(options.importance_file)
        gguf_importance(importance, model.specs)
        asked = replace(asked, importance=importance, calibration=importance.calibration)
    elif needing or uses_importance(quantization, options.importance_matrix):
        if needing and options.importance_matrix == "off":
            raise UserError(
                f"export.importance_matrix is off, but {needing}",
                "set it to auto, or choose IQ3_S, Q3_K_M or a larger quantization",
            )
        asked = _with_sequences(asked, checkpoint, model, needing, options, progress)
    if not overrides:
        return asked
    weighted = asked.importance is not None or asked.sequences is not None
    return replace(asked, types=planned_types(model, quantization, overrides, importance=weighted))


def with_importance(asked: Request, checkpoint: Path, model: Model, *, progress: Progress = QUIET) -> Request:
    """The request with its importance matrix computed, where one is to be."""
    if asked.sequences is None:
        return asked
    progress.say(f"export: importance matrix of {len(asked.sequences):,} sequences")
    importance = compute_importance(
        checkpoint, asked.sequences, task=model.family.task, calibration=asked.calibration, progress=progress
    )
    gguf_importance(importance, model.specs)
    return replace(asked, importance=importance, sequences=None)


def request_of_file(gguf: Path, quantization: str, options: ExportOptions) -> Request:
    """The request for a GGUF that llama.cpp's own converter wrote, of a family that is not in the table.

    Without the torch model's names there is no importance matrix: UserError where one is needed or asked for.
    """
    columns = {t.name: t.shape[0] for t in GgufFile(gguf).tensors if quantizable(t.name, len(t.shape))}
    overrides = chosen_overrides(columns, options.tensor_types)
    refuse_importance(quantization, overrides, options)
    helped = uses_importance(quantization, options.importance_matrix)
    notes = ["quantized without an importance matrix: the family has no converter of edgedistill's"] if helped else []
    return Request(quantization=quantization, overrides=overrides, types=dict(overrides), notes=notes)


def refuse_importance(quantization: str, overrides: Mapping[str, str], options: ExportOptions) -> None:
    """UserError where a matrix is needed or asked for, of a model whose tensors' torch names are not known."""
    needing = [f"{name} as {type_}" for name, type_ in overrides.items() if needs_importance(quantization, type_, name)]
    if quantization in MIXES_THAT_NEED_IMPORTANCE:
        needing.insert(0, quantization)
    if options.importance_file is not None or options.importance_matrix == "on":
        needing.append("export.importance_matrix=on or a given matrix")
    if needing:
        raise UserError(
            f"{needing[0]} needs an importance matrix, which is computed for the families of edgedistill's own"
            " converter alone",
            "choose IQ3_S, Q3_K_M or a larger quantization, or leave out --converter",
        )


def matrices_of(model: Model) -> dict[str, int]:
    """GGUF name → row length of every matrix that can be quantized."""
    return {
        spec.gguf_name: spec.stored_shape[-1]
        for spec in model.specs.values()
        if not spec.vector and quantizable(spec.gguf_name, len(spec.stored_shape))
    }


def planned_types(model: Model, quantization: str, overrides: Mapping[str, str], *, importance: bool) -> dict[str, str]:
    """Type that each matrix is to get, before any fallback: llama.cpp's choice for the mix, and the overrides."""
    sizes = model.sizes
    chosen = wanted_types(
        matrices_of(model),
        quantization,
        layers=sizes.num_hidden_layers,
        heads_a_key=sizes.num_attention_heads // sizes.num_key_value_heads,
        importance=importance,
    )
    return chosen | dict(overrides)


def _needing(model: Model, quantization: str, overrides: Mapping[str, str]) -> str:
    """Why an importance matrix is needed, in words; "" where it is not."""
    if quantization in MIXES_THAT_NEED_IMPORTANCE:
        return f"llama.cpp writes {quantization} only with an importance matrix"
    columns = matrices_of(model)
    for name, type_ in planned_types(model, quantization, overrides, importance=False).items():
        if needs_importance(quantization, usable_type(type_, columns[name]), name):
            return f"{name} is to be {type_}, which llama.cpp writes only with an importance matrix"
    return ""


def _with_sequences(
    asked: Request, checkpoint: Path, model: Model, needing: str, options: ExportOptions, progress: Progress
) -> Request:
    """With what to compute a matrix from; or with a note that says why not, where it would only have helped."""
    forced = options.importance_matrix == "on"
    if not options.calibration and not (needing or forced):
        return replace(asked, notes=["quantized without an importance matrix: no calibration text was given"])
    try:
        sequences, record = calibration_sequences(checkpoint, options, task=model.family.task)
    except UserError as error:
        if needing:
            raise UserError(f"{needing}: {error.cause}", error.remedy) from error
        if forced:
            raise
        progress.warn(f"export: no importance matrix: {error.cause}")
        return replace(asked, notes=[f"quantized without an importance matrix: {error.cause}"])
    return replace(asked, sequences=sequences, calibration=record)
