"""The data stage: read, deduplicate, split, and put the parts in the store."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.data.documents import PYTHON_DOCS, in_pieces, read_documents, source_hash
from edgedistill.data.split import PARTS, split_documents
from edgedistill.progress import QUIET, Progress
from edgedistill.recipe import Data
from edgedistill.records import DataResult
from edgedistill.store import Store, Stored, Work, canonical_json


def prepare_data(data: Data, *, store: Store, progress: Progress = QUIET) -> Stored[DataResult]:
    """Documents split into train.jsonl, calibration.jsonl and held_out.jsonl, keyed by their content.

    Reading is always done anew (it is what finds a changed file) unless the source is the running
    Python's documentation, which cannot change between two runs of one interpreter.
    """
    inputs, documents, held_out = _inputs(data)
    stored = store.run("data", inputs, lambda work: _build(work, data, documents, held_out), DataResult, progress.say)
    # the same text may lie elsewhere now: the record names where this build found it
    return replace(stored, result=stored.result.model_copy(update={"source": _source(data)}))


def find_data(data: Data, *, store: Store) -> Stored[DataResult] | None:
    """The finished record of this data, or None."""
    return store.find("data", _inputs(data)[0], DataResult)


def _inputs(data: Data) -> tuple[dict[str, Any], list[str] | None, list[str] | None]:
    """The key's inputs, and the documents where they had to be read for it."""
    settings = data.model_dump(mode="json", exclude={"source", "eval_data"})
    if data.source == PYTHON_DOCS and data.eval_data is None:
        interpreter = [sys.implementation.name, sys.version, Path(sys.base_prefix).as_posix()]
        return {"data": settings, "interpreter": interpreter, "version": __version__}, None, None
    documents = read_documents(data.source, data)
    held_out = read_documents(data.eval_data, data) if data.eval_data else None
    inputs = {
        "data": settings,
        "documents": source_hash(documents),
        "pieces": in_pieces(data.source, data),
        "version": __version__,
    }
    if held_out is not None:
        inputs["held_out"] = source_hash(held_out)
        inputs["held_out_pieces"] = in_pieces(data.eval_data or "", data)
    return inputs, documents, held_out


def _build(work: Work, data: Data, documents: list[str] | None, held_out: list[str] | None) -> DataResult:
    if documents is None:
        documents = read_documents(data.source, data)
    split = split_documents(
        documents,
        data,
        held_out,
        pieces=in_pieces(data.source, data),
        held_out_pieces=data.eval_data is not None and in_pieces(data.eval_data, data),
    )
    for name in PARTS:
        with (work.out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"documents": block}, ensure_ascii=False) + "\n" for block in split.parts[name])
    parts = split.summary()
    hashes = canonical_json({name: part.sha256 for name, part in parts.items()})
    return DataResult(
        source=_source(data),
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
