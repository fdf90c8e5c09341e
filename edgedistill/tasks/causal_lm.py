"""Causal language modelling: documents → token ids → packed training sequences and scoring windows.

Legend: S sequences, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.config.recipe import group_windows
from edgedistill.errors import UserError
from edgedistill.models.folder import open_for_text, vocabulary
from edgedistill.strict import read_json

Ids = NDArray[np.int32]
IGNORED = -100


@dataclass(frozen=True)
class TextTokenizer:
    """The `tokenizers` tokenizer of a model folder with its BOS and EOS.

    `vocab` is one more than the largest token id: rows of the embedding beyond it are padding.
    """

    backend: Any
    bos: int | None
    eos: int | None
    vocab: int

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """From tokenizer.json and tokenizer_config.json, else config.json. UserError where there is none."""
        known = vocabulary(folder)
        backend = open_for_text(folder / "tokenizer.json")
        settings = (
            read_json(folder / "tokenizer_config.json", what="tokenizer_config.json")
            if (folder / "tokenizer_config.json").is_file()
            else {}
        )
        config = read_json(folder / "config.json", what="config.json") if (folder / "config.json").is_file() else {}

        def special(name: str) -> int | None:
            token = settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in known:
                return known[token]
            value = config.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            # a tokenizer that names no BOS (Qwen) means it: config.json's leftover is not used then
            return value if isinstance(value, int) and f"{name}_token" not in settings else None

        bos = special("bos")
        if settings.get("add_bos_token") is False and settings.get("bos_token") is None:
            bos = None
        return cls(backend=backend, bos=bos, eos=special("eos"), vocab=max(known.values()) + 1)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, BOS in front where the tokenizer has one, nothing at the end."""
        front = [] if self.bos is None else [self.bos]
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(front + item.ids, dtype=np.int32) for item in encoded]


def encode_blocks(tokenizer: TextTokenizer, blocks: Sequence[Sequence[str]]) -> list[Ids]:
    """Ids of each block: its documents one after another, BOS before each, or EOS after each where there is no BOS."""
    encoded = iter(tokenizer.encode([text for block in blocks for text in block]))
    end = np.array([tokenizer.eos] if tokenizer.bos is None and tokenizer.eos is not None else [], dtype=np.int32)
    return [
        np.concatenate([part for _ in block for part in (next(encoded), end)]) if len(block) > 1 else next(encoded)
        for block in blocks
    ]


@dataclass(frozen=True)
class Packed:
    """All documents in one stream, cut into sequences; the order is a function of seed and epoch.

    `stream`: token ids. A sequence is T + 1 consecutive ids: T inputs and, one later, T targets.
    `starts`: where each document begins in the stream, ascending.
    """

    stream: Ids
    context: int
    seed: int
    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def sequences(self) -> int:
        return (len(self.stream) - 1) // self.context

    def order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.sequences)

    def batches(self, size: int, start_step: int) -> Iterator[NDArray[np.int64]]:
        """Numbers of the [size] sequences of each step from `start_step` on, for ever; epochs run into each other."""
        position = start_step * size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            rows = np.empty(size, dtype=np.int64)
            for index in range(position, position + size):
                if index // self.sequences != epoch:
                    epoch = index // self.sequences
                    order = self.order(epoch)
                rows[index - position] = order[index % self.sequences]
            position += size
            yield rows

    def sequence_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[S, T + 1] ids of the sequences `rows`."""
        starts = rows[:, None] * self.context + np.arange(self.context + 1)[None, :]
        ids: NDArray[np.int64] = self.stream[starts].astype(np.int64)
        return ids

    def targets(self, rows: NDArray[np.int64], *, documents: bool) -> NDArray[np.int64]:
        """[S, T] next ids. With `documents`, a document's first token counts for nothing: none before it saw it."""
        ids = self.sequence_ids(rows)[:, 1:]
        if documents:
            places = rows[:, None] * self.context + np.arange(1, self.context + 1)[None, :]
            ids[np.isin(places, self.starts)] = IGNORED
        return ids

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[S, T] position of each input within its document, or within the sequence where that starts later."""
        first = rows[:, None] * self.context
        places = first + np.arange(self.context)[None, :]
        begins = self.starts[np.searchsorted(self.starts, places, side="right") - 1]
        return places - np.maximum(begins, first)


def pack(documents: Sequence[Ids], *, context: int, seed: int, eos: int | None, bos: int | None) -> Packed:
    """Documents in a shuffled order, each ended by EOS where that is another token than BOS.

    Raises UserError where the text is shorter than one sequence.
    """
    order = np.random.default_rng((seed, 2**31)).permutation(len(documents))
    end = np.array([eos] if eos is not None and eos != bos else [], dtype=np.int32)
    stream = np.concatenate([part for index in order for part in (documents[index], end)])
    lengths = np.array([len(documents[index]) + len(end) for index in order], dtype=np.int64)
    if len(stream) <= context:
        raise UserError(
            f"the training part holds {len(stream):,} tokens, fewer than one sequence of {context:,}",
            "give more text, or a smaller context with --set distill.context_tokens=N",
        )
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)[:-1]])
    return Packed(stream=stream, context=context, seed=seed, starts=starts)


@dataclass(frozen=True)
class Window:
    """A piece of one document to score: `ids` [T], of whose targets those from `first` on count.

    Target i is ids[i + 1]; positions before `first` were scored in the window before.
    """

    document: int
    ids: Ids
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - 1 - self.first


def stride_of(context: int, stride: int | None) -> int:
    """The step between windows that runs: a window's first id is scored by none but the window before."""
    return context - 1 if stride is None else min(stride, context - 1)


def scoring_windows(
    documents: Sequence[Ids], *, context: int, stride: int | None, max_tokens: int | None
) -> list[Window]:
    """Windows of at most `context` ids; every token but a document's first is scored exactly once.

    `max_tokens` bounds the scored tokens, in whole documents (at least two). stride None: disjoint windows,
    each of which sees the last id of the one before.
    """
    step = stride_of(context, stride)
    windows: list[Window] = []
    total = 0
    for number, ids in enumerate(documents):
        if len(ids) < 2:
            continue
        if max_tokens is not None and number >= 2 and total + len(ids) - 1 > max_tokens:
            break
        total += len(ids) - 1
        start, scored_to = 0, 0
        while scored_to < len(ids) - 1:
            end = min(start + context, len(ids))
            windows.append(Window(document=number, ids=ids[start:end], first=scored_to - start))
            scored_to = end - 1
            start = min(start + step, scored_to)
    return windows


def groups(windows: list[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Windows of one length together, so that nothing is padded; fewer where each token has more logits."""
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.ids), []).append(window)
    for length, group in sorted(by_length.items()):
        size = group_windows(length, vocabulary)
        for start in range(0, len(group), size):
            yield group[start : start + size]
