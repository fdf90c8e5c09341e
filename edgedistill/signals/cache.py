"""The teacher's signals written to disk, once, in parallel, resumable; `cache_reader` reads. See docs/signal-cache.md.

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

from edgedistill.errors import UserError
from edgedistill.fit.chunks import LOGITS_BYTES, SHARD_BYTES
from edgedistill.losses.losses import Head, finish_logits
from edgedistill.progress import QUIET, Progress
from edgedistill.signals import multiset
from edgedistill.signals.cache_files import KINDS, SCHEMA, estimate_bytes, is_remote, local_copy, read_record, upload
from edgedistill.store import fsync_folder, sha256_of, write_durably

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
                f"there is an unfinished cache of other signals at {folder}",
                "remove that folder, or name another place",
            )
        for path in [*folder.glob("shard-*.safetensors"), done]:
            path.unlink(missing_ok=True)
    write_durably(mark, text)
