"""A signal cache's files without its tensors: its record, its key, and its place, a folder or an fsspec URL.

Nothing heavy is imported here: `plan` looks into a cache that lies there already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.config.recipe import Recipe
from edgedistill.errors import UserError
from edgedistill.store import sha256_of
from edgedistill.strict import local_path, parse_json, read_json

SCHEMA = "edgedistill.signal-cache/1"
KINDS = ("sampled", "topk", "dense", "hidden")
DRAWN = ("sampled", "topk")  # kinds that hold probabilities, at one temperature


def estimate_bytes(kind: str, *, vocab: int, width: int, draws: int, top_k: int) -> float:
    """Bytes a token, about: a sample is taken to hold half of its draws distinct."""
    if kind == "sampled":
        from edgedistill.signals import multiset  # numpy: not for a plan without such a cache

        k = max(1, min(draws, vocab) // 2)
        return float(multiset.payload_bits(draws, vocab)[k] + multiset.k_bits(draws, vocab)) / 8
    return float({"topk": 6 * top_k + 4, "dense": 2 * vocab, "hidden": 2 * width}[kind])


def recipe_key(recipe: Recipe) -> dict[str, Any]:
    """The fields of a cache's key that the recipe alone decides."""
    ask = recipe.distill
    kind = ask.cache.kind
    return {
        "kind": kind,
        "autocast": ask.precision,
        "documents_share": ask.documents_share,
        "context_tokens": ask.context_tokens,
        "packing_seed": recipe.seed,
        "attention": ask.attention,
        "temperature": ask.temperature if kind in DRAWN else 1.0,
        "draws": ask.cache.draws if kind == "sampled" else 0,
        "top_k": ask.cache.top_k if kind == "topk" else 0,
        "seed": recipe.seed,
        "hidden_layers": list(ask.cache.hidden_layers),
        "attention_layers": list(ask.cache.attention_layers),
    }


def refuse_other_cache(recipe: Recipe, known: Mapping[str, Any]) -> None:
    """Refuse a finished cache at `distill.cache.url` that this recipe cannot use; `known`: more of the key. UserError.

    Nothing is fetched but the cache's record, and a cache that is yet to be built is no reason to refuse.
    """
    url = recipe.distill.cache.url
    if recipe.distill.teacher_signals != "cached" or url is None or not cache_exists(url):
        return
    require_key(_record_at(url), {**recipe_key(recipe), **known}, url, whole=False)


def require_key(record: Mapping[str, Any], key: Mapping[str, Any], url: str, *, whole: bool = True) -> None:
    """Refuse a cache of another key, with the first three fields that differ. Not `whole`: only those of `key` count.

    Raises UserError.
    """
    found = record["key"]
    names = sorted({*key, *found}) if whole else sorted(key)
    differing = [name for name in names if key.get(name) != found.get(name)]
    if differing:
        shown = "; ".join(f"{name} is {found.get(name)!r} there and {key.get(name)!r} here" for name in differing[:3])
        raise UserError(
            f"the cache of teacher signals at {url} was made for something else: {shown}",
            "name another place in distill.cache.url, or remove that cache and build it again",
        )


def cache_exists(url: str) -> bool:
    """Whether a whole cache lies there: its cache.json is written last."""
    if is_remote(url):
        import fsspec

        files, path = fsspec.core.url_to_fs(url)
        return bool(files.exists(f"{path}/cache.json"))
    return (local_path(url, what="distill.cache.url") / "cache.json").is_file()


def read_record(folder: Path, url: str) -> dict[str, Any]:
    """cache.json, its shape checked. UserError where it is missing, of another version, or names paths."""
    if not (folder / "cache.json").exists():
        raise _no_cache(url, FileNotFoundError("cache.json is missing"))
    try:
        return _checked(read_json(folder / "cache.json", what="cache.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_cache(url, error) from error


def _checked(record: Any) -> dict[str, Any]:
    if record["schema"] != SCHEMA:
        raise ValueError(f"its schema is {record['schema']!r}, not {SCHEMA!r}")
    sizes = [record[name] for name in ("vocab", "sequences", "context", "shard_sequences")]
    if record["kind"] not in KINDS or not all(type(v) is int and 0 < v < 1 << 48 for v in sizes):
        raise ValueError("its sizes are wrong")
    names = [shard["name"] for shard in record["shards"]]
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ValueError("it names files outside of its folder")
    if len(names) != -(-record["sequences"] // record["shard_sequences"]):
        raise ValueError(f"it has {len(names)} shards")
    if not isinstance(record["key"], dict):
        raise ValueError("its key is not a mapping")
    return record  # type: ignore[no-any-return]


def _no_cache(url: str, error: Exception) -> UserError:
    return UserError(f"there is no cache of teacher signals at {url}: {error}", "build it: edgedistill teacher cache")


def _record_at(url: str) -> dict[str, Any]:
    if not is_remote(url):
        return read_record(Path(url), url)
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        return _checked(parse_json(files.cat_file(f"{path}/cache.json")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_cache(url, error) from error


def is_remote(url: str) -> bool:
    return "://" in url


def local_copy(url: str, local: Path | None) -> Path:
    if local is None:
        raise ValueError(f"a cache at {url} needs a local folder to work in")
    return local / hashlib.sha256(url.encode()).hexdigest()[:24]


def upload(folder: Path, url: str, names: Sequence[str]) -> None:
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    files.makedirs(path, exist_ok=True)
    for name in [*names, "cache.json"]:  # cache.json last: what is there is whole
        files.put_file(str(folder / name), f"{path}/{name}")


def download(url: str, local: Path | None) -> Path:
    """The files of a remote cache, each fetched once; those that lie here with the hash named are kept."""
    import fsspec

    folder = local_copy(url, local)
    folder.mkdir(parents=True, exist_ok=True)
    files, path = fsspec.core.url_to_fs(url)
    try:
        files.get_file(f"{path}/cache.json", str(folder / "cache.json"))
    except (OSError, KeyError) as error:
        raise UserError(
            f"no cache of teacher signals at {url}: {error}", "build it: edgedistill teacher cache"
        ) from error
    for shard in read_record(folder, url)["shards"]:
        target = folder / shard["name"]
        if target.is_file() and target.stat().st_size == shard["bytes"] and sha256_of(target) == shard["sha256"]:
            continue
        try:
            files.get_file(f"{path}/{shard['name']}", str(target))
        except (OSError, KeyError) as error:
            raise UserError(
                f"the cache of teacher signals at {url} is damaged: {shard['name']}: {error}", "build it again"
            ) from error
        if sha256_of(target) != shard["sha256"]:
            target.unlink()
            raise UserError(
                f"the cache of teacher signals at {url} is damaged: {shard['name']} has another hash", "build it again"
            )
    return folder
