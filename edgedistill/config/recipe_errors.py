"""What is wrong with a recipe: all of it at once, each with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from edgedistill.errors import UserError, did_you_mean
from edgedistill.strict import shown

MOST_SHOWN = 8
# Other programs' names of fields, where they are not near enough to ours to be found by their letters.
OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "optim": "optimizer",
    "batch_size": "batch_sequences",
    "per_device_train_batch_size": "batch_sequences",
    "max_length": "context_tokens",
    "max_seq_length": "context_tokens",
    "seq_len": "context_tokens",
    "block_size": "context_tokens",
    "num_train_epochs": "epochs",
    "gradient_checkpointing": "activation_checkpointing",
    "bf16": "precision",
    "fp16": "precision",
    "dataset": "source",
    "path": "source",
    "name_or_path": "model",
    "model_name_or_path": "model",
    "quantization": "artifacts",
    "quantizations": "artifacts",
}
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SHORT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbg])", re.IGNORECASE)


def refuse_unknown(tree: dict[str, Any], recipe: type[BaseModel], source: str) -> None:
    """UserError that names every key that is no field. `source`: the recipe, or the option that says it."""
    found = list(_unknown(tree, recipe, recipe, source, ""))
    if not found:
        return
    paths = ", ".join(f"'{path}'" for path, _ in found[:MOST_SHOWN])
    more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    if len(found) == 1:
        path, meant = found[0]
        section = path.rpartition(".")[0]
        if source.startswith("--set") and section and "." not in meant:  # where a whole path is written, a whole one
            meant = meant.replace("did you mean '", f"did you mean '{section}.")
        raise UserError(f"{source}: unknown key {paths}", meant)
    remedies = "; ".join(f"'{path}': {remedy}" for path, remedy in found[:MOST_SHOWN])
    raise UserError(f"{source}: unknown keys {paths}{more}", remedies)


def _unknown(
    tree: dict[str, Any], section: type[BaseModel], recipe: type[BaseModel], source: str, prefix: str
) -> Iterator[tuple[str, str]]:
    """(path, remedy) of each key that is no field; an empty section becomes a mapping."""
    for key, value in tree.items():
        field = section.model_fields.get(key)
        if field is None:
            yield f"{prefix}{shown(key)[1:-1]}", _meant(str(key), section, recipe)
            continue
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if value is None:
                value = tree[key] = {}
            if not isinstance(value, dict):
                raise UserError(
                    f"{source}: '{prefix}{key}' is {shown(value)}",
                    f"it is a section with the keys {', '.join(inner.model_fields)}",
                )
            yield from _unknown(value, inner, recipe, source, f"{prefix}{key}.")


def _meant(key: str, section: type[BaseModel], recipe: type[BaseModel]) -> str:
    """What somebody who writes this key most likely means: a field here, or one of this very name elsewhere."""
    other = OTHER_NAMES.get(key.lower())
    if other in section.model_fields:
        return f"did you mean '{other}'?"
    near = did_you_mean(key, section.model_fields)
    if near.startswith("did you mean"):
        return near
    elsewhere = [path for path in _paths(recipe, "") if path.rpartition(".")[2] in (key, other)]
    return f"did you mean {' or '.join(repr(path) for path in elsewhere[:3])}?" if elsewhere else near


def _paths(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def wrong_values(error: ValidationError, where: str, sources: Mapping[str, str]) -> UserError:
    """All values that are not what their fields take. `sources`: path → the option that set it."""
    causes, paths = [], []
    for one in error.errors(include_url=False):
        path = shown(".".join(str(part) for part in one["loc"]))[1:-1]
        asked = next(
            (said for option, said in sources.items() if path == option or path.startswith(f"{option}.")), None
        )
        said = f"recipe {where}: {path} = {shown(one['input'])}" if asked is None else asked
        causes.append(f"{said}: {one['msg']}{_written_out(one['input'])}")
        paths.append(path)
    more = f"; and {len(causes) - MOST_SHOWN} more" if len(causes) > MOST_SHOWN else ""
    what = f"{paths[0]} may be, and what it is by default" if len(paths) == 1 else "each may be"
    return UserError("; ".join(causes[:MOST_SHOWN]) + more, f"docs/recipe-reference.md says what {what}")


def _written_out(value: object) -> str:
    """`: write 20000` of "20k"."""
    found = _SHORT.fullmatch(value.strip()) if isinstance(value, str) else None
    return f": write {round(float(found[1]) * UNITS[found[2].lower()])}" if found else ""
