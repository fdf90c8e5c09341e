"""Train, calibration and held-out parts; nothing in two of them goes unreported.

`hash` puts each document where the hash of its text says, so that adding documents moves no other.
`tail` holds out the end of the source, calibrates on what stands before it, and trains on the rest.

A part is a list of blocks, and a block a list of documents: the block is what intervals resample. Lines and
paragraphs of running text belong together: neighbours make a block, and blocks are hashed, or a held-out line
would stand between two lines of the training part. A block ends with its file. Each line stays a document of
its own for the model. The quickstart's short documents (a topic, a docstring) are joined to one text after the
split. Rows of a table are blocks of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgedistill.config.recipe import Data
from edgedistill.data.documents import PYTHON_DOCS, Group, source_hash
from edgedistill.errors import UserError
from edgedistill.records.data import SplitPart

Block = list[str]
PARTS = ("train", "calibration", "held_out")
MIN_DOCUMENTS = 3
MIN_HELD_OUT_DOCUMENTS = 2
MOST_SHARED = 0.5  # of the held-out text's runs of 13 words: a text of which more was trained on holds nothing out
OVERLAP_WORDS = 13  # as GPT-3's decontamination: shorter runs are common phrases


@dataclass(frozen=True)
class Split:
    """The three parts, as blocks of documents, and what was dropped or found on the way."""

    parts: dict[str, list[Block]]
    duplicates_dropped: int
    overlap: dict[str, float]

    def summary(self) -> dict[str, SplitPart]:
        flat = {name: [text for block in blocks for text in block] for name, blocks in self.parts.items()}
        return {
            name: SplitPart(
                documents=len(self.parts[name]),
                bytes=sum(len(t.encode()) for t in texts),
                sha256=source_hash("\n\n".join(block) for block in self.parts[name]),
            )
            for name, texts in flat.items()
        }


def split_documents(documents: Sequence[Group], data: Data, held_out: Sequence[Group] | None = None) -> Split:
    """Split by the recipe. `held_out`: a text of its own; then nothing is split off for it.

    Exact duplicates are dropped first (the first stays), and what is held out is left out of the training. Raises
    UserError where a part would be empty, or most of a held-out text of its own is in the training part all the same.
    """
    unique, count, dropped, left_out = _enough(documents, held_out)
    train, calibration, tail = _cut(unique, data, held_out)
    parts = {"train": train, "calibration": calibration, "held_out": tail}
    shared = overlap([t for block in train for t in block], [t for block in tail for t in block])
    share = shared["share_of_13_word_runs"]
    if held_out is not None and share > MOST_SHARED:
        raise UserError(
            f"{share:.0%} of the text of --eval-data (in runs of 13 words) is in the training part too: retention on it"
            " would say nothing about other text",
            "hold out text that is not trained on, or leave --eval-data out to hold out a part of the data",
        )
    if left_out:
        shared["left_out_of_training"] = float(left_out)
    if data.source == PYTHON_DOCS:
        parts = {
            name: [["\n".join(block)] for block in blocks_of([t for b in part for t in b], data.min_document_chars)]
            for name, part in parts.items()
        }
    _require_filled(parts, count)
    return Split(parts=parts, duplicates_dropped=dropped, overlap=shared)


def require_parts(documents: Sequence[Group], data: Data, held_out: Sequence[Group] | None = None) -> None:
    """What `split_documents` would refuse for want of documents, without comparing their texts. UserError."""
    unique, count, _, _ = _enough(documents, held_out)
    train, calibration, tail = _cut(unique, data, held_out)
    _require_filled({"train": train, "calibration": calibration, "held_out": tail}, count)


def _enough(documents: Sequence[Group], held_out: Sequence[Group] | None) -> tuple[list[Group], int, int, int]:
    """The documents to split, how many they are, how many duplicates were dropped and how many are held out."""
    unique = _unique(documents)
    count = sum(len(group.texts) for group in unique)
    dropped = sum(len(group.texts) for group in documents) - count
    unique, left_out = _without(unique, held_out or ())
    count -= left_out
    if left_out and count < MIN_DOCUMENTS:
        raise UserError(
            f"{left_out:,} of {count + left_out:,} documents of the data are held out in --eval-data: {count} are left"
            " to train on",
            "give held-out text that is not the training text, or leave --eval-data out to hold out a part of the data",
        )
    if count < MIN_DOCUMENTS:
        raise UserError(
            f"the data holds {count} document(s); {MIN_DOCUMENTS} are needed to train, calibrate and hold out",
            "give more text, or say what ends a document with --document-separator",
        )
    return unique, count, dropped, left_out


def _require_filled(parts: Mapping[str, Sequence[Block]], count: int) -> None:
    for name, texts in parts.items():
        if len(texts) < (MIN_HELD_OUT_DOCUMENTS if name == "held_out" else 1):
            raise UserError(
                f"the {name.replace('_', '-')} part got {len(texts)} document(s) of {count}",
                "give more text, a larger data.eval_share, a smaller data.min_document_chars, or --eval-data a file of"
                " its own",
            )


def held_out_chars(documents: Sequence[Group], data: Data, held_out: Sequence[Group] | None = None) -> list[int]:
    """Characters of each held-out document, as `split_documents` would hold them out."""
    if held_out is not None:
        tail = blocks_of_groups(_unique(held_out), data.min_document_chars)
    else:
        _, _, tail = _cut(_unique(documents), data, None)
    return [sum(len(text) for text in block) for block in tail]


def _cut(unique: Sequence[Group], data: Data, held_out: Sequence[Group] | None) -> tuple[list[Block], ...]:
    """Blocks to train on, to calibrate on and held out; `held_out`: a text of its own, which is that part."""
    blocks = blocks_of_groups(unique, data.min_document_chars)
    cut = _by_hash if data.split == "hash" else _by_tail
    train, calibration, tail = cut(blocks, 0.0 if held_out is not None else data.eval_share, data.calibration_share)
    if held_out is not None:
        tail = blocks_of_groups(_unique(held_out), data.min_document_chars)
    return train, calibration, tail


def _unique(groups: Sequence[Group]) -> list[Group]:
    """Each document where it stands first."""
    seen: set[str] = set()
    made = []
    for group in groups:
        texts = [text for text in dict.fromkeys(group.texts) if text not in seen]
        seen.update(texts)
        made.append(Group(texts, group.running))
    return made


def _without(groups: Sequence[Group], held_out: Sequence[Group]) -> tuple[list[Group], int]:
    """The groups without the documents that are held out, and how many those are."""
    own = {text for group in held_out for text in group.texts}
    kept = [Group([text for text in group.texts if text not in own], group.running) for group in groups]
    return kept, sum(len(group.texts) for group in groups) - sum(len(group.texts) for group in kept)


def _by_hash(blocks: list[Block], eval_share: float, calibration_share: float) -> tuple[list[Block], ...]:
    train: list[Block] = []
    calibration: list[Block] = []
    held_out: list[Block] = []
    for text in blocks:
        draw = int.from_bytes(hashlib.sha256("\n".join(text).encode()).digest()[:8], "big") / 2**64
        if draw < eval_share:
            held_out.append(text)
        elif draw < eval_share + calibration_share:
            calibration.append(text)
        else:
            train.append(text)
    return train, calibration, held_out


def _by_tail(documents: list[Block], eval_share: float, calibration_share: float) -> tuple[list[Block], ...]:
    """Cut by lines of text, not documents, and never hold out more than the share: a model that was
    trained on the first 95 % of a file's lines must not meet one of them again in its last 5 %."""
    lines = [sum(1 for text in block for line in text.split("\n") if line.strip()) for block in documents]
    total = sum(lines)
    first_held_out = _first_at(lines, total * (1 - eval_share))
    first_calibration = _first_at(lines, total * (1 - eval_share - calibration_share))
    return documents[:first_calibration], documents[first_calibration:first_held_out], documents[first_held_out:]


def _first_at(lines: list[int], start: float) -> int:
    before = 0
    for index, count in enumerate(lines):
        if before >= start:
            return index
        before += count
    return len(lines)


def blocks_of_groups(groups: Iterable[Group], min_chars: int) -> list[Block]:
    """Rows as blocks of one, running text as blocks of neighbours within its own file: another file beside it, of
    whatever kind, moves no block."""
    blocks: list[Block] = []
    for group in groups:
        blocks += blocks_of(group.texts, min_chars) if group.running else [[text] for text in group.texts]
    return blocks


def blocks_of(texts: list[str], min_chars: int) -> list[Block]:
    """Neighbours together until each block has `min_chars`, line breaks counted (the last may be shorter).

    Lines and paragraphs of one story are not independent: an interval over them would be too narrow.
    """
    blocks: list[Block] = []
    block: Block = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text) + 1
        if size >= min_chars:
            blocks.append(block)
            block, size = [], 0
    if block:
        if blocks and size < min_chars / 2:
            blocks[-1] = blocks[-1] + block
        else:
            blocks.append(block)
    return blocks


def overlap(train: list[str], held_out: list[str]) -> dict[str, float]:
    """What stands in both parts: held-out documents, and their runs of 13 words, that training saw."""
    known = {run for text in train for run in _runs(text)}
    whole = set(train)
    runs_shared = runs_total = documents_with_shared = 0
    for text in held_out:
        runs = list(_runs(text))
        shared = sum(run in known for run in runs)
        runs_total += len(runs)
        runs_shared += shared
        documents_with_shared += shared > 0
    return {
        "documents_in_both": float(sum(text in whole for text in held_out)),
        "documents_sharing_13_words": float(documents_with_shared),
        "share_of_13_word_runs": runs_shared / runs_total if runs_total else 0.0,
    }


def _runs(text: str) -> Iterator[int]:
    words = text.lower().split()
    for start in range(len(words) - OVERLAP_WORDS + 1):
        yield hash(tuple(words[start : start + OVERLAP_WORDS]))
