"""What a planted fault is. T is what an artifact is read into: a `Gguf`, or a `Decoder` folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
Random = np.random.Generator


@dataclass(frozen=True)
class Fault:
    """A fault that is applicable to one artifact. `names`: the tensor or key that a good check names.

    `apply(path, rng)` changes the file or folder in place, and nothing but it.
    """

    name: str
    kind: str
    names: str
    apply: Callable[[Path, Random], None]


@dataclass(frozen=True)
class Plan(Generic[T]):
    """A fault before an artifact is known.

    `applies`: whether this one can have it, so that it changes what is computed or said; `names` gets the artifact's
    own numbers: {first}, {last}, {middle} layer.
    """

    name: str
    kind: str
    names: str
    edit: Callable[[T, Random], None]
    applies: Callable[[T], bool]


def bound(
    plans: list[Plan[T]], model: T, numbers: dict[str, int], edit_file: Callable[[Path, Callable[[T], None]], None]
) -> list[Fault]:
    """The plans that apply to an artifact, as faults of its file."""

    def fault(plan: Plan[T]) -> Fault:
        def apply(path: Path, rng: Random) -> None:
            edit_file(path, lambda read: plan.edit(read, rng))

        return Fault(plan.name, plan.kind, plan.names.format(**numbers), apply)

    return [fault(plan) for plan in plans if plan.applies(model)]


def seeded(fault: Fault, seed: int = 0) -> Random:
    """The same damage at every run, another one for every fault."""
    return np.random.default_rng([seed, *fault.name.encode()])
