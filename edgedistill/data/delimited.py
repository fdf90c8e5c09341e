"""Rows of CSV and TSV: by the first line's names, quotes and line breaks as their writer meant them.

In CSV a quotation mark at a field's start quotes it (RFC 4180). TSV is written both ways: by writers that quote as in
CSV, and by those that never do, where a mark is a mark. Read the wrong way, two marks swallow all lines between them.
So a TSV is read over first, and taken for quoted only where a writer of quoted fields would have written it so.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from edgedistill.data.opened import MAX_LINE_BYTES, shell_path
from edgedistill.data.table import Table, decoded_line, lines_of, no_column
from edgedistill.errors import UserError
from edgedistill.strict import shown

# Python's reader takes a CR for a line's end wherever it stands: those within a line pass through it as two characters
# that begin with this one, and so does this one itself
MASK = "\ufdd0"
LINE_ENDS = ("\r\r\n", "\r\n", "\n")  # the first is what Python on Windows writes where newline="" was forgotten
# a field as it is written: quoted, or bare
FIELD = re.compile(r'(?:"((?:[^"]|"")*)"|([^\t]*))(?:\t|$)')
# a text over several lines is looked at twice where so few others are, or where it is a good part of the file
FEW_SPANNING, LONG_SPAN_LINES, LONG_SPAN_SHARE = 0.05, 50, 0.1


def delimited_rows(file: BinaryIO, table: Table, separator: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows and their first lines. A row that is empty is none; UserError for quotes that do not close, and for more
    fields than the first line has."""
    csv.field_size_limit(MAX_LINE_BYTES)
    literal = separator == "\t" and _quotes_are_text(_lines(file, table), table)
    file.seek(0)
    lines = _lines(file, table)
    reader = (
        csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
        if literal
        else csv.reader(lines, delimiter=separator, strict=True)
    )
    names: list[str] | None = None
    line = longest = longest_at = rows = spanning = 0
    try:
        while True:
            line = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                break
            fields = [_unmasked(value) for value in fields]
            if names is None:
                if separator == "," and fields == ["sep=", ""]:
                    continue  # the line by which Excel is told the separator
                names = fields
                _check_names(names, table)
                if table.data.text_column not in names:
                    raise no_column(table, names)
                continue
            rows += 1
            spanning += reader.line_num > line
            if reader.line_num - line > longest:
                longest, longest_at = reader.line_num - line, line
            if not fields:  # a blank line
                continue
            if any(fields[len(names) :]):
                raise UserError(
                    f"data file {table.where}, line {line:,} has {len(fields):,} fields, the first {len(names):,}",
                    f'put a field with {"a tab" if separator == chr(9) else "a comma"} or a line break in "quotes"',
                )
            yield dict(zip(names, fields, strict=False)), line
    except csv.Error as error:
        raise UserError(
            f"data file {table.where}, line {line:,}: {error}",
            'a field that begins with " ends with one, and a " within it is written twice: correct it, or write .jsonl',
        ) from error
    rare = longest > 1 and spanning <= FEW_SPANNING * rows
    if rare or (longest >= LONG_SPAN_LINES and longest > LONG_SPAN_SHARE * reader.line_num):
        table.notes.append(
            f"one text in quotes goes from line {longest_at:,} to {longest_at + longest:,}: if that is not one text, a"
            " quotation mark is too many"
        )


def _check_names(names: list[str], table: Table) -> None:
    if len(names) == 1 and "\r" in names[0]:
        old, new = shell_path(table.path), shell_path(table.path.with_name(f"lf-{table.path.name}"))
        raise UserError(
            f"data file {table.where} has lines that end in CR alone", rf"convert it: tr '\r' '\n' < {old} > {new}"
        )
    if names.count(table.data.text_column) > 1:
        raise UserError(f"data file {table.where} has the column {shown(table.data.text_column)} twice", "rename one")


def _lines(file: BinaryIO, table: Table) -> Iterator[str]:
    """Decoded lines, each with its end; a CR within a line is masked."""
    for raw, number in lines_of(file, table):
        line = decoded_line(raw, number, table)
        if "\r" in line or MASK in line:
            end = next((end for end in LINE_ENDS if line.endswith(end)), "")
            line = line.removesuffix(end).replace(MASK, f"{MASK}1").replace("\r", f"{MASK}2") + end
        yield line


def _unmasked(value: str) -> str:
    return value.replace(f"{MASK}2", "\r").replace(f"{MASK}1", MASK) if MASK in value else value


@dataclass
class _Evidence:
    """How a TSV's fields are written, column by column.

    A writer of quoted fields quotes a column always, or where a field needs it (a tab, a mark, a line break; Excel:
    a comma too), and never leaves a mark in a bare field.
    """

    bare: set[int] = field(default_factory=set)
    needlessly_quoted: set[int] = field(default_factory=set)
    bare_mark: bool = False
    bare_comma: bool = False
    quoted_for_comma: bool = False

    def see(self, text: str) -> None:
        for column, found in enumerate(FIELD.finditer(text)):
            quoted, bare = found.groups()
            if quoted is None:
                self.bare_mark |= '"' in bare
                self.bare_comma |= "," in bare
                if bare and not _is_number(bare):
                    self.bare.add(column)
            elif not any(mark in quoted for mark in '\t"\n' + MASK) and quoted == quoted.strip() != "":
                if "," in quoted:
                    self.quoted_for_comma = True
                else:
                    self.needlessly_quoted.add(column)

    @property
    def of_marks(self) -> bool:
        """Whether some mark stands where no writer of quoted fields sets one."""
        return self.bare_mark or bool(self.bare & self.needlessly_quoted) or (self.bare_comma and self.quoted_for_comma)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _quotes_are_text(lines: Iterable[str], table: Table) -> bool:
    """Whether the quotation marks of a TSV are marks in its texts and quote nothing. Notes it where there are some."""
    evidence = _Evidence()
    record: list[str] = []
    spanning = spanning_like_rows = 0
    width = 0
    fits = True  # every line has at most as many fields as the first: it can be read without quotes
    marks = broken = False

    def kept() -> Iterator[str]:
        nonlocal fits, marks
        for line in lines:
            fits &= not width or line.count("\t") < width
            marks |= '"' in line
            record.append(line)
            yield line

    through = kept()
    reader = csv.reader(through, delimiter="\t", strict=True)
    try:
        for fields in reader:
            if not width:
                width = len(fields)
            else:
                evidence.see("".join(record).rstrip("\r\n"))
                if len(record) > 1:
                    spanning += 1
                    spanning_like_rows += all(line.count("\t") == width - 1 for line in record)
            record.clear()
    except csv.Error:
        broken = True
        for _ in through:
            record.clear()
    like_rows = spanning > 0 and spanning == spanning_like_rows and width > 1
    literal = fits and (evidence.of_marks or like_rows or (broken and not spanning))
    if literal and marks:
        table.notes.append("its quotation marks are read as text: no writer of quoted fields sets them so")
    return literal and marks
