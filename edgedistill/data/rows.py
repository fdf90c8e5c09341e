"""Texts of a table's rows, from JSON lines, CSV and Parquet: a row at a time, strictly, in bounded memory.

A file that inflates (a gzip bomb, a Parquet page of one text a million times), a line without end, nesting that
kills a parser: each is refused with its line. No row is skipped but one without a text.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from edgedistill.errors import UserError
from edgedistill.recipe import Data
from edgedistill.strict import NotJson, open_regular, parse_json, shown

MAX_LINE_BYTES = 1 << 26  # of a line and of a document; the longest books have 10 MB
MAX_ARRAY_BYTES = 1 << 29  # a .json file that is one list is parsed whole
MIN_INFLATION_BYTES, MAX_INFLATION = 1 << 28, 200  # Parquet: text beyond both, beside the file's size, is a bomb
MAX_FOOTER_BYTES = 1 << 26
PARQUET_ROWS = 16  # a batch; each of its texts may be a whole page of 2 GB in a file that is made to hurt
COLUMNS_SHOWN = 20
ROW = "a row is one JSON object on a line"
COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


def read_rows(path: Path, data: Data) -> list[str]:
    """The texts in the column that `data` names, at most `max_documents`. UserError with file, line and cause."""
    suffix = path.suffix.lower()
    with open_regular(path, what="data file") as file:
        try:
            if suffix == ".parquet":
                return _kept(_parquet(file, path, data), path, data)
            _refuse_compressed(file, path)
            rows = _csv(file, path, "\t" if suffix == ".tsv" else ",", data) if suffix in (".csv", ".tsv") else (
                _json(file, path)
            )  # fmt: skip
            return _kept(_column(rows, path, data), path, data)
        except OSError as error:
            raise UserError(f"data file {path} cannot be read: {error.strerror or error}", "check its disk") from error


def require_room(text_bytes: int, path: str | Path) -> None:
    """Refuse text that does not fit in half of this machine's memory: a document in it is a Python text."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if text_bytes > memory // 2:
        raise UserError(
            f"data {path} holds at least {text_bytes:,} bytes of text, this machine has {memory:,} bytes of memory",
            "read the first of it with --set data.max_documents=N (.jsonl, .csv, .parquet), or give a smaller file",
        )


def _kept(values: Iterable[tuple[Any, int]], path: Path, data: Data) -> list[str]:
    """The texts that are not empty, of pairs of value and line."""
    kept: list[str] = []
    size = 0
    for value, line in values:
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str):
            raise UserError(
                f"data {path}: column '{data.text_column}' holds {type(value).__name__} (row {line:,})",
                "name a column of text",
            )
        size += len(value)
        if len(value) > MAX_LINE_BYTES:
            raise UserError(
                f"data {path}: the text of row {line:,} has {len(value):,} characters",
                f"a document has at most {MAX_LINE_BYTES:,}: split it",
            )
        kept.append(value)
        if len(kept) % 1024 == 0:
            require_room(size, path)
        if len(kept) == data.max_documents:
            break
    return kept


def _column(rows: Iterable[tuple[dict[str, Any], int]], path: Path, data: Data) -> Iterator[tuple[Any, int]]:
    """The column's value in each row, None where a row lacks it. UserError where all rows do."""
    found = False
    names: dict[str, None] = {}
    for row, line in rows:
        if data.text_column in row:
            found = True
            yield row[data.text_column], line
        elif not found and len(names) < COLUMNS_SHOWN:
            names.update(dict.fromkeys(row))
    if names and not found:
        raise _no_column(path, data, list(names))


def _no_column(path: Path, data: Data, names: list[str]) -> UserError:
    listed = ", ".join(shown(name, 40)[1:-1] for name in names[:COLUMNS_SHOWN])
    return UserError(
        f"data {path} has no column {shown(data.text_column)}: it has {listed}",
        "name it with --set data.text_column=NAME",
    )


def _refuse_compressed(file: BinaryIO, path: Path) -> None:
    start = file.read(6)
    file.seek(0)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"data file {path} is compressed ({name})", "decompress it first; text is read as it is")


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"data file {path}: line {number:,} has more than {MAX_LINE_BYTES:,} bytes",
                "a row is one line of at most that; split it, or check that this is a file of lines",
            )
        yield line, number


def _json(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """JSON lines; a .json file may also be one list of rows."""
    if path.suffix.lower() == ".json" and file.read(64).lstrip()[:1] == b"[":
        yield from _json_list(file, path)
        return
    file.seek(0)
    for line, number in _lines(file, path):
        if line.isspace():
            continue
        try:
            row = parse_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except NotJson as error:
            raise UserError(
                f"data file {path}, line {number:,}: {error}", "a row is one JSON object on a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"data file {path}, line {number:,} holds a {type(row).__name__}", ROW)
        yield row, number


def _json_list(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_ARRAY_BYTES:
        raise UserError(f"data file {path} is a JSON list of {size:,} bytes", "write a row a line (.jsonl)")
    file.seek(0)
    try:
        rows = parse_json(file.read(MAX_ARRAY_BYTES))
    except NotJson as error:
        raise UserError(f"data file {path}: {error}", "it is a list of JSON objects, or one object a line") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"data file {path}: row {number:,} holds a {type(row).__name__}", "a row is a JSON object")
        yield row, number


def _csv(file: BinaryIO, path: Path, separator: str, data: Data) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows by the first line's names. A quoted field may hold line breaks."""

    def decoded() -> Iterator[str]:
        for line, number in _lines(file, path):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data file {path}, line {number:,} is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}",
                    f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {path}",
                ) from error

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(decoded(), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if names.count(data.text_column) > 1:
            raise UserError(f"data file {path} has the column {shown(data.text_column)} twice", "rename one")
        if names and data.text_column not in names:
            raise _no_column(path, data, names)
        for fields in reader:
            if len(fields) > len(names):
                raise UserError(
                    f"data file {path}, line {reader.line_num:,} has {len(fields):,} fields, the first {len(names):,}",
                    'a field with a comma or a line break stands in "quotes"',
                )
            yield dict(zip(names, fields, strict=False)), reader.line_num
    except csv.Error as error:
        raise UserError(f"data file {path}, line {reader.line_num:,}: {error}", "mend the line's quotes") from error


def _parquet(file: BinaryIO, path: Path, data: Data) -> Iterator[tuple[Any, int]]:
    size = os.fstat(file.fileno()).st_size
    again = "copy or write it again"
    tail = file.seek(max(size - 8, 0)) and file.read(8)
    if size < 12 or not tail or tail[4:] != b"PAR1":
        raise UserError(f"data file {path} is no Parquet file: it does not end in PAR1", again)
    if int.from_bytes(tail[:4], "little") > min(size - 12, MAX_FOOTER_BYTES):
        raise UserError(f"data file {path} is no whole Parquet file: its footer's length is wrong", again)
    import pyarrow
    from pyarrow import parquet

    limits = {"thrift_string_size_limit": MAX_FOOTER_BYTES, "thrift_container_size_limit": 1_000_000}
    line = text_bytes = 0
    try:
        table = parquet.ParquetFile(file, **limits)
        names = table.schema_arrow.names
        if data.text_column not in names:
            raise _no_column(path, data, names)
        for batch in table.iter_batches(PARQUET_ROWS, columns=[data.text_column], use_threads=False):
            for scalar in batch.column(0):
                value = scalar.as_py()
                line += 1
                text_bytes += len(value) if isinstance(value, str) else 0
                if text_bytes > max(MIN_INFLATION_BYTES, MAX_INFLATION * size):
                    raise UserError(
                        f"data file {path} of {size:,} bytes holds at least {text_bytes:,} characters of text",
                        f"more than {MAX_INFLATION} times a file's size is taken for a bomb: write it as .jsonl",
                    )
                yield value, line
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"data file {path} cannot be read as Parquet: {reason}", again) from error
