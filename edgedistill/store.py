"""The store: records by the hash of everything that can change them; atomic, locked, resumable.

    <root>/records/<stage>/<key>/record.json + files     whole, or not there at all
    <root>/work/<stage>-<key>/out, state                 what a stage is building; survives a kill
    <root>/locks/<stage>-<key>.lock                      one builder at a time
    <root>/hashes/<hash of path>.json                    content hashes by size, mtime, ctime and inode

A stage writes into `out` (what ships) and `state` (checkpoints). `Store.run` fsyncs `out` with its
folders and renames it into place last.

A record is believed only where it holds: record.json carries a hash of itself, its key is that of its inputs, and
its files are hashed again whenever it is read. Of files beyond FULL_HASH_BYTES in all, those whose stamp (size, mtime,
ctime, inode) is known are sampled in blocks instead. These commands work on a whole store: store_commands.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from edgedistill import __version__
from edgedistill.errors import UserError
from edgedistill.records.base import FileEntry
from edgedistill.strict import local_path, read_json

R = TypeVar("R", bound=BaseModel)
RECORD_SCHEMA = "edgedistill.record/2"
MAX_RECORD_BYTES = 1 << 26
CHUNK_BYTES = 1 << 20
# SHA-256 reads 0.8 to 2 GB a second: what is hashed in full at each reading stays under a second.
FULL_HASH_BYTES = 512 << 20
# Larger files keep a hash a block beside the whole one; so many blocks are read at each reading.
BLOCK_BYTES = 4 << 20
BLOCKED_ABOVE_BYTES = 64 << 20
SAMPLED_BLOCKS = 16
# A file that was written this short a time ago may change again within one tick of the clock that stamps it.
RACY_NS = 50_000_000


class Damaged(Exception):
    """A record that is not what was written; says which file, and how."""


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


def home_is_known() -> bool:
    """Whether `~` stands for a folder: not for a user without an entry in the password file where HOME is not set."""
    return not os.path.expanduser("~").startswith("~")  # noqa: PTH111  Path.expanduser raises instead


def default_root() -> Path:
    """EDGEDISTILL_STORE, else edgedistill/ in the user's cache folder."""
    named = os.environ.get("EDGEDISTILL_STORE")
    if named:
        return local_path(named, what="EDGEDISTILL_STORE").absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if cache.startswith("~") and not home_is_known():
        raise UserError(
            "no folder for the store: HOME is not set, and this user is not in the password file",
            "name a folder in EDGEDISTILL_STORE, or set HOME",
        )
    return local_path(cache, what="the cache folder") / "edgedistill"


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
        say: Callable[[str], None] | None = None,
    ) -> Stored[R]:
        """The record of these inputs: found, or built under a lock and put in place whole.

        A record that is damaged is built again; `say` is told so, and of waiting for another process.
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
            if say is not None:
                say(f"another process is building {stage} {key[:8]}; waiting for it")
            lock.acquire()
        try:
            found = self._load(stage, key, result_type, reused=True, say=say)
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
        record: dict[str, Any] = {
            "schema": RECORD_SCHEMA,
            "stage": stage,
            "key": key,
            "inputs": inputs,
            "result": result,
            "files": [e.model_dump() for e in file_entries(out, skip=frozenset({"record.json"}))],
            "written_unix_s": int(time.time()),
        }
        large = [e for e in record["files"] if e["bytes"] > BLOCKED_ABOVE_BYTES]
        record["blocks"] = {e["path"]: block_hashes(out / e["path"]) for e in large}
        record["sha256"] = own_sha256(record)
        (out / "record.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
        fsync_tree(out)
        final = self.record_folder(stage, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        out.replace(final)
        fsync_folder(final.parent)
        for entry in large:
            path = (final / entry["path"]).resolve()
            self._remember(path, _stamp(path), entry["sha256"])

    def _load(
        self, stage: str, key: str, result_type: type[R], *, reused: bool, say: Callable[[str], None] | None = None
    ) -> Stored[R] | None:
        folder = self.record_folder(stage, key)
        if not folder.is_dir():
            return None
        try:
            record = read_record(folder)
            result = result_type.model_validate(record["result"])
            self.require_whole(folder, record)
        except (Damaged, ValidationError) as error:
            if say is not None:
                why = error if isinstance(error, Damaged) else "its result is of another version"
                say(f"the store's {stage} {key[:8]} is not whole, and is made again ({why})")
            return None
        return Stored(stage=stage, key=key, directory=folder, result=result, reused=reused)

    def hash_file(self, path: Path) -> str:
        """Content hash of a large input, remembered by size, mtime, ctime and inode.

        A program can set a file's size and mtime as it likes; ctime moves with every write.
        """
        path = path.resolve()
        stamp = _stamp(path)
        remembered = self._remembered(path, stamp)
        if remembered is not None:
            return remembered
        digest = sha256_of(path)
        if _stamp(path) == stamp and abs(time.time_ns() - path.stat().st_ctime_ns) > RACY_NS:
            self._remember(path, stamp, digest)
        return digest

    def once(self, name: str, check: Callable[[], None]) -> None:
        """Run `check` unless it passed before. What it says depends on `name` alone: there is a content hash in it."""
        mark = self.root / "hashes" / name
        if mark.is_file():
            return
        check()
        with suppress(OSError):  # a store that takes no more: checked again the next time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()

    def _hash_note(self, path: Path) -> Path:
        return self.root / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"

    def _remembered(self, path: Path, stamp: list[int]) -> str | None:
        try:
            known = json.loads(self._hash_note(path).read_text(encoding="utf-8"))
            return str(known["sha256"]) if known["stamp"] == stamp else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, path: Path, stamp: list[int], digest: str) -> None:
        note = self._hash_note(path)
        with suppress(OSError):  # a store that takes no more: hashed again the next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_durably(note, json.dumps({"path": str(path), "stamp": stamp, "sha256": digest}))

    def require_whole(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Hash the record's files, or sample what is too large for that. Raises Damaged."""
        left = FULL_HASH_BYTES
        for entry in sorted(record["files"], key=lambda e: int(e["bytes"])):
            path = folder / entry["path"]
            if not path.is_file():
                raise Damaged(f"{path}: missing")
            if path.stat().st_size != entry["bytes"]:
                raise Damaged(f"{path}: {path.stat().st_size:,} bytes instead of {entry['bytes']:,}")
            blocks = record["blocks"].get(entry["path"])
            if left >= entry["bytes"] or blocks is None:
                left -= entry["bytes"]
                found = sha256_of(path)
            else:
                found = self.hash_file(path)
                _sample(path, blocks)
            if found != entry["sha256"]:
                raise Damaged(f"{path}: content changed")


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def block_hashes(path: Path) -> list[str]:
    """The hash of each block of a file."""
    with path.open("rb") as file:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK_BYTES), b"")]


def _sample(path: Path, blocks: list[str]) -> None:
    """Hash some blocks of a file, others each time. Raises Damaged."""
    with path.open("rb") as file:
        for number in random.SystemRandom().sample(range(len(blocks)), min(SAMPLED_BLOCKS, len(blocks))):
            file.seek(number * BLOCK_BYTES)
            if hashlib.sha256(file.read(BLOCK_BYTES)).hexdigest() != blocks[number]:
                raise Damaged(f"{path}: content changed, within {BLOCK_BYTES} bytes of byte {number * BLOCK_BYTES:,}")


def own_sha256(record: Mapping[str, Any]) -> str:
    """The hash of a record without its own hash, as it reads back from JSON."""
    content = json.loads(json.dumps({name: value for name, value in record.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _has_its_fields(record: Mapping[str, Any]) -> bool:
    kinds = {"stage": str, "key": str, "inputs": dict, "result": dict, "files": list, "written_unix_s": int}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return False
    blocks = record.get("blocks")
    return isinstance(blocks, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and not Path(entry["path"]).is_absolute()
        and ".." not in Path(entry["path"]).parts
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and isinstance(blocks.get(entry["path"], []), list)
        for entry in record["files"]
    )


def read_record(folder: Path) -> dict[str, Any]:
    """record.json, its hash of itself checked and its key that of its inputs. Raises Damaged."""
    path = folder / "record.json"
    try:
        record = read_json(path, what="record", max_bytes=MAX_RECORD_BYTES)
    except UserError as error:
        raise Damaged(f"{path}: missing or not readable") from error
    if record.get("schema") != RECORD_SCHEMA:
        raise Damaged(f"{path}: not of this version ({RECORD_SCHEMA})")
    if not _has_its_fields(record):
        raise Damaged(f"{path}: a field is missing or of another kind")
    if record.get("sha256") != own_sha256(record):
        raise Damaged(f"{path}: content changed: it does not have the hash that it holds of itself")
    if (record["stage"], record["key"]) != (folder.parent.name, folder.name) or (
        key_of(record["stage"], record["inputs"]) != folder.name
    ):
        raise Damaged(f"{path}: it is of other inputs: the key does not match them")
    return record
