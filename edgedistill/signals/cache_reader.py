"""The teacher's signals read from disk, memory-mapped; what a file claims is checked. See docs/signal-cache.md.

Legend: S sequences of T tokens, N = S · T, H_t the teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import Tensor  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.losses.losses import Head, SparseTargets, Teacher, TeacherHead, TeacherLogits
from edgedistill.models.safetensors_header import read_safetensors_header
from edgedistill.signals import multiset
from edgedistill.signals.cache_files import download, is_remote, read_record, require_key
from edgedistill.store import sha256_of

DTYPES = {"U64": np.uint64, "I64": np.int64, "I32": np.int32, "F64": np.float64, "F32": np.float32, "F16": np.float16,
          "BF16": np.int16}  # fmt: skip
Rows = NDArray[np.int64]


def open_cache(
    url: str,
    *,
    key: Mapping[str, Any],
    head: Head | None = None,
    device: torch.device | None = None,
    local: Path | None = None,
    verify: bool = False,
) -> CacheReader:
    """The cache at a folder or URL, after it was checked against `key`.

    `head` is the teacher's output head, needed for kind hidden. `local` is where a URL's files are kept. `verify`
    hashes every shard. Raises UserError naming the first fields that differ, a shard that is cut short or changed, a
    header that lies.
    """
    folder = download(url, local) if is_remote(url) else Path(url)
    record = read_record(folder, url)
    require_key(record, key, url)
    for shard in record["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.is_file() else -1
        if size != shard["bytes"] or (verify and sha256_of(path) != shard["sha256"]):
            what = "missing" if size < 0 else f"{size:,} bytes, not {shard['bytes']:,}" if size != shard["bytes"] else (
                "changed")  # fmt: skip
            raise UserError(
                f"the cache of teacher signals at {url} is damaged: {shard['name']} is {what}",
                "remove the cache and build it again",
            )
    if record["kind"] == "hidden" and head is None:
        raise ValueError("a cache of hidden states needs the teacher's head")
    return CacheReader(folder, record, head, device or torch.device("cpu"))


class CacheReader:
    """Signals by sequence number. Shards are mapped when they are first read."""

    def __init__(self, folder: Path, record: dict[str, Any], head: Head | None, device: torch.device) -> None:
        self.folder, self.record, self.head, self.device = folder, record, head, device
        self.kind: str = record["kind"]
        self._shards: dict[int, dict[str, NDArray[Any]]] = {}

    @property
    def bytes(self) -> int:
        return sum(int(shard["bytes"]) for shard in self.record["shards"])

    @property
    def bytes_per_token(self) -> float:
        return float(self.bytes / (self.record["sequences"] * self.record["context"]))

    def batch(self, rows: Rows) -> Teacher:
        """What the loss needs of the sequences `rows`: N = len(rows) · T tokens."""
        if self.kind == "sampled":
            return self._sampled(rows)
        if self.kind == "topk":
            ids = self._gather("ids", rows).astype(np.int64).reshape(-1, self.record["top_k"])
            weights = self._gather("probabilities", rows).astype(np.float32).reshape(ids.shape)
            tail = self._gather("tail", rows).reshape(-1)
            return SparseTargets(*(torch.from_numpy(each).to(self.device) for each in (ids, weights, tail)))
        values = self._bf16(self.kind if self.kind == "hidden" else "logits", rows).flatten(0, 1)
        if self.kind == "dense":
            return TeacherLogits(values)
        assert self.head is not None
        return TeacherHead(values, self.head)

    def layer(self, name: str, rows: Rows) -> Tensor:
        """ "hidden.3" [S, T, H_t] or "attention.2" [S, heads, T, T] of the sequences `rows`, bf16."""
        return self._bf16(name, rows)

    def distinct(self, rows: Rows) -> Rows:
        """Distinct ids a token of a sampled cache."""
        found: Rows = (self._multisets(rows)[1] > 0).sum(1)
        return found

    def _sampled(self, rows: Rows) -> SparseTargets:
        ids, counts = self._multisets(rows)
        entropy = np.repeat(self._gather("entropy", rows), self.record["context"])
        return SparseTargets(
            torch.from_numpy(ids).to(self.device),
            torch.from_numpy(counts.astype(np.float32) / self.record["draws"]).to(self.device),
            entropy=torch.from_numpy(entropy.astype(np.float32)).to(self.device),
        )

    def _multisets(self, rows: Rows) -> tuple[Rows, Rows]:
        pieces, first_bits, used = [], [], 0
        for row in rows:
            shard, place = self._find(int(row))
            begin, end = (int(v) for v in shard["first_bit"][place : place + 2])
            if not 0 <= begin < end <= 64 * len(shard["words"]):
                raise self._damaged("a sequence lies outside of its shard")
            piece = np.array(shard["words"][begin >> 6 : (end + 63) >> 6])
            pieces.append(piece)
            first_bits.append(64 * used + (begin & 63))
            used += len(piece)
        try:
            return multiset.decode(
                np.concatenate(pieces), np.array(first_bits), self.record["context"], draws=self.record["draws"],
                vocab=self.record["vocab"],
            )  # fmt: skip
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _bf16(self, name: str, rows: Rows) -> Tensor:
        return torch.from_numpy(self._gather(name, rows)).view(torch.bfloat16).to(self.device)

    def _gather(self, name: str, rows: Rows) -> NDArray[Any]:
        parts = []
        for row in rows:
            shard, place = self._find(int(row))
            if name not in shard:
                raise UserError(
                    f"the cache of teacher signals at {self.folder} holds no {name}: it has {', '.join(shard)}",
                    "name the layer in distill.cache.hidden_layers or attention_layers, and build it again",
                )
            parts.append(shard[name][place])
        return np.stack(parts)

    def _find(self, row: int) -> tuple[dict[str, NDArray[Any]], int]:
        size = self.record["shard_sequences"]
        number, place = divmod(row, size)
        if not 0 <= row < self.record["sequences"]:
            raise IndexError(f"sequence {row} of {self.record['sequences']}")
        if number not in self._shards:
            held = min(size, self.record["sequences"] - number * size)
            self._shards[number] = self._map(self.folder / self.record["shards"][number]["name"], held)
        return self._shards[number], place

    def _map(self, path: Path, held: int) -> dict[str, NDArray[Any]]:
        """The tensors of a safetensors file, mapped; every claim of its header is checked."""
        try:
            made: dict[str, NDArray[Any]] = {}
            for name, entry in read_safetensors_header(path).tensors.items():
                dtype, shape = np.dtype(DTYPES[entry.dtype]), entry.shape
                if name not in ("words", "first_bit") and shape[:1] != (held,):
                    raise ValueError(f"{name} is {shape}, not of {held} sequences")
                made[name] = np.memmap(path, dtype=dtype, mode="r", offset=entry.begin, shape=shape)
            if self.kind == "sampled" and (len(made["first_bit"]) != held + 1 or made["words"].ndim != 1):
                raise ValueError("places of another number of sequences")
        except UserError as error:
            raise self._damaged(error.cause) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{path.name}: {error}") from error
        return made

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"the cache of teacher signals at {self.folder} is damaged: {what}", "remove the cache and build it again"
        )
