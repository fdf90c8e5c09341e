"""What a distillation loss is made of: the mix, the heads, and the forms in which a teacher comes.

Shapes: N tokens, H_s and H_t widths of student and teacher, V vocabulary rows, K kept entries of a sparse teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor  # noqa: TID253  this module is imported by training alone

from edgedistill.losses.divergences import DIVERGENCES

NAMES = (*DIVERGENCES, "cross_entropy")


@dataclass(frozen=True)
class LossSpec:
    """A mix of losses by weight. `temperature` is that of the divergences, `vocab` the tokens that are real.

    Raises ValueError for a name that is not known and for a mix without weight.
    """

    weights: Mapping[str, float]
    temperature: float
    vocab: int
    jsd_beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(NAMES)
        if unknown:
            raise ValueError(f"unknown losses {sorted(unknown)}; known: {', '.join(NAMES)}")
        kept = {name: weight for name, weight in self.weights.items() if weight > 0}
        if not kept:
            raise ValueError("at least one loss needs a weight above 0")
        object.__setattr__(self, "weights", kept)

    @property
    def name(self) -> str:
        """For records and logs: "1·forward-kl(T=1) + 0.5·cross-entropy"."""
        shown = []
        for name, weight in self.weights.items():
            inside = [] if name == "cross_entropy" else [f"T={self.temperature:g}"]
            inside += [f"β={self.jsd_beta:g}"] if name == "jsd" else []
            inside += [f"α={self.skew:g}"] if name.startswith("skewed") else []
            shown.append(f"{weight:g}·{name.replace('_', '-')}" + (f"({', '.join(inside)})" if inside else ""))
        return " + ".join(shown)

    @property
    def needs_teacher(self) -> bool:
        return any(name != "cross_entropy" for name in self.weights)

    def parameter(self, name: str) -> float:
        return self.jsd_beta if name == "jsd" else self.skew


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap·tanh(scale·(hidden Wᵀ + bias) / softcap), or without the cap."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's hidden states [N, H_t] and its head: its logits are made chunk by chunk."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's logits [N, V] at the real tokens."""

    logits: Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Some of a teacher's probabilities: ids [N, K], weights [N, K] (0 where unused).

    Without `tail` the weights of a token sum to 1 (a sample: counts over draws); with it [N], it is the probability
    of all other tokens, which then are one outcome: the divergence is taken over K + 1 of them. `entropy` [N] is
    that of the distribution a sample was drawn from (nats, at T): the reported KL is unbiased with it.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None = None
    entropy: Tensor | None = None


Teacher = TeacherHead | TeacherLogits | SparseTargets | tuple[tuple[TeacherHead, float], ...]
