"""Texts of a table's rows, from JSON lines, CSV, TSV and Parquet: a row at a time, strictly, in bounded memory.

A file that inflates (a gzip bomb, a Parquet page of one text a million times), a line without end, nesting that
kills a parser: each is refused with its line. No row is skipped but one without a text, and those are counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from edgedistill.data.delimited import delimited_rows
from edgedistill.data.files import WHOLE, Kind
from edgedistill.data.opened import (
    MAX_INFLATION,
    MAX_LINE_BYTES,
    MIN_INFLATION_BYTES,
    open_data,
    refuse_compressed,
    require_room,
)
from edgedistill.data.table import CHAT, COLUMNS_SHOWN, Table, decoded_line, lines_of, no_column
from edgedistill.data.text import refuse_wide
from edgedistill.errors import UserError
from edgedistill.strict import NotJson, parse_json, shown

MAX_ARRAY_BYTES = 1 << 29  # a .json file that is one list is parsed whole
MAX_FOOTER_BYTES = 1 << 26
SAMPLE_BYTES = 1 << 12  # of a file's start, which say whether it is text in UTF-8
PARQUET_ROWS = 16  # a batch; each of its texts may be a whole page of 2 GB in a file that is made to hurt
ARROW_MAGIC = b"ARROW1"  # of a file; a stream has none
NO_TEXT, BLANK = "without a text", "with a blank text"


def read_rows(table: Table, kind: Kind) -> list[str]:
    """The texts in the column that `data` names, at most `most` of them. UserError with file, line and cause."""
    with open_data(table.path, kind.compression, table.where) as file:
        try:
            if kind.format not in WHOLE:
                start = file.read(SAMPLE_BYTES)
                if kind.compression is None:
                    refuse_compressed(start, table.path, table.where)
                refuse_wide(start, table.path, table.where)
                file.seek(0)
            return rows_of(file, table, kind)
        except OSError as error:
            raise UserError(
                f"data file {table.where} cannot be read: {error.strerror or error}", "check its disk"
            ) from error


def rows_of(file: BinaryIO, table: Table, kind: Kind) -> list[str]:
    """As `read_rows`, of an open file whose content is `kind`'s format."""
    if kind.format == "parquet":
        return _kept(_parquet(file, table), table)
    if kind.format == "arrow":
        return _kept(_arrow(file, table), table)
    if kind.format in ("csv", "tsv"):
        rows = delimited_rows(file, table, "\t" if kind.format == "tsv" else ",")
    else:
        rows = _json(file, table, kind)
    return _kept(_column(rows, table), table)


def _kept(values: Iterable[tuple[Any, int]], table: Table) -> list[str]:
    """The texts that are not empty, of pairs of value and line."""
    kept: list[str] = []
    size = 0
    column = shown(table.data.text_column)
    for value, line in values:
        table.rows += 1
        if value is None:
            table.dropped[NO_TEXT] += 1
            continue
        if not isinstance(value, str):
            raise UserError(
                f"data {table.where}: column {column} holds {type(value).__name__} (row {line:,})",
                _no_text(value, table),
            )
        if not value.strip():
            table.dropped[BLANK] += 1
            continue
        size += len(value)
        if len(value) > MAX_LINE_BYTES:
            raise UserError(
                f"data {table.where}: the text of row {line:,} has {len(value):,} characters",
                f"a document has at most {MAX_LINE_BYTES:,}: split it",
            )
        kept.append(value)
        if len(kept) % 1024 == 0:
            require_room(size, table.where)
        if len(kept) == table.most:
            break
    return kept


def _no_text(value: Any, table: Table) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return CHAT
    if isinstance(value, list) and value and isinstance(value[0], str):
        return "a row holds one text: write a row for each text of the list, or join them"
    if isinstance(value, dict) and table.path.suffix.lower() == ".json" and "0" in value:
        return "write a row a line; with pandas: to_json(..., orient='records', lines=True)"
    if isinstance(value, dict):
        names = ", ".join(shown(name) for name in list(value)[:5])
        return f"its texts stand in fields of it ({names}): write one of them to a column of its own"
    return "name a column of text with --set data.text_column=NAME, or write the values as text, in quotes"


def _column(rows: Iterable[tuple[dict[str, Any], int]], table: Table) -> Iterator[tuple[Any, int]]:
    """The column's value in each row, None where a row lacks it. UserError where all rows do."""
    name = table.data.text_column
    found = False
    lacking = 0  # a row without the column counts once it is known that others have it
    names: dict[str, None] = {}
    for row, line in rows:
        if name in row:
            if not found:
                yield from ((None, 0) for _ in range(lacking))
            found = True
            yield row[name], line
        elif found:
            yield None, line
        else:
            lacking += 1
            if len(names) < COLUMNS_SHOWN:
                names.update(dict.fromkeys(row))
    if lacking and not found:
        raise no_column(table, list(names))


def _json(file: BinaryIO, table: Table, kind: Kind) -> Iterator[tuple[dict[str, Any], int]]:
    """JSON lines; a .json file may also be one list of rows."""
    if kind.format == "json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _json_list(file, table)
        return
    file.seek(0)
    for line, number in lines_of(file, table):
        text = decoded_line(line, number, table).removeprefix("\ufeff")  # of files that were put one behind the other
        if not text.strip():
            continue
        try:
            row = parse_json(text, constants=True)
        except NotJson as error:
            if kind.format == "json" and number == 1:
                _refuse_rows_within(_whole_object(file), table)
            raise UserError(
                f"data file {table.where}, line {number:,}: {error}", _json_remedy(text, str(error), table, kind)
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"data file {table.where}, line {number:,} holds a {type(row).__name__}",
                "one list of rows is a .json file, not .jsonl"
                if isinstance(row, list) and row and isinstance(row[0], dict)
                else f'a row is one JSON object on a line, like {{"{table.data.text_column}": "..."}}',
            )
        if kind.format == "json" and number == 1 and table.data.text_column not in row:
            _refuse_rows_within(row, table)
        yield row, number


def _json_remedy(line: str, reason: str, table: Table, kind: Kind) -> str:
    """What to do about a line that is no JSON, by what it looks like."""
    line = line.strip()
    if "surrogate" in reason:
        return "the escape is half of a character: write \\ufffd in its place, or take it out"
    if "appears twice" in reason:
        return "give each key of a row once"
    if line[-1:] == "," and line[:1] == "{":
        return "the line ends with a comma: take it out, or write one list of rows to a .json file"
    if line[:1] == "[" and kind.format != "json":
        return f"one list of rows is a .json file: name it {table.path.stem}.json"
    if line[:2] in ("{'", "{}") or line[:1] == "(":
        return "it looks like Python's own notation: write each row with json.dumps"
    if line in ("{", "}"):
        return "an object over several lines: write one row a line (.jsonl), or one list of rows (.json)"
    return "a row is one JSON object on a line"


def _refuse_rows_within(row: dict[str, Any], table: Table) -> None:
    """A .json file that is one object around its rows. UserError that says where they stand."""
    within = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if within:
        raise UserError(
            f"data {table.where} is one object, its rows are under {shown(within[0])}",
            f"write that list alone to a file, e.g. jq .{within[0]} {table.path.name} > rows.json",
        )


def _whole_object(file: BinaryIO) -> dict[str, Any]:
    """A file that is one JSON object, over as many lines as it likes; nothing where it is none."""
    file.seek(0)
    try:
        whole = parse_json(file.read(MAX_ARRAY_BYTES).decode("utf-8-sig"), constants=True)
    except ValueError:  # NotJson and what is not UTF-8 among them
        return {}
    return whole if isinstance(whole, dict) else {}


def _json_list(file: BinaryIO, table: Table) -> Iterator[tuple[dict[str, Any], int]]:
    file.seek(0)
    raw = file.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        raise UserError(
            f"data file {table.where} is a JSON list of more than {MAX_ARRAY_BYTES:,} bytes",
            "write a row a line (.jsonl)",
        )
    try:
        rows = parse_json(decoded_line(raw, 1, table), constants=True)
    except NotJson as error:
        raise UserError(
            f"data file {table.where}: {error}", "it is one list of JSON objects, or (.jsonl) one object a line"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"data file {table.where}: row {number:,} holds a {type(row).__name__}", "a row is a JSON object"
            )
        yield row, number


def _parquet(file: BinaryIO, table: Table) -> Iterator[tuple[Any, int]]:
    size = file.seek(0, os.SEEK_END)
    again = "copy or write it again"
    tail = file.seek(max(size - 8, 0)) and file.read(8)
    if size < 12 or not tail or tail[4:] != b"PAR1":
        raise UserError(f"data file {table.where} is not a Parquet file: it does not end in PAR1", again)
    if int.from_bytes(tail[:4], "little") > min(size - 12, MAX_FOOTER_BYTES):
        raise UserError(f"data file {table.where} is not a complete Parquet file: its footer's length is wrong", again)
    import pyarrow
    from pyarrow import parquet

    limits = {"thrift_string_size_limit": MAX_FOOTER_BYTES, "thrift_container_size_limit": 1_000_000}
    column = table.data.text_column
    try:
        opened = parquet.ParquetFile(file, **limits)
        names = opened.schema_arrow.names
        if names.count(column) != 1:
            raise no_column(table, names) if column not in names else _twice(table)
        yield from _texts_of(opened.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False), size, table)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"data file {table.where} cannot be read as Parquet: {reason}", again) from error


def _arrow(file: BinaryIO, table: Table) -> Iterator[tuple[Any, int]]:
    """Rows of an Arrow file or stream, as `datasets` keeps them: a block at a time, each checked before it is read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    import pyarrow
    from pyarrow import ipc

    again = "write it again; of `datasets`: save_to_disk, or to_parquet"
    column = table.data.text_column
    try:
        whole = file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        file.seek(0)
        opened = ipc.open_file(file) if whole else ipc.open_stream(file)
        names = opened.schema.names
        if names.count(column) != 1:
            raise no_column(table, names) if column not in names else _twice(table)
        blocks = (opened.get_batch(index) for index in range(opened.num_record_batches)) if whole else opened
        # a file from outside: offsets that lead out of its text are found by validate, which gives nothing back
        yield from _texts_of((batch for batch in blocks if batch.validate(full=True) is None), size, table)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"data file {table.where} cannot be read as Arrow: {reason}", again) from error


def _texts_of(batches: Iterable[Any], size: int, table: Table) -> Iterator[tuple[Any, int]]:
    """The text column's values with their row, counted from 1."""
    line = text_bytes = 0
    for batch in batches:
        for scalar in batch.column(table.data.text_column):
            line += 1
            value = _text_of(scalar, line, table)
            text_bytes += len(value) if isinstance(value, str) else 0
            _require_real(text_bytes, size, table)
            yield value, line


def _text_of(scalar: Any, row: int, table: Table) -> Any:
    """A cell's value. Bytes are the text that they are in UTF-8: some writers of Parquet do not say that a column is
    text (Spark, Impala). UserError where they are none."""
    value = scalar.as_py()
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        column = shown(table.data.text_column)
        raise UserError(
            f"data file {table.where}, row {row:,}: column {column} holds bytes that are not UTF-8",
            "name a column of text with --set data.text_column=NAME, or write the text as such",
        ) from error


def _require_real(text_bytes: int, size: int, table: Table) -> None:
    """Refuse text that a file of its size does not hold. UserError."""
    if text_bytes > max(MIN_INFLATION_BYTES, MAX_INFLATION * size):
        raise UserError(
            f"data file {table.where} of {size:,} bytes holds at least {text_bytes:,} characters of text",
            f"more than {MAX_INFLATION} times a file's size is taken for a bomb: write it as .jsonl",
        )


def _twice(table: Table) -> UserError:
    return UserError(f"data file {table.where} has the column {shown(table.data.text_column)} twice", "rename one")
