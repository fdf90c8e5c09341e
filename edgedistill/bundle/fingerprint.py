"""What an artifact says and holds, key by key and tensor by tensor, so that what differs from a record has a name.

The hash of a file says that something is different, this says what: a key of a GGUF's metadata or of genai_config.json,
a tensor, a node of a graph. Read without the runtime and without the packages that write these formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.guards.genai import rebuilt_config
from edgedistill.guards.gguf import check_ggufs
from edgedistill.guards.onnx_model import check_onnx
from edgedistill.records.golden import Setting

LONG = 64  # a text beyond is kept as its hash
DIGITS = 16
CHUNK = 1 << 20
NAMES_SHOWN = 6
GENAI_CONFIG = "genai_config.json"
ONNX = "model.onnx"


@dataclass(frozen=True)
class Fingerprint:
    """`settings`: key → value, or `sha256:…` of one that is long; `weights`: tensor or node → digits of a sha256."""

    settings: dict[str, Setting]
    weights: dict[str, str]


def fingerprint(format_: str, model: Path) -> Fingerprint:
    """Of the file or folder that a runtime opens. Raises UserError where it cannot be what it should."""
    if format_ == "gguf":
        return _of_ggufs(model)
    if format_ == "onnx":
        return _of_decoder(model if model.is_dir() else model.parent)
    return Fingerprint({}, {})


def _of_ggufs(model: Path) -> Fingerprint:
    settings: dict[str, Setting] = {}
    weights: dict[str, str] = {}
    for number, header in enumerate(check_ggufs(model)):
        for name, value in header.values.items():
            settings[name if number == 0 else f"{number}:{name}"] = _short(value)
        with header.path.open("rb") as file:
            for name, (start, size) in header.spans.items():
                digest = _digest(file, start, size)
                if name in header.tensors:
                    weights[name] = hashlib.sha256(f"{header.kinds[name]} {digest}".encode()).hexdigest()[:DIGITS]
                else:
                    settings[name if number == 0 else f"{number}:{name}"] = f"sha256:{digest}"
    return Fingerprint(settings, weights)


def _of_decoder(folder: Path) -> Fingerprint:
    settings: dict[str, Setting] = {}
    config = folder / GENAI_CONFIG
    if config.is_file():
        settings |= dict(_leaves(rebuilt_config(config)))
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt") and path.name != GENAI_CONFIG:
            with path.open("rb") as file:
                settings[path.name] = f"sha256:{_digest(file, 0, path.stat().st_size)}"
    weights = {}
    if (folder / ONNX).is_file():
        for name, pieces in check_onnx(folder / ONNX).pieces.items():
            digests = []
            for place, start, size in pieces:
                with (folder / place).open("rb") as file:
                    digests.append(_digest(file, start, size))
            weights[name] = hashlib.sha256("".join(digests).encode()).hexdigest()[:DIGITS]
    return Fingerprint(settings, weights)


def _short(value: Any) -> Setting:
    if isinstance(value, str) and len(value) > LONG:
        return f"sha256:{hashlib.sha256(value.encode('utf-8')).hexdigest()}"
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Dotted path → value of everything that is no object."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, _short(value)


def _digest(file: Any, start: int, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(start)
    while size > 0 and (part := file.read(min(size, CHUNK))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


def first_difference(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first key whose value is not the recorded one, in words, and the names of more; "" where all are."""
    missing = object()
    names = [*recorded, *(name for name in found if name not in recorded)]
    differ = []
    for name in names:
        one, other = recorded.get(name, missing), found.get(name, missing)
        if one != other or type(one) is not type(other):
            differ.append(name)
    if not differ:
        return ""
    first, *more = differ
    if first not in found:
        why = f"{first} is missing"
    elif first not in recorded:
        why = f"{first} is not among what was recorded"
    else:
        why = f"{first} is {_shown(found[first])}, not {_shown(recorded[first])}"
    if not more:
        return why
    return f"{why}; {len(more)} more: {', '.join(more[:NAMES_SHOWN])}{', …' if len(more) > NAMES_SHOWN else ''}"


def _shown(value: Setting) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}…"
