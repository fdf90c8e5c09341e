"""An artifact's files are those of its record while a stage uses them: what is measured is what the record names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.records.artifact import Artifact
from edgedistill.store import Store


@contextmanager
def unchanged(artifact: Artifact, folder: Path, store: Store) -> Iterator[None]:
    """Hash the files in `folder` against the record, now and at the end; nor was one put aside in between and back.

    UserError naming the file. Hashes are remembered as `Store.hash_file` says.
    """
    paths = {folder / entry.path: entry.sha256 for entry in artifact.files}
    before = {path: _look(path) for path in paths}
    _require(paths, store)
    yield
    for path, look in before.items():
        if _look(path) != look:
            raise _changed(path)
    _require(paths, store)


def _look(path: Path) -> list[int]:
    """Of a file and of the folder that holds its name. No ctime of the file: a link to it elsewhere changes that."""
    try:
        file, holder = path.stat(), path.parent.stat()
    except OSError:
        return []
    return [file.st_ino, file.st_size, file.st_mtime_ns, holder.st_mtime_ns]


def _require(paths: dict[Path, str], store: Store) -> None:
    for path, expected in paths.items():
        if not path.is_file() or store.hash_file(path) != expected:
            raise _changed(path)


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} is not what its record says, or somebody wrote to it while it was used",
        "leave an artifact alone while it is verified or benchmarked, and run the command again",
    )
