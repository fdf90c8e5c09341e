"""`retention.json`: the ladder, its neighbours, and the gate. Its JSON Schema is kept in docs/schemas/."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from edgedistill.records.base import Count, Interval, Record
from edgedistill.records.figures import Basis

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
