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
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from edgedistill.errors import UserError
from edgedistill.records.artifact import Calibration, Fallback, Parity, Sensitivity, SpeedComparison
from edgedistill.records.base import Count, FileEntry, Record
from edgedistill.records.data import SplitPart
from edgedistill.records.golden import Golden
from edgedistill.records.names import collision, unsafe_path
from edgedistill.records.reading import json_record
from edgedistill.records.shape import Shape
from edgedistill.strict import shown

REMEDY = "take the bundle again from where it was made"
MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
MAX_MANIFEST_BYTES = 2 << 20
MAX_MANIFEST_VALUES = 100_000
MAX_SUMS_BYTES = 2 << 20
MAX_FILES = 2_000
MAX_ARTIFACTS = 16
MAX_CASES = 64
MAX_TOKENS = 1 << 24
UNSET_HASH = "0" * 64
_SELF_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sums_text(hashes: Mapping[str, str]) -> str:
    """The canonical SHA256SUMS of path → sha256: sorted by path, as `sha256sum -c` reads it."""
    return "".join(f"{hashes[path]}  {path}\n" for path in sorted(hashes))


def parse_sums(data: bytes) -> dict[str, str]:
    """path → sha256 of a canonical SHA256SUMS. Raises UserError naming the line that is not canonical."""
    remedy = f"{REMEDY}: {SUMS} was altered"
    if not data.endswith(b"\n"):
        raise UserError(f"{SUMS} does not end with a line feed ({len(data)} bytes)", remedy)
    found: dict[str, str] = {}
    previous = ""
    for number, raw in enumerate(data[:-1].split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{SUMS} line {number} is not UTF-8: {shown(raw[:80])}", remedy) from None
        why, path = _line_fault(line, previous)
        if why:
            raise UserError(f"{SUMS} line {number} is not canonical: {why}: {shown(line)}", remedy)
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


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# A name that is printed in a line of text, or is part of a path.
Word = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=10_000)]


class Tensor(Record):
    """An input or output of the artifact. A dimension is a number, or a name where it may vary."""

    name: Word
    dtype: Word
    shape: Annotated[list[Count | Word], Field(max_length=16)]


class BundleArtifact(Record):
    """One artifact of the bundle. `folder` holds it, `entry` (in that folder) is what the runtime opens."""

    name: Word
    format: Literal["gguf", "onnx", "bitsandbytes", "executorch"]
    quantization: Word
    runtime: Literal["llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "executorch"]
    task: Word
    folder: str
    entry: str
    files: list[FileEntry] = Field(min_length=1, max_length=MAX_FILES)
    bytes: Count
    sha256: Sha256
    parameters: int = Field(ge=1)
    bits_per_weight: Finite
    tensor_types: dict[str, Count]
    fallbacks: list[Fallback]
    context_tokens: Count
    vocab_size: Count
    overrides: dict[str, str]
    calibration: Calibration | None
    parity: Parity | None
    sensitivity: Sensitivity | None
    speed: SpeedComparison | None
    notes: list[Text]
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

    name: Word
    origin: Word
    shape: Shape
    parameters: int = Field(ge=1)
    weights_sha256: Sha256
    tokenizer_sha256: Sha256


class DataNote(Record):
    """The text that it was trained and judged on, by name: no path of the machine that it lay on."""

    source: Text
    split: Text
    sha256: Sha256
    parts: dict[str, SplitPart]
    overlap: dict[str, Finite]
    duplicates_dropped: Count

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


class SourceNote(Record):
    """A model whose weights or answers are in the student, and what of its words is in LICENSE and NOTICE."""

    role: Literal["student", "teacher"]
    name: Word
    has_license: bool
    has_notice: bool


class Manifest(Record):
    """manifest.json. `files`: every file of the bundle but manifest.json and SHA256SUMS."""

    schema_: Literal["edgedistill.bundle/1"] = Field(default="edgedistill.bundle/1", alias="schema")
    manifest_sha256: str = Field(
        default=UNSET_HASH, description="sha256 of this file with these 64 digits replaced by zeros"
    )
    name: Word
    edgedistill: Word
    artifacts: list[BundleArtifact] = Field(min_length=1, max_length=MAX_ARTIFACTS)
    files: list[FileEntry] = Field(max_length=MAX_FILES)
    target: dict[str, Any]
    limits: dict[str, Any]
    recipe: dict[str, Any]
    seeds: dict[str, int]
    teacher: ModelNote | None
    further_teachers: list[ModelNote] = Field(
        default=[], max_length=MAX_ARTIFACTS, description="those that taught beside it"
    )
    student: ModelNote
    sources: list[SourceNote] = Field(default=[], max_length=MAX_ARTIFACTS, description="whose licences apply")
    data: DataNote | None
    tool_versions: dict[str, str]
    machine: dict[str, Any]
    basis_notes: list[Text]

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("files")
    @classmethod
    def _safe(cls, files: list[FileEntry]) -> list[FileEntry]:
        for entry in files:
            if why := unsafe_path(entry.path):
                raise ValueError(f"the path {entry.path!r} is refused: {why}")
        if why := collision([*(entry.path for entry in files), MANIFEST, SUMS, SIGNATURE]):
            raise ValueError(why)
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


def claims_digest(manifest: Manifest) -> str:
    """sha256 of all that a manifest says, the hashes of all files but the card among it: the card carries it."""
    files = [entry for entry in manifest.files if entry.path != CARD]
    blank = manifest.model_copy(update={"manifest_sha256": UNSET_HASH, "files": files})
    return hashlib.sha256(json_text(blank, what=MANIFEST).encode()).hexdigest()


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
    return json_record(
        Manifest, data, what=MANIFEST, remedy=REMEDY, max_bytes=MAX_MANIFEST_BYTES, max_values=MAX_MANIFEST_VALUES
    )


def known_hashes(entries: Iterable[FileEntry]) -> dict[str, str]:
    """path → sha256."""
    return {entry.path: entry.sha256 for entry in entries}
