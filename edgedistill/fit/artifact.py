"""Whether an artifact of a shape fits a target: its bytes, memory and speed ceiling against the profile's limits."""

from __future__ import annotations

from typing import NamedTuple

from edgedistill.config.recipe import Recipe
from edgedistill.config.targets import Target, parse_artifact
from edgedistill.errors import UserError
from edgedistill.fit import sizes
from edgedistill.quantization.mixes import uses_importance
from edgedistill.records.base import Record
from edgedistill.records.figures import Figure
from edgedistill.records.shape import Shape

# Last-level caches of these devices hold 2 to 50 MB: weights that small need not come from memory.
CACHE_BYTES = 50_000_000
# How weights lie in an artifact, and its KV cache, where it is no GGUF.
BLOCKS = {"onnx": "blocks of 32", "bitsandbytes": "linear layers"}
FLOATS = {"gguf": "F16", "onnx": "FP32", "bitsandbytes": "BF16"}
# A target, and an artifact's format and quantization.
Wanted = tuple[Target, str, str]


class ArtifactPlan(Record):
    """One artifact on one target. `read_bytes` is what decoding a token reads, at the bench's prompt length."""

    target: str
    artifact: str
    format: str
    quantization: str
    context_tokens: int
    artifact_bytes: Figure
    memory_bytes: Figure
    kv_cache_bytes: Figure
    runtime_bytes: Figure
    decode_ceiling_tokens_per_s: Figure
    k_quant_fallbacks: int


class Breach(NamedTuple):
    """A limit that a student would break; a student `scale` times its size would keep it."""

    target: str
    cause: str
    remedy: str
    scale: float


def artifacts_of(recipe: Recipe, target: Target) -> list[str]:
    """The artifacts of a build for this target, in canonical spelling: the recipe's, or the target's default.

    Raises UserError for one that the target cannot run, or that a build cannot follow to its bundle.
    """
    chosen = recipe.export.artifacts or target.default_artifacts
    named = [":".join(parse_artifact(artifact)) for artifact in chosen]
    for artifact in named:
        if not sizes.predicted(*parse_artifact(artifact)):
            raise UserError(
                f"{artifact} can only be exported: build cannot plan, verify and bundle it as a decoder",
                "use `edgedistill export`, or set export.artifacts to some of"
                f" {', '.join(a for a in target.allowed_artifacts if sizes.predicted(*parse_artifact(a)))}",
            )
        if artifact not in target.allowed_artifacts:
            raise UserError(
                f"target {target.name} does not run {artifact}",
                f"set export.artifacts to some of {', '.join(target.allowed_artifacts)}",
            )
    return list(dict.fromkeys(named))


def context_of(recipe: Recipe, target: Target, shape: Shape) -> int:
    """Context on the device: the recipe's, else the target's, never more than the model has positions.

    Raises UserError where the recipe asks for more than the model's positions.
    """
    asked = recipe.export.context_tokens
    if asked is None:
        return min(target.context_tokens, shape.max_position_embeddings)
    if asked > shape.max_position_embeddings:
        raise UserError(
            f"export.context_tokens is {asked:,}, but the model has {shape.max_position_embeddings:,} positions",
            f"set export.context_tokens to at most {shape.max_position_embeddings:,}",
        )
    return asked


def decode_ceiling(target: Target, *, read_bytes: int) -> Figure:
    """Decode tokens/s that the device's memory bandwidth allows at most: bandwidth / bytes read a token."""
    bandwidth = target.bandwidth_bytes_per_s
    caveat = "; so few bytes may stay in caches, which are faster" if read_bytes < CACHE_BYTES else ""
    return Figure(
        value=bandwidth.value / read_bytes,
        unit="tokens/s",
        basis="derived",
        source=f"{bandwidth.value / 1e9:g} GB/s ({target.name}) / {read_bytes:,} bytes a token{caveat}",
    )


def human_bytes(value: float) -> str:
    """1234567 -> "1.23 MB" (decimal units, as in every limit)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if abs(value) < 100 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def breaches_of(shape: Shape, wanted: list[Wanted], recipe: Recipe) -> list[Breach]:
    smaller = _smaller(recipe)
    return [
        breach
        for entry in wanted
        for breach in _breaches_of_one(artifact_plan(shape, recipe, *entry), entry[0], smaller)
    ]


def _smaller(recipe: Recipe) -> str:
    """What makes the student of this recipe smaller: nothing designs one whose sizes are given."""
    if recipe.student.start == "pretrained":
        return "name a smaller student (--student)"
    asked = [name for name, value in recipe.student.shape if value is not None]
    return f"lower student.shape.{', '.join(asked)}" if asked else "raise student.compression"


def _breaches_of_one(planned: ArtifactPlan, target: Target, smaller: str) -> list[Breach]:
    limits = target.limits
    size, memory = planned.artifact_bytes.value, planned.memory_bytes.value
    speed, least = planned.decode_ceiling_tokens_per_s.value, limits.min_decode_tokens_per_s
    where = f"target {target.name}, {planned.artifact}"
    fits = "a student of about {:.2g} of its size would fit"
    found = []
    if size > limits.max_artifact_bytes:
        scale = limits.max_artifact_bytes / size
        found.append(
            Breach(
                target.name,
                f"{where}: the artifact has {human_bytes(size)}, {human_bytes(size - limits.max_artifact_bytes)} over "
                f"the limit of {human_bytes(limits.max_artifact_bytes)}",
                f"{fits.format(scale)}: {smaller}, or choose fewer bits in export.artifacts",
                scale,
            )
        )
    if memory > limits.max_memory_bytes:
        fixed = planned.runtime_bytes.value
        scale = max(0.0, (limits.max_memory_bytes - fixed) / (memory - fixed)) if memory > fixed else 0.0
        found.append(
            Breach(
                target.name,
                f"{where}: it needs {human_bytes(memory)} of memory ({human_bytes(planned.kv_cache_bytes.value)} of it "
                f"KV cache at {planned.context_tokens:,} tokens), {human_bytes(memory - limits.max_memory_bytes)} over "
                f"the limit of {human_bytes(limits.max_memory_bytes)}",
                f"{fits.format(scale)}: {smaller}, or lower export.context_tokens",
                scale,
            )
        )
    if least is not None and speed < least:
        scale = speed / least
        found.append(
            Breach(
                target.name,
                f"{where}: memory bandwidth allows at most {speed:.3g} tokens/s, {least - speed:.3g} below the "
                f"limit of {least:g}",
                f"{fits.format(scale)}: {smaller}, or choose fewer bits in export.artifacts",
                scale,
            )
        )
    return found


def artifact_plan(shape: Shape, recipe: Recipe, target: Target, format_: str, quantization: str) -> ArtifactPlan:
    context = context_of(recipe, target, shape)
    importance = uses_importance(quantization, recipe.export.importance_matrix) if format_ == "gguf" else None
    types = tuple(recipe.export.tensor_types.items())
    size = sizes.artifact_bytes(shape, format_, quantization, importance=importance, tensor_types=types)
    cache = sizes.kv_cache_bytes(shape, context, format_, quantization)
    floats = FLOATS[format_]
    scratch = sizes.compute_buffer_bytes(shape, context)
    runtime = int(target.runtime_bytes.value) + scratch
    # The ceiling is at the least that decoding reads: the cache as the bench's prompt leaves it.
    prompt = min(recipe.bench.prompt_tokens or target.bench.prompt_tokens, context)
    read = sizes.read_bytes_a_token(shape, format_, quantization, importance=importance, tensor_types=types)
    read += sizes.kv_cache_bytes(shape, prompt, format_, quantization)

    raised = "" if recipe.export.mixed_retention is None else ", at least: export.mixed_retention may raise layers"

    def derived(value: float, source: str) -> Figure:
        return Figure(value=value, unit="B", basis="derived", source=source)

    return ArtifactPlan(
        target=target.name,
        artifact=f"{format_}:{quantization}",
        format=format_,
        quantization=quantization,
        context_tokens=context,
        artifact_bytes=derived(size, f"{quantization} {BLOCKS.get(format_, 'by tensor')}" + raised),
        memory_bytes=derived(
            size + cache + runtime, f"weights + KV cache of {context:,} tokens in {floats} + runtime of {target.name}"
        ),
        kv_cache_bytes=derived(cache, f"{context:,} tokens in {floats}"),
        runtime_bytes=derived(runtime, f"{target.runtime_bytes.source}; scratch of {human_bytes(scratch)}"),
        decode_ceiling_tokens_per_s=decode_ceiling(target, read_bytes=read),
        k_quant_fallbacks=sizes.k_quant_fallbacks(shape, quantization) if format_ == "gguf" else 0,
    )
