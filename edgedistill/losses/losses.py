"""The distillation loss, from hidden states to gradients, without ever holding all logits.

Shapes: N tokens, H_s and H_t widths of student and teacher, V_s and V_t their vocabulary rows, V the tokens that
the tokenizer really has (rows beyond it are padding), K kept entries of a sparse teacher.

With z the student's logits, T the temperature, s = z / T, q = softmax(s) and p the teacher's probabilities at T,
the loss is Σ weight · T² · D(p, q) over the divergences of `divergences`, plus weight · −log softmax(z)[y]. The T² of
Hinton et al. 2015 stands on loss and gradient alike. The student's softmax runs over all of its rows while p is zero
on padding, so that training drives the padding's mass down (reverse KL, which would be infinite there, is taken over
the real tokens alone); the teacher's runs over the real tokens, since mass on a token that does not exist is nothing
to learn.

Memory: logits exist for one chunk of tokens at a time, in the products' precision (4 bytes a logit for student and
teacher together in bf16, 8 in fp32); the gradient is written over the student's; what is done in fp32 is done in
blocks of rows that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253

from edgedistill.fit.chunks import (
    BLOCK_BYTES,
    CPU_CHUNK_BYTES,
    CUDA_CHUNK_BYTES,
    CUDA_CHUNK_TOKENS,
    FEWEST_CHUNK_TOKENS,
)
from edgedistill.losses.block_losses import Dense, block_loss, finish_logits
from edgedistill.losses.loss_spec import NAMES, Head, LossSpec, SparseTargets, Teacher, TeacherHead, TeacherLogits
from edgedistill.tasks.causal_lm import IGNORED

__all__ = [
    "IGNORED", "NAMES", "Head", "LossSpec", "SparseTargets", "Teacher", "TeacherHead", "TeacherLogits", "finish_logits",
    "head_loss",
]  # fmt: skip

HEAD_BLOCK_ROWS = 8192  # of the head's gradient that one low-precision product makes


def head_loss(
    hidden: Tensor,
    head: Head,
    teacher: Teacher | None,
    targets: Tensor,
    spec: LossSpec,
    *,
    valid_total: int | Tensor,
    low_precision: bool,
    taid_t: float = 1.0,
    report_kl: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of N tokens and its terms; gradients reach `hidden` [N, H_s] and the head's weight and bias.

    `targets` [N] are the next tokens, -100 where one does not count. `valid_total` is the number of counted tokens of
    the whole accumulated batch, over all micro-batches and ranks. `low_precision`: products in bf16. `taid_t`: the
    teacher's share in TAID's moving teacher. Returns the scalar loss and detached scalars: a term each (unweighted, T²
    included), and "kl", KL(teacher ‖ student) at T = 1 in nats a token, where asked for and the teacher's
    probabilities are whole. With a sample as `SparseTargets`, forward_kl is an unbiased estimate where the entropy is
    given, else it lies above by what the sample's own entropy lacks; the gradient is unbiased either way.

    Raises ValueError where shapes, vocabularies or the teacher's form do not fit the mix.
    """
    _check(hidden, head, teacher, targets, spec)
    settings = _Settings(spec, valid_total, low_precision, taid_t, report_kl, chunk_bytes)
    loss, *terms = _HeadLoss.apply(hidden, head.weight, head.bias, head, teacher, targets, settings)  # type: ignore[no-untyped-call]
    return loss, dict(zip(settings.reported(teacher), terms, strict=True))


@dataclass(frozen=True)
class _Settings:
    spec: LossSpec
    valid_total: int | Tensor
    low_precision: bool
    taid_t: float
    report_kl: bool
    chunk_bytes: int | None

    def reported(self, teacher: Teacher | None) -> list[str]:
        whole = teacher is not None and not isinstance(teacher, SparseTargets)
        return [*self.spec.weights, *(["kl"] if self.report_kl and whole else [])]


class _HeadLoss(torch.autograd.Function):
    """Head projection and loss, chunk by chunk; the gradient is made in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: Teacher | None,
        targets: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        compute = _compute_dtype(hidden, settings.low_precision)
        exact = torch.float64 if compute == torch.float64 else torch.float32
        matrix = weight.detach().to(compute)
        teachers = _teacher_heads(teacher, settings.spec.vocab, compute)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if wants_bias and bias is not None else None
        reported = settings.reported(teacher)
        sums = torch.zeros(len(reported), dtype=torch.float64, device=hidden.device)
        scale = 1.0 / settings.valid_total
        rows = _chunk_rows(hidden, weight.shape[0], teachers, compute, settings.chunk_bytes)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h = hidden.detach()[part].to(compute)
            z = h @ matrix.T
            t = [(each.hidden[part].to(compute) @ each.matrix.T, each) for each in teachers]
            for block in _blocks(z.shape[0], z.shape[1], hidden.device):
                where = slice(start + block.start, start + block.stop)
                sums += _block_losses(
                    z[block],
                    head,
                    [(logits[block], each) for logits, each in t],
                    _rows_of(teacher, where),
                    targets[where],
                    settings,
                    scale,
                    exact,
                    reported,
                )
            del t
            # z now holds the gradient with respect to the head's output
            if grad_hidden is not None:
                grad_hidden[part] = z @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, z, h)
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=exact)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        terms = (sums * scale).to(exact)
        # the weights stay Python numbers: a tensor of them would make a GPU wait for its copy
        loss = torch.stack([terms[i] * settings.spec.weights.get(name, 0.0) for i, name in enumerate(reported)]).sum()
        shown = tuple(terms.unbind())
        ctx.mark_non_differentiable(*shown)
        return loss, *shown

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        grads = [None if grad is None or scale is None else grad.mul_(scale) for grad in ctx.grads]
        ctx.grads = (None, None, None)
        return (*grads, None, None, None, None)


@dataclass(frozen=True)
class _TeacherPart:
    hidden: Tensor
    matrix: Tensor  # [V, H_t] in the products' precision
    head: Head
    bias: Tensor | None
    share: float


def _block_losses(
    z: Tensor,
    head: Head,
    teachers: Sequence[tuple[Tensor, _TeacherPart]],
    given: Teacher | None,
    targets: Tensor,
    settings: _Settings,
    scale: float | Tensor,
    exact: torch.dtype,
    reported: Sequence[str],
) -> Tensor:
    """Sums of the terms over a block's counted tokens; `z` [n, V_s] is overwritten with the gradient of the loss with
    respect to hidden Wᵀ, times `scale`."""
    valid = targets != IGNORED
    logits = finish_logits(z if z.dtype == exact else z.to(exact), head.bias, head)
    capped = logits.clone() if head.softcap is not None else None
    teacher: Sequence[Dense] | SparseTargets
    if isinstance(given, SparseTargets):
        teacher = given
    elif isinstance(given, TeacherLogits):
        teacher = [Dense(given.logits.to(exact, copy=True), 1.0)]
    else:
        teacher = [Dense(finish_logits(t.to(exact), each.bias, each.head), each.share) for t, each in teachers]
    values, gradient = block_loss(
        logits, teacher, targets, settings.spec, valid.to(exact) * scale, taid_t=settings.taid_t,
        report_kl="kl" in reported,
    )  # fmt: skip
    if capped is not None and head.softcap is not None:
        gradient.mul_(1.0 - (capped / head.softcap) ** 2)
    if head.scale != 1.0:
        gradient.mul_(head.scale)
    if gradient.data_ptr() != z.data_ptr():
        z.copy_(gradient)
    # a masked token may hold anything, and nothing of it may count: 0 · inf is not 0
    return torch.stack([torch.where(valid, values[name], 0.0).sum(dtype=torch.float64) for name in reported])


def _add_product(grad_weight: Tensor, gradient: Tensor, h: Tensor) -> None:
    """grad_weight [V, H] += gradientᵀ h, summed in grad_weight's precision."""
    if gradient.dtype == grad_weight.dtype:
        grad_weight.addmm_(gradient.T, h)
        return
    for start in range(0, grad_weight.shape[0], HEAD_BLOCK_ROWS):
        rows = slice(start, start + HEAD_BLOCK_ROWS)
        grad_weight[rows] += gradient[:, rows].T @ h


def _teacher_heads(teacher: Teacher | None, vocab: int, compute: torch.dtype) -> list[_TeacherPart]:
    if isinstance(teacher, TeacherHead):
        teacher = ((teacher, 1.0),)
    if not isinstance(teacher, tuple):
        return []
    return [
        _TeacherPart(
            hidden=each.hidden.detach(),
            matrix=each.head.weight.detach()[:vocab].to(compute),
            head=each.head,
            bias=None if each.head.bias is None else each.head.bias[:vocab],
            share=share,
        )
        for each, share in teacher
    ]


def _rows_of(teacher: Teacher | None, rows: slice) -> Teacher | None:
    """The part of a teacher that is given by token."""
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits[rows])
    if isinstance(teacher, SparseTargets):
        tail = None if teacher.tail is None else teacher.tail[rows]
        entropy = None if teacher.entropy is None else teacher.entropy[rows]
        return SparseTargets(teacher.ids[rows], teacher.weights[rows], tail, entropy)
    return None


def _compute_dtype(hidden: Tensor, low_precision: bool) -> torch.dtype:
    if hidden.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if low_precision else torch.float32


def _chunk_rows(
    hidden: Tensor, vocab_rows: int, teachers: Sequence[_TeacherPart], compute: torch.dtype, chunk_bytes: int | None
) -> int:
    """Tokens of a chunk: as the byte budget allows, and no more than a quarter of a CPU's batch, which suffices."""
    per_row = vocab_rows * compute.itemsize * (1 + len(teachers))
    tokens = hidden.shape[0]
    if chunk_bytes is not None:
        return max(1, chunk_bytes // per_row)
    if hidden.device.type == "cuda":
        # the fp32 work is done on the whole chunk: about four such buffers
        per_row += 16 * vocab_rows
        free, _ = torch.cuda.mem_get_info(hidden.device)
        fitting = min(CUDA_CHUNK_BYTES * 2, free // 2) // per_row
        return max(1, min(max(CUDA_CHUNK_TOKENS, tokens // 8), fitting))
    return max(1, min(CPU_CHUNK_BYTES // per_row, max(FEWEST_CHUNK_TOKENS, -(-tokens // 4))))


def _blocks(tokens: int, vocab_rows: int, device: torch.device) -> list[slice]:
    rows = tokens if device.type == "cuda" else max(1, BLOCK_BYTES // (4 * vocab_rows))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _check(hidden: Tensor, head: Head, teacher: Teacher | None, targets: Tensor, spec: LossSpec) -> None:
    tokens, rows = hidden.shape[0], head.weight.shape[0]
    if not 0 < spec.vocab <= rows:
        raise ValueError(f"{spec.vocab} tokens, but the student's head has {rows} rows")
    if targets.shape != (tokens,):
        raise ValueError(f"{tuple(targets.shape)} targets for {tokens} tokens")
    if spec.needs_teacher and teacher is None:
        raise ValueError(f"{spec.name} needs a teacher")
    if isinstance(teacher, SparseTargets):
        others = [name for name in spec.weights if name not in ("forward_kl", "cross_entropy")]
        if others:
            raise ValueError(f"sparse targets serve forward_kl and cross_entropy, not {', '.join(others)}")
        lengths = [("sparse targets", teacher.ids.shape[0])]
    elif isinstance(teacher, TeacherLogits):
        if teacher.logits.shape[1] != spec.vocab:
            raise ValueError(f"the teacher's logits have {teacher.logits.shape[1]} entries, not {spec.vocab}")
        lengths = [("teacher's logits", teacher.logits.shape[0])]
    else:
        parts = teacher if isinstance(teacher, tuple) else ((teacher, 1.0),) if teacher is not None else ()
        for part, _ in parts:
            if part.head.weight.shape[0] < spec.vocab:
                raise ValueError(f"{spec.vocab} tokens, but the teacher's head has {part.head.weight.shape[0]} rows")
        lengths = [("teacher's hidden states", part.hidden.shape[0]) for part, _ in parts]
    for what, length in lengths:
        if length != tokens:
            raise ValueError(f"{length} rows of {what} for {tokens} tokens")
