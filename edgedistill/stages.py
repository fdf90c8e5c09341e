"""One stage by itself, on a model or an artifact that the user names: export, verify, bench."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from edgedistill.config.recipe import Recipe
from edgedistill.config.targets import Target, parse_artifact
from edgedistill.data.documents import read_source
from edgedistill.data.report import tell
from edgedistill.data.split import blocks_of_groups
from edgedistill.errors import UserError
from edgedistill.models.folder import (
    folder_notes,
    kept_tokens,
    locate,
    open_model,
    require_finite_weights,
    require_loadable,
    require_sound_once,
)
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import MANIFEST
from edgedistill.records.reading import first_fault
from edgedistill.records.retention import Retention
from edgedistill.store import Store, Stored, combined_sha256, fsync_folder, fsync_tree, sha256_of
from edgedistill.strict import NotJson, local_path, parse_json, read_bytes, require_writable

RECORD = "artifact.json"
MAX_RECORD_BYTES = 1 << 26
# What stands in a file system that is otherwise empty.
NO_CONTENT = frozenset({"lost+found"})
# What holds inputs of a graph instead of text.
ARRAYS = (".npz", ".npy")


def export(
    student: str,
    *,
    format_: str,
    quantization: str,
    context_tokens: int | None,
    out: Path,
    store: Store,
    recipe: Recipe | None = None,
    calibration: str | None = None,
    converter: Path | None = None,
    task: str | None = None,
    progress: Progress = QUIET,
) -> Artifact:
    """`out` with the artifact and artifact.json, put in place whole after its runtime opened it and ran a token.

    Raises UserError where `out` holds something, or the model cannot be converted; RuntimeCrashed where its
    runtime dies on it.
    """
    from edgedistill.export.stage import is_decoder, tell_notes, write_artifact
    from edgedistill.gguf.convert import gguf_positions

    format_, quantization = parse_artifact(f"{format_}:{quantization}")
    out, beside = _place(out)
    arrays = calibration is not None and Path(calibration).suffix.lower() in ARRAYS
    if arrays and (format_ != "onnx" or is_decoder(locate(student, role="student")[0], task)):
        raise UserError(f"{calibration} holds arrays, but {format_} of a decoder is calibrated on text", "give text")
    if format_ == "gguf":
        # Many more families become GGUFs than this package plans and trains.
        path, _ = locate(student, role="student")
        positions = gguf_positions(path, converter)
    elif format_ == "onnx" and not is_decoder(locate(student, role="student")[0], task):
        # Its own exporter reads and checks it: what it does may need no positions at all.
        path, _ = locate(student, role="student")
        positions = context_tokens or 0
    else:
        folder = open_model(student, role="student")
        path, positions = folder.path, folder.shape.max_position_embeddings
    require_loadable(path, "student")
    context = context_tokens or positions
    if context and not 8 <= context <= positions:
        raise UserError(
            f"context of {context:,} tokens, but the model has {positions:,} positions",
            f"give --context-tokens of 8 to {positions:,}",
        )
    if converter is None and (format_ == "gguf" or is_decoder(path, task)):
        require_finite_weights(path, "student")
    options = _options(recipe or Recipe(), calibration, converter, task, progress)
    beside.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=beside))
    try:
        artifact = write_artifact(
            path, scratch, format_=format_, quantization=quantization, context_tokens=context,
            name=path.name, options=options, store=store, progress=progress,
        )  # fmt: skip
        (scratch / RECORD).write_text(artifact.model_dump_json(indent=2) + "\n", encoding="utf-8")
        fsync_tree(scratch)
        _put_in_place(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    tell_notes(artifact, progress)
    for fallback in artifact.fallbacks:
        progress.say(
            f"export: {fallback.tensor} is {fallback.got} instead of {fallback.wanted}: {fallback.why}", level=2
        )
    return artifact


def _place(asked: Path) -> tuple[Path, Path]:
    """The folder of an export and where it is prepared: beside it, or within it where its name cannot be taken.

    A mount point, and a folder whose parent belongs to somebody else, are filled as they are; a link to a folder
    means that folder. UserError where something is there, or nothing can be written.
    """
    out = local_path(asked, what="--out").absolute()
    if ".." in out.parts:
        out = out.resolve()  # also where a folder on the way is not there yet
    if out.is_symlink() and out.is_dir():
        out = out.resolve()
    if os.path.lexists(out) and (not out.is_dir() or any(p.name not in NO_CONTENT for p in out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder", "name a new folder with --out")
    if out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK)):
        require_writable(out, what="--out")
        return out, out
    require_writable(out.parent, what="--out")
    return out, out.parent


def _put_in_place(scratch: Path, out: Path) -> None:
    """Rename the whole folder, or where `out` has to stay what it is, each file in it, its record last."""
    if scratch.parent != out:
        if out.exists():
            out.rmdir()
        scratch.chmod(0o755)
        scratch.replace(out)
        return
    for path in sorted(scratch.iterdir(), key=lambda path: (path.name == RECORD, path.name)):
        path.replace(out / path.name)
    scratch.rmdir()
    fsync_folder(out)


def _options(
    recipe: Recipe, calibration: str | None, converter: Path | None, task: str | None, progress: Progress
) -> ExportOptions:
    from edgedistill.export.stage import options_of

    blocks = None
    arrays = None
    if calibration is not None and Path(calibration).suffix.lower() in ARRAYS:
        arrays = local_path(calibration, what="calibration")
        if not arrays.is_file():
            raise UserError(f"no calibration file {arrays}", "check the path given with --calibration")
    elif calibration is not None:
        documents = read_source(calibration, recipe.data, option="--calibration")
        if documents.read is not None:
            tell(documents.read, progress)
        blocks = [[text] for text in documents.texts]
    options = options_of(recipe.export, blocks, calibration or "", recipe.seed)
    return replace(options, converter=converter, task=task, calibration_path=arrays)


def open_artifact(folder: Path) -> Stored[Artifact]:
    """An exported folder, its record read and its bytes hashed again. UserError where they differ."""
    path = folder / RECORD
    if not path.is_file():
        for bundle in (folder, folder.parent):
            if (bundle / MANIFEST).is_file():
                return _of_bundle(bundle, folder)
        raise UserError(f"{folder} has no {RECORD}", "name a folder that `edgedistill export` wrote, or a bundle")
    try:
        raw = read_bytes(path, what=RECORD, max_bytes=MAX_RECORD_BYTES)
        parse_json(raw)  # which refuses what pydantic's reader takes: keys that stand twice
        artifact = Artifact.model_validate_json(raw)
    except ValidationError as error:
        why = first_fault(error)
        raise UserError(f"{path} is not a record that this version wrote: {why}", "export it again") from error
    except NotJson as error:
        raise UserError(f"{path} is not an artifact's record: {error}", "export it again") from error
    for entry in artifact.files:
        file = folder / entry.path
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise UserError(f"{folder} lacks {entry.path}", "export it again")
        if sha256_of(file) != entry.sha256:
            raise UserError(f"{file} is not what was exported: its hash differs", "export it again")
    # What stages go by is the hash of all files together, and what runs is the entry.
    if combined_sha256(artifact.files) != artifact.sha256:
        raise UserError(f"{path} disagrees with itself: its sha256 is not that of its files", "export it again")
    if artifact.entry != "." and artifact.entry not in {entry.path for entry in artifact.files}:
        raise UserError(
            f"{path} names {artifact.entry!r} as the file to run, which is not one of its files", "export it again"
        )
    return Stored(stage="export", key=artifact.sha256[:32], directory=folder, result=artifact, reused=True)


def _of_bundle(bundle: Path, asked: Path) -> Stored[Artifact]:
    """An artifact of a bundle, which is checked first, all but its golden vectors. UserError.

    `asked` is the bundle, where it has one artifact, or the folder of one of its artifacts.
    """
    from edgedistill.bundle.check import check_sealed

    artifacts = check_sealed(bundle).manifest.artifacts
    chosen = [one for one in artifacts if asked != bundle and bundle / one.folder == asked]
    if asked == bundle and len(artifacts) == 1:
        chosen = artifacts
    if not chosen:
        folders = ", ".join(str(bundle / one.folder) for one in artifacts)
        raise UserError(f"{asked} does not say which artifact of the bundle", f"name one of {folders}")
    known = chosen[0].model_dump(include=set(Artifact.model_fields) - {"inputs", "outputs", "tool_versions"})
    artifact = Artifact.model_validate(known)
    return Stored(
        stage="export", key=artifact.sha256[:32], directory=bundle / chosen[0].folder, result=artifact, reused=True
    )


def verify(
    artifact: Path, *, student: str, teacher: str | None, recipe: Recipe, store: Store, progress: Progress = QUIET
) -> tuple[Retention, Path]:
    """The ladder of an exported artifact on `recipe.data.source`, all of which counts as held out."""
    from edgedistill.strategies.distill import given_student
    from edgedistill.teacher.stage import describe
    from edgedistill.verify.stage import verify_artifact

    exported = open_artifact(artifact)
    student_folder = open_model(student, role="student")
    teacher_folder = open_model(teacher or student, role="teacher")
    for folder, role in ((student_folder, "student"), (teacher_folder, "teacher")):
        require_loadable(folder.path, role)
        require_sound_once(folder, store, role)
    for note in folder_notes(student_folder.path):
        progress.warn(f"student {student}: {note}")
    kept_tokens(teacher_folder.path, student_folder.path)  # refused now rather than after the text was read
    documents = read_source(recipe.data.source, recipe.data)
    if documents.read is not None:
        tell(documents.read, progress)
    blocks = blocks_of_groups(documents.groups, recipe.data.min_document_chars)
    return verify_artifact(
        exported,
        student=given_student(student_folder, store),
        teacher=describe(teacher_folder, store),
        held_out=blocks,
        settings=recipe.verify,
        store=store,
        progress=progress,
    )


def bench(artifact: Path, target: Target, *, recipe: Recipe, store: Store, progress: Progress = QUIET) -> Latency:
    """An exported artifact's speed and memory, measured now (the store is not asked)."""
    from edgedistill.bench.measure import bench as measure

    exported = open_artifact(artifact)
    return measure(
        exported.result, exported.directory, target, settings=recipe.bench, seed=recipe.seed, store=store,
        progress=progress,
    )  # fmt: skip
