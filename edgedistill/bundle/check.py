"""`edgedistill bundle verify`: is every byte as it was made, and does this machine compute what it should?

Needs typer, pydantic, numpy, filelock and the artifact's runtime: neither torch nor transformers. The bundle is read
with distrust, the cheap before the dear: the manifest's size, form and names, what it says of itself, the files'
names, kinds and sizes, their hashes, what the records and the artifact say, and only then the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgedistill import __version__
from edgedistill.bundle.claims import check_claims, profile_notes
from edgedistill.bundle.contents import check_contents
from edgedistill.bundle.documents import check_documents
from edgedistill.bundle.files import hash_file, read_bounded, read_sealed, refuse_holes, sizes_in
from edgedistill.bundle.golden import check_fingerprint
from edgedistill.bundle.golden import replay as replay_golden
from edgedistill.bundle.judge import check_ceilings, check_records
from edgedistill.errors import UserError
from edgedistill.records.base import Record
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SUMS_BYTES,
    REMEDY,
    SIGNATURE,
    SUMS,
    Manifest,
    manifest_bytes,
    parse_manifest,
    parse_sums,
    self_hash_holds,
)
from edgedistill.records.retention import Retention
from edgedistill.store import Store
from edgedistill.strict import shown

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


@dataclass(frozen=True)
class Sealed:
    """A bundle whose files are whole and whose claims hold together. `figures`: of each artifact, in order."""

    folder: Path
    manifest: Manifest
    sizes: dict[str, int]
    figures: list[tuple[Retention, Latency | None]]
    notes: list[str]


def verify_bundle(folder: Path, *, replay: bool = True, store: Store | None = None) -> BundleCheck:
    """Check the manifest, the folder, SHA256SUMS, every file, the records and (with `replay`) the golden vectors.

    Raises UserError naming the file that is wrong, or what to install where the runtime is missing;
    RuntimeCrashed where the runtime dies. `store` keeps what is known of this machine's llama.cpp.
    """
    sealed = check_sealed(folder)
    notes = [INTEGRITY_ONLY, *sealed.notes]
    replays = []
    for artifact in sealed.manifest.artifacts if replay else ():
        done = replay_golden(folder, artifact, store=store)
        notes += done.notes
        replays.append(ArtifactReplay(**{name: getattr(done, name) for name in ArtifactReplay.model_fields}))
    if not replay:
        notes.append("the golden vectors were not replayed")
    return BundleCheck(
        name=sealed.manifest.name,
        target=str(sealed.manifest.target.get("name", "")),
        files=len(sealed.sizes),
        bytes=sum(sealed.sizes.values()),
        golden_replayed=sum(one.cases for one in replays),
        replays=replays,
        signed=False,
        notes=notes,
    )


def check_sealed(folder: Path) -> Sealed:
    """All of `bundle verify` but the runtime: nothing in the bundle is run. Raises UserError."""
    try:
        return _check_sealed(folder)
    except OSError as error:
        named = shown(str(error.filename or folder))
        raise UserError(f"{named} cannot be read: {error.strerror or error}", "make it readable") from error


def _check_sealed(folder: Path) -> Sealed:
    if not folder.is_dir():
        of = folder.parent if folder.is_file() and (folder.parent / MANIFEST).exists() else None
        raise UserError(f"no folder {folder}", f"give the folder of a bundle{f': {of}' if of else ''}")
    if not (folder / MANIFEST).exists() and not (folder / SUMS).exists():
        raise UserError(f"{folder} is not a bundle: it has no {MANIFEST} and no {SUMS}", "give the folder of a bundle")
    manifest_data = read_bounded(folder, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = _whole_manifest(manifest_data)
    check_claims(manifest)
    if (folder / SIGNATURE).is_symlink() or (folder / SIGNATURE).exists():
        raise UserError(
            f"{SIGNATURE} in {folder}: signatures cannot be checked by this version",
            "remove it, or use a version that can",
        )
    sizes = _sizes(folder, manifest, len(manifest_data))
    hashes = parse_sums(read_bounded(folder, SUMS, MAX_SUMS_BYTES))
    _check_sums(folder, manifest, hashes)
    _check_hashes(folder, manifest, hashes)
    entries = {entry.path: entry for entry in manifest.files}

    def read(path: str) -> bytes:
        return read_sealed(folder, path, entries[path].bytes, entries[path].sha256)

    figures = check_records(manifest, read)
    try:
        notes = profile_notes(manifest) + check_contents(folder, manifest, read)
    except UserError as error:
        raise _with_name(folder, manifest, error) from error
    check_ceilings(folder, manifest, figures)
    for artifact in manifest.artifacts:
        check_fingerprint(folder, artifact)
    notes += check_documents(manifest, figures, read)
    # Last, since it names no field: one that has a default may be missing, and then it is in no hash of the claims.
    if manifest.edgedistill == __version__ and manifest_bytes(manifest) != manifest_data:
        raise UserError(f"{MANIFEST} is not as this version writes it: a field is missing, or in another form", REMEDY)
    return Sealed(folder=folder, manifest=manifest, sizes=sizes, figures=figures, notes=notes)


def _with_name(folder: Path, manifest: Manifest, error: UserError) -> UserError:
    """The error, with the key or tensor that is not the recorded one where the artifact was changed, its record not."""
    for artifact in manifest.artifacts:
        try:
            check_fingerprint(folder, artifact)
        except UserError as named:
            if named.cause != error.cause:
                return UserError(f"{error.cause}; {named.cause}", error.remedy)
    return error


def _whole_manifest(data: bytes) -> Manifest:
    """The manifest, by the hash that it holds of itself; where that is wrong, what else is wrong with it is said."""
    if not self_hash_holds(data):
        why = ""
        try:
            parse_manifest(data)
        except UserError as error:
            why = f" ({error.cause})"
        raise UserError(f"by the hash that {MANIFEST} holds of itself, {MANIFEST} was altered{why}", REMEDY)
    return parse_manifest(data)


def _sizes(folder: Path, manifest: Manifest, manifest_bytes: int) -> dict[str, int]:
    """Path → bytes of all files, which are exactly those that the manifest lists, of the sizes that it gives."""
    listed: dict[str, int | None] = {entry.path: entry.bytes for entry in manifest.files}
    sizes = sizes_in(folder, {**listed, MANIFEST: manifest_bytes, SUMS: None})
    for path in sorted({*listed, SUMS} - set(sizes)):
        raise UserError(f"{path} is missing in {folder}", REMEDY)
    for path, size in sizes.items():
        refuse_holes(folder, path, size)
    return sizes


def _check_sums(folder: Path, manifest: Manifest, hashes: dict[str, str]) -> None:
    """SHA256SUMS lists the files of the manifest and the manifest, nothing else."""
    listed = {MANIFEST, *(entry.path for entry in manifest.files)}
    for path in sorted(listed - set(hashes)):
        raise UserError(f"{SUMS} does not list {path}, which belongs to the bundle: {SUMS} was altered", REMEDY)
    for path in sorted(set(hashes) - listed):
        raise UserError(
            f"{SUMS} lists {path}, which is neither in {folder} nor in {MANIFEST}: {SUMS} was altered", REMEDY
        )


def _check_hashes(folder: Path, manifest: Manifest, hashes: dict[str, str]) -> None:
    """Every file against manifest and SHA256SUMS, small ones first; the two tell which of three was altered."""
    entries = {entry.path: entry for entry in manifest.files}
    # Whether it is whole itself is known: it holds a hash of itself.
    found = hash_file(folder, MANIFEST, (folder / MANIFEST).stat().st_size)
    if found != hashes[MANIFEST]:
        raise UserError(
            f"{MANIFEST} and {SUMS} disagree (sha256 {found}, listed {hashes[MANIFEST]}): by the hash that {MANIFEST} "
            f"holds of itself, {SUMS} was altered",
            REMEDY,
        )
    for entry in sorted(entries.values(), key=lambda one: (one.bytes, one.path)):
        path, listed = entry.path, hashes[entry.path]
        found = hash_file(folder, path, entry.bytes)
        if found == entry.sha256 == listed:
            continue
        if found == listed:
            raise UserError(f"{MANIFEST} and {SUMS} disagree about {path}", REMEDY)
        raise UserError(
            f"{path} and {SUMS} disagree (sha256 {found}, listed {listed}): by {MANIFEST}, "
            f"{SUMS if found == entry.sha256 else path} was altered",
            REMEDY,
        )
