"""How an artifact is written, beyond its format and quantization: what the command line and recipes ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NOT_COMPARED = "its logits were not compared with torch's (export.compare_logits is off): its weights alone were"
UNKNOWN_FAMILY = "its weights and logits were not compared with the original: the family is not in edgedistill's table"
CalibrationMethod = Literal["minmax", "entropy", "percentile"]
Int8Scheme = Literal["auto", "u8s8", "u8s8-7bit", "u8u8", "s8s8"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export. Everything here can change the bytes written, so `key` is part of the store's key.

    `calibration`: what importance matrices and static quantization see: blocks of documents for text, or None where
    none was given; `calibration_source` names it in records. `calibration_samples`: at most so many sequences or
    inputs, drawn with `seed`. `importance_matrix`: auto (for the types where it was measured to help).
    `importance_file`: a matrix that gguf/importance.py wrote, taken instead of computing one.
    `tensor_types`: regular expression of a tensor's name (GGUF) or node's name (ONNX) → type, the first match counts.
    `mixed_retention`: raise the layers that cost most until retention meets this at the smallest size; None: no search.
    `max_file_bytes`: split larger files. `converter`: llama.cpp's own convert_hf_to_gguf.py, for other families.
    `task`: what a model without a causal head does; None: from its config. `ort_format`: write `.ort` too.
    `int8_scheme`: signs and width of INT8, by the CPU; auto: this machine's (onnx/int8_scheme.py).
    `tensorrt`: standard operators alone, and a script that builds the engine on a device.
    `compare_logits`: hold a GGUF or ONNX decoder to the float32 model, which then stands in memory.
    `compare_speed`: measure float against quantized here. `notes`: what the record shall say of the weights' origin.
    """

    calibration: tuple[tuple[str, ...], ...] | None = field(default=None, repr=False)
    calibration_path: Path | None = None
    calibration_source: str = ""
    calibration_samples: int = 128
    calibration_tokens: int = 256
    calibration_batch: int = 8
    calibration_method: CalibrationMethod = "minmax"
    seed: int = 0
    importance_matrix: Literal["auto", "on", "off"] = "auto"
    importance_file: Path | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    mixed_retention: float | None = None
    max_file_bytes: int | None = None
    converter: Path | None = None
    task: str | None = None
    opset: int | None = None
    ort_format: bool = False
    int8_scheme: Int8Scheme = "auto"
    tensorrt: bool = False
    compare_logits: bool = True
    compare_speed: bool = True
    notes: tuple[str, ...] = ()

    def key(self) -> dict[str, Any]:
        """What of this changes the artifact, as JSON; the calibration text as its hash."""
        import hashlib

        from edgedistill.store import canonical_json

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        text = values.pop("calibration")
        values["calibration_sha256"] = (
            None if text is None else hashlib.sha256(canonical_json([list(b) for b in text]).encode()).hexdigest()
        )
        values["calibration_path"] = None if self.calibration_path is None else _content_sha256(self.calibration_path)
        values["importance_file"] = None if self.importance_file is None else _content_sha256(self.importance_file)
        values["converter"] = None if self.converter is None else _content_sha256(self.converter)
        values["tensor_types"] = [list(pair) for pair in self.tensor_types]
        return values


def _content_sha256(path: Path) -> str:
    from edgedistill.store import combined_sha256, file_entries, sha256_of

    return combined_sha256(file_entries(path)) if path.is_dir() else sha256_of(path)


DEFAULT_OPTIONS = ExportOptions()
