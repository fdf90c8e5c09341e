"""What was read of a data path, in words: files, rows, documents, and what is not among them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgedistill.progress import Progress
from edgedistill.records.data import LeftOut, SourceRead

MAX_FILES_LISTED = 20
# how the parts of a data set are called, in a file's or a folder's name
PART = re.compile(r"(?:^|[^a-z])(?:(train|training)|(test|valid|validation|val|dev|eval|heldout|held[-_]out))(?![a-z])")
EXPECTED = ("hidden", "describes")  # left out as everybody expects: said, but no warning


def tell(read: SourceRead, progress: Progress) -> None:
    """Says what was read; what may be missed is a warning, which -q shows too."""
    progress.say(f"data: {read.source}: {counts(read)}")
    for entry in read.left_out:
        say = progress.say if entry.why.startswith(EXPECTED) else progress.warn
        say(f"data: {read.source}: left out: {left_out(entry)}")
    for warning in warnings(read):
        progress.warn(f"data: {warning}")


def counts(read: SourceRead) -> str:
    """Files, rows, documents, and why not every row is one."""
    files = f"{read.file_count:,} file{'s' if read.file_count != 1 else ''}, " if read.file_count else ""
    further = _further(read)
    return f"{files}{_kept(read.rows, read.documents, read.dropped)}{f'; {further}' if further else ''}"


def left_out(entry: LeftOut) -> str:
    more = entry.count - len(entry.paths)
    return f"{entry.count:,} {entry.why}: {', '.join(entry.paths)}{f' and {more:,} more' if more else ''}"


def warnings(read: SourceRead) -> list[str]:
    """What the user should look at: notes of files, and files without any text."""
    found = [f"{file.path}: {note}" for file in read.files for note in file.notes]
    tested = _tested(read)
    if tested:
        found.append(
            f"{read.source} has a training part and another ({', '.join(tested[:5])}), and all of it is read as one:"
            " name the files, or folders of their own, with --data and --eval-data"
        )
    empty = [file.path for file in read.files if not file.documents]
    if empty and read.whole:
        found.append(f"{len(empty):,} of the files hold no text: {', '.join(empty[:5])}")
    return found


def _tested(read: SourceRead) -> list[str]:
    """Files that are called as what is held out, beside files that are called as what is trained on."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for file in read.files if read.file_count > 1 else ():
        name = file.path.removeprefix(read.source)
        found = PART.search(name.lower())
        if found is not None:
            parts[found[1] is not None].append(name.lstrip("/"))
    return parts[False] if parts[True] else []


HEADER = ("data", "read as", "rows", "documents", "dropped")


def source_rows(read: SourceRead) -> Iterator[tuple[str, ...]]:
    """Rows of the plan's table of data, under `HEADER`: the source as a whole, then its files."""
    one = read.files[0] if read.file_count == 1 else None
    yield (
        one.path if one else read.source,
        one.format if one else f"{read.file_count:,} files" if read.file_count else "data set",
        f"{read.rows:,}", f"{read.documents:,}", _lost(read.dropped),
    )  # fmt: skip
    if one is not None:
        return
    for file in read.files[:MAX_FILES_LISTED]:
        yield f"  {file.path}", file.format, f"{file.rows:,}", f"{file.documents:,}", _lost(file.dropped)
    if read.file_count > MAX_FILES_LISTED:
        yield (
            f"  and {read.file_count - MAX_FILES_LISTED:,} more files (--json lists the first thousand)",
            "",
            "",
            "",
            "",
        )


def remarks(read: SourceRead) -> Iterator[str]:
    """Lines below that table: what is left out, what stands in it twice, what to look at."""
    if further := _further(read):
        yield f"{read.source}: {further}"
    yield from (f"{read.source}: left out: {left_out(entry)}" for entry in read.left_out)
    yield from (f"warning: {warning}" for warning in warnings(read))


def _kept(rows: int, documents: int, dropped: dict[str, int]) -> str:
    lost = f" (dropped: {_lost(dropped)})" if dropped else ""
    return f"{rows:,} row{'s' if rows != 1 else ''}, {documents:,} document{'s' if documents != 1 else ''}{lost}"


def _lost(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in dropped.items())


def _further(read: SourceRead) -> str:
    more = []
    if read.duplicates:
        more.append(f"{read.duplicates:,} of the documents are repeated word for word: only the first counts")
    if not read.whole:
        more.append("reading stopped at data.max_documents")
    return "; ".join(more)
