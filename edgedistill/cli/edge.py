"""Where a command meets the system: its streams, its arguments, and what becomes of an error that was not expected.

An error of the system that names a file (no permission, no such folder, a name that is too long, a disk that is full)
is about what the user named: cause, remedy, exit code 2. What is left is a bug: traceback, exit code 1.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys

from edgedistill import streams
from edgedistill.errors import UserError
from edgedistill.strict import shown

MAX_CAUSE_CHARS = 2000
# What moves a cursor, changes a terminal's colours, or turns text round; line feed and tab stay.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_REMEDIES = {
    errno.EACCES: "check its permissions, or name another place",
    errno.EPERM: "check its permissions, or name another place",
    errno.EROFS: "its file system takes no changes: name another place",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOTDIR: "a part of that path is a file: name another place",
    errno.EISDIR: "it is a folder: name a file",
    errno.EEXIST: "it is a file, or was made meanwhile: name another place",
    errno.ELOOP: "a link there leads to itself: correct it",
    errno.ENOENT: "check that the path exists and was not removed meanwhile",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare_streams() -> None:
    """Standard streams that take any text, and that are there: a file opened later must not become one of them."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115
        elif descriptor > 0 and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without the letters: \xe9 instead of a traceback


def require_text(arguments: list[str]) -> None:
    """Refuse words and places that are no text here: neither YAML nor JSON nor a hash takes them. UserError."""
    named = [os.environ.get("EDGEDISTILL_STORE", ""), os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")]
    try:
        here = os.getcwd()  # noqa: PTH109  Path.cwd() is the same
    except OSError as error:
        raise UserError(
            f"the current folder cannot be read: {error.strerror}", "change into a folder that exists"
        ) from error
    for word in (*arguments, *named, here):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{shown(word)} is not text in this locale ({sys.getfilesystemencoding()})",
                "run with LC_ALL=C.UTF-8 or PYTHONUTF8=1; a name that is not UTF-8 must be renamed",
            ) from error


# Their work is not in the store: what was begun is taken away again.
NOT_KEPT = ("export", "bench", "report")
HINTS = (
    (
        "Missing option '--target'",
        "-t with a device, as `edgedistill targets list` shows them, or with a profile's file",
    ),
    ("No such option: --quantization", "--set export.artifacts=gguf:Q4_0, or leave it to the target's profile"),
    ("No such option: --format", "--set export.artifacts=gguf:Q4_0, or leave it to the target's profile"),
)


def after_interrupt(arguments: list[str]) -> str:
    """What an interrupted command leaves."""
    if arguments[:1] and arguments[0] in NOT_KEPT:
        return "nothing was written; the same command begins again"
    return "what was finished is kept; the same command goes on from there"


def hint(said: str) -> str:
    """What to do about an option that is missing or not there; "" where the message says it."""
    return next((remedy for begin, remedy in HINTS if said.startswith(begin)), "")


def plain(text: str) -> str:
    """Text for a terminal: what is no letter but a command to it is shown as its escape."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def write_out(text: str) -> None:
    """A result on standard output. A reader that went away (`| head`) is no error: what it did not want is dropped."""
    try:
        print(plain(text), file=streams.out(), flush=True)
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Nobody reads standard output: what is still to be written goes nowhere, Python's last flush included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def complain(cause: str, remedy: str, who: str = "") -> None:
    """An error on standard error: a few lines, however long the value is."""
    cut = cause if len(cause) <= MAX_CAUSE_CHARS else f"{cause[:MAX_CAUSE_CHARS]}… ({len(cause):,} characters)"
    try:
        print(plain(f"error{who}: {cut}"), file=streams.err())
        if remedy:
            print(plain(f"  try: {remedy[:MAX_CAUSE_CHARS]}"), file=streams.err())
        streams.err().flush()
    except (OSError, ValueError):  # standard error is a pipe that nobody reads, a full disk, or closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)


def of_the_system(error: OSError) -> tuple[str, str] | None:
    """Cause and remedy of an error of the system that is about the user's files, or None: then it is a bug."""
    where = "" if error.filename is None else f": {shown(os.fsdecode(error.filename), 300)}"
    if error.errno in FULL:
        return (
            f"the disk is full{where}",
            "free some space (`edgedistill store list`, `edgedistill store prune`) and run the command again",
        )
    if error.filename is None and error.errno not in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM):
        return None
    reason = error.strerror or type(error).__name__
    return f"{reason}{where}", _REMEDIES.get(error.errno or 0, "check that place, and run the command again")


def of_memory() -> tuple[str, str]:
    return (
        "the memory of this machine did not suffice",
        "ask for less: see `edgedistill plan`, or run it where there is more",
    )
