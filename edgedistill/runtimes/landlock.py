"""Landlock, on Linux from 5.13: the process reads what is listed, writes nothing, and cannot take that back.

https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION = 1
PATH_BENEATH = 1
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
WRITE_FILE, IOCTL_DEVICE = 1 << 1, 1 << 15
FILES_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP_FROM, TCP = 4, 3  # bind, connect
SCOPES_FROM, SCOPES = 6, 3  # abstract sockets, signals


def restrict(readable: Iterable[Path], *, writable: Iterable[Path] = (), owned: Iterable[Path] = ()) -> str:
    """From now on this thread and its children read only what is `readable`; what was done. Raises OSError.

    `writable`: existing files and devices; `owned`: folders where anything but starting programs is allowed.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"no Landlock on {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    version = _call(libc, CREATE_RULESET, None, 0, VERSION)
    files = max(rights for first, rights in FILES_BY_VERSION.items() if first <= version)
    attributes = struct.pack("=QQQ", files, TCP if version >= TCP_FROM else 0, SCOPES if version >= SCOPES_FROM else 0)
    size = 24 if version >= SCOPES_FROM else 16 if version >= TCP_FROM else 8
    ruleset = _call(libc, CREATE_RULESET, attributes, size, 0)
    try:
        for path in readable:
            _allow(libc, ruleset, path, EXECUTE | READ_FILE | READ_DIR, files)
        for path in writable:
            _allow(libc, ruleset, path, READ_FILE | READ_DIR | WRITE_FILE | IOCTL_DEVICE, files)
        for path in owned:
            _allow(libc, ruleset, path, files & ~EXECUTE, files)
        _call(libc, RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return f"Landlock {version}"


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int, handled: int) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(handle).st_mode):
                rights &= ~READ_DIR
            _call(libc, ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights & handled, handle), 0)
        finally:
            os.close(handle)


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    longs = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    found = int(libc.syscall(ctypes.c_long(number), *longs))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
