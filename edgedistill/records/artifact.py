"""What an export leaves: files, types, parity with torch, and what quantizing cost."""

from __future__ import annotations

from typing import Any, Literal

from edgedistill.records.base import Count, FileEntry, Interval, Record
from edgedistill.records.figures import Basis


class Fallback(Record):
    """A tensor that got another type than the one asked for, and why."""

    tensor: str
    wanted: str
    got: str
    why: str


class TensorSpec(Record):
    """An input or output of a graph: a name in `shape` is an axis that varies."""

    name: str
    dtype: str
    shape: list[int | str]


class Parity(Record):
    """The artifact in its runtime against the torch model on real inputs, before anything says success.

    Differences are over all outputs, in the outputs' own unit. `reference`: what torch held: the original weights,
    or the stored weights dequantized. `relative_rms` is the root mean square of the difference over that of the
    reference about its mean; at most `limit` is rounding. Greedy tokens are None where the model is no decoder;
    `greedy_compared` of them had a margin that the runtime's rounding cannot turn.
    """

    runtime: str
    inputs: str
    reference: Literal["original", "stored"]
    values: Count
    max_abs_difference: float
    mean_abs_difference: float
    relative_rms: float
    limit: float
    greedy_tokens: int | None = None
    greedy_compared: int | None = None
    greedy_tokens_equal: int | None = None


class Calibration(Record):
    """What static quantization or an importance matrix saw. `order_sha256` is that of the samples in their order."""

    method: str
    source: str
    samples: Count
    tokens: int | None = None
    seed: int
    order_sha256: str


class SensitivityRow(Record):
    """One group of tensors quantized alone: what it costs on text that was not trained on, and the type that it got.

    `bytes_saved`: what `type` saves of the group's bytes in floating point. The interval is over `documents`, worth
    `effective_documents` of equal length; null: too few.
    """

    group: str
    type: str
    cost: float
    cost_ci95: Interval | None
    documents: int
    effective_documents: float
    bytes_saved: int
    chosen: str


class Sensitivity(Record):
    """The table that a mix was chosen from, costliest a byte first. `cost` is in the metric's unit, against the float
    model, over `examples` (tokens, inputs) of `documents`, which the intervals are over.

    `source`: the text. `as_quantized`: the retention without any group raised; `reached`: with those that were, which
    take `bytes_added` more.
    """

    metric: str
    source: str
    examples: Count
    documents: Count
    rows: list[SensitivityRow]
    target: float
    reached: float
    as_quantized: float
    bytes_added: int


class SpeedComparison(Record):
    """Float and quantized artifact, interleaved here: does quantizing pay? Medians; `ratio` is of `pairs` of runs."""

    machine: dict[str, Any]
    runtime: str
    float_ms: float
    quantized_ms: float
    ratio: float
    ratio_ci95: Interval | None
    pairs: int
    pays: bool
    basis: Basis = "measured"


class Artifact(Record):
    """The exact bytes that ship. `entry` is what the runtime opens (a file, or "." for a folder).

    `context_tokens` and `vocab_size` are 0 for a model without tokens. `overrides`: tensor name → type that was asked
    for beside the quantization. `notes`: where the artifact is known to differ from the original.
    """

    format: Literal["gguf", "onnx", "bitsandbytes", "executorch"]
    quantization: str
    runtime: Literal["llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "executorch"]
    task: str = "causal-lm"
    entry: str
    files: list[FileEntry]
    bytes: Count
    sha256: str
    parameters: Count
    bits_per_weight: float
    tensor_types: dict[str, Count]
    fallbacks: list[Fallback] = []
    context_tokens: Count
    vocab_size: Count
    tool_versions: dict[str, str] = {}
    overrides: dict[str, str] = {}
    calibration: Calibration | None = None
    parity: Parity | None = None
    sensitivity: Sensitivity | None = None
    speed: SpeedComparison | None = None
    notes: list[str] = []
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
