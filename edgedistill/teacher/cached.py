"""The teacher's signals on disk: found, or made by one pass of the teacher over the packed text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedistill.config.recipe import Recipe
from edgedistill.fit.chunks import CACHE_BATCH_TOKENS
from edgedistill.progress import QUIET, Progress
from edgedistill.records.data import DataResult
from edgedistill.records.training import SignalsResult, TeacherResult
from edgedistill.signals.cache import build_cache
from edgedistill.signals.cache_files import cache_exists, recipe_key
from edgedistill.signals.cache_reader import CacheReader, open_cache
from edgedistill.signals.signals import CachedSignals, LiveSignals, MixedSignals, produce_from
from edgedistill.store import Store, Work, versions
from edgedistill.tasks.causal_lm import Packed, TextTokenizer
from edgedistill.teacher.live import precision_of
from edgedistill.teacher.stage import mixture_key
from edgedistill.training.ranks import Ranks, run_together


def cache_key(
    recipe: Recipe, *, teacher: TeacherResult, data: DataResult, tokenizer: TextTokenizer, packed: Packed, ranks: Ranks,
    kept_sha256: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the signals depend on; a cache of another key is refused with what differs.

    `kept_sha256` is that of the teacher's ids that a trimmed vocabulary keeps: signals are over those alone.
    """
    return recipe_key(recipe) | {
        "teacher_weights_sha256": teacher.weights_sha256,
        "further_teachers": mixture_key(teacher),
        "teacher_precision": precision_of(recipe.teacher, ranks.device),
        "tokenizer_sha256": teacher.tokenizer_sha256,
        "kept_sha256": kept_sha256,
        "data_sha256": data.sha256,
        "context_tokens": packed.context,
        "sequences": packed.sequences,
        "packing_seed": packed.seed,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "vocab": tokenizer.vocab,
    }


def obtain_cache(
    recipe: Recipe,
    *,
    teacher: TeacherResult,
    data: DataResult,
    tokenizer: TextTokenizer,
    packed: Packed,
    load: Callable[[], LiveSignals | MixedSignals],
    store: Store,
    ranks: Ranks,
    kept_sha256: str | None = None,
    progress: Progress = QUIET,
) -> CachedSignals:
    """The cache of this recipe, in the store or at `distill.cache.url`; built by all ranks where it is missing.

    `load` brings the teacher into memory. Raises UserError where a cache at the URL has another key or is damaged,
    and where the disk does not hold it.
    """
    key = cache_key(
        recipe, teacher=teacher, data=data, tokenizer=tokenizer, packed=packed, ranks=ranks, kept_sha256=kept_sha256
    )
    url = recipe.distill.cache.url
    # the hidden kind remakes logits with the teacher's head; the others need no teacher once they stand
    live: list[LiveSignals | MixedSignals] = []

    def teacher_now() -> LiveSignals | MixedSignals:
        if not live:
            live.append(load())
        return live[0]

    local = store.root / "downloads"

    def reader(place: str) -> CacheReader:
        head = None
        if key["kind"] == "hidden":
            single = teacher_now()
            assert isinstance(single, LiveSignals)  # the plan refuses states of several teachers
            head = single.head()
        return open_cache(place, key=key, head=head, device=ranks.device, local=local)

    if url is not None:
        fill(url, key, teacher_now, packed, ranks, progress, local=local)
        if not ranks.main:
            ranks.barrier()  # the first rank fetches a remote cache, the others find it here
        found = reader(url)
        if ranks.main:
            ranks.barrier()
        return CachedSignals(found, url=url)

    def build(work: Work) -> SignalsResult:
        folder = work.state / "cache"
        fill(str(folder), key, teacher_now, packed, ranks, progress)
        ranks.barrier()
        if ranks.main:
            shutil.move(str(folder), work.out / "cache")
        size = sum(p.stat().st_size for p in (work.out / "cache").rglob("*")) if ranks.main else 0
        return SignalsResult(
            path="cache", kind=str(key["kind"]), tokens=packed.sequences * packed.context, bytes=size,
            bytes_per_token=size / (packed.sequences * packed.context),
        )  # fmt: skip

    inputs = key | {"versions": versions("torch", "transformers", "edgedistill")}
    stored = run_together(ranks, store, "signals", inputs, build, SignalsResult, progress.say)
    place = str(stored.directory / stored.result.path)
    return CachedSignals(reader(place), url=place)


def fill(
    url: str, key: dict[str, Any], teacher: Callable[[], LiveSignals | MixedSignals], packed: Packed, ranks: Ranks,
    progress: Progress, local: Path | None = None,
) -> None:  # fmt: skip
    """Build the cache at a folder or URL, unless it stands there whole; an unfinished one is gone on with.

    `local` is where a URL's shards are staged; all ranks see the same one.
    """
    if ranks.broadcast(cache_exists(url)):
        return
    live = teacher()
    build_cache(
        url,
        key=key,
        kind=key["kind"],
        vocab=key["vocab"],
        sequences=packed.sequences,
        context=packed.context,
        temperature=key["temperature"],
        draws=key["draws"],
        top_k=key["top_k"],
        seed=key["seed"],
        produce=produce_from(
            live, packed, documents=key["attention"] == "documents", temperature=key["temperature"],
            hidden_layers=key["hidden_layers"], attention_layers=key["attention_layers"],
        ),
        hidden_layers=key["hidden_layers"],
        attention_layers=key["attention_layers"],
        rank=ranks.rank,
        world=ranks.world,
        barrier=ranks.barrier,
        local=local,
        batch_sequences=max(1, CACHE_BATCH_TOKENS // packed.context),
        progress=progress,
    )  # fmt: skip


def hidden_in(
    folder: Path, *, live: LiveSignals, packed: Packed, key: dict[str, Any], ranks: Ranks, progress: Progress
) -> CachedSignals:
    """The exact cache (final hidden states) that one run makes for itself in its work folder."""
    fill(str(folder), key, lambda: live, packed, ranks, progress)
    return CachedSignals(open_cache(str(folder), key=key, head=live.head(), device=ranks.device))
