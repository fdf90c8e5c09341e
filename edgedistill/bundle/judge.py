"""retention.json and latency.json of a bundle: of this artifact, for this target, passed, and true to themselves.

A record is believed for what was measured, and for nothing that follows from it: ratios, percentiles, rates, the
gate's verdict and `measured` are computed again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgedistill.bundle.claims import MAX_RECORD_BYTES, recipe_part, refuse, target_of
from edgedistill.bundle.plausible import check_intervals, check_ladder
from edgedistill.records.base import Record
from edgedistill.records.latency import Latency, Percentiles
from edgedistill.records.manifest import REMEDY, BundleArtifact, Manifest
from edgedistill.records.reading import json_record
from edgedistill.records.retention import Retention, Rung, RungName
from edgedistill.strict import shown

Read = Callable[[str], bytes]
Figures = list[tuple[Retention, Latency | None]]
RELATIVE = 1e-9
LARGEST = 1e15  # of anything that is measured: what follows from it stays finite, and can be drawn
MAX_RECORD_VALUES = 600_000
MAX_PRINTED_CHARS = 10_000
MAX_NAME_CHARS = 300
LEAST_RSS_BYTES = 1 << 20  # no process of a runtime is smaller
# What a token reads of an ONNX graph's files: all but tables of which a row is looked up.
LEAST_SHARE, MOST_SHARE = 0.1, 2.0
ONNX_CACHE_BYTES = 4  # float32 at most


def check_records(manifest: Manifest, read: Read) -> Figures:
    """The records of each artifact, in order. `read` gives the bytes of a path. Raises UserError naming the file."""
    found: Figures = []
    for artifact in manifest.artifacts:
        retention = _record(Retention, artifact.retention, read)
        check_retention(manifest, artifact, retention)
        latency = None
        if artifact.latency is not None:
            latency = _record(Latency, artifact.latency, read)
            check_latency(manifest, artifact, latency)
        found.append((retention, latency))
    notes = [
        note for one, figures in zip(manifest.artifacts, found, strict=True) for note in basis_notes(one, *figures)
    ]
    if manifest.basis_notes != notes:
        refuse("manifest.json: basis_notes are not what the records say")
    return found


def _record(kind: Any, path: str, read: Read) -> Any:
    record = json_record(
        kind, read(path), what=path, remedy=REMEDY, max_bytes=MAX_RECORD_BYTES, max_values=MAX_RECORD_VALUES
    )
    for where, value in _leaves(record):
        if isinstance(value, str):
            if len(value) > MAX_PRINTED_CHARS:
                refuse(f"{path}: {shown(where)} has {len(value):,} characters")
        elif not abs(value) <= LARGEST:
            refuse(f"{path}: {shown(where)} is {value:g}, which nobody measures")
    return record


def check_retention(manifest: Manifest, artifact: BundleArtifact, found: Retention) -> None:
    """Raises UserError where the record is not this artifact's, did not pass, or disagrees with itself."""
    path = artifact.retention
    rungs = {rung.rung: rung for rung in found.rungs}
    check_ladder(manifest, artifact, found)
    of = {"shipped": artifact.sha256, "quantized": artifact.sha256, "student": manifest.student.weights_sha256}
    if manifest.teacher is not None:
        of["teacher"] = manifest.teacher.weights_sha256
    for name, rung in rungs.items():
        if rung.artifact_sha256 != of.get(name, rung.artifact_sha256):
            refuse(f"{path} is of another {name} ({shown(rung.artifact_sha256)}, not {of[name]})")
        _check_rung(path, rung, rungs["teacher"])
    shipped = rungs["shipped"]
    if (found.retention.value, found.retention.ci95) != (shipped.retention, shipped.retention_ci95):
        refuse(f"{path}: its retention is not that of the shipped rung")
    for field in ("kl_mean_nats", "kl_mean_nats_ci95", "kl_p99_nats", "kl_p99_nats_ci95"):
        if getattr(found.agreement, field) != getattr(shipped, field):
            refuse(f"{path}: agreement.{field} is not that of the shipped rung")
    if (found.agreement.top1, found.agreement.top1_ci95) != (shipped.top1_agreement, shipped.top1_agreement_ci95):
        refuse(f"{path}: agreement.top1 is not that of the shipped rung")
    if (found.artifact, found.task) != (artifact.name, artifact.task):
        refuse(f"{path} is of {shown(found.artifact)} ({shown(found.task)}), not of {artifact.name} ({artifact.task})")
    _check_neighbours(path, found, rungs)
    if not 1 <= found.documents <= found.examples:
        refuse(f"{path}: {found.examples} tokens of {found.documents} documents")
    if found.tokenizer.mismatches > found.tokenizer.texts:
        refuse(f"{path}: {found.tokenizer.mismatches} mismatches of {found.tokenizer.texts} texts")
    check_intervals(path, found)
    _check_gate(manifest, path, found)


def _check_neighbours(path: str, found: Retention, rungs: dict[RungName, Rung]) -> None:
    """Ratios of perplexities are those of the rungs; a guess over the teacher's is by the teacher's."""
    teacher = rungs["teacher"].perplexity
    for pair in found.neighbours:
        if {pair.above, pair.below} <= set(rungs):
            ratio = rungs[pair.below].perplexity / rungs[pair.above].perplexity
            if not _near(pair.perplexity_ratio.value, ratio):
                refuse(
                    f"{path}: {pair.below} by {pair.above} is {pair.perplexity_ratio.value:g}, the rungs give {ratio:g}"
                )
        if not 0 <= pair.top1_agreement <= 1 or pair.kl_mean_nats.value < -RELATIVE:
            refuse(f"{path}: {pair.below} against {pair.above}: agreement or KL is out of range")
    guess = found.baselines
    if not _near(guess.unigram_over_teacher.value, guess.unigram_perplexity / teacher):
        refuse(
            f"{path}: word counts by the teacher are {guess.unigram_over_teacher.value:g}, their perplexities say other"
        )
    if not _near(guess.uniform_over_teacher.value, guess.tokens / teacher):
        refuse(
            f"{path}: a uniform guess by the teacher is {guess.uniform_over_teacher.value:g}, its tokens say otherwise"
        )


def _check_gate(manifest: Manifest, path: str, found: Retention) -> None:
    """The checks, judged again from what was measured, say what the record says: that all of them passed."""
    from edgedistill.verify.gate import judge

    gate = found.gate
    asked = recipe_part(manifest, "verify").get("min_retention")
    if gate.min_retention != asked:
        refuse(f"{path}: the gate is at {gate.min_retention:g}, and the recipe asks for {shown(asked)}")
    again = judge(found, gate.min_retention)
    if (gate.verdict, gate.passed) != (again.verdict, again.passed):
        refuse(f"{path}: the gate says {gate.verdict!r}, and what was measured {again.verdict!r}")
    if len(gate.checks) != len(again.checks):
        refuse(f"{path}: the gate has {len(gate.checks)} checks, and what was measured has {len(again.checks)}")
    for said, made in zip(gate.checks, again.checks, strict=True):
        for field in type(made).model_fields:
            one, other = getattr(said, field), getattr(made, field)
            same = _near(one, other) if isinstance(one, float) and isinstance(other, float) else one == other
            if not same:
                refuse(
                    f"{path}: gate: {made.name}: {field} is {shown(one)}, and what was measured gives {shown(other)}"
                )
    if not gate.passed:
        refuse(f"{path}: its gate did not pass ({gate.verdict}): no such bundle is written")


def _check_rung(path: str, rung: Rung, teacher: Rung) -> None:
    where = f"{path}: the {rung.rung} rung's"
    if not rung.perplexity >= 1 - RELATIVE or rung.value != rung.perplexity or rung.ci95 != rung.perplexity_ci95:
        refuse(f"{where} perplexity is {rung.perplexity:g} (value {rung.value:g})")
    if not _near(rung.retention, teacher.perplexity / rung.perplexity):
        refuse(
            f"{where} retention is {rung.retention:g}, and the teacher's perplexity by its own is "
            f"{teacher.perplexity / rung.perplexity:g}"
        )
    for field in ("next_token_accuracy", "top1_agreement"):
        if not 0 <= getattr(rung, field) <= 1:
            refuse(f"{where} {field} is {getattr(rung, field):g}")
    if rung.kl_mean_nats < -RELATIVE or (rung.kl_p99_nats or 0) < -RELATIVE:
        refuse(f"{where} KL is negative")


def check_latency(manifest: Manifest, artifact: BundleArtifact, found: Latency) -> None:
    """Raises UserError where the record is not this artifact's and target's, or disagrees with its samples."""
    path = artifact.latency or ""
    if found.artifact_sha256 != artifact.sha256:
        refuse(f"{path} is of another artifact ({shown(found.artifact_sha256)}, not {artifact.sha256})")
    if found.target != manifest.target.get("name"):
        refuse(f"{path} is for {shown(found.target)}, not for {shown(manifest.target.get('name'))}")
    load = found.workload
    if load.prompt_tokens + load.new_tokens > artifact.context_tokens:
        refuse(f"{path}: {load.prompt_tokens} + {load.new_tokens} tokens do not fit {artifact.name}'s context")
    ttft_ms, token_ms = found.samples.get("ttft_ms", []), found.samples.get("token_ms", [])
    if len(ttft_ms) != load.repeats or len(token_ms) != load.repeats * (load.new_tokens - 1) or not token_ms:
        refuse(
            f"{path}: {len(ttft_ms)} and {len(token_ms)} samples are not those of {load.repeats} repeats of "
            f"{load.new_tokens} tokens"
        )
    if not min(min(samples, default=1.0) for samples in found.samples.values()) > 0:
        refuse(f"{path}: a sample took no time")
    from edgedistill.bench.measure import drift, percentiles

    _check_percentiles(path, "ttft_ms", found.ttft_ms, percentiles(ttft_ms))
    _check_percentiles(path, "token_ms", found.token_ms, percentiles(token_ms))
    computed = {
        "prefill_tokens_per_s": 1e3 * load.prompt_tokens * load.repeats / math.fsum(ttft_ms),
        "decode_tokens_per_s": 1e3 * len(token_ms) / math.fsum(token_ms),
        "drift": drift(token_ms),
        "load_ms": next(iter(found.samples.get("load_ms", [])), found.load_ms),
    }
    for field, value in computed.items():
        if not _near(getattr(found, field), value):
            refuse(f"{path}: {field} is {getattr(found, field):g}, and its samples give {value:g}")
    _check_rates(path, found, ttft_ms, token_ms)
    if found.peak_rss_bytes < LEAST_RSS_BYTES or (found.energy_j or 0) < 0 or not found.load_ms > 0:
        refuse(f"{path}: memory, energy or load time is negative or nothing (peak_rss_bytes {found.peak_rss_bytes:,})")
    _check_ceiling(manifest, path, found)
    _check_basis(manifest, path, found)


def _check_rates(path: str, found: Latency, ttft_ms: list[float], token_ms: list[float]) -> None:
    """The rates' intervals and how many repeats they are over are those of the samples."""
    from edgedistill.statistics import rate

    load = found.workload
    per_repeat = load.new_tokens - 1
    decode_ms = [math.fsum(token_ms[start : start + per_repeat]) for start in range(0, len(token_ms), per_repeat)]
    prefill, decode = rate(ttft_ms, [load.prompt_tokens] * load.repeats), rate(decode_ms, [per_repeat] * load.repeats)
    if found.rate_units != load.repeats:
        refuse(f"{path}: rates are over {found.rate_units} repeats, not over {load.repeats}")
    for name, computed in (("prefill", prefill), ("decode", decode)):
        said = getattr(found, f"{name}_tokens_per_s_ci95")
        same = said is computed.ci95 is None or (
            said is not None and computed.ci95 is not None and all(map(_near, said, computed.ci95))
        )
        if not same:
            refuse(f"{path}: {name}_tokens_per_s_ci95 is {said}, and its samples give {computed.ci95}")


def _check_percentiles(path: str, name: str, said: Percentiles, computed: Percentiles) -> None:
    for field in ("p50", "p90", "p99"):
        one, other = getattr(said, field), getattr(computed, field)
        if (one is None) != (other is None) or (one is not None and not _near(one, other)):
            refuse(f"{path}: {name}.{field} is {one}, and its samples give {other}")


def _check_ceiling(manifest: Manifest, path: str, found: Latency) -> None:
    """The ceiling is the target's bandwidth by the bytes that its source names."""
    bandwidth = target_of(manifest).bandwidth_bytes_per_s.value
    if (
        found.ceiling.basis != "derived"
        or found.ceiling.unit != "tokens/s"
        or not _near(found.ceiling.value, bandwidth / max(1, _bytes_a_token(found)))
    ):
        refuse(f"{path}: the ceiling of {found.ceiling.value:g} is not the target's bandwidth by the bytes a token")


def _bytes_a_token(found: Latency) -> int:
    """By the ceiling's source; 0 where it names none."""
    read = re.search(r"÷ ([0-9,]{1,30}) bytes a token", found.ceiling.source)
    digits = "" if read is None else read[1].replace(",", "")
    return int(digits) if digits else 0


def check_ceilings(folder: Path, manifest: Manifest, figures: Figures) -> None:
    """The bytes a token are those of the artifact's own files, whose headers were checked before.

    An ONNX graph takes a package to read, which a verifier may lack: there they lie within bounds of its files' sizes.
    """
    from edgedistill.bench.ceiling import bytes_read_a_token

    for artifact, (_, latency) in zip(manifest.artifacts, figures, strict=True):
        if latency is None:
            continue
        said, context = _bytes_a_token(latency), latency.workload.prompt_tokens
        if artifact.format in ("gguf", "bitsandbytes"):
            read = bytes_read_a_token(artifact, folder / artifact.folder, context_tokens=context)
            least = most = float(read.total)
        else:
            shape = manifest.student.shape
            cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * context
            graphs = sum(entry.bytes for entry in artifact.files if not entry.path.endswith(".json"))
            least, most = LEAST_SHARE * graphs, MOST_SHARE * artifact.bytes + ONNX_CACHE_BYTES * cache
        if not least <= said <= most:
            span = f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"
            refuse(f"{artifact.latency}: the ceiling is of {said:,} bytes a token, and {artifact.name} reads {span}")


def _check_basis(manifest: Manifest, path: str, found: Latency) -> None:
    """Only the target itself, with its GPU, under the load of its profile, is `measured`."""
    if found.basis != "measured":
        return
    from edgedistill.bench.measure import basis_of

    where = found.measured_on
    kinds: dict[str, type] = {"options": dict, "threads": int, "cores": int, "memory_bytes": int, "isa": list}
    for key, kind in kinds.items():
        if not isinstance(where.get(key), kind):
            refuse(f"{path} says measured, and measured_on.{key} is {shown(where.get(key))}")
    for key in ("machine", "cpu", "gpu"):
        if len(str(where.get(key))) > MAX_NAME_CHARS:
            refuse(f"{path}: measured_on.{key} has more than {MAX_NAME_CHARS} characters")
    if not all(isinstance(one, str) for one in where["isa"]):
        refuse(f"{path}: measured_on.isa is {shown(where['isa'])}")
    info = {"options": where["options"], "runtime_version": where.get("runtime_version")}
    basis, notes = basis_of(target_of(manifest), where, info, found.workload, where["threads"])
    if basis != "measured":
        refuse(f"{path} says measured, and {shown(notes[0])}")


def basis_notes(artifact: BundleArtifact, retention: Retention, latency: Latency | None) -> list[str]:
    """What the manifest says of how an artifact's figures came about."""
    name = artifact.name
    shipped = [rung.basis for rung in retention.rungs if rung.rung == "shipped"]
    notes = [f"{name}: retention of the shipped bytes is {basis}" for basis in shipped]
    if latency is None:
        return [*notes, f"{name}: speed was not measured"]
    where = latency.measured_on.get("cpu") or "an unnamed CPU"
    return [*notes, f"{name}: speed and memory are {latency.basis}, on {where}; the ceiling is {latency.ceiling.basis}"]


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(place, number or text) of everything in a record."""
    if isinstance(value, Record):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):
        for key, one in value.items():
            yield where, str(key)
            yield from _leaves(one, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one, where)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield where, value
