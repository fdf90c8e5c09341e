"""Documents of running text: decoded strictly, and cut at a separator, at blank lines, or a line each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from edgedistill.data.opened import (
    MAGIC_BYTES,
    MAX_LINE_BYTES,
    encoding_remedy,
    is_tar,
    open_data,
    refuse_compressed,
    require_room,
    shell_path,
    tar_error,
    wide_encoding,
)
from edgedistill.errors import UserError
from edgedistill.strict import NotJson, parse_json, shown, unescape

MAX_CONTROL_SHARE = 0.001
CONTROLS = bytes(code for code in range(32) if code not in (9, 10, 12, 13))
CHUNK_BYTES = 1 << 22


@dataclass
class Pieces:
    """What a text was cut into: its documents, how many pieces were blank, and what should be said."""

    documents: list[str]
    blank: int = 0
    notes: list[str] = field(default_factory=list)


def read_text_file(path: Path, separator: str | None, compression: str | None = None, where: str = "") -> Pieces:
    """The documents of a text file. UserError as `decode_text`; an empty file has none."""
    text = decode_text(path, separator, compression, where)
    pieces = cut_text(text, separator)
    if separator is None and is_json_row(text.lstrip("\n").partition("\n")[0]):
        pieces.notes.append("its first line is a JSON object and is read as text: named .jsonl, its rows would be read")
    return pieces


def decode_text(path: Path, separator: str | None = None, compression: str | None = None, where: str = "") -> str:
    """The text of a UTF-8 file (a byte order mark is fine). UserError for a binary, another encoding, a document (a
    line, where no `separator` is named) of more than 64 MiB, and more text than this machine has memory for."""
    where = where or str(path)
    with open_data(path, compression, where) as file:
        if compression is None:
            refuse_compressed(file.read(MAGIC_BYTES), path, where)
            file.seek(0)
            require_room(2 * os.fstat(file.fileno()).st_size, where)
        try:
            raw = _scanned(file, path, where, unescape(separator).encode() if separator else b"\n")
        except OSError as error:
            raise UserError(f"data file {where} cannot be read: {error.strerror or error}", "check its disk") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data file {where} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}",
            encoding_remedy(raw[: 1 << 16], path),
        ) from error


def _scanned(file: BinaryIO, path: Path, where: str, separator: bytes) -> bytes:
    """All bytes, in chunks: what is no text is refused early."""
    chunks: list[bytes] = []
    size = controls = run = 0
    tail = b""
    while chunk := file.read(CHUNK_BYTES):
        if not chunks:
            refuse_wide(chunk[: 1 << 12], path, where)
        controls += len(chunk) - len(chunk.translate(None, CONTROLS))
        if controls > MAX_CONTROL_SHARE * (size + len(chunk)):
            raise _binary(chunk, size, controls, path, where)
        run = 0 if separator in tail + chunk else run + len(chunk)
        if run > MAX_LINE_BYTES:
            raise UserError(
                f"data file {where}: {run:,} bytes without {shown(separator.decode())}",
                f"a document has at most {MAX_LINE_BYTES:,} bytes: say what ends one with --document-separator",
            )
        tail = chunk[-max(len(separator) - 1, 1) :]
        chunks.append(chunk)
        size += len(chunk)
        require_room(2 * size, where)
    return b"".join(chunks)


def refuse_wide(start: bytes, path: Path, where: str) -> None:
    """Refuse what begins as UTF-16 or UTF-32: bytes of it are UTF-8 too. UserError with what converts it."""
    wide = wide_encoding(start) if b"\0" in start or start[:1] in (b"\xff", b"\xfe") else None
    if wide is not None:
        raise UserError(f"data file {where} is {wide}", encoding_remedy(start, path))


def _binary(chunk: bytes, before: int, controls: int, path: Path, where: str) -> UserError:
    zero = chunk.find(0)
    if not before and is_tar(chunk):
        return tar_error(path, where)
    if zero < 0:
        old, new = shell_path(path), shell_path(path.with_name(f"clean-{path.name}"))
        return UserError(
            f"data file {where} is binary: {controls:,} control characters",
            rf"give text; if it is, take them out: tr -d '\000-\010\013\016-\037' < {old} > {new}",
        )
    return UserError(
        f"data file {where} is binary: byte {before + zero} is 0", "give text in UTF-8, or .jsonl, .csv, .parquet"
    )


def is_json_row(line: str) -> bool:
    """Whether a line is one JSON object."""
    if not line.startswith("{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except NotJson:
        return False


def refuse_rows_as_text(path: Path, where: str) -> None:
    """Refuse a file of no known suffix that holds JSON lines: as text, brackets and keys would be trained on."""
    with open_data(path, None, where) as file:
        lines = [line for _ in range(8) if (line := file.readline(1 << 20)).strip()][:2]
    first = [line.decode("utf-8-sig", "replace").strip() for line in lines]
    if first and all(map(is_json_row, first)):
        raise UserError(
            f"data file {where} holds JSON objects, but its name does not end in .jsonl",
            f"rename it: mv {shell_path(path)} {shell_path(path.with_name(f'{path.name}.jsonl'))}",
        )


def cut_text(text: str, separator: str | None) -> Pieces:
    """Documents of a text: between two separators, to the byte; else at blank lines; else, and where most paragraphs
    are one line anyway, a line each.

    Line ends are LF, CR LF where every line ends so, and CR where there is no other and no separator is named.
    """
    notes = []
    ends = text.count("\n")
    meant = None if separator is None else unescape(separator)
    if ends and text.count("\r\n") == ends:
        text = text.replace("\r\n", "\n")
        meant = meant and meant.replace("\r\n", "\n")
    elif not ends and separator is None and "\r" in text.strip("\r"):
        text = text.replace("\r", "\n")
        notes.append("its lines end in CR alone, as on old Macs: each CR is read as a line's end")
    elif separator is None and "\r\n" in text:
        text = text.replace("\r\n", "\n")
    made = _between(text, meant) if meant is not None else _paragraphs(text)
    made.notes[:0] = notes
    return made


def _between(text: str, separator: str) -> Pieces:
    """What stands between separators. Where each stands on lines of its own, the line breaks around it are its."""
    pieces = text.split(separator)
    notes = []
    several = len(pieces) > 1 and "\n" not in (separator[0], separator[-1])
    after = several and all(piece.startswith("\n") for piece in pieces[1:] if piece)
    before = several and all(piece.endswith("\n") for piece in pieces[:-1] if piece)
    if after and before:
        pieces = [piece.removeprefix("\n" if at else "").removesuffix("\n") for at, piece in enumerate(pieces)]
    elif (after or before) and len(pieces) > 2:
        side, form = ("behind", f"{shown(separator)[1:-1]}\\n") if after else ("before", f"\\n{shown(separator)[1:-1]}")
        notes.append(
            f"the line break {side} each separator stays in the documents; --document-separator '{form}' takes it too"
        )
    elif len(pieces) == 1:
        notes.append(f"the separator {shown(separator)} does not stand in it: it is one document")
    if not pieces[-1].strip():
        pieces.pop()  # what ends with a separator ends there
    kept = [piece for piece in pieces if piece.strip()]
    return Pieces(kept, len(pieces) - len(kept), notes)


def _paragraphs(text: str) -> Pieces:
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
    return Pieces([stripped for piece in pieces if (stripped := piece.strip("\n")).strip()])
