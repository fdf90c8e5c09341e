"""The store: records by the hash of everything that can change them; atomic, locked, resumable.

    <root>/records/<stage>/<key>/record.json + files     whole, or not there at all
    <root>/work/<stage>-<key>/out, state                 what a stage is building; survives a kill
    <root>/locks/<stage>-<key>.lock                      one builder at a time
    <root>/hashes/<hash of path>.json                    content hashes by size, mtime and inode

A stage writes into `out` (what ships) and `state` (checkpoints). `Store.run` fsyncs `out` with its
folders and renames it into place last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from edgedistill import __version__
from edgedistill.errors import UserError
from edgedistill.records import FileEntry

R = TypeVar("R", bound=BaseModel)
RECORD_SCHEMA = "edgedistill.record/1"
CHUNK_BYTES = 1 << 20
ADOPTABLE = ("teacher", "student")


@dataclass(frozen=True)
class Work:
    """Where a stage builds: `out` becomes the record's folder, `state` is thrown away at the end."""

    out: Path
    state: Path
    key: str


@dataclass(frozen=True)
class Stored(Generic[R]):
    """A finished record and its folder; `reused` when nothing had to be computed."""

    stage: str
    key: str
    directory: Path
    result: R
    reused: bool


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_of(stage: str, inputs: Mapping[str, Any]) -> str:
    """The key of a record: sha256 over the stage's name and its inputs, 32 hex digits kept."""
    return hashlib.sha256(f"{stage}\n{canonical_json(inputs)}".encode()).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """Content hash of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_under(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, in sorted posix order."""
    yield from sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix())


def file_entries(folder: Path, *, skip: frozenset[str] = frozenset()) -> list[FileEntry]:
    """Path, size and hash of every file below `folder` but those in `skip`."""
    return [
        FileEntry(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in files_under(folder)
        if (name := path.relative_to(folder).as_posix()) not in skip
    ]


def combined_sha256(entries: list[FileEntry]) -> str:
    """One hash for several files: that of the only file, or of the sorted `sha256  path` lines."""
    if len(entries) == 1:
        return entries[0].sha256
    lines = "".join(f"{e.sha256}  {e.path}\n" for e in sorted(entries, key=lambda e: e.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that compute a stage; part of its key."""
    found = {}
    for package in packages:
        if package == "edgedistill":  # an editable install's metadata may be stale
            found[package] = __version__
            continue
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write_durably(path: Path, text: str) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, durable."""
    for path in files_under(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for inner in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        fsync_folder(inner)
    fsync_folder(folder)


def default_root() -> Path:
    """EDGEDISTILL_STORE, else edgedistill/ in the user's cache folder."""
    named = os.environ.get("EDGEDISTILL_STORE")
    if named:
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "edgedistill"


class Store:
    """The records of one folder on disk. Cheap to make; touches the disk only when asked to."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()

    def record_folder(self, stage: str, key: str) -> Path:
        return self.root / "records" / stage / key

    def work_folder(self, stage: str, key: str) -> Path:
        return self.root / "work" / f"{stage}-{key}"

    def lock(self, name: str) -> FileLock:
        """A lock file in the store; released by the system when its holder dies."""
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the store {self.root} cannot be written: {error.strerror or error}",
                "name a writable folder in EDGEDISTILL_STORE",
            ) from error
        return FileLock(folder / f"{name}.lock")

    def find(self, stage: str, inputs: Mapping[str, Any], result_type: type[R]) -> Stored[R] | None:
        """The finished record of these inputs, or None."""
        return self._load(stage, key_of(stage, inputs), result_type, reused=True)

    def run(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        build: Callable[[Work], R],
        result_type: type[R],
        on_wait: Callable[[str], None] | None = None,
    ) -> Stored[R]:
        """The record of these inputs: found, or built under a lock and put in place whole.

        `build` may be entered again after a kill, with `work.state` as it was left; `work.out` is
        emptied first. Raises whatever `build` raises; the state stays for the next try.
        """
        key = key_of(stage, inputs)
        found = self._load(stage, key, result_type, reused=True)
        if found is not None:
            return found
        lock = self.lock(f"{stage}-{key}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait(f"another process is building {stage} {key[:8]}; waiting for it")
            lock.acquire()
        try:
            found = self._load(stage, key, result_type, reused=True)
            if found is not None:
                return found
            folder = self.work_folder(stage, key)
            work = Work(out=folder / "out", state=folder / "state", key=key)
            shutil.rmtree(work.out, ignore_errors=True)
            work.out.mkdir(parents=True)
            work.state.mkdir(exist_ok=True)
            result = build(work)
            self.put(stage, inputs, work.out, result.model_dump(mode="json", by_alias=True))
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()
        stored = self._load(stage, key, result_type, reused=False)
        if stored is None:
            raise RuntimeError(f"record {stage}/{key} vanished after it was written")
        return stored

    def put(self, stage: str, inputs: Mapping[str, Any], out: Path, result: Mapping[str, Any]) -> None:
        """Make the folder `out` of this store the record of these inputs: durable first, then renamed into place."""
        key = key_of(stage, inputs)
        record = {
            "schema": RECORD_SCHEMA,
            "stage": stage,
            "key": key,
            "inputs": inputs,
            "result": result,
            "files": [e.model_dump() for e in file_entries(out)],
            "written_unix_s": int(time.time()),
        }
        (out / "record.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
        fsync_tree(out)
        final = self.record_folder(stage, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        out.replace(final)
        fsync_folder(final.parent)

    def _load(self, stage: str, key: str, result_type: type[R], *, reused: bool) -> Stored[R] | None:
        folder = self.record_folder(stage, key)
        record = _read_record(folder)
        if record is None:
            return None
        try:
            result = result_type.model_validate(record["result"])
        except (ValidationError, KeyError):
            return None
        for entry in record["files"]:
            path = folder / entry["path"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return None
        return Stored(stage=stage, key=key, directory=folder, result=result, reused=reused)

    def hash_file(self, path: Path) -> str:
        """Content hash of a large input, remembered by size, mtime and inode."""
        path = path.resolve()
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        cache = self.root / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        try:
            known = json.loads(cache.read_text(encoding="utf-8"))
            if known["stamp"] == stamp:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        digest = sha256_of(path)
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_durably(cache, json.dumps({"path": str(path), "stamp": stamp, "sha256": digest}))
        return digest


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == RECORD_SCHEMA else None


def store_list(store: Store) -> list[dict[str, Any]]:
    """One row a record: stage, key, bytes, age, folder; and unfinished work."""
    rows = []
    for path in sorted(store.root.glob("records/*/*/record.json")):
        record = _read_record(path.parent)
        if record is not None:
            rows.append(
                {
                    "stage": record["stage"],
                    "key": record["key"],
                    "bytes": sum(e["bytes"] for e in record["files"]),
                    "written_unix_s": record["written_unix_s"],
                    "path": str(path.parent),
                    "state": "finished",
                }
            )
    for folder in sorted(store.root.glob("work/*")):
        stage, _, key = folder.name.rpartition("-")
        size = sum(p.stat().st_size for p in files_under(folder))
        rows.append(
            {
                "stage": stage,
                "key": key,
                "bytes": size,
                "written_unix_s": int(folder.stat().st_mtime),
                "path": str(folder),
                "state": "unfinished",
            }
        )
    return rows


def store_verify(store: Store) -> list[str]:
    """Re-hash every file of every record; a list of what is wrong, empty where all is well."""
    problems = []
    for folder in sorted(store.root.glob("records/*/*")):
        record = _read_record(folder)
        if record is None:
            problems.append(f"{folder}: record.json is missing or not readable")
            continue
        if key_of(record["stage"], record["inputs"]) != folder.name:
            problems.append(f"{folder}: the key does not match the inputs")
        for entry in record["files"]:
            path = folder / entry["path"]
            if not path.is_file():
                problems.append(f"{path}: missing")
            elif sha256_of(path) != entry["sha256"]:
                problems.append(f"{path}: content changed")
    return problems


def store_adopt(store: Store) -> list[dict[str, Any]]:
    """Keep finished teachers and students across an upgrade of the libraries that computed them.

    Each record of those stages whose library versions are not the installed ones is copied under the key that the
    installed ones give, marked `adopted`; what is damaged is not. Returns stage, keys and both sets of versions.
    """
    adopted = []
    for stage in ADOPTABLE:
        for folder in sorted(store.root.glob(f"records/{stage}/*")):
            record = _read_record(folder)
            if record is None or not _whole(folder):
                continue
            before = record["inputs"]["versions"]
            inputs = {**record["inputs"], "versions": versions(*before)}
            key = key_of(stage, inputs)
            if key == folder.name or _read_record(store.record_folder(stage, key)) is not None:
                continue
            with store.lock(f"{stage}-{key}"):
                out = store.work_folder(stage, key) / "out"
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(folder, out, ignore=shutil.ignore_patterns("record.json"))
                store.put(stage, inputs, out, {**record["result"], "adopted": True})
            adopted.append({"stage": stage, "from": folder.name, "to": key, "was": before, "is": inputs["versions"]})
    return adopted


def store_prune(
    store: Store, *, stage: str | None = None, older_than_days: float | None = None, everything: bool = False
) -> list[str]:
    """Remove what is damaged, and with a filter, or `everything`, records and unfinished work; what was removed.

    Without a filter only records go that cannot be read or whose files are not what they were. A folder that another
    process is building is left alone. Raises UserError where `everything` and a filter are both given.
    """
    if everything and (stage is not None or older_than_days is not None):
        raise UserError("--all with --stage or --older-than-days", "give --all alone, or the filters alone")
    chosen = []
    if everything or stage is not None or older_than_days is not None:
        limit = time.time() - (older_than_days or 0.0) * 86400
        chosen = [
            row
            for row in store_list(store)
            if (stage is None or row["stage"] == stage) and row["written_unix_s"] <= limit
        ]
    damaged = [
        {"stage": folder.parent.name, "key": folder.name, "path": str(folder)}
        for folder in sorted(store.root.glob("records/*/*"))
        if not _whole(folder)
    ]
    removed: list[str] = []
    for row in [*damaged, *chosen]:
        if row["path"] in removed:
            continue
        lock = store.lock(f"{row['stage']}-{row['key']}")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(row["path"], ignore_errors=True)
        except Timeout:
            continue
        removed.append(row["path"])
    return removed


def _whole(folder: Path) -> bool:
    """A record that reads, and whose files have their sizes and hashes."""
    record = _read_record(folder)
    return record is not None and all(
        (folder / e["path"]).is_file()
        and (folder / e["path"]).stat().st_size == e["bytes"]
        and sha256_of(folder / e["path"]) == e["sha256"]
        for e in record["files"]
    )
