"""The distillation loss, from hidden states to gradients, without ever holding all logits.

Shapes: N tokens, H_s and H_t widths of student and teacher, V_s and V_t their vocabulary rows,
V the tokens that the tokenizer really has (rows beyond it are padding).

With z the student's logits, t the teacher's, q = softmax(z/T), p = softmax(t[:V]/T):

    forward KL   Σ p (log p − log q)     gradient × T²:  T (q − p)
    cross-entropy  −log softmax(z)[y]    gradient:       softmax(z) − onehot(y)

The T² of Hinton et al. 2015 stands on loss and gradient alike. The student's softmax runs over all of
its rows while p is zero on padding, so that training drives the padding's mass down; the teacher's runs
over the real tokens alone, since mass on a token that does not exist is nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253

CHUNK_BYTES = 256 << 20
BYTES_PER_LOGIT = 16  # student's and teacher's fp32 rows, the gradient, one temporary
IGNORED = -100


@dataclass(frozen=True)
class LossSpec:
    """Weights of the terms. `vocab`: tokens that the tokenizer has."""

    forward_kl: float
    cross_entropy: float
    temperature: float
    vocab: int

    def __post_init__(self) -> None:
        if self.forward_kl <= 0 and self.cross_entropy <= 0:
            raise ValueError("at least one loss needs a weight above 0")

    @property
    def name(self) -> str:
        terms = []
        if self.forward_kl > 0:
            terms.append(f"{self.forward_kl:g}·forward-kl(T={self.temperature:g})")
        if self.cross_entropy > 0:
            terms.append(f"{self.cross_entropy:g}·cross-entropy")
        return " + ".join(terms)


@dataclass(frozen=True)
class TeacherHead:
    """What the loss needs of a live teacher: hidden states [N, H_t] and its output head [V_t, H_t]."""

    hidden: Tensor
    weight: Tensor


class _HeadLoss(torch.autograd.Function):
    """Head projection and loss, token chunk by token chunk; the gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        targets: Tensor,
        spec: LossSpec,
        valid_total: int,
        low_precision: bool,
    ) -> tuple[Tensor, Tensor]:
        compute = torch.bfloat16 if low_precision else torch.float32
        head = weight.to(compute)
        teacher_head = None if teacher_weight is None else teacher_weight[: spec.vocab].to(compute)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        rows = max(64, CHUNK_BYTES // (BYTES_PER_LOGIT * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h = hidden[part].to(compute)
            z = (h @ head.T).float()
            t = None
            if teacher_head is not None and teacher_hidden is not None:
                t = (teacher_hidden[part].to(compute) @ teacher_head.T).float()
            kl, ce, gradient = token_losses(z, t, targets[part], spec)
            sums[0] += kl.sum(dtype=torch.float64)
            sums[1] += ce.sum(dtype=torch.float64)
            gradient = gradient.mul_(1.0 / valid_total).to(compute)
            if grad_hidden is not None:
                grad_hidden[part] = (gradient @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (gradient.T @ h).float()
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        terms = (sums / valid_total).float()
        ctx.mark_non_differentiable(terms)
        return spec.forward_kl * terms[0] + spec.cross_entropy * terms[1], terms

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        grad_hidden, grad_weight = ctx.grads
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale),
            *([None] * 6),
        )


def token_losses(z: Tensor, t: Tensor | None, targets: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: T²-scaled KL [N], cross-entropy [N], and the gradient [N, V_s] of their weighted sum.

    `z` [N, V_s] fp32, `t` [N, V] fp32 or None, `targets` [N] with -100 where a token does not count.
    """
    valid = targets != IGNORED
    rows = torch.arange(z.shape[0], device=z.device)
    kl = torch.zeros(z.shape[0], device=z.device)
    gradient = torch.zeros(0)
    log_q1 = torch.log_softmax(z, dim=-1)
    safe_targets = targets.clamp_min(0)
    ce = -log_q1[rows, safe_targets] * valid
    temperature = spec.temperature
    if spec.forward_kl > 0:
        if t is None:
            raise ValueError("forward KL needs the teacher's logits")
        vocab = t.shape[-1]
        log_q = log_q1 if temperature == 1.0 else torch.log_softmax(z / temperature, dim=-1)
        log_p = torch.log_softmax(t if temperature == 1.0 else t / temperature, dim=-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q[:, :vocab])).sum(-1) * (temperature**2) * valid
        gradient = log_q.exp() if log_q is not log_q1 or spec.cross_entropy > 0 else log_q1.exp_()
        gradient[:, :vocab] -= p
        gradient *= spec.forward_kl * temperature
    if spec.cross_entropy > 0:
        soft = log_q1.exp_()
        soft[rows, safe_targets] -= 1.0
        gradient = (
            soft.mul_(spec.cross_entropy) if spec.forward_kl <= 0 else gradient.add_(soft, alpha=spec.cross_entropy)
        )
    gradient *= valid.unsqueeze(-1)
    return kl, ce, gradient


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead | None,
    targets: Tensor,
    spec: LossSpec,
    *,
    valid_total: int,
    low_precision: bool,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch's tokens, normalised by `valid_total` (of the whole accumulated batch), and its terms.

    `hidden` [N, H_s] and `weight` [V_s, H_s] of the student; gradients reach both. Returns the scalar loss
    and {"kl": nats a token (T² included), "ce": nats a token}, each of this call's share.
    """
    if not 0 < spec.vocab <= weight.shape[0]:
        raise ValueError(f"{spec.vocab} tokens, but the student's head has {weight.shape[0]} rows")
    loss, terms = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        None if teacher is None else teacher.hidden,
        None if teacher is None else teacher.weight,
        targets,
        spec,
        valid_total,
        low_precision,
    )
    shares = terms.tolist()
    return loss, {"kl": shares[0], "ce": shares[1]}
