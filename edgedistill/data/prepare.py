"""The data stage: read, deduplicate, split, and put the parts in the store."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.config.recipe import Data
from edgedistill.data.documents import PYTHON_DOCS, Documents, read_source, source_hash
from edgedistill.data.report import tell
from edgedistill.data.split import PARTS, split_documents
from edgedistill.progress import QUIET, Progress
from edgedistill.records.data import DataResult, SourceRead
from edgedistill.store import Store, Stored, Work, canonical_json

LAYOUT = 3  # of the record and its parts: 3 since what is held out is left out of the training


def prepare_data(data: Data, *, store: Store, progress: Progress = QUIET) -> Stored[DataResult]:
    """Documents split into train.jsonl, calibration.jsonl and held_out.jsonl, keyed by their content.

    Reading is always done anew (it is what finds a changed file) unless the source is the running
    Python's documentation, which cannot change between two runs of one interpreter.
    """
    texts = read_texts(data)
    for read in texts.read:
        tell(read, progress)
    stored = store.run("data", _inputs(data, texts), lambda work: _build(work, data, texts), DataResult, progress.say)
    return _as_read(stored, data, texts)


def find_data(data: Data, *, store: Store, texts: Texts | None = None) -> Stored[DataResult] | None:
    """The finished record of this data, or None. `texts`: its text, where the caller has read it already."""
    texts = read_texts(data) if texts is None else texts
    found = store.find("data", _inputs(data, texts), DataResult)
    return None if found is None else _as_read(found, data, texts)


@dataclass(frozen=True)
class Texts:
    """The text that a recipe names, read: all of it, and the held-out text where that is one of its own.

    None for Python's documentation, which is read when it is split.
    """

    documents: Documents | None
    held_out: Documents | None

    @property
    def read(self) -> list[SourceRead]:
        return [each.read for each in (self.documents, self.held_out) if each is not None and each.read is not None]


def read_texts(data: Data) -> Texts:
    """The text of `data.source` and `data.eval_data`. UserError as `read_source`."""
    if data.source == PYTHON_DOCS and data.eval_data is None:
        return Texts(None, None)
    return Texts(read_source(data.source, data), _held_out_of_its_own(data))


def _held_out_of_its_own(data: Data) -> Documents | None:
    return read_source(data.eval_data, data, option="--eval-data") if data.eval_data else None


def _inputs(data: Data, texts: Texts) -> dict[str, Any]:
    """What can change the parts: the settings, and the documents' content, file by file."""
    settings = data.model_dump(mode="json", exclude={"source", "eval_data"})
    base = {"data": settings, "layout": LAYOUT, "version": __version__}
    if texts.documents is None:
        return {**base, "interpreter": [sys.implementation.name, sys.version, Path(sys.base_prefix).as_posix()]}
    inputs = {**base, "documents": _hashes(texts.documents)}
    return inputs if texts.held_out is None else {**inputs, "held_out": _hashes(texts.held_out)}


def _hashes(documents: Documents) -> str:
    """One hash over all files: rows as they follow each other, running text file by file, as blocks are made of it."""
    parts: list[tuple[bool, list[str]]] = []
    for group in documents.groups:
        if parts and not group.running and not parts[-1][0]:
            parts[-1][1].extend(group.texts)
        elif group.texts:
            parts.append((group.running, list(group.texts)))
    listed = canonical_json([[running, source_hash(texts)] for running, texts in parts])
    return hashlib.sha256(listed.encode()).hexdigest()


def _as_read(stored: Stored[DataResult], data: Data, texts: Texts) -> Stored[DataResult]:
    """The same text may lie elsewhere now: the record names where this build found it, and in which files."""
    return replace(stored, result=stored.result.model_copy(update={"source": _source(data), "read": texts.read}))


def _build(work: Work, data: Data, texts: Texts) -> DataResult:
    documents = texts.documents or read_source(data.source, data)
    held_out = texts.held_out
    split = split_documents(documents.groups, data, held_out.groups if held_out is not None else None)
    for name in PARTS:
        with (work.out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"documents": block}, ensure_ascii=False) + "\n" for block in split.parts[name])
    parts = split.summary()
    hashes = canonical_json({name: part.sha256 for name, part in parts.items()})
    return DataResult(
        source=_source(data),
        read=texts.read,
        split="own file" if held_out is not None else data.split,
        parts=parts,
        duplicates_dropped=split.duplicates_dropped,
        overlap=split.overlap,
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
    )


def _source(data: Data) -> str:
    return data.source if data.eval_data is None else f"{data.source} (held out: {data.eval_data})"


def read_part(folder: Path, part: str) -> list[list[str]]:
    """The blocks of one part of a data record, each a list of documents."""
    with (folder / f"{part}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["documents"] for line in file]
