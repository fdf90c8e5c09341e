"""Where text comes from: python-docs, a text file, a table's rows, a folder of them, a URL, or a hub id."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edgedistill.data.rows import MAX_LINE_BYTES, read_rows, require_room
from edgedistill.errors import UserError
from edgedistill.recipe import Data
from edgedistill.strict import local_path, open_regular, shown, unescape

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
READ = TEXT_SUFFIXES | set(LOADERS)
MAX_CONTROL_SHARE = 0.001
CONTROLS = bytes(code for code in range(32) if code not in (9, 10, 12, 13))
CHUNK_BYTES = 1 << 22
MAX_FILES = 1_000_000


def in_pieces(source: str, data: Data) -> bool:
    """Whether the documents are lines or paragraphs of running text, whose neighbours belong together."""
    path = local_path(source.removeprefix("file://"), what="data")
    files = [path] if path.is_file() else data_files(path) if path.is_dir() else []
    return data.document_separator is None and any(p.suffix.lower() not in LOADERS for p in files)


def data_files(folder: Path) -> list[Path]:
    """The files of a data folder that are read, sorted. Links to folders are not followed; what has a text's name and
    is no file (a FIFO, a device, a link to nothing) is a UserError when it is opened."""
    found: list[Path] = []
    seen = 0

    def refuse(error: OSError) -> None:
        raise UserError(f"data folder {error.filename} cannot be read: {error.strerror}", "check its permissions")

    for place, folders, files in os.walk(folder, onerror=refuse):
        seen += len(files) + len(folders)
        if seen > MAX_FILES:
            raise UserError(f"data folder {folder} holds more than {MAX_FILES:,} files", "name a smaller folder")
        found += [Path(place, name) for name in files if Path(name).suffix.lower() in READ]
    return sorted(found)


def read_documents(source: str, data: Data) -> list[str]:
    """All documents of `source`, in order, none of them empty.

    Raises UserError naming the source: missing, empty, binary, another encoding, no such column.
    """
    if source == PYTHON_DOCS:
        from edgedistill.data.python_docs import python_docs

        return python_docs()
    source = source.removeprefix("file://")
    path = local_path(source, what="data")
    if path.is_dir():
        documents = _read_folder(path, data)
    elif os.path.lexists(path):
        documents = _read_file(path, data)
    elif "://" in source:
        documents = _read_url(source, data)
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


def _read_folder(folder: Path, data: Data) -> list[str]:
    files = data_files(folder)
    if not files:
        raise UserError(f"data folder {folder} holds no text", f"put files of {', '.join(sorted(READ))} there")
    documents: list[str] = []
    size = 0
    for file in files:
        found = _read_file(file, data)
        documents += found
        size += sum(map(len, found))
        require_room(size, folder)
        if data.max_documents is not None and len(documents) >= data.max_documents:
            break
    return documents


def _read_file(path: Path, data: Data) -> list[str]:
    if path.suffix.lower() in LOADERS:
        return read_rows(path, data)
    return split_text(decode_text(path, data.document_separator), data.document_separator)


def _read_url(url: str, data: Data) -> list[str]:
    """A file at a URL: fetched once and kept, then read as any other; `data.streaming`: as `datasets` streams it."""
    suffix = PurePosixPath(url.partition("://")[2]).suffix.lower()
    if suffix not in LOADERS:
        raise UserError(f"data {shown(url)} ends in {shown(suffix)}", f"a URL names a file of {', '.join(LOADERS)}")
    if data.streaming:
        return _load(LOADERS[suffix], url, data)
    from datasets import DownloadConfig, DownloadManager

    try:
        fetched = Path(DownloadManager(download_config=DownloadConfig(disable_tqdm=True)).download(url))
    except Exception as error:  # each protocol's library has errors of its own
        raise _not_loaded(url, error) from error
    with tempfile.TemporaryDirectory() as folder:  # the copy's name is a hash: its kind is the URL's
        named = Path(folder, f"rows{suffix}")
        named.symlink_to(fetched.absolute())
        return read_rows(named, data)


def decode_text(path: Path, separator: str | None = None) -> str:
    """The text of a UTF-8 file (a byte order mark is fine). UserError for a binary, another encoding, a document (a
    line, where no `separator` is named) of more than 64 MiB, and more text than this machine has memory for."""
    with open_regular(path, what="data file") as file:
        size = os.fstat(file.fileno()).st_size
        require_room(2 * size, path)
        try:
            _scan(file, path, size, unescape(separator).encode() if separator else b"\n")
            file.seek(0)
            raw = file.read()
        except OSError as error:
            raise UserError(f"data file {path} cannot be read: {error.strerror}", "check its disk") from error
    if not raw.strip():
        raise UserError(f"data file {path} is empty ({len(raw)} bytes)", "give a file with text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data file {path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}",
            f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {path}",
        ) from error
    return text.replace("\r\n", "\n")


def _scan(file: BinaryIO, path: Path, size: int, separator: bytes) -> None:
    """One pass in chunks before the text is held whole: what is no text is refused early."""
    controls = run = 0
    tail = b""
    while chunk := file.read(CHUNK_BYTES):
        if not tail and chunk[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"data file {path} is UTF-16", f"convert it: iconv -f UTF-16 -t UTF-8 {path}")
        controls += len(chunk) - len(chunk.translate(None, CONTROLS))
        if controls > MAX_CONTROL_SHARE * size:
            zero = chunk.find(0)
            what = f"byte {file.tell() - len(chunk) + zero} is 0" if zero >= 0 else f"{controls:,} control characters"
            raise UserError(
                f"data file {path} is binary: {what}", "give text in UTF-8, or .jsonl, .csv, .parquet, not compressed"
            )
        run = 0 if separator in tail + chunk else run + len(chunk)
        if run > MAX_LINE_BYTES:
            raise UserError(
                f"data file {path}: {run:,} bytes without {shown(separator.decode())}",
                f"a document has at most {MAX_LINE_BYTES:,} bytes: say what ends one with --document-separator",
            )
        tail = chunk[-max(len(separator) - 1, 1) :]


def split_text(text: str, separator: str | None) -> list[str]:
    """Documents of a text: split at `separator`; else at blank lines; else, and where most paragraphs are one
    line anyway, a line each."""
    if separator is not None:
        pieces = text.split(unescape(separator))
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
    """Documents through `datasets`: a hub id, or a URL that is streamed by its loader.

    With `data.streaming` rows are read one after another, no more of them than `data.max_documents`, and nothing
    is downloaded whole.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

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
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, DatasetsError) as error:
        raise _not_loaded(where, error) from error
    wrong = next((row for row in texts if not isinstance(row, str)), None)
    if wrong is not None:
        raise UserError(
            f"data {where}: column '{data.text_column}' holds {type(wrong).__name__}", "name a column of text"
        )
    return texts


def _not_loaded(where: str, error: Exception) -> UserError:
    reason = str(error.__cause__ or error).strip().splitlines()[:1]
    return UserError(
        f"data {shown(where)} cannot be loaded: {reason[0][:300] if reason else type(error).__name__}",
        "give a local file (.txt, .jsonl, .csv, .parquet), a folder, or a dataset id that can be reached from here",
    )


def _texts(table: Any, data: Data) -> list[Any]:
    """The rows' texts that are not empty, at most `max_documents` of them."""
    rows = (row[data.text_column] for row in table) if data.streaming else iter(table[data.text_column])
    kept = (row for row in rows if row is not None and (not isinstance(row, str) or row.strip()))
    return list(itertools.islice(kept, data.max_documents))
