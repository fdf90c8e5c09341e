"""Which paths may stand in a bundle: such as every system keeps apart, shows as they are, and can make.

A bundle is carried between Linux, macOS, Windows and Android. Two names that one of them takes for the same, a name
that one cannot make, or one that is shown as another, is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MAX_PATH_CHARS = 512
MAX_PART_BYTES = 255  # NAME_MAX of every usual file system
MAX_PARTS = 16
# What Windows keeps for devices, whatever suffix follows.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])(?:\..*)?", re.IGNORECASE | re.DOTALL)
_NOT_ON_WINDOWS = frozenset('<>:"|?*')


def unsafe_path(path: str) -> str:
    """Why a path must not stand in a bundle; "" where it may. Posix, relative, no way out of the folder."""
    if not path or len(path) > MAX_PATH_CHARS:
        return f"it has {len(path)} characters"
    if "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        return "it has a control character or a backslash"
    if not path.isprintable():
        return "it has a character that is not shown, or that turns the reading direction"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "it is absolute"
    if unicodedata.normalize("NFC", path) != path:
        return "it is not in Unicode's composed form (NFC)"
    parts = path.split("/")
    if len(parts) > MAX_PARTS:
        return f"it is {len(parts)} levels deep"
    return next(filter(None, map(_unsafe_part, parts)), "")


def _unsafe_part(part: str) -> str:
    if part in ("", ".", ".."):
        return "it has an empty, '.' or '..' part"
    if len(part.encode("utf-8", "surrogatepass")) > MAX_PART_BYTES:
        return f"a part of it is longer than {MAX_PART_BYTES} bytes"
    if part[-1] in " ." or part[0] == " ":
        return "a part of it begins or ends with a space, or ends with a dot"
    if _NOT_ON_WINDOWS & set(part):
        return "it has a character that Windows refuses"
    return "it has a name that Windows keeps for a device" if _RESERVED.fullmatch(part) else ""


def collision(paths: Iterable[str]) -> str:
    """Why some of the paths cannot stand in one folder; "" where all can.

    A system that ignores case or the form of a letter takes two of them, or folders of theirs, for one; or a path is
    a file and a folder.
    """
    files: set[str] = set()
    folders: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for path in paths:
        if path in files:
            return f"{path!r} appears twice"
        files.add(path)
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            here = "/".join(parts[:count])
            if count < len(parts):
                folders[here] = path
            other = spelled.setdefault(_folded(here), here)
            if other != here:
                return f"{other!r} and {here!r} are one name where case or the form of letters does not count"
    for path in sorted(files & set(folders)):
        return f"{path!r} is a file, and the folder of {folders[path]!r}"
    return ""


def _folded(path: str) -> str:
    """Equal for two names that some file system (HFS+, APFS, NTFS, exFAT) takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", path).casefold())
