"""Files and JSON from outside, read once and strictly: bounded, never blocking, nothing that two readers read apart.

What is no regular file is refused before it is read: a FIFO blocks whoever opens it, a device has no end. JSON is
RFC 8259 and no more: UTF-8, no key twice, no NaN or infinity, no number or nesting beyond what anybody needs. YAML
is read in strict_yaml.py, safetensors headers in safetensors_header.py; both stand on this.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from edgedistill.errors import UserError

MAX_JSON_BYTES = 256_000_000  # the largest tokenizer.json of today has about 35 MB
MAX_JSON_DEPTH = 64  # what transformers writes has fewer than ten levels
MAX_NUMBER_CHARS = 100  # a double needs 25
MAX_COMPONENT_BYTES, MAX_PATH_BYTES = 255, 4095  # of Linux
SHOWN_CHARS = 120
# A search tries each way to share a text among the parts that repeat: of n characters and r parts about n^(r + 1) / r!,
# which is a second for 200 characters. Each part that may be left out doubles it.
MAX_PATTERN_CHARS, MAX_REPEATS, MAX_OPTIONAL, MAX_CHOICES = 500, 3, 3, 64
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
# What git leaves in a large file's place where git-lfs is not installed, or the file was not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024  # of the format's definition
_ONLY_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_AS_BRACKETS = bytes.maketrans(b"{}", b"[]")
_ESCAPES = re.compile(r"\\(?:(u[dD][89abAB]..\\u[dD][c-fC-F]..)|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_UNESCAPED = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.?)", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "\\": "\\", "'": "'", '"': '"'}


class NotJson(ValueError):
    """Text that is no JSON as it is read here; the message says why, and where."""


def shown(value: Any, chars: int = SHOWN_CHARS) -> str:
    """A value as an error shows it: its repr, plain ASCII where that is not printable, cut where it is long."""
    try:
        text = repr(value) if not isinstance(value, str) else repr(value[: 2 * chars])
    except (ValueError, RecursionError):  # an integer of too many digits, a tree too deep to print
        return f"a {type(value).__name__} that is too long to show"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= chars else f"{text[: chars - 1]}…"


def local_path(text: str | Path, *, what: str) -> Path:
    """The path that a user named. UserError for one that no system call takes: NUL, no text, too long."""
    name = str(text)
    if not name.strip():
        raise UserError(f"{what} {shown(name)} is not a path", "name a file or folder")
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} {shown(name)} is not UTF-8 text", "rename it, or run with LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        ) from error
    if b"\0" in raw:
        raise UserError(f"{what} {shown(name)} has a NUL character in it", "a path has none")
    longest = max(map(len, raw.split(b"/")))
    if longest > MAX_COMPONENT_BYTES or len(raw) > MAX_PATH_BYTES:
        raise UserError(
            f"{what} {shown(name)} is too long: {len(raw):,} bytes, its longest part {longest:,}",
            f"a path has at most {MAX_PATH_BYTES:,} bytes, a part of it {MAX_COMPONENT_BYTES}",
        )
    try:
        # a file whose name begins with a tilde is that file
        return Path(name) if os.path.lexists(name) else Path(name).expanduser()
    except RuntimeError as error:  # ~nobody/…
        raise UserError(f"{what} {shown(name)}: no such user's folder", "write the path out") from error


def require_writable(folder: Path, *, what: str) -> None:
    """Refuse a place to write now rather than after hours of work: tried, with nothing left there. UserError."""
    made: list[Path] = []
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir()
                made.append(place)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{what} {folder} cannot be written: {error.strerror or error}", "name another place"
        ) from error
    finally:
        for place in reversed(made):
            with suppress(OSError):
                place.rmdir()


@contextmanager
def open_regular(path: Path, *, what: str) -> Iterator[BinaryIO]:
    """A regular file, opened for reading without ever waiting for it; links are followed.

    Raises UserError: missing, a link to nothing or to itself, a folder, a FIFO, a device, not readable, the pointer
    that git keeps in the place of a large file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _not_opened(path, what, error) from error
    found = os.fstat(descriptor)
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UserError(
            f"{what} {path} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}", "name a regular file with that content"
        )
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size < _MAX_POINTER_BYTES:
            _refuse_pointer(descriptor, path, what)
        yield file


def _refuse_pointer(descriptor: int, path: Path, what: str) -> None:
    try:
        start = os.pread(descriptor, len(_LFS_POINTER), 0)  # its position stays where it is
    except OSError:  # what cannot be read is said by who reads it
        return
    if start == _LFS_POINTER:
        raise UserError(
            f"{what} {path} is a pointer of Git LFS, not the file itself",
            "fetch the files in that folder: git lfs install && git lfs pull; or download it from where it was cloned",
        )


def _not_opened(path: Path, what: str, error: OSError | ValueError) -> UserError:
    number = error.errno if isinstance(error, OSError) else errno.EINVAL
    if number == errno.ENOENT and path.is_symlink():
        return UserError(f"{what} {path} is a link to nothing", "correct the link, or copy the file there")
    if number in (errno.ENOENT, errno.ENOTDIR):
        return UserError(f"{what} {path} is missing", "check the path")
    if number == errno.ELOOP:
        return UserError(f"{what} {path} is a link to itself", "correct the link, or copy the file there")
    if number in (errno.ENXIO, errno.ENODEV):  # a socket
        return UserError(f"{what} {path} is a socket or a device", "name a regular file with that content")
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"{what} {path} cannot be read: {reason}", "check its permissions and its name")


def read_bytes(path: Path, *, what: str, max_bytes: int) -> bytes:
    """A regular file's bytes, at most `max_bytes` of them. UserError otherwise."""
    with open_regular(path, what=what) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            raw = file.read(max_bytes + 1) if size <= max_bytes else b""
        except OSError as error:
            raise UserError(f"{what} {path} cannot be read: {error.strerror or error}", "check its disk") from error
    if max(size, len(raw)) > max_bytes:
        raise UserError(f"{what} {path} has {max(size, len(raw)):,} bytes", f"it has at most {max_bytes:,}")
    return raw


def read_text(path: Path, *, what: str, max_bytes: int) -> str:
    """A regular file's text. UserError where it is not UTF-8, or begins with a byte order mark."""
    raw = read_bytes(path, what=what, max_bytes=max_bytes)
    try:
        return _decoded(raw)
    except NotJson as error:
        raise UserError(f"{what} {path}: {error}", "save it as UTF-8 without a byte order mark") from error


def _decoded(raw: bytes) -> str:
    if raw.startswith(b"\xef\xbb\xbf"):
        raise NotJson("it begins with a byte order mark")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise NotJson("it is UTF-16, not UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"it is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from error


def unescape(text: str) -> str:
    r"""What \n, \t, \x1e, \u2028 and the like in a text stand for. ValueError for an escape that stands for nothing."""

    def meant(found: re.Match[str]) -> str:
        escape = found[1]
        if len(escape) > 1:
            code = int(escape[1:], 16)
            if code < 0x110000 and not 0xD800 <= code < 0xE000:
                return chr(code)
        elif escape in _LETTERS:
            return _LETTERS[escape]
        raise ValueError(f"{shown(found[0])} is not an escape; \\n, \\t, \\\\, \\xHH and \\uHHHH are")

    return _UNESCAPED.sub(meant, text)


def compiled_pattern(text: str) -> re.Pattern[str]:
    """A regular expression from outside. ValueError for one that is none, or whose search may take for ever: a part
    that repeats, may be left out, or has a choice, within a group that repeats; or several such parts in a row."""
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error or 'nested too deep'}") from error
    inner, choices = [False], [1]
    at = repeats = optional = 0
    ways = 1
    before = "("  # what stands in front: a bracket that opens, a sign that repeats, or anything else
    while at < len(text):
        sign = text[at]
        if sign == "\\":
            at += 1
        elif sign == "[":
            at = _class_end(text, at)
        elif sign == "(":
            inner.append(False)
            choices.append(1)
        elif sign == ")" or sign in "*+{?":
            means = sign != "?" or before == ""  # `(?:` and `+?` repeat nothing
            repeated = means if sign != ")" else text[at + 1 : at + 2] in ("*", "+", "{", "?")
            within = inner.pop() if sign == ")" else False
            ways *= choices.pop() if sign == ")" else 1
            if within and repeated and text[at + 1 : at + 2] != "?":
                raise ValueError(f"{shown(text)} repeats a group in which a part repeats or is chosen")
            repeats += sign in "*+{"
            optional += sign == "?" and means
            inner[-1] = inner[-1] or within or repeated
        elif sign == "|":
            inner[-1] = True
            choices[-1] += 1
        before = "(" if sign in "(|" else "*" if sign in "*+?}" else ""
        at += 1
    if len(text) > MAX_PATTERN_CHARS:
        raise ValueError(f"{shown(text)} has more than {MAX_PATTERN_CHARS} characters")
    if repeats > MAX_REPEATS or optional > MAX_OPTIONAL or ways > MAX_CHOICES:
        raise ValueError(
            f"{shown(text)} repeats more than {MAX_REPEATS} parts, may leave out more than {MAX_OPTIONAL}, or has more"
            f" than {MAX_CHOICES} ways through its groups"
        )
    return pattern


def _class_end(text: str, start: int) -> int:
    at = start + (3 if text[start + 1 : start + 3] == "^]" else 2 if text[start + 1 : start + 2] in ("]", "^") else 1)
    while text[at] != "]":
        at += 2 if text[at] == "\\" else 1
    return at


def read_json(
    path: Path, *, what: str, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH
) -> dict[str, Any]:
    """The JSON object in a file; `what` names the file's kind in errors. UserError for anything else."""
    return json_object_of(read_bytes(path, what=what, max_bytes=max_bytes), path, what=what, max_depth=max_depth)


def json_object_of(raw: bytes, path: Path, *, what: str, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
    """The JSON object in bytes that were read from `path`. UserError for anything else."""
    value = json_value_of(raw, path, what=what, max_depth=max_depth)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds a {type(value).__name__}", f"{what} is a JSON object")
    return value


def read_json_value(path: Path, *, what: str, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """As `read_json`, of any kind of value."""
    return json_value_of(read_bytes(path, what=what, max_bytes=max_bytes), path, what=what, max_depth=max_depth)


def json_value_of(raw: bytes, path: Path, *, what: str, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """The JSON value of bytes that were read from `path`. UserError for anything else."""
    try:
        return parse_json(raw, max_depth=max_depth)
    except NotJson as error:
        encoded = "UTF-8" in str(error) or "byte order mark" in str(error)
        remedy = "save it as UTF-8 without a byte order mark" if encoded else f"replace it with a whole {what}"
        raise UserError(f"{what} {path}: {error}", remedy) from error


def parse_json(raw: bytes | str, *, max_depth: int = MAX_JSON_DEPTH, constants: bool = False) -> Any:
    """JSON text → value. NotJson (a ValueError) for a key that stands twice, NaN, infinity (1e999 too), a number of
    more than 100 characters, nesting beyond `max_depth`, half of a surrogate pair, and whatever else is no JSON.

    `constants`: NaN and Infinity, as Python writes them, are numbers; for rows whose numbers nobody reads.
    """
    text = _decoded(raw) if isinstance(raw, bytes) else raw
    if _deeper_than(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"), max_depth):
        raise NotJson(f"nested more than {max_depth} deep")
    if _HALF_PAIR.search(text):
        _refuse_half_pairs(text)
    try:
        return (_DECODER_OF_ROWS if constants else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"it is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise NotJson("nested too deep") from error


def _deeper_than(raw: bytes, most: int) -> bool:
    """Whether brackets are nested deeper than `most`, without a parser's stack: pairs that close at once are taken
    away, a level a time. Of unbalanced text it may say either: the parser refuses that."""
    if raw.count(b"[") + raw.count(b"{") <= most:
        return False
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _ONLY_STRUCTURE).replace(b'""', b"")
    left = b"".join(bare.split(b'"')[::2]).translate(_AS_BRACKETS)
    for _ in range(most):
        before, left = left, left.replace(b"[]", b"")
        if len(left) == len(before):
            break
    return b"[" in left and (len(left) > most or b"[]" in left)


def _refuse_half_pairs(text: str) -> None:
    """Rust and C++ readers refuse half of a surrogate pair, and no file takes the text that Python makes of it."""
    for found in _ESCAPES.finditer(text):
        if found[2] is not None:
            line = text.count("\n", 0, found.start()) + 1
            raise NotJson(f"\\{found[2]} is half of a surrogate pair (line {line})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotJson(f"the key {shown(twice)} appears twice in one object")
    return made


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise NotJson(f"a number of {len(text):,} digits: {text[:20]}…")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= 10 * MAX_NUMBER_CHARS else float("inf")
    if value in (float("inf"), float("-inf")):
        raise NotJson(f"the number {shown(text, 40)} is beyond what a double holds")
    return value


def _constant(text: str) -> float:
    raise NotJson(f"{text} is not a number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
_DECODER_OF_ROWS = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)
