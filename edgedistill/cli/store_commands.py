"""What can be asked of a whole store: `store list`, `verify`, `adopt` and `prune`."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from edgedistill.errors import UserError, did_you_mean
from edgedistill.store import Damaged, Store, files_under, key_of, read_record, sha256_of, versions
from edgedistill.strict import shown

ADOPTABLE = ("teacher", "student")
STAGE = "[a-z][a-z-]*"
KEY = "[0-9a-f]{32}"
WORK = re.compile(f"({STAGE})-({KEY})")
# Beside records and unfinished work, by the names that this program gives; all of it can be made again.
OTHERS = {
    "reports": re.compile(KEY),
    "logs": WORK,
    "downloads": re.compile("[0-9a-f]{24}"),
    "probes": re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.json"),
    "hashes": re.compile(rf"{KEY}\.json|sound-[0-9a-f]{{64}}"),
}


def _inside(store: Store, name: str) -> list[Path]:
    """What lies in a folder of the store; nothing behind a link, which may lead to anything of the user's."""
    folder = store.root / name
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _records(store: Store) -> Iterator[Path]:
    """Folders of records, by their names: whoever names a folder of his own as the store keeps what lies in it."""
    for stage in _inside(store, "records"):
        if re.fullmatch(STAGE, stage.name):
            found = _inside(store, f"records/{stage.name}")
            yield from (path for path in found if re.fullmatch(KEY, path.name) and _is_folder(path))


def _unfinished(store: Store) -> Iterator[Path]:
    yield from (path for path in _inside(store, "work") if WORK.fullmatch(path.name) and _is_folder(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def store_list(store: Store) -> list[dict[str, Any]]:
    """One row a record: stage, key, bytes, age, folder; and unfinished work."""
    rows = []
    for folder in _records(store):
        record = _record_or_none(folder)
        rows.append(
            {
                "stage": folder.parent.name,
                "key": folder.name,
                "bytes": _bytes_under(folder),
                "written_unix_s": int(folder.lstat().st_mtime) if record is None else record["written_unix_s"],
                "path": str(folder),
                "state": "damaged" if record is None else "finished",
                "what": "" if record is None else about(record["stage"], record["result"]),
            }
        )
    for folder in _unfinished(store):
        stage, _, key = folder.name.rpartition("-")
        rows.append(
            {
                "stage": stage,
                "key": key,
                "bytes": _bytes_under(folder),
                "written_unix_s": int(folder.lstat().st_mtime),
                "path": str(folder),
                "state": "unfinished",
                "what": "",
            }
        )
    return rows


def about(stage: str, result: dict[str, Any]) -> str:
    """What a record is, in a few words, from the fields that it has; "" for one of another version's shape."""
    try:
        return str(ABOUT[stage](result)) if stage in ABOUT else ""
    except (KeyError, TypeError, ValueError, IndexError):
        return ""


# Those whose results the store keeps.
STAGES = ("data", "vocabulary", "teacher", "signals", "student", "qad", "export", "verify", "bench")
ABOUT: dict[str, Callable[[dict[str, Any]], str]] = {
    "data": lambda r: f"{r['source']}: {r['parts']['train']['documents']:,} documents to train on",
    "teacher": lambda r: f"{r['name']}, {r['parameters']:,} parameters",
    "student": lambda r: f"{r['parameters']:,} parameters, start {r['start']}",
    "export": lambda r: f"{r['format']}:{r['quantization']}, context {r['context_tokens']:,} tokens",
    "verify": lambda r: f"retention {r['retention']['value']:.3f}",
    "bench": lambda r: f"{r['target']}: {r['decode_tokens_per_s']:,.0f} tokens/s ({r['basis']})",
    "vocabulary": lambda r: f"{r['tokens']:,} of the teacher's {r['teacher_tokens']:,} tokens",
    "signals": lambda r: f"{r['kind']}, {r['tokens']:,} tokens",
    "qad": lambda r: f"{r['training']['tokens']:,} tokens under the rounding",
}


def require_stage(stage: str | None) -> None:
    """UserError for a stage that leaves nothing in the store."""
    if stage is not None and stage not in STAGES:
        raise UserError(f"no stage {shown(stage)} in the store", did_you_mean(stage, STAGES))


def store_verify(store: Store) -> list[str]:
    """Re-hash every file of every record, and records themselves; a list of what is wrong, empty where all is well."""
    problems = []
    for folder in _records(store):
        try:
            problems += _problems(folder, read_record(folder))
        except Damaged as error:
            problems.append(str(error))
    ours = set(_records(store))
    foreign = [path for path in sorted(store.root.glob("records/*/*")) if path not in ours]
    return problems + [f"{path}: no record's folder by its name, or behind a link; prune leaves it" for path in foreign]


def _problems(folder: Path, record: dict[str, Any]) -> list[str]:
    """What of a record's files is not as it was written: missing, changed, or there in addition."""
    found = []
    for entry in record["files"]:
        path = folder / entry["path"]
        if not path.is_file():
            found.append(f"{path}: missing")
        elif sha256_of(path) != entry["sha256"]:
            found.append(f"{path}: content changed")
    known = {folder / entry["path"] for entry in record["files"]} | {folder / "record.json"}
    return found + [f"{path}: not part of the record" for path in files_under(folder) if path not in known]


def _whole(folder: Path) -> bool:
    """A record that reads, and whose files are those that it names, with their hashes."""
    record = _record_or_none(folder)
    return record is not None and not _problems(folder, record)


def _record_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return read_record(folder)
    except Damaged:
        return None


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_under(folder))


def store_adopt(store: Store) -> list[dict[str, Any]]:
    """Keep finished teachers and students across an upgrade of the libraries that computed them.

    Each record of those stages whose library versions are not the installed ones is copied under the key that the
    installed ones give, marked `adopted`; what is damaged is not. Returns stage, keys and both sets of versions.
    """
    adopted = []
    for stage in ADOPTABLE:
        for folder in [one for one in _records(store) if one.parent.name == stage]:
            record = _record_or_none(folder)
            if record is None or _problems(folder, record):
                continue
            before = record["inputs"]["versions"]
            inputs = {**record["inputs"], "versions": versions(*before)}
            key = key_of(stage, inputs)
            if key == folder.name or _record_or_none(store.record_folder(stage, key)) is not None:
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

    Without a filter only records go that cannot be read or whose files are not what they were. `everything` also takes
    reports, logs, downloads, probes and remembered hashes. A folder that another process is building is left alone,
    and so is whatever has another name than this program gives, or lies behind a link.
    Raises UserError where `everything` and a filter are both given.
    """
    if everything and (stage is not None or older_than_days is not None):
        raise UserError("--all with --stage or --older-than-days", "give --all alone, or the filters alone")
    rows = store_list(store)
    filtered = everything or stage is not None or older_than_days is not None
    limit = time.time() - (older_than_days or 0.0) * 86400
    removed: list[str] = []
    for row in rows:
        chosen = filtered and (stage is None or row["stage"] == stage) and row["written_unix_s"] <= limit
        if not chosen and (row["state"] == "unfinished" or _whole(Path(row["path"]))):
            continue
        try:
            with store.lock(f"{row['stage']}-{row['key']}").acquire(timeout=0):
                shutil.rmtree(row["path"], ignore_errors=True)
        except Timeout:
            continue
        removed.append(row["path"])
    return removed + (_prune_others(store) if everything else [])


def _prune_others(store: Store) -> list[str]:
    """Remove what lies beside the records; a log or download of a run that goes on stays."""
    busy = {folder.name for folder in _unfinished(store)}
    removed = []
    for name, ours in OTHERS.items():
        for path in _inside(store, name):
            if not ours.fullmatch(path.name) or (name == "logs" and path.name in busy):
                continue
            if _is_folder(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(str(path))
    return removed
