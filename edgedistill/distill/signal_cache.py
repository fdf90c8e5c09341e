"""The teacher's signals on disk: written once in parallel, resumable; read memory-mapped. Format: docs/signal-cache.md.

Legend: S sequences of T tokens, N = S · T, H_t the teacher's width, V real tokens, K kept entries.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor  # noqa: TID253

from edgedistill.distill import multiset
from edgedistill.distill.cache_files import (
    KINDS,
    SCHEMA,
    download,
    is_remote,
    local_copy,
    read_record,
    require_key,
    upload,
)
from edgedistill.distill.losses import Head, SparseTargets, Teacher, TeacherHead, TeacherLogits, finish_logits
from edgedistill.errors import UserError
from edgedistill.progress import QUIET, Progress
from edgedistill.store import fsync_folder, sha256_of, write_durably

SHARD_BYTES = 64 << 20  # about; a shard is whole sequences
LOGITS_BYTES = 128 << 20  # of fp32 logits made at a time while writing
MAX_HEADER_BYTES = 1 << 20
DTYPES = {"U64": np.uint64, "I64": np.int64, "I32": np.int32, "F64": np.float64, "F32": np.float32, "F16": np.float16,
          "BF16": np.int16}  # fmt: skip
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Produced:
    """What the teacher says of some sequences: final states [S, T, H_t], its head, chosen layers, what counts.

    `logits`, where several teachers are mixed: (slice of the S · T tokens, V) → their logits [n, V], fp32.
    """

    hidden: Tensor
    head: Head
    layers: Mapping[int, Tensor]
    attentions: Mapping[int, Tensor]
    counted: Tensor
    logits: Callable[[slice, int], Tensor] | None = None


def estimate_bytes(kind: str, *, vocab: int, width: int, draws: int, top_k: int) -> float:
    """Bytes a token, about: a sample is taken to hold half of its draws distinct."""
    if kind == "sampled":
        k = max(1, min(draws, vocab) // 2)
        return float(multiset.payload_bits(draws, vocab)[k] + multiset.k_bits(draws, vocab)) / 8
    return float({"topk": 6 * top_k + 4, "dense": 2 * vocab, "hidden": 2 * width}[kind])


def build_cache(
    url: str,
    *,
    key: Mapping[str, Any],
    kind: str,
    vocab: int,
    sequences: int,
    context: int,
    temperature: float,
    draws: int,
    top_k: int,
    seed: int,
    produce: Callable[[Rows], Produced],
    hidden_layers: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    batch_sequences: int = 1,
    local: Path | None = None,
    progress: Progress = QUIET,
) -> None:
    """Write the cache of all sequences into a folder or to a URL; rank r of W writes shards r, r + W, …

    A shard that is there whole is kept: a build that was killed goes on. A shard's bytes do not depend on the ranks:
    the draws of a sequence are a function of `seed` and its number. `local` is where a URL's shards are staged.
    Raises UserError where the disk is too small, and where an unfinished build of another key lies there.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    folder = local_copy(url, local) if is_remote(url) else Path(url)
    folder.mkdir(parents=True, exist_ok=True)
    first = produce(np.arange(1))
    per_token = estimate_bytes(kind, vocab=vocab, width=first.hidden.shape[-1], draws=draws, top_k=top_k)
    per_token += sum(2 * t.numel() / context for t in (*first.layers.values(), *first.attentions.values()))
    size = max(1, min(sequences, int(SHARD_BYTES / max(1.0, per_token * context))))
    names = [f"shard-{number:05d}.safetensors" for number in range(-(-sequences // size))]
    if rank == 0:
        _claim(folder, key, staged=is_remote(url))
    barrier()
    _require_room(folder, int(per_token * context * sequences))
    writer = _Writer(kind, vocab, context, temperature, draws, top_k, seed, produce, batch_sequences)
    missing = [number for number, name in enumerate(names) if not (folder / name).is_file()]
    barrier()  # all ranks have looked before the first one writes
    passes = [0] * world
    for number in missing:
        rows = np.arange(number * size, min((number + 1) * size, sequences))
        passes[number % world] += -(-len(rows) // batch_sequences)
        if number % world == rank:
            _write(folder / names[number], writer.tensors(rows), rank)
            progress.step("teacher signals", int(rows[-1]) + 1, sequences)
    for _ in range(max(passes) - passes[rank]):
        produce(np.arange(1))  # a sharded teacher's pass needs every rank, also those that have no shard left
    barrier()
    if rank == 0:
        record = {
            "schema": SCHEMA,
            "key": dict(key),
            "kind": kind,
            "vocab": vocab,
            "sequences": sequences,
            "context": context,
            "temperature": temperature,
            "draws": draws,
            "top_k": top_k,
            "shard_sequences": size,
            "hidden_layers": list(hidden_layers),
            "attention_layers": list(attention_layers),
            "shards": [
                {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
                for name in names
            ],
        }
        write_durably(folder / "cache.json", json.dumps(record, indent=1))
        (folder / "building.json").unlink(missing_ok=True)
        if is_remote(url):
            upload(folder, url, names)
    barrier()


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
        total = path.stat().st_size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(MAX_HEADER_BYTES, total - 8):
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            made: dict[str, NDArray[Any]] = {}
            for name, entry in header.items():
                dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(v) for v in entry["shape"])
                begin, end = (int(v) for v in entry["data_offsets"])
                count = int(np.prod(shape, dtype=object)) if shape else 1
                if min(shape, default=0) < 0 or begin < 0 or end - begin != count * dtype.itemsize:
                    raise ValueError(f"{name} of {shape} in bytes {begin} to {end}")
                if 8 + length + end > total:
                    raise ValueError(f"{name} ends beyond the file")
                if name not in ("words", "first_bit") and shape[0] != held:
                    raise ValueError(f"{name} holds {shape[0]} sequences, not {held}")
                made[name] = np.memmap(path, dtype=dtype, mode="r", offset=8 + length + begin, shape=shape)
            if self.kind == "sampled" and (len(made["first_bit"]) != held + 1 or made["words"].ndim != 1):
                raise ValueError("places of another number of sequences")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{path.name}: {error}") from error
        return made

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"the cache of teacher signals at {self.folder} is damaged: {what}", "remove the cache and build it again"
        )


@dataclass(frozen=True)
class _Writer:
    kind: str
    vocab: int
    context: int
    temperature: float
    draws: int
    top_k: int
    seed: int
    produce: Callable[[Rows], Produced]
    batch_sequences: int

    def tensors(self, rows: Rows) -> dict[str, Tensor]:
        """A shard's tensors."""
        parts: dict[str, list[Tensor]] = {}
        streams: list[tuple[NDArray[np.uint64], int]] = []
        for start in range(0, len(rows), self.batch_sequences):
            batch = rows[start : start + self.batch_sequences]
            made = self.produce(batch)
            found = self._signals(made, batch, streams)
            found |= {f"hidden.{layer}": states.to(torch.bfloat16) for layer, states in made.layers.items()}
            found |= {f"attention.{layer}": maps.to(torch.bfloat16) for layer, maps in made.attentions.items()}
            for name, tensor in found.items():
                parts.setdefault(name, []).append(tensor.cpu())
        whole = {name: torch.cat(pieces).contiguous() for name, pieces in parts.items()}
        if streams:
            whole |= _joined(streams)
        return whole

    def _signals(self, made: Produced, rows: Rows, streams: list[tuple[NDArray[np.uint64], int]]) -> dict[str, Tensor]:
        if self.kind == "hidden":
            return {"hidden": made.hidden.to(torch.bfloat16)}
        hidden = made.hidden.flatten(0, 1)
        size = max(1, LOGITS_BYTES // (4 * self.vocab))
        pieces = [self._of_logits(self._logits(hidden, slice(i, i + size), made), rows, i) for i in
                  range(0, len(hidden), size)]  # fmt: skip
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        if self.kind != "sampled":
            return {name: tensor.reshape(len(rows), self.context, *tensor.shape[1:]) for name, tensor in joined.items()}
        ids, counts = (joined[name].reshape(len(rows), self.context, -1).numpy() for name in ("ids", "counts"))
        for sequence in range(len(rows)):
            streams.append(multiset.encode(ids[sequence], counts[sequence], draws=self.draws, vocab=self.vocab))
        counted = made.counted.cpu().double()
        entropy = joined["entropy"].reshape(len(rows), -1).double() * counted
        return {"entropy": entropy.sum(1) / counted.sum(1).clamp_min(1)}

    def _logits(self, hidden: Tensor, tokens: slice, made: Produced) -> Tensor:
        if made.logits is not None:
            return made.logits(tokens, self.vocab)
        head = made.head
        weight = head.weight[: self.vocab]
        bias = None if head.bias is None else head.bias[: self.vocab]
        # states are kept, and so used, in bf16: every kind sees the same teacher
        states = hidden[tokens].to(torch.bfloat16).to(weight.dtype)
        return finish_logits((states @ weight.T).float(), bias, head)

    def _of_logits(self, logits: Tensor, rows: Rows, first: int) -> dict[str, Tensor]:
        if self.kind == "dense":
            return {"logits": logits.to(torch.bfloat16)}
        log_p = torch.log_softmax(logits / self.temperature, -1)
        p = log_p.exp()
        if self.kind == "topk":
            kept, ids = p.topk(min(self.top_k, self.vocab), dim=-1)
            halves = kept.half()
            tail = (1.0 - halves.float().sum(-1)).clamp_min(0.0)
            return {"ids": ids.int(), "probabilities": halves, "tail": tail}
        places = np.arange(first, first + len(logits))
        uniform = np.concatenate([self._uniform(rows, places)])
        ids, counts = sample_multisets(p, torch.from_numpy(uniform).to(p.device))
        return {"ids": ids.cpu(), "counts": counts.cpu(), "entropy": -(p * log_p.clamp_min(-1e4)).sum(-1).cpu()}

    def _uniform(self, rows: Rows, places: Rows) -> NDArray[np.float64]:
        """[len(places), draws] uniforms of a batch's tokens; those of a sequence depend on its number alone."""
        of = places // self.context
        made = [
            np.random.default_rng((self.seed, int(rows[sequence]))).random((self.context, self.draws))[
                places[of == sequence] % self.context
            ]
            for sequence in np.unique(of)
        ]
        return np.concatenate(made)


def sample_multisets(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from rows of probabilities [N, V] by inverting their distribution function at `uniform` [N, n].

    Returns ids [N, n] int64, ascending, used ones first, and counts [N, n] (0 where unused). Sums run in float64.
    """
    levels = p.double().cumsum_(-1)
    # the last level stands for 1: a uniform above it by rounding would fall off the end
    drawn = torch.searchsorted(levels, (uniform * levels[:, -1:]).sort(-1).values, right=True)
    drawn.clamp_max_(p.shape[-1] - 1)
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = new.cumsum(-1) - 1
    ids = torch.zeros_like(drawn).scatter_(-1, slot, drawn)
    counts = torch.zeros_like(drawn).scatter_add_(-1, slot, torch.ones_like(drawn))
    return ids, counts


def _joined(streams: list[tuple[NDArray[np.uint64], int]]) -> dict[str, Tensor]:
    """Sequences' runs of bits one after another, each from a word's beginning, and where each begins; the end last."""
    begins = np.concatenate([[0], np.cumsum([len(words) for words, _ in streams])]).astype(np.int64)
    words = np.concatenate([words for words, _ in streams])
    return {"words": torch.from_numpy(words), "first_bit": torch.from_numpy(begins * multiset.WORD)}


def _write(path: Path, tensors: dict[str, Tensor], rank: int) -> None:
    temporary = path.with_name(f"{path.name}.{rank}.tmp")
    try:
        save_file(tensors, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in (28, 122) or "os error 28" in str(error) or "No space" in str(error):
            raise _no_room(path.parent, sum(t.nbytes for t in tensors.values())) from error
        raise
    temporary.replace(path)
    fsync_folder(path.parent)


def _require_room(folder: Path, needed: int) -> None:
    there = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if needed - there > shutil.disk_usage(folder).free:
        raise _no_room(folder, needed - there)


def _no_room(folder: Path, needed: int) -> UserError:
    return UserError(
        f"the teacher's signals take about {needed:,} more bytes at {folder}, and"
        f" {shutil.disk_usage(folder).free:,} are free",
        "free space, name another place in distill.cache.url, choose distill.cache.kind=sampled, or set"
        " distill.teacher_signals=live; shards that were written are kept",
    )


def _claim(folder: Path, key: Mapping[str, Any], *, staged: bool) -> None:
    """Shards of an unfinished build are kept only where they are of the same key.

    Others are refused, or removed where the folder is but the staging place of a URL, which may hold what was there
    before.
    """
    mark, done = folder / "building.json", folder / "cache.json"
    text = json.dumps(dict(key), sort_keys=True)
    found = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if done.is_file():
        found = json.dumps(read_record(folder, str(folder))["key"], sort_keys=True)
    if found != text and (done.is_file() or any(folder.glob("shard-*.safetensors"))):
        if not staged:
            raise UserError(
                f"an unfinished cache of other signals lies at {folder}", "remove that folder, or name another place"
            )
        for path in [*folder.glob("shard-*.safetensors"), done]:
            path.unlink(missing_ok=True)
    write_durably(mark, text)
