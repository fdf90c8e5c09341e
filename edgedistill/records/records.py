"""What flows between the stages: typed, frozen, and refused when a key is unknown.

Units stand in the field names. `retention.json` and `latency.json` are `Retention` and `Latency`;
their JSON Schemas are kept in docs/schemas/ and held to these classes by tests/test_schemas.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgedistill.records.figures import Basis as Basis
from edgedistill.records.figures import Figure as Figure

Count = Annotated[int, Field(ge=0)]
RungName = Literal["teacher", "student", "quantized", "shipped"]
Verdict = Literal["passed", "failed", "too few documents to tell"]
CheckName = Literal[
    "teacher against a uniform guess",
    "teacher against word counts",
    "files against the model",
    "tokenizer",
    "quantized against student",
    "shipped against quantized",
    "retention",
    "agreement",
]
Interval = tuple[float, float]  # 95 %; null beside a figure: too few independent units to tell (statistics.py)


class Record(BaseModel):
    """Base: immutable, unknown keys refused. Its validator is built when it is first used: most commands use few."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


class FileEntry(Record):
    """A file: path relative to its folder (posix), size, content hash."""

    path: str
    bytes: Count
    sha256: str


class Shape(Record):
    """The sizes that define a decoder (Llama, Qwen2, Qwen3 families)."""

    family: str = "llama"
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    tie_word_embeddings: bool = True
    max_position_embeddings: Count = 2048
    attention_bias: bool = False
    qk_norm: bool = False

    @property
    def parameters(self) -> int:
        """Exact number of parameters of the transformers model of this shape."""
        return self.embedding_parameters + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Token embedding, and the output head where it is not tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def layer_parameters(self) -> int:
        """One decoder layer: q, k, v, o, gate, up, down, two norms, biases and q/k norms where they are."""
        q_width = self.num_attention_heads * self.head_dim
        kv_width = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * q_width + 2 * self.hidden_size * kv_width
        bias = q_width + 2 * kv_width if self.attention_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return attention + bias + 3 * self.hidden_size * self.intermediate_size + norms


class SplitPart(Record):
    """One part of the documents."""

    documents: Count
    bytes: Count
    sha256: str


class FileRead(Record):
    """A file of text as it was read: `rows` stand in it, `documents` are kept, `dropped` are the others by reason."""

    path: str
    format: str
    rows: Count
    documents: Count
    dropped: dict[str, Count] = {}
    notes: list[str] = []


class LeftOut(Record):
    """What of a folder was not read, and why: how many files or folders, and the first of them."""

    why: str
    count: Count
    paths: list[str]


class SourceRead(Record):
    """A data path as it was read: all rows are documents or dropped.

    `files` are the first thousand of `file_count`; of a data set from a hub there is none. `duplicates` are documents
    that stand in it before, word for word: the split drops them. `whole` is false where reading stopped at
    `data.max_documents`; rows behind that are not counted.
    """

    source: str
    file_count: Count
    files: list[FileRead]
    rows: Count
    documents: Count
    dropped: dict[str, Count]
    duplicates: Count
    left_out: list[LeftOut]
    whole: bool


class DataResult(Record):
    """What the data stage leaves: `train.jsonl`, `calibration.jsonl`, `held_out.jsonl`, a block of documents a line.

    `read`: what the text was read from, and `data.eval_data`'s; empty for Python's documentation.
    """

    source: str
    read: list[SourceRead] = []
    split: str
    parts: dict[str, SplitPart]
    duplicates_dropped: Count
    overlap: dict[str, float]
    sha256: str


class VocabularyResult(Record):
    """A tokenizer trimmed to what the text uses: `path` is its folder, with a config.json of the new ids.

    `used_tokens` are those in the documents, `only_held_out_tokens` those of them that the held-out part alone has;
    `kept_sha256` is that of the kept ids of the teacher, ascending, as little-endian int64.
    """

    path: str
    tokens: int
    teacher_tokens: int
    used_tokens: int
    only_held_out_tokens: int
    kept_sha256: str
    tokenizer_sha256: str


class TrainResult(Record):
    """How a training run went."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    best_step: int
    stopped_early: bool
    history: list[dict[str, float]]
    loss: str
    precision: str
    skipped_steps: list[int] = []
    micro_batch_sequences: int = 0
    ranks: int = 1


class SignalsResult(Record):
    """A cache of the teacher's signals. `path` is relative to the record; `tokens` are the packed sequences'."""

    path: str
    kind: str
    tokens: int
    bytes: int
    bytes_per_token: float


class FurtherTeacher(Record):
    """A teacher beside the first: what it is, where its weights lie, and its share before normalising."""

    name: str
    origin: Literal["folder", "hub"]
    path: str
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str
    weight: float


class TeacherResult(Record):
    """The teacher: where its weights lie and what they are. `path` is a local folder."""

    origin: Literal["trained", "folder", "hub"]
    name: str
    path: str
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str
    training: TrainResult | None = None
    adopted: bool = False
    weight: float = 1.0
    also: list[FurtherTeacher] = []


class StudentResult(Record):
    """A trained (or given) student: `model/` in its record's folder, as transformers saves it."""

    path: str
    start: Literal["fresh", "pretrained", "layers", "width", "both", "given"]
    start_details: dict[str, Any] = {}
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str
    teacher_weights_sha256: str | None = None
    further_teachers: list[FurtherTeacher] = []
    signals: str = "none"
    training: TrainResult | None = None
    adopted: bool = False


class QadResult(Record):
    """A student trained under an artifact's rounding: its fp32 masters, which the artifact is exported from.

    `student_weights_sha256`: the float student that it started as, which stays the ladder's `student`.
    `tensor_types`: what the artifact stores of each tensor, by transformers' names. `importance_file`: the importance
    matrix that training rounded with and the export takes; None: none.
    """

    path: str
    artifact: str
    weights_sha256: str
    student_weights_sha256: str
    tokenizer_sha256: str
    tensor_types: dict[str, str]
    importance_file: str | None = None
    signals: str
    training: TrainResult


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


class Rung(Record):
    """A line of the retention ladder, all rungs on the same tokens. Agreement is against the teacher.

    An interval is null where there are too few documents for one.
    """

    rung: RungName
    value: float
    ci95: Interval | None
    perplexity: float
    perplexity_ci95: Interval | None
    next_token_accuracy: float
    next_token_accuracy_ci95: Interval | None
    retention: float
    retention_ci95: Interval | None
    kl_mean_nats: float
    kl_mean_nats_ci95: Interval | None
    kl_p99_nats: float | None
    kl_p99_nats_ci95: Interval | None
    top1_agreement: float
    top1_agreement_ci95: Interval | None
    artifact_sha256: str
    basis: Basis
    runtime: str


class Scored(Record):
    """A value with its 95 % interval; null: too few documents to tell."""

    value: float
    ci95: Interval | None


class Agreement(Record):
    """The shipped artifact against the teacher, token by token."""

    top1: float
    top1_ci95: Interval | None
    kl_mean_nats: float
    kl_mean_nats_ci95: Interval | None
    kl_p99_nats: float | None
    kl_p99_nats_ci95: Interval | None


class Check(Record):
    """One comparison of the gate; docs/gate.md says why each is there and where its limit comes from.

    `value` in `unit`, with its interval where it has one, has to be `bound` the `limit`. `passed` is null where too few
    documents were scored to tell. `rung`: which line of the ladder is wrong where it fails; `tensor`: the first tensor,
    or key of the file, that departs, where that is known. `why` says it in a sentence.
    """

    name: CheckName
    compares: str
    value: float
    unit: str
    ci95: Interval | None = None
    limit: float
    bound: Literal["at least", "more than", "at most"]
    passed: bool | None
    rung: RungName
    tensor: str | None = None
    why: str


class Gate(Record):
    """Every check has to pass. `min_retention` is what the retention interval's lower end has to reach."""

    min_retention: float
    on: Literal["ci95_low"] = "ci95_low"
    passed: bool
    verdict: Verdict
    checks: list[Check]

    @model_validator(mode="after")
    def _one_story(self) -> Gate:
        if "retention" not in [check.name for check in self.checks]:
            raise ValueError("the checks say nothing of retention")
        outcomes = [check.passed for check in self.checks]
        found = "failed" if False in outcomes else "too few documents to tell" if None in outcomes else "passed"
        if self.verdict != found or self.passed != (found == "passed"):
            raise ValueError(f"the checks say {found!r}, the gate {self.verdict!r}")
        return self


class Neighbours(Record):
    """Two rungs that should hold the same model, or a model and its rounding, token by token.

    `kl_mean_nats` is KL(above ‖ below); `perplexity_ratio` is below ÷ above.
    """

    above: RungName
    below: RungName
    kl_mean_nats: Scored
    perplexity_ratio: Scored
    top1_agreement: float


class Baselines(Record):
    """What a teacher has to beat: a uniform guess over its `tokens`, and the words' counts in the other documents.

    `*_over_teacher`: perplexity of the guess ÷ the teacher's. `smoothing`: the pseudo-count of each token that suits
    the text best.
    """

    tokens: int
    uniform_over_teacher: Scored
    unigram_perplexity: float
    unigram_over_teacher: Scored
    smoothing: float


class Departure(Record):
    """Where an artifact is not the model that it was made of: the tensor, or the key, and how it differs.

    `found` in the `file`, by reading it, or in the `runtime`: the first tensor that it computes otherwise than torch.
    """

    found: Literal["file", "runtime"]
    rung: RungName
    tensor: str
    said: str


class TokenizerCheck(Record):
    """Token ids of the artifact's own tokenizer against the original's, over varied texts."""

    texts: Count
    mismatches: Count
    first_mismatch: str | None = None


class Measured(Record):
    """What verification measured, before any gate: it changes no measurement."""

    schema_: Literal["edgedistill.retention/1"] = Field(default="edgedistill.retention/1", alias="schema")
    task: str
    metric: str
    higher_is_better: bool
    examples: Count
    documents: Count
    effective_documents: float = Field(
        description="as many documents of equal length would weigh as much: what intervals count"
    )
    eval_sha256: str
    context_tokens: Count
    stride_tokens: Count
    bos: bool
    intervals: str = Field(description="how intervals are made: statistics.METHOD")
    machine: dict[str, Any]
    runtime_options: dict[str, Any]
    artifact: str = Field(description="format and quantization")
    made_of: Literal["student", "masters"] = Field(
        default="student",
        description="what the artifact holds: the student's weights, or masters that went on from it under the"
        " artifact's rounding",
    )
    duplicate_documents: int = Field(default=0, description="given, but no second unit: their text was scored already")
    rungs: list[Rung]
    baselines: Baselines
    neighbours: list[Neighbours]
    departures: list[Departure] = []
    retention: Scored
    agreement: Agreement
    tokenizer: TokenizerCheck
    kept_tokens: int | None = Field(
        default=None,
        description="tokens of a trimmed vocabulary: KL is then over these, the teacher's probabilities renormalised"
        " (its own KL is the mean of −log of what it gives them in all); perplexity and choices are over all tokens"
        " that each model has; null: not trimmed",
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Retention(Measured):
    """`retention.json`: how much of the teacher the shipped bytes kept, and whether that passes the gate."""

    gate: Gate


class Percentiles(Record):
    """Of all samples, in milliseconds. A 99th percentile of fewer than 100 samples is null."""

    p50: float
    p90: float
    p99: float | None


class Workload(Record):
    """What was run."""

    batch: Count
    prompt_tokens: Count
    new_tokens: Count
    warmup: Count
    repeats: Count


class Latency(Record):
    """`latency.json`: how fast the artifact's bytes ran, on which machine, with every sample."""

    schema_: Literal["edgedistill.latency/1"] = Field(default="edgedistill.latency/1", alias="schema")
    target: str
    measured_on: dict[str, Any]
    basis: Basis
    artifact_sha256: str
    workload: Workload
    ttft_ms: Percentiles
    token_ms: Percentiles
    prefill_tokens_per_s: float
    prefill_tokens_per_s_ci95: Interval | None
    decode_tokens_per_s: float
    decode_tokens_per_s_ci95: Interval | None
    rate_units: int = Field(description="repeats, over which the intervals of both rates are; null intervals: too few")
    load_ms: float
    peak_rss_bytes: Count
    drift: float
    energy_j: float | None = None
    samples: dict[str, list[float]]
    ceiling: Figure
    notes: list[str] = []

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
