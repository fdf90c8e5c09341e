"""Divergences between teacher and student, each with its closed-form gradient. One function a divergence.

Legend: n tokens, V vocabulary rows of the student. s: the student's logits over temperature, q = softmax(s), p: the
teacher's probabilities, zero on rows that it does not have. A function takes a `Pair` and the divergence's parameter
and returns the divergence of each token in nats [n] and its gradient with respect to s [n, V], in memory of its own.
Where a gradient is known with respect to q, as g, it is q ⊙ (g − Σ q g) with respect to s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253


class Pair(NamedTuple):
    """Student and teacher of n tokens. `log_p` stops at the teacher's last row; `neg_entropy` is Σ p log p."""

    log_q: Tensor  # [n, V]
    q: Tensor  # [n, V]
    log_p: Tensor  # [n, V_t], V_t <= V
    p: Tensor  # [n, V]
    neg_entropy: Tensor  # [n]


Parts = tuple[Tensor, Tensor]  # value [n], gradient [n, V]
Divergence = Callable[[Pair, float], Parts]


def forward_kl(pair: Pair, parameter: float) -> Parts:
    """KL(p ‖ q) = Σ p (log p − log q); gradient q − p (Hinton et al. 2015)."""
    return pair.neg_entropy - (pair.p * pair.log_q).sum(-1), pair.q - pair.p


def reverse_kl(pair: Pair, parameter: float) -> Parts:
    """KL(q ‖ p) over the tokens that the teacher can give; gradient q ⊙ (log q − log p − KL) (Gu et al. 2024).

    Where p is zero for every student (padding), q is taken as renormalised over the rest: the caller cuts those rows.
    """
    ratio = pair.log_q - pair.log_p
    value = (pair.q * ratio).sum(-1)
    return value, ratio.sub_(value.unsqueeze(-1)).mul_(pair.q)


def jsd(pair: Pair, beta: float) -> Parts:
    """β KL(p ‖ m) + (1−β) KL(q ‖ m), m = βp + (1−β)q (Agarwal et al. 2024).

    Gradient (1−β) q ⊙ (log q/m − KL(q ‖ m)).
    """
    log_m = _log(torch.lerp(pair.q, pair.p, beta))
    teacher = pair.neg_entropy - (pair.p * log_m).sum(-1)
    ratio = torch.sub(pair.log_q, log_m, out=log_m)
    student = (pair.q * ratio).sum(-1)
    gradient = ratio.sub_(student.unsqueeze(-1)).mul_(pair.q).mul_(1 - beta)
    return beta * teacher + (1 - beta) * student, gradient


def skewed_kl(pair: Pair, skew: float) -> Parts:
    """KL(p ‖ αp + (1−α)q) (Ko et al. 2024)."""
    mixture = torch.lerp(pair.q, pair.p, skew).clamp_min_(torch.finfo(pair.p.dtype).tiny)
    value = pair.neg_entropy - (pair.p * mixture.log()).sum(-1)
    return value, _from_q(pair.q, (pair.p / mixture).mul_(skew - 1))


def skewed_reverse_kl(pair: Pair, skew: float) -> Parts:
    """KL(q ‖ (1−α)p + αq) (Ko et al. 2024)."""
    mixture = torch.lerp(pair.p, pair.q, skew).clamp_min_(torch.finfo(pair.p.dtype).tiny)
    ratio = pair.log_q - mixture.log()
    return (pair.q * ratio).sum(-1), _from_q(pair.q, ratio.sub_((pair.q / mixture).mul_(skew)))


def total_variation(pair: Pair, parameter: float) -> Parts:
    """½ Σ |p − q| (Wen et al. 2023)."""
    difference = pair.q - pair.p
    return 0.5 * difference.abs().sum(-1), _from_q(pair.q, difference.sign_().mul_(0.5))


def _from_q(q: Tensor, gradient: Tensor) -> Tensor:
    """q ⊙ (g − Σ q g), in the gradient's place."""
    return gradient.sub_((q * gradient).sum(-1, keepdim=True)).mul_(q)


def _log(probabilities: Tensor) -> Tensor:
    """The logarithm in place; that of the smallest number instead of infinity where one is zero."""
    return probabilities.clamp_min_(torch.finfo(probabilities.dtype).tiny).log_()


# taid is forward KL to a teacher that the caller has moved toward the student.
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "taid": forward_kl,
    "total_variation": total_variation,
}
