"""What a data path names: the kind of a file by its name, and which files of a folder are read.

Names are taken as they stand: no character in them is a pattern. What a folder holds beside its data is left out, and
said: hidden files and folders (checkpoints of notebooks, .git, AppleDouble), kinds that are not read, what describes
rows (README.md beside them). A link to a folder is followed once, so that a circle ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgedistill.errors import UserError
from edgedistill.records.data import LeftOut
from edgedistill.strict import shown

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
WHOLE = ("parquet", "arrow")  # formats whose files are read at their end or by their own blocks: never inflated
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# beside rows these describe them; in a folder of texts they are texts
DESCRIPTIONS = frozenset({"readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing"})
# what `datasets` keeps beside its tables
METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
CACHES = re.compile(r"cache-[0-9a-f]+(?:_\d+_of_\d+)?\.arrow")  # what its `map` and `filter` leave beside them
# what systems, and Spark, leave beside data; the last two hold JSON that is no data
HIDDEN_NAMES = frozenset({
    "__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini", "lost+found", "$RECYCLE.BIN", "System Volume Information",
    "_SUCCESS", "_metadata", "_common_metadata", "_temporary", "_spark_metadata", "_delta_log",
})  # fmt: skip
MAX_FILES = 1_000_000
SHOWN_PATHS = 5


@dataclass(frozen=True)
class Kind:
    """What a file is read as."""

    format: Format
    compression: str | None = None

    @property
    def name(self) -> str:
        return self.format if self.compression is None else f"{self.format} ({self.compression})"


def kind_of(name: str) -> Kind | None:
    """The kind that a file's name says; None: none that is read."""
    lower = name.lower()
    for end, compression in COMPRESSIONS.items():
        if lower.endswith(end):
            kind = kind_of(lower.removesuffix(end))
            return None if kind is None or kind.compression or kind.format in WHOLE else Kind(
                kind.format, compression
            )  # fmt: skip
    suffix = lower[lower.rfind(".") :] if "." in lower else ""
    return None if suffix not in FORMATS else Kind(FORMATS[suffix])


def read_suffixes() -> str:
    """The endings that are read, in words."""
    return f"{', '.join(FORMATS)}; all but .parquet and .arrow with {' or '.join(COMPRESSIONS)} behind too"


@dataclass
class _Tally:
    """Left out, by reason: how many, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, why: str, path: Path, folder: Path) -> None:
        self.counts[why] = self.counts.get(why, 0) + 1
        first = self.paths.setdefault(why, [])
        if len(first) < SHOWN_PATHS:
            first.append(printable(path.relative_to(folder)))

    def records(self) -> list[LeftOut]:
        return [LeftOut(why=why, count=count, paths=self.paths[why]) for why, count in sorted(self.counts.items())]


def printable(path: Path | str) -> str:
    """A path as reports show it: text that a terminal and a JSON file take."""
    return shown(str(path), 300)[1:-1]


def folder_files(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """The files of a data folder that are read, sorted, and what is left out. UserError for a folder that cannot be
    read, and for too many files. What has a data file's name and is no file is a UserError when it is opened."""
    tally = _Tally()
    files: list[Path] = []
    describing: list[Path] = []
    for path in _entries(folder, tally):
        kind = kind_of(path.name)
        if path.name.lower() in METADATA:
            tally.add("describes a data set", path, folder)
        elif CACHES.fullmatch(path.name):
            tally.add("a cache of what was made of the rows", path, folder)
        elif kind is None:
            tally.add(f"of a kind that is not read ({_ending(path.name)})", path, folder)
        elif kind.format == "text" and path.name.lower().partition(".")[0] in DESCRIPTIONS:
            describing.append(path)
        else:
            files.append(path)
    rows = any(kind.format != "text" for path in files if (kind := kind_of(path.name)))
    for path in describing:
        if rows:
            tally.add("describes the rows beside it", path, folder)
        else:
            files.append(path)
    return sorted(files), tally.records()


def _ending(name: str) -> str:
    start = name.rfind(".")
    return "no suffix" if start < 0 else shown(name[start:].lower(), 20)[1:-1]


def _entries(folder: Path, tally: _Tally) -> Iterator[Path]:
    """Every file below `folder` that is not hidden. Linked folders come after real ones, each folder once."""
    places, links = [folder], list[Path]()
    above = {_identity(parent) for parent in folder.absolute().parents}
    seen: set[tuple[int, int]] = set()
    count = 0
    while places or links:
        place = places.pop() if places else links.pop(0)
        identity = _identity(place)
        if identity in seen or identity in above:
            why = "a link to a folder that is read already" if identity in seen else "a link to a folder around it"
            tally.add(why, place, folder)
            continue
        seen.add(identity)
        for path in _listed(place):
            count += 1
            if count > MAX_FILES:
                raise UserError(f"data folder {folder} holds more than {MAX_FILES:,} files", "name a smaller folder")
            if path.name.startswith(".") or path.name in HIDDEN_NAMES:
                tally.add("hidden", path, folder)
            elif not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                places.append(path)
        links.sort()


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        raise _unreadable(folder, error) from error
    return found.st_dev, found.st_ino


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"data folder {folder} cannot be read: {error.strerror or error}", "check its permissions")
