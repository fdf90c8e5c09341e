"""`latency.json`: how fast and how large, where. Its JSON Schema is kept in docs/schemas/."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from edgedistill.records.base import Count, Interval, Record
from edgedistill.records.figures import Basis, Figure


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
