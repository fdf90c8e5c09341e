"""Faults planted in a GGUF: wrong weights, vocabularies and settings that still load, mostly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from attack.faults import Fault, Random, bound
from attack.gguf_file import Gguf, read, write
from attack.gguf_key_faults import KEY_PLANS
from attack.gguf_tensor_faults import TENSOR_PLANS, layers


def gguf_faults(path: Path) -> list[Fault]:
    """Every fault that can be planted in this GGUF."""
    model = read(path)
    count = layers(model)
    numbers = {"first": 0, "middle": count // 2, "last": count - 1}
    found = bound(TENSOR_PLANS + KEY_PLANS, model, numbers, _edit)
    # A key that begins with a dot is the architecture's own.
    found = [replace(f, names=model.arch + f.names) if f.names.startswith(".") else f for f in found]
    found += [Fault("the last 1,000 bytes are cut off", "truncated", "model.gguf", _cut)]
    found += [Fault("the last tenth of the file is zero", "truncated", list(model.tensors)[-1], _zero_tail)]
    assert len({fault.name for fault in found}) == len(found)
    return found


def _edit(path: Path, change: Callable[[Gguf], None]) -> None:
    model = read(path)
    change(model)
    write(model, path)


def _cut(path: Path, rng: Random) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def _zero_tail(path: Path, rng: Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - size // 10)
        file.write(bytes(size // 10))
