"""Data files opened: regular ones alone, gzip and zstd inflated as they are read, within bounds."""

from __future__ import annotations

import gzip
import io
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from edgedistill.data.files import kind_of
from edgedistill.errors import UserError
from edgedistill.strict import open_regular

MAX_LINE_BYTES = 1 << 26  # of a line and of a document; the longest books have 10 MB
MIN_INFLATION_BYTES, MAX_INFLATION = 1 << 28, 200  # text beyond both, beside the file's size, is a bomb
BUFFER_BYTES = 1 << 20
# how a compressed file begins, and what takes it apart
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"), b"PK\x03\x04": ("zip", "unzip"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"), b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    **{b"BZh%d1AY" % level: ("bzip2", "bunzip2") for level in range(1, 10)},
}  # fmt: skip
# what else has no text on its outside
DOCUMENTS = {
    b"%PDF-": ("a PDF", "take its text out, e.g. with pdftotext"),
    b"PAR1": ("Parquet", "rename it to {name}.parquet"),
    b"ARROW1": ("an Arrow file", "rename it to {name}.arrow"),
    b"\xff\xff\xff\xff": ("an Arrow file", "rename it to {name}.arrow"),
}
OFFICE = {
    ".xlsx": "an Excel table", ".ods": "a table", ".docx": "a Word document", ".odt": "a text document",
    ".pptx": "a presentation", ".epub": "an e-book",
}  # fmt: skip
TAR_MAGIC, TAR_AT = b"ustar", 257
MAGIC_BYTES = TAR_AT + len(TAR_MAGIC)
ENDINGS = {"gzip": ".gz", "zstd": ".zst"}
TAR_ENDINGS = (".tar", ".tgz")
WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


@contextmanager
def open_data(path: Path, compression: str | None, where: str) -> Iterator[BinaryIO]:
    """A data file's bytes, inflated; it can be read again from its start. `where` names it in errors.

    Raises UserError: what is no regular file, what is not so compressed, cut off, or inflates without end.
    """
    with open_regular(path, what="data file") as file:
        if compression is None:
            yield file
            return
        with io.BufferedReader(_Inflated(file, compression, where), BUFFER_BYTES) as inflated:
            yield cast(BinaryIO, inflated)


class _Inflated(io.RawIOBase):
    """The content of a compressed file. Seeks to its start alone."""

    def __init__(self, file: BinaryIO, compression: str, where: str) -> None:
        self._file, self._compression, self._where = file, compression, where
        self._most = max(MIN_INFLATION_BYTES, MAX_INFLATION * os.fstat(file.fileno()).st_size)
        self._start()

    def _start(self) -> None:
        self._stream: Any = None  # the last one, before the file's position is moved
        self._file.seek(0)
        self._read = 0
        if self._compression == "gzip":
            self._stream = gzip.GzipFile(fileobj=self._file, mode="rb")
        else:
            import pyarrow

            own = io.FileIO(os.dup(self._file.fileno()))  # which arrow closes with its stream
            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(own, mode="r"), self._compression)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0):
            raise io.UnsupportedOperation("seeks to its start alone")
        self._start()
        return 0

    def tell(self) -> int:
        return self._read

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            reason = str(error).rstrip(".")
            raise UserError(
                f"data file {self._where} cannot be read as {self._compression}: {reason}",
                "copy or write it again; if it is not compressed like that, give it the right ending",
            ) from error
        self._read += len(chunk)
        if self._read > self._most:
            raise UserError(
                f"data file {self._where} inflates to more than {self._most:,} bytes",
                f"more than {MAX_INFLATION} times a file's size is taken for a bomb: decompress it first",
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)


def shell_path(path: Path) -> str:
    """A path as it stands in a command that a remedy names."""
    return shlex.quote(str(path))


def refuse_compressed(start: bytes, path: Path, where: str) -> None:
    """Refuse a file that begins as a compressed one, or as a document of an office. UserError."""
    for magic, (name, remedy) in DOCUMENTS.items():
        if start.startswith(magic):
            raise UserError(f"data file {where} is {name}", remedy.format(name=path.name))
    if start.startswith(b"PK\x03\x04") and path.suffix.lower() in OFFICE:
        raise UserError(
            f"data file {where} is {OFFICE[path.suffix.lower()]}", "save its text as .txt, or its table as .csv"
        )
    if is_tar(start):
        raise tar_error(path, where)
    for magic, (name, tool) in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"data file {where} is compressed ({name})", _compressed_remedy(path, name, tool))


def _compressed_remedy(path: Path, compression: str, tool: str) -> str:
    """What makes a compressed file one that is read, by what its name says that it holds."""
    ending = ENDINGS.get(compression)
    name = path.name.removesuffix(path.suffix) if ending and path.suffix.lower() == ending else path.name
    inner = Path(name).suffix.lower()
    if inner in TAR_ENDINGS:
        return tar_error(path, str(path)).remedy
    if ending is None:
        return f"decompress it first ({tool}); .gz and .zst are read"
    if inner in (".parquet", ".arrow"):
        return f"decompress it first ({tool}): {inner} is read as it is"
    if kind_of(name) is None:
        return f"name it by what it holds: {name}.txt{ending}, {name}.jsonl{ending} or the like"
    return f"rename it to {name}{ending}"


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return start[TAR_AT : TAR_AT + len(TAR_MAGIC)] == TAR_MAGIC


def tar_error(path: Path, where: str) -> UserError:
    folder = path.name.partition(".")[0] or "unpacked"
    into = shell_path(path.with_name(folder if folder != path.name else f"{folder}-unpacked"))
    return UserError(
        f"data file {where} is a tar archive",
        f"unpack it, and name the folder: mkdir {into} && tar -xf {shell_path(path)} -C {into}",
    )


def require_room(text_bytes: int, where: str | Path) -> None:
    """Refuse text that does not fit in half of this machine's memory: a document in it is a Python text."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if text_bytes > memory // 2:
        raise UserError(
            f"data {where} holds at least {text_bytes:,} bytes of text, this machine has {memory:,} bytes of memory",
            "read the first of it with --set data.max_documents=N (.jsonl, .csv, .parquet), or give a smaller file",
        )


def wide_encoding(sample: bytes) -> str | None:
    """The UTF-16 or UTF-32 that a file beginning so is, by its byte order mark, or by what it looks like without."""
    marked = next((name for mark, name in WIDE_MARKS.items() if sample.startswith(mark)), None)
    return marked or _utf32_of(sample) or _utf16_of(sample)


def _utf32_of(sample: bytes) -> str | None:
    """UTF-32 without a mark: the two upper bytes of all characters are zero but for those that no text has many of."""
    quarter = len(sample) // 4
    first, last = sample[::4].count(0), sample[3::4].count(0)
    if quarter < 2 or sample[1::4].count(0) + sample[2::4].count(0) < 1.5 * quarter:
        return None
    return "UTF-32LE" if last > 0.9 * quarter > first else "UTF-32BE" if first > 0.9 * quarter > last else None


def _utf16_of(sample: bytes) -> str | None:
    """The UTF-16 that bytes without a byte order mark look like: of most characters one byte, the same, is zero."""
    half = len(sample) // 2
    if half < 2:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if min(even, odd) > 0.1 * half or max(even, odd) < 0.5 * half:
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def encoding_remedy(sample: bytes, path: Path) -> str:
    """The command that makes UTF-8 of a file in the encoding that a sample of it looks like."""
    if wide := wide_encoding(sample):
        marked = wide in WIDE_MARKS.values()
        encoding, what = wide, "convert it" if marked else f"convert it, from {wide} where that is what it is"
    else:
        # which says Latin-1 too: the characters that Latin-1 has in the place of its quotes and dashes are never meant
        encoding, what = "WINDOWS-1252", "convert it, from Latin-1 or Windows-1252 where that is what it is"
    old, new = shell_path(path), shell_path(path.with_name(f"utf8-{path.name}"))
    tool = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if tool is None:
        return f"{what}: iconv -f {encoding} -t UTF-8 {old} > {new}"
    return f"{what}: {tool} -dc {old} | iconv -f {encoding} -t UTF-8 | {tool} > {new}"
