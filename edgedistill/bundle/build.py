"""The bundle: a folder that a mobile team can take as it is, written beside its place and put there whole."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from edgedistill import __version__
from edgedistill.bundle.card import HUB_ID, model_card
from edgedistill.bundle.check import verify_bundle
from edgedistill.bundle.claims import PREPROCESS_FILES, signature_of
from edgedistill.bundle.documents import REPORT, REPORT_PACKAGES, documents
from edgedistill.bundle.files import is_bundle
from edgedistill.bundle.golden_make import make_golden
from edgedistill.bundle.judge import basis_notes
from edgedistill.bundle.licenses import Source, source_of
from edgedistill.config.recipe import Recipe
from edgedistill.config.targets import Target
from edgedistill.data.files import kind_of
from edgedistill.errors import UserError
from edgedistill.machine import facts
from edgedistill.models.folder import locate
from edgedistill.records.artifact import Artifact
from edgedistill.records.base import FileEntry
from edgedistill.records.data import DataResult
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import (
    CARD,
    MANIFEST,
    SUMS,
    BundleArtifact,
    DataNote,
    Manifest,
    ModelNote,
    SourceNote,
    Tensor,
    json_text,
    manifest_bytes,
    sums_text,
)
from edgedistill.records.names import unsafe_path
from edgedistill.records.retention import Retention
from edgedistill.records.training import FurtherTeacher, StudentResult, TeacherResult
from edgedistill.report.html import render
from edgedistill.store import (
    Store,
    combined_sha256,
    file_entries,
    fsync_folder,
    fsync_tree,
    sha256_of,
    versions,
    write_durably,
)

GOLDEN_THREADS = 4
TOOLS = (
    "edgedistill", "torch", "transformers", "gguf", "llama-cpp-python", "onnx", "onnxruntime", "onnxruntime-genai",
    *REPORT_PACKAGES,
)  # fmt: skip
# Recipe fields that may hold a path of the machine that the bundle was made on.
RECIPE_PATHS = (("teacher", "model"), ("student", "model"), ("data", "source"), ("data", "eval_data"))
RENAME_EXCHANGE = 2
AT_FDCWD = -100
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class BundledArtifact:
    """An artifact with its records. `folder`: where `artifact.files` lie."""

    artifact: Artifact
    folder: Path
    retention: Retention
    latency: Latency | None


def bundle(
    folder: Path,
    *,
    recipe: Recipe,
    target: Target,
    artifacts: Sequence[BundledArtifact],
    student: StudentResult,
    teacher: TeacherResult | None,
    data: DataResult | None,
    student_dir: Path,
    held_out_texts: Sequence[str],
    store: Store,
) -> Path:
    """Write the bundle `folder`; the first artifact is the primary one. An older bundle there is replaced.

    Golden vectors are computed on the copied bytes in the real runtime. Whatever goes wrong, what was
    at `folder` before stays. Raises UserError where `folder` is something else than a bundle, an
    artifact's bytes are not those of its record, or the disk is full; RuntimeCrashed.
    """
    folder = folder.absolute()
    _check_asked(artifacts)
    lock = store.lock(f"bundle-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}")
    with lock:
        temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
        try:
            _prepare(folder)
            temporary.mkdir()
            bundled: list[BundleArtifact] = []
            for one in artifacts:
                bundled.append(_artifact(temporary, one, bundled, student_dir, held_out_texts, store))
            _preprocess(temporary, student_dir)
            sources = _sources(recipe, student, teacher, student_dir)
            manifest = _manifest(folder.name, bundled, artifacts, recipe, target, student, teacher, sources, data)
            _seal(temporary, manifest, _documents(temporary, manifest, artifacts, sources))
            # Read back as the one who gets it will.
            verify_bundle(temporary, replay=False)
            fsync_tree(temporary)
            _put_in_place(temporary, folder)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"the bundle {folder} cannot be written: {error.strerror}",
                "free space or name another --out; what was there is unchanged",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_asked(artifacts: Sequence[BundledArtifact]) -> None:
    if not artifacts:
        raise UserError("a bundle of no artifacts", "export one first")
    names = [_name(one.artifact) for one in artifacts]
    if len(set(names)) != len(names):
        raise UserError(f"a bundle with the same artifact twice: {', '.join(names)}", "name each artifact once")
    for one in artifacts:
        for label, digest in _judged(one):
            if digest != one.artifact.sha256:
                raise UserError(
                    f"the {label} record of {_name(one.artifact)} is of other bytes: "
                    f"{digest[:16]}…, not {one.artifact.sha256[:16]}…",
                    "run that stage again on this artifact",
                )


def _judged(one: BundledArtifact) -> list[tuple[str, str]]:
    """(record, the artifact's hash that it carries)."""
    judged = [("retention", rung.artifact_sha256) for rung in one.retention.rungs if rung.rung == "shipped"]
    return [*judged, ("latency", one.latency.artifact_sha256)] if one.latency is not None else judged


def _name(artifact: Artifact) -> str:
    return f"{artifact.format}:{artifact.quantization}"


def require_place(folder: Path) -> None:
    """Refuse a place where no bundle can be put, before any work. UserError."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is not a folder", "name another --out")
    if folder.exists() and os.path.ismount(folder):
        raise UserError(f"{folder} is a mount point, which nothing can take the place of", "name its parent in --out")
    if folder.exists() and any(folder.iterdir()) and not is_bundle(folder):
        raise UserError(f"{folder} exists and is not a bundle", "move it away, or name another --out")


def _prepare(folder: Path) -> None:
    """Refuse to replace what is no bundle; remove what killed runs left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    left = sorted(folder.parent.glob(f".{folder.name}.old-*"))
    if left and not folder.exists():
        left.pop(0).rename(folder)  # killed between two renames: the old bundle comes back
    for path in [*left, *folder.parent.glob(f".{folder.name}.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)
    require_place(folder)


def _artifact(
    root: Path,
    one: BundledArtifact,
    before: Sequence[BundleArtifact],
    student_dir: Path,
    held_out_texts: Sequence[str],
    store: Store,
) -> BundleArtifact:
    """Copy an artifact and its records into the bundle, and make its golden vectors there."""
    artifact = one.artifact
    suffix, reports = "", "reports"
    if before:
        alone = artifact.format not in [other.format for other in before]
        suffix = f"/{artifact.format}" if alone else f"/{artifact.format}-{artifact.quantization.lower()}"
        reports = f"reports/{artifact.format}-{artifact.quantization}"
    artifact = _copy_model(one, root / f"model{suffix}")
    write = {f"{reports}/retention.json": one.retention, f"{reports}/latency.json": one.latency}
    for path, record in write.items():
        if record is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(json_text(record, what=path), encoding="utf-8", newline="\n")
    model = root / f"model{suffix}" / artifact.entry
    inputs, outputs = _signature(artifact, model)
    golden = make_golden(
        artifact,
        model,
        root,
        f"golden{suffix}",
        held_out_texts,
        tokenizer_json=student_dir / "tokenizer.json",
        threads=GOLDEN_THREADS,
        store=store,
    )
    return BundleArtifact(
        **artifact.model_dump(exclude={"tool_versions", "inputs", "outputs"}),
        name=_name(artifact),
        folder=f"model{suffix}",
        inputs=inputs,
        outputs=outputs,
        reports=reports,
        retention=f"{reports}/retention.json",
        latency=f"{reports}/latency.json" if one.latency is not None else None,
        golden=golden,
    )


def _copy_model(one: BundledArtifact, to: Path) -> Artifact:
    """Copy the files, hash the copies; a GGUF of one file is called model.gguf. The artifact as it lies there."""
    artifact = one.artifact
    rename = artifact.format == "gguf" and len(artifact.files) == 1
    files = []
    for entry in artifact.files:
        if why := unsafe_path(entry.path):
            raise UserError(f"the artifact's path {entry.path!r} is refused: {why}", "export the artifact again")
        name = "model.gguf" if rename else entry.path
        copy = to / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.folder / entry.path, copy)
        if sha256_of(copy) != entry.sha256:
            raise UserError(
                f"{one.folder / entry.path} is not what its record says: sha256 is not {entry.sha256[:16]}…",
                "export the artifact again",
            )
        files.append(FileEntry(path=name, bytes=entry.bytes, sha256=entry.sha256))
    if combined_sha256(files) != artifact.sha256:
        raise UserError(
            f"the record of {_name(artifact)} disagrees with itself: its sha256 is not that of its files",
            "export the artifact again",
        )
    return artifact.model_copy(update={"files": files, "entry": "model.gguf" if rename else artifact.entry})


def _signature(artifact: Artifact, model: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs: an ONNX graph's own; a GGUF's are what llama_decode takes and gives, a folder's forward's."""
    if artifact.format != "onnx":
        return signature_of(artifact.format, artifact.vocab_size)
    import onnx

    from edgedistill.runtimes.ort import model_file

    graph = onnx.load(str(model_file(model)), load_external_data=False).graph

    def tensor(value: onnx.ValueInfoProto) -> Tensor:
        kind = value.type.tensor_type
        return Tensor(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
            shape=[dim.dim_param or int(dim.dim_value) for dim in kind.shape.dim],
        )

    weights = {initializer.name for initializer in graph.initializer}
    return [tensor(v) for v in graph.input if v.name not in weights], [tensor(v) for v in graph.output]


def _preprocess(root: Path, student_dir: Path) -> None:
    folder = root / "preprocess"
    folder.mkdir()
    found = [name for name in PREPROCESS_FILES if (student_dir / name).is_file()]
    if "tokenizer.json" not in found:
        raise UserError(f"{student_dir} holds no tokenizer.json", "a bundle needs it: save the tokenizer as a fast one")
    for name in found:
        shutil.copyfile(student_dir / name, folder / name)


def _manifest(
    name: str,
    bundled: list[BundleArtifact],
    artifacts: Sequence[BundledArtifact],
    recipe: Recipe,
    target: Target,
    student: StudentResult,
    teacher: TeacherResult | None,
    sources: Sequence[Source],
    data: DataResult | None,
) -> Manifest:
    tools = {**versions(*TOOLS), "edgedistill": __version__, "python": facts.describe()["python"]}
    for one in artifacts:
        tools |= one.artifact.tool_versions
    return Manifest(
        name=name,
        edgedistill=__version__,
        artifacts=bundled,
        files=[],
        target=target.model_dump(mode="json"),
        limits={**target.limits.model_dump(mode="json"), "context_tokens": bundled[0].context_tokens},
        recipe=_recipe_note(recipe),
        seeds={"recipe": recipe.seed},
        teacher=None if teacher is None else _teacher_note(teacher),
        further_teachers=[_teacher_note(each) for each in teacher.also] if teacher is not None else [],
        student=ModelNote(
            name=recipe.name,
            origin=student.start + (", adopted from another version" if student.adopted else ""),
            shape=student.shape,
            parameters=student.parameters,
            weights_sha256=student.weights_sha256,
            tokenizer_sha256=student.tokenizer_sha256,
        ),
        sources=[
            SourceNote(role=each.role, name=each.name, has_license=bool(each.license), has_notice=bool(each.notice))
            for each in sources
        ],
        data=_data_note(data),
        tool_versions=dict(sorted(tools.items())),
        machine=facts.describe(),
        basis_notes=[
            note
            for record, one in zip(bundled, artifacts, strict=True)
            for note in basis_notes(record, one.retention, one.latency)
        ],
    )


def without_folders(source: str) -> str:
    """A local path's or a URL's last part; a hub id as it is.

    A file's own name is enough: where it lay, and what a URL carries beside it, is nobody's business.
    """
    path = PurePath(source.partition("?")[0] if "://" in source else source)
    # what has the suffix of a file that is read as text is a file, also where it is gone by now
    a_file = kind_of(path.name) is not None or os.path.lexists(source) or Path(source).expanduser().exists()
    if not a_file and HUB_ID.fullmatch(source) and not path.name.startswith("."):
        return source
    return path.name if path.name not in ("", "..") else "local files"


def _recipe_note(recipe: Recipe) -> dict[str, Any]:
    note = recipe.model_dump(mode="json")
    for section, field in RECIPE_PATHS:
        if note[section][field] is not None:
            note[section][field] = without_folders(note[section][field])
    for further in note["teacher"]["also"]:
        further["model"] = without_folders(further["model"])
    return note


def _data_note(data: DataResult | None) -> DataNote | None:
    if data is None:
        return None
    # Two sources where the held-out text has its own; see data/prepare.py.
    both = re.fullmatch(r"(.+) \(held out: (.+)\)", data.source, re.DOTALL)
    source = "{} (held out: {})".format(*map(without_folders, both.groups())) if both else without_folders(data.source)
    return DataNote(
        source=source,
        split=data.split,
        sha256=data.sha256,
        parts=data.parts,
        overlap=data.overlap,
        duplicates_dropped=data.duplicates_dropped,
    )


def _teacher_note(teacher: TeacherResult | FurtherTeacher) -> ModelNote:
    return ModelNote(
        name=PurePath(teacher.name).name if teacher.origin == "folder" else without_folders(teacher.name),
        origin=teacher.origin,
        shape=teacher.shape,
        parameters=teacher.parameters,
        weights_sha256=teacher.weights_sha256,
        tokenizer_sha256=teacher.tokenizer_sha256,
    )


def _sources(recipe: Recipe, student: StudentResult, teacher: TeacherResult | None, student_dir: Path) -> list[Source]:
    """Whose weights or answers are in the student: what it started as, and all who taught it."""
    found = []
    if student.start == "pretrained" and recipe.student.model is not None:
        folder, origin = locate(recipe.student.model, revision=recipe.student.revision, role="student")
        name = recipe.student.model if origin == "hub" else without_folders(recipe.student.model)
        found.append(source_of("student", name, folder))
    elif student.start == "given":
        found.append(source_of("student", recipe.name, student_dir))
    teachers: list[TeacherResult | FurtherTeacher] = [] if teacher is None else [teacher, *teacher.also]
    for each in teachers:
        if each.origin != "trained":
            found.append(source_of("teacher", _teacher_note(each).name, Path(each.path)))
    return found


def _documents(
    root: Path, manifest: Manifest, artifacts: Sequence[BundledArtifact], sources: Sequence[Source]
) -> list[FileEntry]:
    """Write what a person reads; all files that are there then."""
    figures = [(one.retention, one.latency) for one in artifacts]
    texts = documents(manifest, figures, sources) | {REPORT: render(manifest, figures)}
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8", newline="\n")
    # last: it holds a hash of all others
    others = file_entries(root)
    card = model_card(manifest.model_copy(update={"files": others}), figures, sources)
    (root / CARD).write_text(card, encoding="utf-8", newline="\n")
    entry = FileEntry(path=CARD, bytes=(root / CARD).stat().st_size, sha256=sha256_of(root / CARD))
    return sorted([*others, entry], key=lambda one: one.path)


def _seal(root: Path, manifest: Manifest, files: list[FileEntry]) -> None:
    """manifest.json over every other file, then SHA256SUMS over all."""
    (root / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update={"files": files})))
    hashes = {entry.path: entry.sha256 for entry in files} | {MANIFEST: sha256_of(root / MANIFEST)}
    write_durably(root / SUMS, sums_text(hashes))


def _put_in_place(new: Path, final: Path) -> None:
    """Rename, or where an older bundle is there exchange the two in one step if the system can."""
    if not final.exists():
        new.rename(final)
    elif not _exchange(new, final):
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        final.rename(old)
        try:
            new.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    fsync_folder(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names atomically (Linux, where the file system can). False where it cannot."""
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return int(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)) == 0
    return False
