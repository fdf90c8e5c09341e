"""`edgedistill bundle verify`: is every byte as it was made, and does this machine compute what it should?

Needs typer, pydantic, numpy, filelock and the artifact's runtime: neither torch nor transformers.
The bundle is read with distrust: nothing in it is executed, unpickled or followed out of the folder.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgedistill.bundle.golden import replay as replay_golden
from edgedistill.bundle.manifest import (
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_SUMS_BYTES,
    SIGNATURE,
    SUMS,
    Manifest,
    known_hashes,
    parse_manifest,
    parse_sums,
    self_hash_holds,
)
from edgedistill.errors import UserError
from edgedistill.records import Record
from edgedistill.store import Store, combined_sha256, sha256_of

REMEDY = "take the bundle again from where it was made"
INTEGRITY_ONLY = (
    "not signed: every byte is as the bundle's own SHA256SUMS says (integrity), "
    "which does not prove who made it (origin)"
)


class ArtifactReplay(Record):
    """The golden replay of one artifact. Deviation and tolerance are of the logits, absolute.

    `tokens_compared`: tokens that were held to the recorded ones in whole batches, `greedy_compared`: decoded alone.
    `found` and `allowed`: every statistic; `alike`: whether runtime, CPU and kernels are those of the maker.
    """

    artifact: str
    runtime_version: str
    cases: int
    tokens_compared: int
    greedy_compared: int
    largest_deviation: float
    tolerance: float
    found: dict[str, float]
    allowed: dict[str, float]
    alike: bool


class BundleCheck(Record):
    """A bundle that passed. `signed` is false: this version checks no signatures, and refuses a bundle with one."""

    name: str
    target: str
    files: int
    bytes: int
    golden_replayed: int
    replays: list[ArtifactReplay]
    signed: bool
    notes: list[str]


def verify_bundle(folder: Path, *, replay: bool = True, store: Store | None = None) -> BundleCheck:
    """Check the folder, SHA256SUMS, every file, the manifest, and (with `replay`) the golden vectors.

    Raises UserError naming the file that is wrong, or what to install where the runtime is missing;
    RuntimeCrashed where the runtime dies. `store` keeps what is known of this machine's llama.cpp.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "give the folder of a bundle")
    if not (folder / MANIFEST).exists() and not (folder / SUMS).exists():
        raise UserError(f"{folder} is not a bundle: it has no {MANIFEST} and no {SUMS}", "give the folder of a bundle")
    sizes = _files_of(folder)
    if SIGNATURE in sizes:
        raise UserError(
            f"{SIGNATURE} in {folder}: signatures cannot be checked by this version",
            "remove it, or use a version that can",
        )
    hashes = parse_sums(_read(folder, SUMS, sizes, MAX_SUMS_BYTES))
    manifest_data = _read(folder, MANIFEST, sizes, MAX_MANIFEST_BYTES)
    manifest = _manifest_or_none(manifest_data)
    _check_listed(folder, sizes, hashes, manifest)
    _check_hashes(folder, sizes, hashes, manifest, manifest_data)
    manifest = parse_manifest(manifest_data)
    _check_agreement(manifest, hashes)
    notes = [INTEGRITY_ONLY]
    replays = []
    for artifact in manifest.artifacts if replay else ():
        done = replay_golden(folder, artifact, store=store)
        notes += done.notes
        replays.append(ArtifactReplay(**{name: getattr(done, name) for name in ArtifactReplay.model_fields}))
    if not replay:
        notes.append("the golden vectors were not replayed")
    return BundleCheck(
        name=manifest.name,
        target=str(manifest.target.get("name", "")),
        files=len(hashes) + 1,
        bytes=sum(sizes.values()),
        golden_replayed=sum(one.cases for one in replays),
        replays=replays,
        signed=False,
        notes=notes,
    )


def _files_of(folder: Path) -> dict[str, int]:
    """Path → bytes of every file. Raises UserError for links and special files, which a bundle never holds."""
    sizes: dict[str, int] = {}
    for here, folders, files in os.walk(folder, followlinks=False, onerror=_refuse_unreadable):
        for name in sorted([*folders, *files]):
            path = Path(here) / name
            shown = path.relative_to(folder).as_posix()
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[shown] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "a special file"
                raise UserError(f"{shown!r} in {folder} is {kind}: a bundle holds plain files only", REMEDY)
        if len(sizes) > MAX_FILES + 2:
            raise UserError(f"{folder} holds more than {MAX_FILES} files", REMEDY)
    return sizes


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}", "make it readable") from error


def _read(folder: Path, name: str, sizes: dict[str, int], limit: int) -> bytes:
    if name not in sizes:
        raise UserError(f"{name} is missing in {folder}", REMEDY)
    if sizes[name] > limit:
        raise UserError(f"{name} has {sizes[name]} bytes, more than {limit}", REMEDY)
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {error.strerror}", "make it readable") from error


def _manifest_or_none(data: bytes) -> Manifest | None:
    """The manifest, to cross-check with; what is wrong with it is said once the hashes have spoken."""
    try:
        return parse_manifest(data)
    except UserError:
        return None


def _check_listed(folder: Path, sizes: dict[str, int], hashes: dict[str, str], manifest: Manifest | None) -> None:
    in_manifest = known_hashes(manifest.files) if manifest else {}
    for path in sorted(set(hashes) - set(sizes)):
        why = f"{path} is missing in {folder}, and {SUMS} lists it"
        if manifest and path != MANIFEST and path not in in_manifest:
            why = f"{SUMS} lists {path}, which is neither in {folder} nor in {MANIFEST}: {SUMS} was altered"
        raise UserError(why, REMEDY)
    for path in sorted(set(sizes) - set(hashes) - {SUMS}):
        if path in in_manifest or path == MANIFEST:
            raise UserError(f"{SUMS} does not list {path}, which belongs to the bundle: {SUMS} was altered", REMEDY)
        raise UserError(
            f"{path!r} in {folder} is not part of the bundle: {SUMS} does not list it", f"remove it, or {REMEDY}"
        )
    for here, folders, files in os.walk(folder, followlinks=False):
        if not folders and not files:
            empty = Path(here).relative_to(folder).as_posix()
            raise UserError(f"{empty!r} in {folder} is an empty folder and not part of the bundle", "remove it")


def _check_hashes(
    folder: Path, sizes: dict[str, int], hashes: dict[str, str], manifest: Manifest | None, manifest_data: bytes
) -> None:
    """Every file against SHA256SUMS; where they disagree the manifest tells which of the two was altered."""
    entries = {entry.path: entry for entry in manifest.files} if manifest else {}
    # The manifest first: what it says of the others counts only where it is whole itself.
    for path in [MANIFEST, *sorted(set(hashes) - {MANIFEST})]:
        if path not in hashes:
            raise UserError(f"{SUMS} does not list {path}: {SUMS} was altered", REMEDY)
        entry = entries.get(path)
        # Before hashing: a file of another size may be very much larger.
        if entry is not None and sizes[path] != entry.bytes:
            raise UserError(
                f"{path} was altered: it has {sizes[path]} bytes, and {MANIFEST}, whose hash is in {SUMS}, "
                f"says {entry.bytes}",
                REMEDY,
            )
        try:
            found = sha256_of(folder / path)
        except OSError as error:
            raise UserError(f"{folder / path} cannot be read: {error.strerror}", "make it readable") from error
        if found == hashes[path]:
            continue
        shown = f"{path} and {SUMS} disagree (sha256 {found}, listed {hashes[path]}): "
        if path == MANIFEST:
            file_is_whole = self_hash_holds(manifest_data)
            by = f"by the hash that {MANIFEST} holds of itself"
        else:
            file_is_whole = entry is not None and entry.sha256 == found
            by = f"by {MANIFEST}"
        raise UserError(f"{shown}{by}, {SUMS if file_is_whole else path} was altered", REMEDY)


def _check_agreement(manifest: Manifest, hashes: dict[str, str]) -> None:
    """The manifest names every file, with the same hash, and nothing that is not there."""
    in_manifest = known_hashes(manifest.files)
    listed = {path: digest for path, digest in hashes.items() if path != MANIFEST}
    for path in sorted(set(in_manifest) ^ set(listed)):
        where = (MANIFEST, SUMS) if path in in_manifest else (SUMS, MANIFEST)
        raise UserError(f"{path} is in {where[0]} and not in {where[1]}", REMEDY)
    for path in sorted(listed):
        if listed[path] != in_manifest[path]:
            raise UserError(f"{MANIFEST} and {SUMS} disagree about {path}", REMEDY)
    for artifact in manifest.artifacts:
        for entry in artifact.files:
            if in_manifest.get(f"{artifact.folder}/{entry.path}") != entry.sha256:
                raise UserError(f"{MANIFEST} disagrees with itself about {artifact.folder}/{entry.path}", REMEDY)
        if combined_sha256(artifact.files) != artifact.sha256:
            raise UserError(f"{MANIFEST}: the sha256 of {artifact.name} is not that of its files", REMEDY)
        cases = artifact.golden.cases
        named = [path for case in cases for path in (case.prompt, *artifact.golden.files(case))]
        if artifact.entry != ".":
            named.append(f"{artifact.folder}/{artifact.entry}")
        named += [path for path in (artifact.retention, artifact.latency) if path]
        for path in named:
            if path not in in_manifest:
                raise UserError(f"{MANIFEST} names {path!r} in {artifact.name}, which is no file of the bundle", REMEDY)
