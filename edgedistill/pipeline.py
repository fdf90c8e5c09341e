"""START HERE: the whole flow, a step a call.

    recipe + target ─ plan ─ teacher ─ student ─ distill ─ quantize/export ─ verify ─ bench ─ bundle

`build` is the table of contents. Every step is a plain function that the command line, Python users and
the tests call alike; each finds its record in the store, or makes it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill.config.recipe import Recipe
from edgedistill.config.refusals import refuse_mixture, refuse_no_text, refuse_trimming
from edgedistill.config.targets import Target
from edgedistill.data.prepare import find_data, prepare_data
from edgedistill.errors import EdgedistillError, LimitBroken, RuntimeCrashed, UserError
from edgedistill.fit.artifact import artifacts_of
from edgedistill.launch import is_follower
from edgedistill.machine import facts, waiting
from edgedistill.plan.plan import Plan, refuse_signals
from edgedistill.plan.preflight import (
    model_notes,
    require_loadable_models,
    require_sound_models,
    require_usable_cache,
    with_start,
)
from edgedistill.plan.preflight import preflight as preflight
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.records.data import DataResult
from edgedistill.records.latency import Latency
from edgedistill.records.retention import Retention
from edgedistill.records.training import QadResult, SignalsResult, StudentResult, TeacherResult
from edgedistill.store import Store, Stored
from edgedistill.strict import local_path, require_writable


@dataclass(frozen=True)
class Trained:
    """What stands before any target: plan, data, teacher and the student in its record's folder."""

    plan: Plan
    data: Stored[DataResult]
    teacher: TeacherResult
    student: Stored[StudentResult]


@dataclass(frozen=True)
class Finished:
    """One artifact of one target, with its proof and its speed."""

    target: Target
    exported: Stored[Artifact]
    retention: Retention
    retention_folder: Path
    latency: Latency | None


@dataclass(frozen=True)
class Built:
    """One target's bundle folder and what went into it (None: the gate failed, there is no bundle)."""

    target: Target
    bundle: Path | None
    artifacts: list[Finished]


def build(
    recipe: Recipe, targets: Sequence[Target], *, store: Store, out: Path, progress: Progress = QUIET
) -> tuple[Trained, list[Built]]:
    """The whole job: one distilled student, one bundle in `out` per target.

    Raises UserError before any work where the plan refuses. What goes wrong with one target stops no other: after all
    are done it is raised, GateFailed where an artifact kept too little (its reports stay in the store, named in the
    error), LimitBroken where a finished artifact breaks a limit of its target; the error's `results` hold what was
    built. Of several processes (torchrun, `accelerate launch`) all train; what follows is the first one's work, the
    others return with nothing built.
    """
    require_writable(local_path(out, what="--out").absolute(), what="--out")
    _require_places([out / f"{recipe.name}-{target.name}" for target in targets])
    trained = distill(recipe, targets, store=store, progress=progress)
    built: list[Built] = []
    if is_follower():
        return trained, built
    unfinished: list[tuple[Target, EdgedistillError]] = []
    for target in targets:
        try:
            built.append(_build_for(recipe, target, trained, store=store, out=out, progress=progress))
        except (UserError, RuntimeCrashed) as error:
            unfinished.append((target, error))
            if target is not targets[-1]:
                progress.warn(f"{target.name}: {error.cause}; the other targets go on")
    try:
        _raise_unfinished(unfinished)
        _raise_failed_gates(built, recipe)
        _raise_broken_limits(built)
    except EdgedistillError as error:
        error.results = (trained, built)
        raise
    return trained, built


def _require_places(folders: Sequence[Path]) -> None:
    """UserError where no bundle at all could be put; one place that is taken stops no other target."""
    from edgedistill.bundle.build import require_place

    refused = []
    for folder in folders:
        try:
            require_place(folder)
        except UserError as error:
            refused.append(error)
    if refused and len(refused) == len(folders):
        raise refused[0]


def _build_for(
    recipe: Recipe, target: Target, trained: Trained, *, store: Store, out: Path, progress: Progress
) -> Built:
    """Export, verification, benchmark and bundle of one target."""
    finished = []
    for artifact in artifacts_of(recipe, target):
        masters = learn_rounding(recipe, target, artifact, trained, store=store, progress=progress)
        exported = export(recipe, target, artifact, trained, masters=masters, store=store, progress=progress)
        retention, folder = verify(recipe, exported, trained, masters=masters, store=store, progress=progress)
        latency = None
        if retention.gate.passed:
            latency = bench(recipe, target, exported, store=store, progress=progress)
        finished.append(Finished(target, exported, retention, folder, latency))
    passed = all(item.retention.gate.passed for item in finished)
    path = bundle(recipe, target, trained, finished, store=store, out=out, progress=progress) if passed else None
    return Built(target, path, finished)


def distill(recipe: Recipe, targets: Sequence[Target], *, store: Store, progress: Progress = QUIET) -> Trained:
    """Plan, data, teacher and a student that fits all targets; whatever the store has is reused."""
    waiting.let_threads_sleep(look=True)
    from edgedistill.strategies.distill import distill as train_student
    from edgedistill.teacher.stage import obtain_teacher
    from edgedistill.training.ranks import leave

    planned = preflight(recipe, targets, store=store, progress=progress)
    require_loadable_models(recipe)
    progress.say(f"plan: the student's start is {planned.start} ({planned.start_because})")
    progress.say(
        f"plan: student of {planned.student_parameters:,} parameters for {', '.join(planned.targets)}"
        f" ({planned.compression:.1f}x smaller than the teacher's {planned.teacher_parameters:,})"
    )
    for warning in planned.warnings:
        progress.warn(warning)
    data = prepare_data(recipe.data, store=store, progress=progress)
    _say(progress, data, f"{data.result.parts['train'].documents:,} documents to train on")
    if data.result.overlap["documents_sharing_13_words"]:
        progress.say(
            f"data: {data.result.overlap['documents_sharing_13_words']:.0f} of"
            f" {data.result.parts['held_out'].documents} held-out documents share a run of 13 words with the training"
            f" part ({data.result.overlap['share_of_13_word_runs']:.2%} of such runs)"
        )
    if left_out := data.result.overlap.get("left_out_of_training"):
        progress.say(f"data: {left_out:.0f} documents are held out in --eval-data, and left out of the training")
    teacher = obtain_teacher(recipe, data=data, store=store, progress=progress)
    progress.say(f"teacher: {teacher.name}, {teacher.parameters:,} parameters")
    recipe = with_start(recipe, planned)
    student = train_student(recipe, shape=planned.student, teacher=teacher, data=data, store=store, progress=progress)
    _say(progress, student, f"{student.result.parameters:,} parameters")
    leave()
    return Trained(planned, data, teacher, student)


def cache_teacher(recipe: Recipe, *, store: Store, progress: Progress = QUIET) -> tuple[str, SignalsResult]:
    """The teacher's signals on disk, as the recipe's `distill.cache` asks: where they lie, and how large they are."""
    waiting.let_threads_sleep(look=True)
    from edgedistill.strategies.distill import cache_signals
    from edgedistill.teacher.stage import obtain_teacher
    from edgedistill.training.ranks import leave

    used = recipe.distill.model_copy(update={"teacher_signals": "cached"})  # as `distill` will, whatever it says here
    recipe = recipe.model_copy(update={"distill": used})
    refuse_signals(recipe)
    require_loadable_models(recipe)
    require_sound_models(recipe, store)
    refuse_no_text(recipe)
    for note in model_notes(recipe):
        progress.warn(note)
    require_usable_cache(recipe, store, find_data(recipe.data, store=store))
    refuse_mixture(recipe, caching=True)
    refuse_trimming(recipe)
    data = prepare_data(recipe.data, store=store, progress=progress)
    _say(progress, data, f"{data.result.parts['train'].documents:,} documents")
    teacher = obtain_teacher(recipe, data=data, store=store, progress=progress)
    progress.say(f"teacher: {teacher.name}, {teacher.parameters:,} parameters")
    made = cache_signals(recipe, teacher=teacher, data=data, store=store, progress=progress)
    leave()
    return made


def learn_rounding(
    recipe: Recipe, target: Target, artifact: str, trained: Trained, *, store: Store, progress: Progress = QUIET
) -> Stored[QadResult] | None:
    """Quantization-aware distillation: the masters to export; None where the recipe asks for none.

    An artifact in floating point has no rounding to learn: the student is exported as it is.
    """
    from edgedistill.fit.artifact import context_of
    from edgedistill.strategies.qad import quantization_aware, wanted

    if not wanted(recipe, artifact):
        return None
    made = quantization_aware(
        recipe,
        artifact,
        student=trained.student,
        teacher=trained.teacher,
        data=trained.data,
        options=_export_options(recipe, trained),
        context_tokens=context_of(recipe, target, trained.student.result.shape),
        store=store,
        progress=progress,
    )
    tokens = made.result.training.tokens
    progress.say(f"qad: {artifact}, {tokens:,} tokens under its rounding{' (from the store)' if made.reused else ''}")
    return made


def export(
    recipe: Recipe,
    target: Target,
    artifact: str,
    trained: Trained,
    *,
    masters: Stored[QadResult] | None = None,
    store: Store,
    progress: Progress = QUIET,
) -> Stored[Artifact]:
    """The student, or the masters that went on from it, as `artifact` ("gguf:Q4_K_M"); context as the target has it."""
    from edgedistill.export.stage import export_model
    from edgedistill.fit.artifact import context_of

    student = trained.student
    folder, weights = student.directory / student.result.path, student.result.weights_sha256
    options = _export_options(recipe, trained)
    if masters is not None:
        folder, weights = masters.directory / masters.result.path, masters.result.weights_sha256
        options = _with_its_rounding(options, masters)
    return export_model(
        folder,
        artifact,
        context_tokens=context_of(recipe, target, student.result.shape),
        name=recipe.name,
        weights_sha256=weights,
        tokenizer_sha256=student.result.tokenizer_sha256,
        store=store,
        options=options,
        progress=progress,
    )


def _export_options(recipe: Recipe, trained: Trained) -> ExportOptions:
    from edgedistill.data.prepare import read_part
    from edgedistill.export.stage import options_of

    calibration = read_part(trained.data.directory, "calibration")
    return options_of(recipe.export, calibration, "calibration part", recipe.seed)


def _with_its_rounding(options: ExportOptions, masters: Stored[QadResult]) -> ExportOptions:
    """The options that keep the rounding which training saw, and a note that says where the weights come from."""
    from edgedistill.strategies.qad import pinned

    made = masters.result
    note = (
        f"trained for {made.training.tokens:,} tokens under this rounding (quantization-aware distillation), from the"
        f" float student {made.student_weights_sha256[:16]}; exported from its masters {made.weights_sha256[:16]}"
    )
    kept = pinned(options, None if made.importance_file is None else masters.directory / made.importance_file)
    return dataclasses.replace(kept, notes=(*options.notes, note))


def verify(
    recipe: Recipe,
    exported: Stored[Artifact],
    trained: Trained,
    *,
    masters: Stored[QadResult] | None = None,
    store: Store,
    progress: Progress = QUIET,
) -> tuple[Retention, Path]:
    """The retention ladder of an exported artifact on the held-out part, its gate, and the record's folder."""
    from edgedistill.data.prepare import read_part
    from edgedistill.verify.stage import verify_artifact

    student = trained.student.result.model_copy(
        update={"path": str(trained.student.directory / trained.student.result.path)}
    )
    made_of = None
    if masters is not None:
        made_of = masters.result.model_copy(update={"path": str(masters.directory / masters.result.path)})
    return verify_artifact(
        exported,
        student=student,
        teacher=trained.teacher,
        held_out=read_part(trained.data.directory, "held_out"),
        settings=recipe.verify,
        store=store,
        masters=made_of,
        progress=progress,
    )


def bench(
    recipe: Recipe, target: Target, exported: Stored[Artifact], *, store: Store, progress: Progress = QUIET
) -> Latency:
    """The artifact's speed and memory on this machine, with the target's settings."""
    from edgedistill.bench.stage import bench_artifact

    return bench_artifact(exported, target, settings=recipe.bench, seed=recipe.seed, store=store, progress=progress)


def bundle(
    recipe: Recipe,
    target: Target,
    trained: Trained,
    finished: Sequence[Finished],
    *,
    store: Store,
    out: Path,
    progress: Progress = QUIET,
) -> Path:
    """`out`/<recipe>-<target>: the folder that ships, put in place whole."""
    from edgedistill.bundle.build import BundledArtifact
    from edgedistill.bundle.build import bundle as write_bundle
    from edgedistill.data.prepare import read_part

    folder = out / f"{recipe.name}-{target.name}"
    path = write_bundle(
        folder,
        recipe=recipe,
        target=target,
        artifacts=[
            BundledArtifact(
                artifact=item.exported.result,
                folder=item.exported.directory,
                retention=item.retention,
                latency=item.latency,
            )
            for item in finished
        ],
        student=trained.student.result,
        teacher=trained.teacher,
        data=trained.data.result,
        student_dir=trained.student.directory / trained.student.result.path,
        held_out_texts=["\n".join(block) for block in read_part(trained.data.directory, "held_out")],
        store=store,
    )
    progress.say(f"bundle: {path}")
    return path


def threads_here() -> int:
    """Threads for work that is not being timed: the CPUs that this process may use."""
    return max(1, len(facts.usable_cpus()) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _say(progress: Progress, stored: Stored[DataResult] | Stored[StudentResult], what: str) -> None:
    progress.say(f"{stored.stage}: {what}{' (from the store)' if stored.reused else ''}")


def _raise_unfinished(unfinished: Sequence[tuple[Target, EdgedistillError]]) -> None:
    if not unfinished:
        return
    first = unfinished[0][1]
    if len(unfinished) == 1:
        raise first
    raise type(first)(
        "; ".join(f"{target.name}: {error.cause}" for target, error in unfinished),
        "; ".join(dict.fromkeys(error.remedy for _, error in unfinished)),
    )


def _raise_failed_gates(built: Sequence[Built], recipe: Recipe) -> None:
    from edgedistill.verify.stage import require_gate

    require_gate(
        [
            (
                f"{item.target.name} {done.exported.result.format}:{done.exported.result.quantization}",
                done.retention,
                done.retention_folder,
            )
            for item in built
            for done in item.artifacts
        ],
        length=recipe.distill.length,
    )


def _raise_broken_limits(built: Sequence[Built]) -> None:
    broken = []
    for item in built:
        limits = item.target.limits
        for done in item.artifacts:
            size = done.exported.result.bytes
            if size > limits.max_artifact_bytes:
                broken.append(
                    f"{item.target.name}: the artifact has {size:,} bytes, limit {limits.max_artifact_bytes:,}"
                )
            latency = done.latency
            if latency is None:
                continue
            if latency.peak_rss_bytes > limits.max_memory_bytes:
                broken.append(
                    f"{item.target.name}: {latency.peak_rss_bytes:,} bytes of memory, limit {limits.max_memory_bytes:,}"
                )
            if latency.basis != "measured":
                continue
            floor, slowest = limits.min_decode_tokens_per_s, limits.max_ttft_ms
            if floor is not None and latency.decode_tokens_per_s < floor:
                broken.append(f"{item.target.name}: {latency.decode_tokens_per_s:.1f} tokens/s, limit {floor:g}")
            if slowest is not None and latency.ttft_ms.p50 > slowest:
                broken.append(f"{item.target.name}: first token after {latency.ttft_ms.p50:.0f} ms, limit {slowest:g}")
    if broken:
        raise LimitBroken(
            "a finished artifact breaks a limit of its target: " + "; ".join(broken), "the bundle was kept"
        )
