"""What a liar does to a bundle after a change: every hash right again, as if it had been made so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedistill.store import combined_sha256

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
Tree = dict[str, Any]


def reseal(bundle: Path, change: Callable[[Tree], None] = lambda manifest: None, *, documents: bool = False) -> bool:
    """Recompute sizes and hashes of files, artifacts, records, the manifest and SHA256SUMS.

    `change` gets the manifest first. It knows JSON and hashes, no schema: what it writes may be anything. Files that
    were added are listed, those that are gone are not. `documents`: card, notices, samples and report are written
    anew as well, as somebody with this program would; False where manifest or records are not valid for that.
    """
    manifest: Tree = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    renamed: dict[str, str] = {}
    for artifact in manifest["artifacts"]:
        renamed |= _artifact(bundle, artifact)
    _records(bundle, renamed)
    _bill(bundle, manifest)
    made = documents and _documents(bundle, manifest)
    paths = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    manifest["files"] = [_entry(bundle, path) for path in paths if path not in (MANIFEST, SUMS)]
    data = _sealed(manifest)
    (bundle / MANIFEST).write_bytes(data)
    hashes = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    hashes[MANIFEST] = hashlib.sha256(data).hexdigest()
    lines = "".join(f"{hashes[path]}  {path}\n" for path in sorted(hashes))
    (bundle / SUMS).write_text(lines, encoding="utf-8", newline="\n")
    return made


def _artifact(bundle: Path, artifact: Tree) -> dict[str, str]:
    """Old hash → new hash of the artifact and of its files."""
    folder = artifact["folder"]
    files = [_entry(bundle / folder, entry["path"]) for entry in artifact["files"]]
    renamed = {old["sha256"]: new["sha256"] for old, new in zip(artifact["files"], files, strict=True)}
    artifact["files"] = files
    before, artifact["bytes"] = artifact["bytes"], sum(entry["bytes"] for entry in files)
    if artifact["format"] == "gguf" and artifact["bytes"] != before and isinstance(artifact["bits_per_weight"], float):
        artifact["bits_per_weight"] *= artifact["bytes"] / before
    renamed[artifact["sha256"]] = artifact["sha256"] = _combined(files)
    return renamed


def _combined(files: list[Tree]) -> str:
    from edgedistill.records.base import FileEntry

    return combined_sha256([FileEntry(**entry) for entry in files])


def _records(bundle: Path, renamed: dict[str, str]) -> None:
    """Reports, the bill of materials and the card speak of the new bytes."""
    for path in bundle.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".md", ".html") and path.name != MANIFEST:
            text = before = path.read_text(encoding="utf-8", errors="surrogateescape")
            for old, new in renamed.items():
                text = text.replace(old, new)
            if text != before:
                path.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def _bill(bundle: Path, manifest: Tree) -> None:
    """The bill of materials names the artifacts by their hashes; of a manifest that is none it stays as it is."""
    from pydantic import ValidationError

    from edgedistill.bundle.sbom import sbom_text
    from edgedistill.records.manifest import Manifest

    try:
        text = sbom_text(Manifest.model_validate(manifest))
    except ValidationError:
        return
    if (bundle / "sbom.cdx.json").is_file():
        (bundle / "sbom.cdx.json").write_text(text, encoding="utf-8", newline="\n")


def _documents(bundle: Path, manifest: Tree) -> bool:
    from pydantic import ValidationError

    from edgedistill.bundle.card import model_card
    from edgedistill.bundle.documents import REPORT, documents
    from edgedistill.bundle.licenses import Source
    from edgedistill.records.latency import Latency
    from edgedistill.records.manifest import CARD, Manifest
    from edgedistill.records.retention import Retention
    from edgedistill.report.html import render

    try:
        made = Manifest.model_validate(manifest)
        figures = [
            (
                Retention.model_validate_json((bundle / one.retention).read_bytes()),
                Latency.model_validate_json((bundle / one.latency).read_bytes()) if one.latency else None,
            )
            for one in made.artifacts
        ]
    except (ValidationError, OSError):
        return False
    sources = [
        Source(each.role, each.name, "?" if each.has_license else None, "?" if each.has_notice else None)
        for each in made.sources
    ]
    for path, text in {**documents(made, figures, sources), REPORT: render(made, figures)}.items():
        if path not in ("LICENSE", "NOTICE"):  # the words of others are in these
            (bundle / path).write_text(text, encoding="utf-8", newline="\n")
    paths = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    manifest["files"] = [_entry(bundle, path) for path in paths if path not in (MANIFEST, SUMS)]
    (bundle / CARD).write_text(
        model_card(Manifest.model_validate(manifest), figures, sources), encoding="utf-8", newline="\n"
    )
    return True


def _entry(folder: Path, path: str) -> Tree:
    with (folder / path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path, "bytes": (folder / path).stat().st_size, "sha256": digest}


def _sealed(manifest: Tree) -> bytes:
    manifest["manifest_sha256"] = "0" * 64
    blank = (json.dumps(manifest, indent=1) + "\n").encode()
    field = '"manifest_sha256": "%s"'
    return blank.replace((field % ("0" * 64)).encode(), (field % hashlib.sha256(blank).hexdigest()).encode(), 1)
