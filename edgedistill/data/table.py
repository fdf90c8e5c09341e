"""A file of rows while it is read: its lines and columns, what is counted of it, and what errors call it."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from edgedistill.config.recipe import Data
from edgedistill.data.opened import MAX_LINE_BYTES, encoding_remedy
from edgedistill.errors import UserError, did_you_mean
from edgedistill.strict import shown

COLUMNS_SHOWN = 20
CHAT_COLUMNS = frozenset({"messages", "conversations", "conversation", "chosen", "rejected"})
CHAT = (
    "conversations are not read as such yet: render each to one text with the teacher's chat template"
    " (tokenizer.apply_chat_template(messages, tokenize=False)), in a column of its own"
)


@dataclass
class Table:
    """A file of rows while it is read: where it lies, what errors call it, and what is counted of it."""

    path: Path
    where: str
    data: Data
    most: int | None = None  # documents to read
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def no_column(table: Table, names: list[str]) -> UserError:
    """No row has the column: what there is instead, and the remedy that fits it."""
    wanted = table.data.text_column
    listed = ", ".join(shown(name, 40)[1:-1] for name in names[:COLUMNS_SHOWN]) or "none"
    remedy = "name it with --set data.text_column=NAME"
    alike = [name for name in names if name.strip().lower() == wanted.lower()]
    separator = next((mark for mark in ";\t|," if len(names) == 1 and wanted in names[0].split(mark)), None)
    told = re.fullmatch(r"sep=(.)", names[0]) if len(names) == 1 else None
    if told is not None:
        remedy = (
            f"its first line says that columns are separated by {shown(told[1])}: write it with commas, or with tabs"
            " and without that line as .tsv"
        )
    elif names and names[0].lstrip().startswith(("{", "[")):
        remedy = "it looks like JSON: name it .jsonl, or .json where it is one list"
    elif alike:
        remedy = f"name it: --set {_assigned('data.text_column', alike[0])}"
    elif separator is not None:
        remedy = f"its columns are separated by {shown(separator)}: write it with commas, or with tabs as .tsv"
    elif CHAT_COLUMNS & set(names):
        remedy = CHAT
    elif names:
        remedy = f"{remedy}; {did_you_mean(wanted, names)}"
    return UserError(f"data {table.where} has no column {shown(wanted)}: it has {listed}", remedy)


def _assigned(field: str, text: str) -> str:
    """`field=text` as a shell and YAML take it for that text."""
    plain = re.fullmatch(r"[A-Za-z][\w.-]*", text) and text.lower() not in ("true", "false", "null")
    return shlex.quote(f"{field}={text if plain else json.dumps(text)}")


def lines_of(file: BinaryIO, table: Table) -> Iterator[tuple[bytes, int]]:
    """Lines of at most 64 MiB, with their numbers."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"data file {table.where}: line {number:,} has more than {MAX_LINE_BYTES:,} bytes",
                "a row is one line of at most that; split it, or check that this is a file of lines",
            )
        yield line, number


def decoded_line(line: bytes, number: int, table: Table) -> str:
    """A line's text. UserError where it is not UTF-8, with the encoding that it looks like."""
    try:
        text = line.decode()
        return text.lstrip("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise UserError(
            f"data file {table.where}, line {number:,} is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}",
            encoding_remedy(line[: 1 << 16], table.path),
        ) from error
