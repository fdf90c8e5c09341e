"""What a retention.json is held to beside its own sums: intervals hold their values, counts fit, no rung is missing.

A record whose figures agree with each other can still say what no measurement gives: an interval that lies elsewhere,
one over a single document, a ladder without its rungs, a teacher that disagrees with itself.
"""

from __future__ import annotations

import re

from edgedistill import __version__, statistics
from edgedistill.bundle.claims import recipe_part, refuse
from edgedistill.records.base import Interval
from edgedistill.records.manifest import BundleArtifact, Manifest
from edgedistill.records.retention import Retention, Rung, RungName
from edgedistill.strict import shown
from edgedistill.verify.tokenizer_check import VARIED_TEXTS

RUNGS: tuple[RungName, ...] = ("teacher", "student", "quantized", "shipped")
NEIGHBOURS: tuple[tuple[RungName, RungName], ...] = (("student", "quantized"), ("quantized", "shipped"))
ROUNDING = 1e-9
SAME = 1e-6  # nats: a model against itself, whose KL is summed in float32
SHARES = ("next_token_accuracy", "top1_agreement")
DIVERGENCES = ("kl_mean_nats", "kl_p99_nats")
# The strongest pseudo-count of the words' counts is a uniform guess, up to what the text's own counts add to it.
UNIFORM = 1e-3
Stated = tuple[str, str, float | None, Interval | None]  # rung or pair, field, value, interval


def check_ladder(manifest: Manifest, artifact: BundleArtifact, found: Retention) -> None:
    """Raises UserError where a decoder's ladder is not whole, or was not measured as the recipe says."""
    path = artifact.retention
    if artifact.task != "causal-lm" or manifest.recipe.get("task") != artifact.task:
        refuse(f"{path}: the task is {shown(artifact.task)}, and a bundle's is causal-lm")
    if tuple(rung.rung for rung in found.rungs) != RUNGS:
        refuse(f"{path}: the rungs are {', '.join(rung.rung for rung in found.rungs)}")
    if tuple((pair.above, pair.below) for pair in found.neighbours) != NEIGHBOURS:
        refuse(f"{path}: the neighbours are {shown([f'{pair.below} by {pair.above}' for pair in found.neighbours])}")
    if (found.metric, found.higher_is_better) != ("perplexity", False):
        refuse(
            f"{path}: the metric is {shown(found.metric)}, and that of causal-lm is perplexity, the lower the better"
        )
    for departure in found.departures:
        refuse(f"{path}: {shown(departure.tensor)} departs in the {departure.found}: no such artifact passes its gate")
    _check_made_of(manifest, path, found)
    _check_text(manifest, path, found)
    _check_runtime(artifact, found.rungs[-1])
    _check_teacher(manifest, path, found)


def _check_made_of(manifest: Manifest, path: str, found: Retention) -> None:
    qad = recipe_part(manifest, "distill", "qad").get("tokens_share", 0)
    if found.made_of == "masters" and not (isinstance(qad, int | float) and qad > 0):
        refuse(f"{path}: made_of is 'masters', and the recipe has no quantization-aware distillation")
    student = recipe_part(manifest, "student")
    # a student that was given may have been trimmed before
    trimmed = student.get("trim_vocabulary") or student.get("model")
    rows = manifest.student.shape.vocab_size
    if found.kept_tokens is not None and not (trimmed and 0 < found.kept_tokens <= rows):
        refuse(f"{path}: kept_tokens is {found.kept_tokens:,}, and the student's {rows:,} are not so trimmed")


def _check_text(manifest: Manifest, path: str, found: Retention) -> None:
    from edgedistill.tasks.causal_lm import stride_of

    asked = recipe_part(manifest, "verify")
    context, stride = asked.get("context_tokens"), asked.get("stride_tokens")
    if found.context_tokens != context:
        refuse(f"{path}: context_tokens is {found.context_tokens}, and the recipe's verify.context_tokens {context}")
    if found.stride_tokens != stride_of(context, stride if isinstance(stride, int) else None):
        refuse(f"{path}: stride_tokens is {found.stride_tokens}, not what the recipe's windows of {context} give")
    if not re.fullmatch("[0-9a-f]{64}", found.eval_sha256):
        refuse(f"{path}: eval_sha256 is {shown(found.eval_sha256)}")
    if found.intervals != statistics.METHOD if _ours(manifest) else not re.fullmatch(r"t-\d{1,4}", found.intervals):
        refuse(f"{path}: intervals are {shown(found.intervals)}, and this version's {statistics.METHOD}")
    if found.tokenizer.texts < len(VARIED_TEXTS):
        refuse(f"{path}: the tokenizer was held to {found.tokenizer.texts} texts, not to {len(VARIED_TEXTS)} and more")


def _ours(manifest: Manifest) -> bool:
    return manifest.edgedistill == __version__


def _check_runtime(artifact: BundleArtifact, shipped: Rung) -> None:
    # onnxruntime runs the same graph, and gives every row of logits.
    runtime = "onnxruntime" if artifact.runtime == "onnxruntime-genai" else artifact.runtime
    if shipped.runtime.split(" ")[0] != runtime:
        refuse(f"{artifact.retention}: the shipped rung ran in {shown(shipped.runtime)}, not in {runtime}")


def _check_teacher(manifest: Manifest, path: str, found: Retention) -> None:
    """Against itself it is itself, where it has no row beside the tokens that are compared."""
    teacher, guess = found.rungs[0], found.baselines
    if guess.unigram_perplexity > guess.tokens * (1 + UNIFORM):
        refuse(
            f"{path}: counts of words have a perplexity of {guess.unigram_perplexity:g}, more than a uniform guess over"
            f" {guess.tokens:,} tokens"
        )
    if manifest.teacher is None:
        return
    rows = manifest.teacher.shape.vocab_size
    if not 1 <= guess.tokens <= rows:
        refuse(f"{path}: a uniform guess over {guess.tokens:,} tokens, and the teacher has {rows:,}")
    whole = found.kept_tokens is None and guess.tokens == rows <= manifest.student.shape.vocab_size
    if whole and (teacher.kl_mean_nats > SAME or (teacher.kl_p99_nats or 0) > SAME or teacher.top1_agreement < 1):
        refuse(
            f"{path}: the teacher's rung is {teacher.kl_mean_nats:g} nats from itself, and agrees for "
            f"{teacher.top1_agreement:g}"
        )


def check_intervals(path: str, found: Retention) -> None:
    """Raises UserError where an interval does not hold its value, lies where no value can, or has too few documents."""
    if not 1 - ROUNDING <= found.effective_documents <= found.documents * (1 + ROUNDING):
        refuse(f"{path}: effective_documents is {found.effective_documents:g}, of {found.documents} documents")
    for where, field, value, ci95 in _stated(found):
        _check_interval(f"{path}: {where} {field}", field, value, ci95, found.effective_documents)


def _stated(found: Retention) -> list[Stated]:
    """Every value that has an interval."""
    stated: list[Stated] = []
    fields = ("value", "perplexity", "retention", *SHARES, *DIVERGENCES)
    for rung in found.rungs:
        for field in fields:
            ci95 = rung.ci95 if field == "value" else getattr(rung, f"{field}_ci95")
            stated.append((f"the {rung.rung} rung's", field, getattr(rung, field), ci95))
    for pair in found.neighbours:
        where, kl, ratio = f"{pair.below} by {pair.above}:", pair.kl_mean_nats, pair.perplexity_ratio
        stated += [(where, "kl_mean_nats", kl.value, kl.ci95), (where, "perplexity_ratio", ratio.value, ratio.ci95)]
    guess = found.baselines
    for name in ("uniform_over_teacher", "unigram_over_teacher"):
        scored = getattr(guess, name)
        stated.append(("baselines'", name, scored.value, scored.ci95))
    return stated


def _check_interval(where: str, field: str, value: float | None, ci95: Interval | None, documents: float) -> None:
    if ci95 is None:
        return
    low, high = ci95
    if value is None or not low - ROUNDING * abs(low) - ROUNDING <= value <= high + ROUNDING * abs(high) + ROUNDING:
        refuse(f"{where} is {shown(value)}, and its interval {low:g} to {high:g}")
    if low < -ROUNDING or (field in SHARES and high > 1 + ROUNDING):
        refuse(f"{where} interval is {low:g} to {high:g}, beyond what it can be")
    least = statistics.MIN_UNITS_FOR_P99 if field == "kl_p99_nats" else statistics.MIN_UNITS
    if documents < least - ROUNDING:
        refuse(f"{where} has an interval over {documents:g} documents, and one takes {least:g}")
