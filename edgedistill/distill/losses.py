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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253

from edgedistill.distill.divergences import DIVERGENCES
from edgedistill.tasks.causal_lm import IGNORED as IGNORED

CPU_CHUNK_BYTES = 256 << 20
CUDA_CHUNK_BYTES = 1 << 30
CUDA_CHUNK_TOKENS = 1024  # fewer starve the matrix units
FEWEST_CHUNK_TOKENS = 256
BLOCK_BYTES = 4 << 20  # of fp32 logits that are worked on at a time on a CPU: they stay in its caches
HEAD_BLOCK_ROWS = 8192  # of the head's gradient that one low-precision product makes
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
    spec = settings.spec
    valid = targets != IGNORED
    counted = valid.to(exact)
    logits = finish_logits(z if z.dtype == exact else z.to(exact), head.bias, head)
    capped = logits.clone() if head.softcap is not None else None
    dense = [(finish_logits(t.to(exact), each.bias, each.head), each.share) for t, each in teachers]
    if isinstance(given, TeacherLogits):
        dense = [(given.logits.to(exact, copy=True), 1.0)]
    plain = set(spec.weights) <= {"forward_kl", "cross_entropy"} and spec.temperature == 1.0 and len(dense) <= 1
    plain = plain and ("kl" not in reported or "forward_kl" in spec.weights)
    if isinstance(given, SparseTargets):
        values, gradient = _sparse(logits, given, targets, spec, exact)
    elif plain:
        values, gradient = _plain(logits, dense[0][0] if dense else None, targets, spec, counted)
    else:
        values, gradient = _general(logits, dense, targets, spec, settings.taid_t, settings.report_kl)
    if "kl" in reported and "kl" not in values:
        values["kl"] = values["forward_kl"]
    factor = (counted * scale).unsqueeze(-1)
    gradient.mul_(factor)
    if capped is not None and head.softcap is not None:
        gradient.mul_(1.0 - (capped / head.softcap) ** 2)
    if head.scale != 1.0:
        gradient.mul_(head.scale)
    if gradient.data_ptr() != z.data_ptr():
        z.copy_(gradient)
    # a masked token may hold anything, and nothing of it may count: 0 · inf is not 0
    return torch.stack([torch.where(valid, values[name], 0.0).sum(dtype=torch.float64) for name in reported])


def _plain(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, spec: LossSpec, counted: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward KL and cross-entropy at T = 1, in place, with one exponential a distribution.

    KL = Σ p t − log Σ eᵗ − Σ p z + log Σ eᶻ, gradient q − p; cross-entropy likewise with p a single token.
    """
    values: dict[str, Tensor] = {}
    kl_weight, ce_weight = spec.weights.get("forward_kl", 0.0), spec.weights.get("cross_entropy", 0.0)
    logits.sub_(logits.amax(-1, keepdim=True))
    at_target = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) if ce_weight else None
    weighted = None
    if teacher is not None and kl_weight:
        teacher.sub_(teacher.amax(-1, keepdim=True))
        p = teacher.exp()
        total = p.sum(-1)
        vocab = teacher.shape[-1]
        weighted = (_dot(p, teacher) - _dot(p, logits[:, :vocab])) / total - total.log()
    gradient = logits.exp_()
    norm = gradient.sum(-1)
    log_norm = norm.log()
    gradient.mul_(((kl_weight + ce_weight) / norm).unsqueeze(-1))
    if weighted is not None:
        values["forward_kl"] = weighted + log_norm
        gradient[:, :vocab].addcmul_(p, (-kl_weight / total).unsqueeze(-1))
    if at_target is not None:
        values["cross_entropy"] = log_norm - at_target
        gradient.scatter_add_(-1, targets.clamp_min(0).unsqueeze(-1), torch.full_like(norm, -ce_weight).unsqueeze(-1))
    return values, gradient


def _general(
    logits: Tensor, teachers: Sequence[tuple[Tensor, float]], targets: Tensor, spec: LossSpec, taid_t: float,
    report_kl: bool,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Any mix, by the table of divergences."""
    temperature, rows = spec.temperature, logits.shape[-1]
    values: dict[str, Tensor] = {}
    gradient = torch.zeros_like(logits)
    s = logits / temperature
    log_q = torch.log_softmax(s, -1)
    q = log_q.exp()
    p = _mixed(teachers, temperature, rows)
    for name, weight in spec.weights.items():
        if name == "cross_entropy":
            continue
        assert p is not None
        target = _moved(s, teachers, spec, taid_t, rows) if name == "taid" else p
        if name == "reverse_kl" and spec.vocab < rows:
            real = torch.log_softmax(s[:, : spec.vocab], -1)
            value, part = DIVERGENCES[name](real, real.exp(), target[:, : spec.vocab], 0.0)
            gradient[:, : spec.vocab].add_(part, alpha=weight * temperature)
        else:
            value, part = DIVERGENCES[name](log_q, q, target, spec.parameter(name))
            gradient.add_(part, alpha=weight * temperature)
        values[name] = value * temperature**2
    needs_one = "cross_entropy" in spec.weights or (report_kl and p is not None)
    if not needs_one:
        return values, gradient
    log_q1 = log_q if temperature == 1.0 else torch.log_softmax(logits, -1)
    if "cross_entropy" in spec.weights:
        weight, index = spec.weights["cross_entropy"], targets.clamp_min(0).unsqueeze(-1)
        values["cross_entropy"] = -log_q1.gather(-1, index).squeeze(-1)
        gradient.add_(log_q1.exp(), alpha=weight)
        gradient.scatter_add_(-1, index, torch.full_like(index, -weight, dtype=gradient.dtype))
    if report_kl and p is not None:
        p1 = p if temperature == 1.0 else _mixed(teachers, 1.0, rows)
        assert p1 is not None
        values["kl"] = (torch.xlogy(p1, p1) - p1 * log_q1).sum(-1)
    return values, gradient


def _sparse(
    logits: Tensor, given: SparseTargets, targets: Tensor, spec: LossSpec, exact: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward KL to some of the teacher's probabilities, never made dense, and cross-entropy.

    A sample: −Σ τ log q less the teacher's entropy (or the sample's own), gradient q·Στ − τ. With a tail, KL over the
    kept tokens and "any other": gradient q − p on those kept and q (1 − p_tail / q_tail) on the others.
    """
    temperature = spec.temperature
    values: dict[str, Tensor] = {}
    log_q = torch.log_softmax(logits / temperature, -1)
    gradient = torch.zeros_like(logits)
    if "forward_kl" in spec.weights:
        weight = spec.weights["forward_kl"] * temperature
        kept = given.weights.to(exact)
        at = log_q.gather(-1, given.ids)
        own = torch.xlogy(kept, kept).sum(-1) if given.entropy is None else -given.entropy.to(exact)
        value = own - (kept * at).sum(-1)
        q = log_q.exp()
        if given.tail is None:
            gradient.add_(q * kept.sum(-1, keepdim=True), alpha=weight)
            gradient.scatter_add_(-1, given.ids, kept * -weight)
        else:
            tail, used = given.tail.to(exact), (kept > 0).to(exact)
            q_kept = at.exp() * used
            q_tail = (1.0 - q_kept.sum(-1)).clamp_min(torch.finfo(exact).eps)
            value = value + torch.xlogy(tail, tail) - tail * q_tail.log()
            others = 1.0 - tail / q_tail
            gradient.add_(q * others.unsqueeze(-1), alpha=weight)
            gradient.scatter_add_(-1, given.ids, (q_kept * (1.0 - others.unsqueeze(-1)) - kept) * weight)
        values["forward_kl"] = value * temperature**2
    if "cross_entropy" in spec.weights:
        weight, index = spec.weights["cross_entropy"], targets.clamp_min(0).unsqueeze(-1)
        log_q1 = log_q if temperature == 1.0 else torch.log_softmax(logits, -1)
        values["cross_entropy"] = -log_q1.gather(-1, index).squeeze(-1)
        gradient.add_(log_q1.exp(), alpha=weight)
        gradient.scatter_add_(-1, index, torch.full_like(index, -weight, dtype=gradient.dtype))
    return values, gradient


def _mixed(teachers: Sequence[tuple[Tensor, float]], temperature: float, rows: int) -> Tensor | None:
    """The teachers' probabilities [n, rows], zero on rows they do not have."""
    if not teachers:
        return None
    p: Tensor | None = None
    for logits, share in teachers:
        each = torch.softmax(logits / temperature, -1) * share
        p = each if p is None else p + each
    assert p is not None
    return p if p.shape[-1] == rows else torch.nn.functional.pad(p, (0, rows - p.shape[-1]))


def _moved(s: Tensor, teachers: Sequence[tuple[Tensor, float]], spec: LossSpec, taid_t: float, rows: int) -> Tensor:
    """TAID's teacher: softmax of the logits a share `taid_t` of the way from student to teacher (Shing et al. 2025)."""
    vocab = teachers[0][0].shape[-1]
    if len(teachers) == 1:
        goal = teachers[0][0] / spec.temperature
    else:
        mixed = _mixed(teachers, spec.temperature, vocab)
        assert mixed is not None
        goal = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
    moved = torch.softmax((1.0 - taid_t) * s[:, :vocab] + taid_t * goal, -1)
    return moved if vocab == rows else torch.nn.functional.pad(moved, (0, rows - vocab))


def finish_logits(logits: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Bias, scale and soft cap, in place."""
    if bias is not None:
        logits.add_(bias.detach().to(logits.dtype))
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without a product of their size in between."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


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
    """Tokens of a chunk: as the byte budget allows, and no more than an eighth of a CPU's batch, which suffices."""
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
    return max(1, min(CPU_CHUNK_BYTES // per_row, max(FEWEST_CHUNK_TOKENS, -(-tokens // 8))))


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
