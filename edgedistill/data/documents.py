"""Where text comes from: python-docs, a text file, a table's rows, a folder of them, a URL, or a hub id.

Local files are read here, anew each time, by the names that they have. What was found, kept, dropped and left out is
counted on the way.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from edgedistill.config.recipe import Data
from edgedistill.data.files import Kind, folder_files, kind_of, printable, read_suffixes
from edgedistill.data.opened import require_room
from edgedistill.data.rows import BLANK, NO_TEXT, read_rows, rows_of
from edgedistill.data.table import Table, no_column
from edgedistill.data.text import read_text_file, refuse_rows_as_text
from edgedistill.errors import UserError
from edgedistill.records.data import FileRead, LeftOut, SourceRead
from edgedistill.strict import local_path, shown

PYTHON_DOCS = "python-docs"
MAX_LISTED = 1000
STREAMED = ("jsonl", "csv", "parquet")  # a .tsv is read twice, a list in .json is read whole
STREAM_BUFFER_BYTES = 1 << 20


IN_RECIPE = {"--data": " or data.source", "--eval-data": " or data.eval_data"}


@dataclass(frozen=True)
class Group:
    """The documents of one file. `running`: lines or paragraphs of a text, whose neighbours belong together."""

    texts: list[str]
    running: bool = False


@dataclass(frozen=True)
class Documents:
    """All documents of a source, file by file, and what was read; None: nothing was (python-docs)."""

    groups: list[Group]
    read: SourceRead | None = None

    @property
    def texts(self) -> list[str]:
        return [text for group in self.groups for text in group.texts]


def read_documents(source: str, data: Data) -> list[str]:
    """All documents of `source`, in order, none of them empty. Raises UserError as `read_source`."""
    return read_source(source, data).texts


def read_source(source: str, data: Data, *, option: str = "--data") -> Documents:
    """All documents of `source`, none of them empty, and what was read, kept and left out. `option`: what named it.

    Raises UserError naming the source: missing, empty, binary, another encoding, no such column.
    """
    if source == PYTHON_DOCS:
        from edgedistill.data.python_docs import python_docs

        return Documents([Group(python_docs()[: data.max_documents])])
    name = source.removeprefix("file://")
    path = local_path(name, what="data")
    if path.is_dir():
        files, left_out = folder_files(path)
        if not files:
            raise _nothing_in(path, left_out)
        made = _read_files(source, files, data, left_out)
    elif os.path.lexists(path):
        made = _read_files(source, [path], data, [])
    elif "://" in name:
        made = _read_url(name, data)
    elif path.suffix or name.startswith((".", "/", "~")):
        raise UserError(f"no data file {name}", f"check the path given with {option}{IN_RECIPE.get(option, '')}")
    else:
        made = _load(name, data)
    if not any(group.texts for group in made.groups):
        raise _no_text(source, made)
    return made


def source_hash(documents: Iterable[str]) -> str:
    """sha256 over the documents in order; independent of how they lay on disk."""
    digest = hashlib.sha256()
    for text in documents:
        block = text.encode()
        digest.update(len(block).to_bytes(8, "little"))
        digest.update(block)
    return digest.hexdigest()


def _nothing_in(folder: Path, left_out: list[LeftOut]) -> UserError:
    held = "; ".join(f"{entry.count:,} {entry.why}" for entry in left_out)
    nameless = any("no suffix" in entry.why for entry in left_out)
    return UserError(
        f"data folder {folder} holds no text{f': {held}' if held else ''}",
        f"it takes files of {read_suffixes()}"
        + ("; a text without a suffix is read where --data names the file itself" if nameless else ""),
    )


def _no_text(source: str, made: Documents) -> UserError:
    read = made.read
    if read is None or not read.rows:
        return UserError(f"data {source} holds no text: it is empty", "give a file with at least a few thousand words")
    why = ", ".join(f"{count:,} {reason}" for reason, count in read.dropped.items())
    return UserError(f"data {source} holds no text: of its {read.rows:,} rows {why}", "check data.text_column")


def _read_files(source: str, paths: list[Path], data: Data, left_out: list[LeftOut]) -> Documents:
    groups: list[Group] = []
    files: list[FileRead] = []
    size = count = 0
    whole = True
    for path in paths:
        most = None if data.max_documents is None else data.max_documents - count
        if most == 0:
            whole = False
            break
        group, file = _read_file(path, kind_of(path.name), data, most, printable(path), alone=len(paths) == 1)
        groups.append(group)
        files.append(file)
        count += len(group.texts)
        whole &= most is None or len(group.texts) < most
        size += sum(map(len, group.texts))
        require_room(size, source)
    if data.document_separator is not None and files and not any(file.format.startswith("text") for file in files):
        unused = "--document-separator ends documents of running text; a row is one already: it changes nothing here"
        files[0] = files[0].model_copy(update={"notes": [*files[0].notes, unused]})
    return _made(source, groups, files, left_out, whole)


def _made(
    source: str, groups: list[Group], files: list[FileRead], left_out: list[LeftOut], whole: bool, *, local: bool = True
) -> Documents:
    dropped: Counter[str] = Counter()
    for file in files:
        dropped.update(file.dropped)
    documents = [text for group in groups for text in group.texts]
    read = SourceRead(
        source=printable(source),
        file_count=len(files) if local else 0,
        files=files[:MAX_LISTED] if local else [],
        rows=sum(file.rows for file in files),
        documents=len(documents),
        dropped=dict(dropped),
        duplicates=len(documents) - len(set(documents)),
        left_out=left_out,
        whole=whole,
    )
    return Documents(groups, read)


def _read_file(
    path: Path, kind: Kind | None, data: Data, most: int | None, where: str, *, alone: bool
) -> tuple[Group, FileRead]:
    """One file's documents. `where` names it in errors; `alone`: no other was named, so it must hold something."""
    notes = []
    if kind is None:
        refuse_rows_as_text(path, where)
        notes.append("its name says no kind that is known: read as text")
        kind = Kind("text")
    if kind.format == "text":
        pieces = read_text_file(path, data.document_separator, kind.compression, where)
        texts = pieces.documents[:most]
        rows = len(texts) + pieces.blank if most is None else len(texts)
        dropped = {BLANK: pieces.blank} if pieces.blank and most is None else {}
        notes += pieces.notes
    else:
        table = Table(path, where, data, most)
        texts = read_rows(table, kind)
        rows, dropped = table.rows, dict(table.dropped)
        notes += table.notes
    if alone and not texts and not rows:
        size = path.stat().st_size
        raise UserError(f"data file {where} is empty ({size:,} bytes, no row or line)", "give a file with text")
    file = FileRead(path=where, format=kind.name, rows=rows, documents=len(texts), dropped=dropped, notes=notes)
    return Group(texts, running=kind.format == "text" and data.document_separator is None), file


def _read_url(url: str, data: Data) -> Documents:
    """A file at a URL: fetched, then read as any other; `data.streaming`: as `datasets` streams it."""
    name = Path(urlsplit(url).path).name
    kind = kind_of(name)
    if kind is None:
        raise UserError(f"data {shown(url)} ends in {shown(name)}", f"a URL names a file of {read_suffixes()}")
    if data.streaming:
        return _stream_url(url, kind, data)
    from datasets import DownloadConfig, DownloadManager

    with tempfile.TemporaryDirectory() as folder:
        # a cache of its own: what lies at a URL may change, and not every server says so
        config = DownloadConfig(cache_dir=folder, disable_tqdm=True)
        try:
            fetched = Path(DownloadManager(download_config=config).download(url))
        except Exception as error:  # each protocol's library has errors of its own
            raise _not_loaded(url, error) from error
        group, file = _read_file(fetched, kind, data, data.max_documents, _without_secrets(url), alone=True)
    whole = data.max_documents is None or len(group.texts) < data.max_documents
    return _made(_without_secrets(url), [group], [file], [], whole)


def _stream_url(url: str, kind: Kind, data: Data) -> Documents:
    """Rows of a file at a URL while it comes, no more of them than `data.max_documents`."""
    if kind.format not in STREAMED or kind.compression is not None:
        raise UserError(
            f"data {shown(url)} is {kind.name}, and {', '.join(STREAMED)} are streamed", "leave data.streaming out"
        )
    import fsspec

    where = _without_secrets(url)
    table = Table(Path(where), where, data, data.max_documents)
    try:
        with fsspec.open(url, "rb") as remote, io.BufferedReader(remote, STREAM_BUFFER_BYTES) as file:
            texts = rows_of(cast(BinaryIO, file), table, kind)
    except UserError:
        raise
    except Exception as error:  # each protocol's library has errors of its own
        raise _not_loaded(url, error) from error
    read = FileRead(
        path=where, format=kind.name, rows=table.rows, documents=len(texts), dropped=dict(table.dropped),
        notes=table.notes,
    )  # fmt: skip
    return _made(where, [Group(texts)], [read], [], data.max_documents is None or len(texts) < data.max_documents)


def _without_secrets(url: str) -> str:
    """A URL as reports show it: without a password, and without a query, which may be a key."""
    parts = urlsplit(url)
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _load(name: str, data: Data) -> Documents:
    """Documents of a data set on a hub, through `datasets`.

    With `data.streaming` rows are read one after another, no more of them than `data.max_documents`, and nothing
    is downloaded whole.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    table = Table(Path(name), name, data, data.max_documents)
    try:
        options = {"name": data.subset} if data.subset else {}
        found = load_dataset(name, split="train", streaming=data.streaming, **options)
        # a stream may not know its columns before its first row
        columns = found.column_names or list(next(iter(found), {}))
        if data.text_column not in columns:
            raise no_column(table, columns)
        texts = list(itertools.islice(_texts(found, table), data.max_documents))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, DatasetsError) as error:
        raise _not_loaded(name, error) from error
    whole = data.max_documents is None or len(texts) < data.max_documents
    read = FileRead(path=name, format="datasets", rows=table.rows, documents=len(texts), dropped=dict(table.dropped))
    return _made(name, [Group(texts)], [read], [], whole, local=False)


def _texts(found: Any, table: Table) -> Iterator[str]:
    """The rows' texts that are not empty; the others are counted. UserError for what is no text."""
    column = table.data.text_column
    for value in (row[column] for row in found) if table.data.streaming else iter(found[column]):
        table.rows += 1
        if value is None:
            table.dropped[NO_TEXT] += 1
        elif not isinstance(value, str):
            raise UserError(
                f"data {table.where}: column '{column}' holds {type(value).__name__}", "name a column of text"
            )
        elif not value.strip():
            table.dropped[BLANK] += 1
        else:
            yield value


def _not_loaded(where: str, error: Exception) -> UserError:
    reason = str(error.__cause__ or error).strip().splitlines()[:1]
    return UserError(
        f"data {shown(where)} cannot be loaded: {reason[0][:300] if reason else type(error).__name__}",
        "give a local file (.txt, .jsonl, .csv, .parquet), a folder, or a dataset id that can be reached from here",
    )
