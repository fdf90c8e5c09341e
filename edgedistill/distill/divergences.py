"""Divergences between teacher and student, each with its closed-form gradient. One function a divergence.

Legend: n tokens, V vocabulary rows. With s the student's logits over temperature, q = softmax(s) and p the
teacher's probabilities (zero on rows that are padding), a function takes

    log_q [n, V], q = exp(log_q) [n, V], p [n, V]

and returns the divergence of each token in nats [n] and its gradient with respect to s [n, V]. Where a gradient is
known with respect to q, as g, it is q ⊙ (g − Σ q g) with respect to s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253

Parts = tuple[Tensor, Tensor]  # value [n], gradient [n, V]
Divergence = Callable[[Tensor, Tensor, Tensor, float], Parts]


def forward_kl(log_q: Tensor, q: Tensor, p: Tensor, parameter: float) -> Parts:
    """KL(p ‖ q) = Σ p (log p − log q); gradient q − p (Hinton et al. 2015)."""
    return (torch.xlogy(p, p) - p * log_q).sum(-1), q - p


def reverse_kl(log_q: Tensor, q: Tensor, p: Tensor, parameter: float) -> Parts:
    """KL(q ‖ p) over the tokens that the teacher can give; gradient q ⊙ (log q − log p − KL) (Gu et al. 2024).

    Where p is zero for every student (padding), q is taken as renormalised over the rest: the caller cuts those rows.
    """
    ratio = log_q - p.clamp_min(torch.finfo(p.dtype).tiny).log()
    value = (q * ratio).sum(-1)
    return value, q * (ratio - value.unsqueeze(-1))


def jsd(log_q: Tensor, q: Tensor, p: Tensor, beta: float) -> Parts:
    """β KL(p ‖ m) + (1−β) KL(q ‖ m), m = βp + (1−β)q (Agarwal et al. 2024).

    Gradient (1−β) q ⊙ (log q/m − KL(q ‖ m)).
    """
    mixture = beta * p + (1 - beta) * q
    log_m = mixture.clamp_min(torch.finfo(p.dtype).tiny).log()
    ratio = torch.where(q > 0, log_q - log_m, torch.zeros_like(q))
    student = (q * ratio).sum(-1)
    teacher = (torch.xlogy(p, p) - p * log_m).sum(-1)
    return beta * teacher + (1 - beta) * student, (1 - beta) * q * (ratio - student.unsqueeze(-1))


def skewed_kl(log_q: Tensor, q: Tensor, p: Tensor, skew: float) -> Parts:
    """KL(p ‖ αp + (1−α)q) (Ko et al. 2024)."""
    mixture = (skew * p + (1 - skew) * q).clamp_min(torch.finfo(p.dtype).tiny)
    value = (torch.xlogy(p, p) - p * mixture.log()).sum(-1)
    return value, _from_q(q, -(1 - skew) * p / mixture)


def skewed_reverse_kl(log_q: Tensor, q: Tensor, p: Tensor, skew: float) -> Parts:
    """KL(q ‖ (1−α)p + αq) (Ko et al. 2024)."""
    mixture = ((1 - skew) * p + skew * q).clamp_min(torch.finfo(p.dtype).tiny)
    ratio = torch.where(q > 0, log_q - mixture.log(), torch.zeros_like(q))
    return (q * ratio).sum(-1), _from_q(q, ratio - skew * q / mixture)


def total_variation(log_q: Tensor, q: Tensor, p: Tensor, parameter: float) -> Parts:
    """½ Σ |p − q| (Wen et al. 2023)."""
    difference = q - p
    return 0.5 * difference.abs().sum(-1), _from_q(q, 0.5 * difference.sign())


def _from_q(q: Tensor, gradient: Tensor) -> Tensor:
    return q * (gradient - (q * gradient).sum(-1, keepdim=True))


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
