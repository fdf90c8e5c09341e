"""manifest.json and SHA256SUMS: what a bundle says of itself, and how both are read with distrust.

Every file but `manifest.json` and `SHA256SUMS` is hashed twice, in the manifest and in SHA256SUMS,
and the manifest holds a hash of itself: so a check can tell which of two disagreeing files was
altered. The name `model.sig` is kept for a signature, which no version makes yet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from edgedistill.bundle.golden_record import Golden
from edgedistill.errors import UserError
from edgedistill.records import (
    Calibration,
    Fallback,
    FileEntry,
    Parity,
    Record,
    Sensitivity,
    Shape,
    SpeedComparison,
    SplitPart,
)

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
MAX_MANIFEST_BYTES = 16 << 20
MAX_SUMS_BYTES = 4 << 20
MAX_FILES = 10_000
MAX_PATH_CHARS = 512
UNSET_HASH = "0" * 64
_SELF_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def unsafe_path(path: str) -> str:
    """Why a path must not stand in a bundle; "" where it may. Posix, relative, no way out of the folder."""
    if not path or len(path) > MAX_PATH_CHARS:
        return f"it has {len(path)} characters"
    if any(ord(c) < 32 or ord(c) == 127 for c in path) or "\\" in path:
        return "it has a control character or a backslash"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "it is absolute"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "it has an empty, '.' or '..' part"
    return ""


def sums_text(hashes: Mapping[str, str]) -> str:
    """The canonical SHA256SUMS of path → sha256: sorted by path, as `sha256sum -c` reads it."""
    return "".join(f"{hashes[path]}  {path}\n" for path in sorted(hashes))


def parse_sums(data: bytes) -> dict[str, str]:
    """path → sha256 of a canonical SHA256SUMS. Raises UserError naming the line that is not canonical."""
    remedy = "take the bundle again from where it was made: SHA256SUMS was altered"
    if not data.endswith(b"\n"):
        raise UserError(f"{SUMS} does not end with a line feed ({len(data)} bytes)", remedy)
    found: dict[str, str] = {}
    previous = ""
    for number, raw in enumerate(data[:-1].split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{SUMS} line {number} is not UTF-8: {raw[:80]!r}", remedy) from None
        why, path = _line_fault(line, previous)
        if why:
            raise UserError(f"{SUMS} line {number} is not canonical: {why}: {line[:160]!r}", remedy)
        found[path] = line[:64]
        previous = path
        if len(found) > MAX_FILES:
            raise UserError(f"{SUMS} lists more than {MAX_FILES} files", remedy)
    return found


def _line_fault(line: str, previous: str) -> tuple[str, str]:
    """Why a line is refused ("" where it is not), and its path."""
    if line.endswith("\r"):
        return "it ends with CR LF", ""
    match = _LINE.fullmatch(line)
    if match is None:
        if re.match(r"[0-9A-Fa-f]{64}  ", line):
            return "the hash has capital letters", ""
        return "it is not 64 lower-case hex digits, two spaces and a path", ""
    path = match.group(2)
    why = unsafe_path(path)
    if why:
        return f"the path is refused, {why}", path
    if path in (SUMS, SIGNATURE):
        return f"{path} cannot be listed", path
    if path == previous:
        return "the path is there twice", path
    return ("the paths are not sorted" if path < previous else ""), path


class Tensor(Record):
    """An input or output of the artifact. A dimension is a number, or a name where it may vary."""

    name: str
    dtype: str
    shape: list[int | str]


class BundleArtifact(Record):
    """One artifact of the bundle. `folder` holds it, `entry` (in that folder) is what the runtime opens."""

    name: str
    format: Literal["gguf", "onnx", "bitsandbytes", "executorch"]
    quantization: str
    runtime: Literal["llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "executorch"]
    task: str
    folder: str
    entry: str
    files: list[FileEntry]
    bytes: int
    sha256: str
    parameters: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    fallbacks: list[Fallback]
    context_tokens: int
    vocab_size: int
    overrides: dict[str, str]
    calibration: Calibration | None
    parity: Parity | None
    sensitivity: Sensitivity | None
    speed: SpeedComparison | None
    notes: list[str]
    inputs: list[Tensor]
    outputs: list[Tensor]
    reports: str
    retention: str
    latency: str | None
    golden: Golden

    @field_validator("folder", "reports", "retention", "latency")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is not None and (why := unsafe_path(value)):
            raise ValueError(f"the path {value!r} is refused: {why}")
        return value

    @field_validator("entry")
    @classmethod
    def _entry_inside(cls, value: str) -> str:
        if value != "." and (why := unsafe_path(value)):
            raise ValueError(f"the path {value!r} is refused: {why}")
        return value


class ModelNote(Record):
    """A teacher or student, without the paths of the machine that it lay on."""

    name: str
    origin: str
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str


class DataNote(Record):
    """The text that it was trained and judged on, by name: no path of the machine that it lay on."""

    source: str
    split: str
    sha256: str
    parts: dict[str, SplitPart]
    overlap: dict[str, float]
    duplicates_dropped: int

    def in_both(self) -> str:
        """What of the held-out text stands in the training part too, in words."""
        dropped = f"{self.duplicates_dropped:,} exact duplicates were dropped before the split"
        if not self.overlap:
            return f"not counted; {dropped}"
        whole, sharing, share = (
            self.overlap.get(key, 0.0)
            for key in ("documents_in_both", "documents_sharing_13_words", "share_of_13_word_runs")
        )
        return (
            f"{whole:,.0f} held-out documents whole; {sharing:,.0f} share a run of 13 words with the training part "
            f"({share:.2%} of all such runs); {dropped}"
        )


class Manifest(Record):
    """manifest.json. `files`: every file of the bundle but manifest.json and SHA256SUMS."""

    schema_: Literal["edgedistill.bundle/1"] = Field(default="edgedistill.bundle/1", alias="schema")
    manifest_sha256: str = Field(
        default=UNSET_HASH, description="sha256 of this file with these 64 digits replaced by zeros"
    )
    name: str
    edgedistill: str
    artifacts: list[BundleArtifact] = Field(min_length=1)
    files: list[FileEntry] = Field(max_length=MAX_FILES)
    target: dict[str, Any]
    limits: dict[str, Any]
    recipe: dict[str, Any]
    seeds: dict[str, int]
    teacher: ModelNote | None
    further_teachers: list[ModelNote] = Field(default=[], description="those that taught beside it")
    student: ModelNote
    data: DataNote | None
    tool_versions: dict[str, str]
    machine: dict[str, Any]
    basis_notes: list[str]

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("files")
    @classmethod
    def _safe(cls, files: list[FileEntry]) -> list[FileEntry]:
        for entry in files:
            if why := unsafe_path(entry.path):
                raise ValueError(f"the path {entry.path!r} is refused: {why}")
        if len({entry.path for entry in files}) != len(files):
            raise ValueError("a path is listed twice")
        return files


def json_text(record: Record, *, what: str) -> str:
    """A record as the JSON that ships: indented, keys in the class's order, a final line feed.

    Raises UserError where a figure is not finite: JSON has no such number, and no bundle should.
    """
    try:
        return json.dumps(record.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(
            f"{what} holds a figure that is not a finite number", "the artifact is broken: look at its retention"
        ) from error


def manifest_bytes(manifest: Manifest) -> bytes:
    """manifest.json with its own hash set."""
    blank = json_text(manifest.model_copy(update={"manifest_sha256": UNSET_HASH}), what=MANIFEST).encode()
    field = b'"manifest_sha256": "%s"'
    digest = hashlib.sha256(blank).hexdigest().encode()
    return blank.replace(field % UNSET_HASH.encode(), field % digest, 1)


def self_hash_holds(data: bytes) -> bool:
    """Whether manifest.json is as it was written, by the hash that it holds of itself."""
    match = _SELF_HASH.search(data)
    if match is None:
        return False
    blank = data[: match.start(1)] + UNSET_HASH.encode() + data[match.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == match.group(1)


def parse_manifest(data: bytes) -> Manifest:
    """Raises UserError, naming manifest.json and the field, for anything but a valid manifest."""
    remedy = "take the bundle again from where it was made"
    if len(data) > MAX_MANIFEST_BYTES:
        raise UserError(f"{MANIFEST} has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}", remedy)
    try:
        data.decode("utf-8")
        return Manifest.model_validate_json(data)
    except UnicodeDecodeError as error:
        raise UserError(f"{MANIFEST} is not UTF-8: byte {error.start}", remedy) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{MANIFEST}: {where + ': ' if where else ''}{first['msg'][:200]}", remedy) from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder. Raises UserError where there is none, or it is not valid."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{folder} is not a bundle: it has no {MANIFEST}", "give a folder that edgedistill wrote")
    with path.open("rb") as file:
        return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a manifest of this schema: all that may be replaced by a new bundle."""
    try:
        return (folder / MANIFEST).is_file() and bool(read_manifest(folder))
    except (UserError, OSError):
        return False


def known_hashes(entries: Iterable[FileEntry]) -> dict[str, str]:
    """path → sha256."""
    return {entry.path: entry.sha256 for entry in entries}
