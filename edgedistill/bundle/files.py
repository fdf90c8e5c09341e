"""The files of a bundle as they lie in a folder: read without trust, and nothing that the manifest does not list.

Every file is a plain one with one name (no link, symbolic or hard), without holes, and has the size that the manifest
gives it before a byte of it is read. A folder is entered only where a listed file lies in it, so that what somebody
put beside the bundle costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.records.manifest import MANIFEST, MAX_MANIFEST_BYTES, REMEDY, Manifest, parse_manifest
from edgedistill.strict import shown

CHUNK_BYTES = 1 << 20
PLAIN_ONLY = ": a bundle holds plain files only"
KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder"}


def read_bounded(folder: Path, name: str, limit: int) -> bytes:
    """A plain file of at most `limit` bytes. Raises UserError naming it."""
    descriptor = _open(folder, name)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise UserError(f"{name} has {size} bytes, more than {limit}", REMEDY)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise _unreadable(folder / name, error) from error
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise UserError(f"{name} grows while it is read: it has more than {limit} bytes", REMEDY)
    return data


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder. Raises UserError where there is none, or it is not valid."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a bundle: it has no {MANIFEST}", "give a folder that edgedistill wrote")
    return parse_manifest(read_bounded(folder, MANIFEST, MAX_MANIFEST_BYTES))


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a manifest of this schema: all that may be replaced by a new bundle."""
    try:
        return (folder / MANIFEST).is_file() and bool(read_manifest(folder))
    except (UserError, OSError):
        return False


def read_sealed(folder: Path, name: str, size: int, sha256: str) -> bytes:
    """The bytes of a small file of the manifest: what is judged is what was hashed. Raises UserError."""
    data = read_bounded(folder, name, size)
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{name} was altered while it was checked", REMEDY)
    return data


def hash_file(folder: Path, name: str, size: int) -> str:
    """sha256 of a plain file that has exactly `size` bytes, read in chunks. Raises UserError."""
    descriptor = _open(folder, name)
    try:
        digest, left = hashlib.sha256(), size
        while block := os.read(descriptor, min(CHUNK_BYTES, left + 1)):
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
    except OSError as error:
        raise _unreadable(folder / name, error) from error
    finally:
        os.close(descriptor)
    if left:
        raise UserError(f"{name} was altered while it was read: it does not have {size} bytes", REMEDY)
    return digest.hexdigest()


def sizes_in(folder: Path, listed: Mapping[str, int | None]) -> dict[str, int]:
    """Path → bytes of every file of the folder, all of them in `listed` (path → bytes, None: any).

    Raises UserError naming the first that is not listed, has another size, or is not a regular file of one name.
    """
    folders = {"/".join(path.split("/")[:depth]) for path in listed for depth in range(1, path.count("/") + 1)}
    found: dict[str, int] = {}
    waiting = [""]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(folder / here) as entries:
                names = []
                for entry in entries:
                    path = f"{here}/{entry.name}" if here else entry.name
                    if path not in listed and path not in folders:
                        raise _not_listed(folder, path, entry)
                    names.append((path, entry))
                for path, entry in sorted(names, key=lambda one: one[0]):
                    status = entry.stat(follow_symlinks=False)
                    if path in folders and stat.S_ISDIR(status.st_mode):
                        waiting.append(path)
                    else:
                        found[path] = _plain(folder, path, status, listed.get(path))
        except OSError as error:
            raise _unreadable(folder / here, error) from error
    return found


def _not_listed(folder: Path, path: str, entry: os.DirEntry[str]) -> UserError:
    if entry.is_symlink():
        return UserError(f"{shown(path)} in {folder} is a symbolic link{PLAIN_ONLY}", REMEDY)
    if entry.is_dir(follow_symlinks=False):
        with suppress(OSError), os.scandir(entry.path) as inside:
            if next(inside, None) is None:
                return UserError(
                    f"{shown(path)} in {folder} is an empty folder and not part of the bundle", "remove it"
                )
        return UserError(
            f"the folder {shown(path)} in {folder} is not part of the bundle: no listed file lies in it",
            f"remove it, or {REMEDY}",
        )
    if not entry.is_file(follow_symlinks=False):
        return UserError(f"{shown(path)} in {folder} is a special file{PLAIN_ONLY}", REMEDY)
    return UserError(
        f"{shown(path)} in {folder} is not part of the bundle: it is not listed", f"remove it, or {REMEDY}"
    )


def _plain(folder: Path, path: str, status: os.stat_result, size: int | None) -> int:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise UserError(f"{path} in {folder} is {kind}{PLAIN_ONLY}", REMEDY)
    if status.st_nlink > 1:
        raise UserError(
            f"{path} in {folder} is a hard link: {status.st_nlink} names share its bytes, and whoever holds another "
            "one can change it",
            "copy the bundle without links: `cp -r`, not `cp -l`",
        )
    if size is not None and status.st_size != size:
        raise UserError(
            f"{path} was altered: it has {status.st_size} bytes, and manifest.json, whose hash is in SHA256SUMS, "
            f"says {size}",
            REMEDY,
        )
    return status.st_size


def refuse_holes(folder: Path, name: str, size: int) -> None:
    """Raises UserError for a sparse file: a few bytes on disk that say to be many. Where the system tells."""
    if not hasattr(os, "SEEK_HOLE") or not size:
        return
    descriptor = _open(folder, name)
    try:
        hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
    except OSError:  # a file system that does not tell
        return
    finally:
        os.close(descriptor)
    if hole < size:
        raise UserError(
            f"{name} in {folder} is sparse: from byte {hole} on, not all of its {size} bytes are on the disk",
            "copy the bundle with `cp -r --sparse=never`, or take it again from where it was made",
        )


def _open(folder: Path, name: str) -> int:
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing in {folder}", REMEDY) from error
    except OSError as error:
        if (folder / name).is_symlink():
            raise UserError(f"{name} in {folder} is a symbolic link{PLAIN_ONLY}", REMEDY) from error
        raise _unreadable(folder / name, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{name} in {folder} is not a regular file{PLAIN_ONLY}", REMEDY)
    return descriptor


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{shown(str(error.filename or path))} cannot be read: {error.strerror}", "make it readable")
