"""What was read of the text, what was left out, and how it was split."""

from __future__ import annotations

from edgedistill.records.base import Count, Record


class SplitPart(Record):
    """One part of the documents."""

    documents: Count
    bytes: Count
    sha256: str


class FileRead(Record):
    """A file of text as it was read: `rows` stand in it, `documents` are kept, `dropped` are the others by reason."""

    path: str
    format: str
    rows: Count
    documents: Count
    dropped: dict[str, Count] = {}
    notes: list[str] = []


class LeftOut(Record):
    """What of a folder was not read, and why: how many files or folders, and the first of them."""

    why: str
    count: Count
    paths: list[str]


class SourceRead(Record):
    """A data path as it was read: all rows are documents or dropped.

    `files` are the first thousand of `file_count`; of a data set from a hub there is none. `duplicates` are documents
    that stand in it before, word for word: the split drops them. `whole` is false where reading stopped at
    `data.max_documents`; rows behind that are not counted.
    """

    source: str
    file_count: Count
    files: list[FileRead]
    rows: Count
    documents: Count
    dropped: dict[str, Count]
    duplicates: Count
    left_out: list[LeftOut]
    whole: bool


class DataResult(Record):
    """What the data stage leaves: `train.jsonl`, `calibration.jsonl`, `held_out.jsonl`, a block of documents a line.

    `read`: what the text was read from, and `data.eval_data`'s; empty for Python's documentation.
    """

    source: str
    read: list[SourceRead] = []
    split: str
    parts: dict[str, SplitPart]
    duplicates_dropped: Count
    overlap: dict[str, float]
    sha256: str


class VocabularyResult(Record):
    """A tokenizer trimmed to what the text uses: `path` is its folder, with a config.json of the new ids.

    `used_tokens` are those in the documents, `only_held_out_tokens` those of them that the held-out part alone has;
    `kept_sha256` is that of the kept ids of the teacher, ascending, as little-endian int64.
    """

    path: str
    tokens: int
    teacher_tokens: int
    used_tokens: int
    only_held_out_tokens: int
    kept_sha256: str
    tokenizer_sha256: str
