"""Where text comes from: python-docs, a text file, a folder of them, or what `datasets` can load."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from edgedistill.errors import UserError
from edgedistill.recipe import Data

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
MAX_CONTROL_SHARE = 0.001


def in_pieces(source: str, data: Data) -> bool:
    """Whether the documents are lines or paragraphs of running text, whose neighbours belong together."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    return data.document_separator is None and any(p.suffix.lower() not in LOADERS for p in files)


def read_documents(source: str, data: Data) -> list[str]:
    """All documents of `source`, in order, none of them empty.

    Raises UserError naming the source: missing, empty, binary, another encoding, no such column.
    """
    if source == PYTHON_DOCS:
        from edgedistill.data.python_docs import python_docs

        return python_docs()
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES | set(LOADERS))
        if not files:
            raise UserError(
                f"data folder {path} holds no text",
                f"put files of {', '.join(sorted(TEXT_SUFFIXES | set(LOADERS)))} there",
            )
        documents = [text for file in files for text in _read_file(file, data)]
    elif path.is_file():
        documents = _read_file(path, data)
    elif "://" in source:
        suffix = PurePosixPath(source.partition("://")[2]).suffix.lower()
        if suffix not in LOADERS:
            raise UserError(f"data {source} ends in '{suffix}'", f"a URL names a file of {', '.join(sorted(LOADERS))}")
        documents = _load(LOADERS[suffix], source, data)
    elif path.suffix or source.startswith((".", "/", "~")):
        raise UserError(f"no data file {source}", "check the path given with --data")
    else:
        documents = _load(source, None, data)
    documents = documents[: data.max_documents]
    if not documents:
        raise UserError(f"data {source} holds no text", "give a file with at least a few thousand words")
    return documents


def source_hash(documents: Iterable[str]) -> str:
    """sha256 over the documents in order; independent of how they lay on disk."""
    digest = hashlib.sha256()
    for text in documents:
        block = text.encode()
        digest.update(len(block).to_bytes(8, "little"))
        digest.update(block)
    return digest.hexdigest()


def _read_file(path: Path, data: Data) -> list[str]:
    if path.suffix.lower() in LOADERS:
        return _load(LOADERS[path.suffix.lower()], str(path), data)
    return split_text(decode_text(path), data.document_separator)


def decode_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte order mark is fine). Binary or another encoding is a UserError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}", "check its permissions") from error
    if not raw.strip():
        raise UserError(f"data file {path} is empty ({len(raw)} bytes)", "give a file with text")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"data file {path} is UTF-16", f"convert it: iconv -f UTF-16 -t UTF-8 {path}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in raw[:65536]:
            raise UserError(
                f"data file {path} is binary: byte {raw.find(0)} is 0", "give text in UTF-8, or .jsonl, .csv, .parquet"
            ) from error
        raise UserError(
            f"data file {path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}",
            f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {path}",
        ) from error
    controls = sum(text.count(chr(code)) for code in range(32) if code not in (9, 10, 12, 13))
    if controls > MAX_CONTROL_SHARE * len(text):
        raise UserError(f"data file {path} is binary: {controls:,} control characters", "give text in UTF-8")
    return text.replace("\r\n", "\n")


def split_text(text: str, separator: str | None) -> list[str]:
    """Documents of a text: split at `separator`; else at blank lines; else, and where most paragraphs are one
    line anyway, a line each."""
    if separator is not None:
        pieces = text.split(separator.encode().decode("unicode_escape") if "\\" in separator else separator)
    else:
        lines = text.split("\n")
        paragraphs: list[list[str]] = [[]]
        for line in lines:
            if line.strip():
                paragraphs[-1].append(line)
            elif paragraphs[-1]:
                paragraphs.append([])
        single = sum(len(paragraph) == 1 for paragraph in paragraphs)
        one_by_one = not any(not line.strip() for line in lines[:-1]) or 2 * single > len(paragraphs)
        pieces = lines if one_by_one else ["\n".join(paragraph) for paragraph in paragraphs]
    return [stripped for piece in pieces if (stripped := piece.strip("\n")).strip()]


def _load(name: str, file: str | None, data: Data) -> list[str]:
    """Documents through `datasets`: a local file or a URL by its loader, or a hub id.

    With `data.streaming` rows are read one after another, no more of them than `data.max_documents`, and nothing
    is downloaded whole.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    where = file or name
    options: dict[str, Any] = {"data_files": file} if file else ({"name": data.subset} if data.subset else {})
    if file and file.lower().endswith(".tsv"):
        options["sep"] = "\t"
    try:
        table = load_dataset(name, split="train", streaming=data.streaming, **options)
        # a stream may not know its columns before its first row
        columns = table.column_names or list(next(iter(table), {}))
        if data.text_column not in columns:
            raise UserError(
                f"data {where} has no column '{data.text_column}': it has {', '.join(columns)}",
                "name it with --set data.text_column=NAME",
            )
        texts = _texts(table, data)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[:1]
        raise UserError(
            f"data {where} cannot be loaded: {reason[0][:300] if reason else type(error).__name__}",
            "give a local file (.txt, .jsonl, .csv, .parquet), a folder, or a dataset id that can be reached from here",
        ) from error
    wrong = next((row for row in texts if not isinstance(row, str)), None)
    if wrong is not None:
        raise UserError(
            f"data {where}: column '{data.text_column}' holds {type(wrong).__name__}", "name a column of text"
        )
    return texts


def _texts(table: Any, data: Data) -> list[Any]:
    """The rows' texts that are not empty, at most `max_documents` of them."""
    rows = (row[data.text_column] for row in table) if data.streaming else iter(table[data.text_column])
    kept = (row for row in rows if row is not None and (not isinstance(row, str) or row.strip()))
    return list(itertools.islice(kept, data.max_documents))
