"""The losses of a block of tokens from its logits, and their gradient.

Slow and obvious forms: tests/losses/test_losses.py.

Legend: n tokens of a block, V the student's rows, V_t the tokens that the tokenizer really has. Everything is fp32
(fp64 in fp64); a block is small enough to stay in a CPU's caches, so passes over it are cheap and fresh memory is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor  # noqa: TID253

from edgedistill.losses.divergences import DIVERGENCES, Pair
from edgedistill.losses.loss_spec import Head, LossSpec, SparseTargets

Found = tuple[dict[str, Tensor], Tensor]  # each term's values [n], the gradient [n, V] times each token's factor


class Dense(NamedTuple):
    """A teacher's logits [n, V_t], ours to overwrite, and its share among several teachers."""

    logits: Tensor
    share: float


def block_loss(
    logits: Tensor,
    teacher: Sequence[Dense] | SparseTargets,
    targets: Tensor,
    spec: LossSpec,
    factor: Tensor,
    *,
    taid_t: float,
    report_kl: bool,
) -> Found:
    """Values of the terms of a block and the gradient of their weighted sum with respect to `logits` [n, V], which are
    overwritten. `factor` [n]: what a token counts. "kl" is added where asked for: KL(teacher ‖ student) at T = 1.
    """
    if isinstance(teacher, SparseTargets):
        return _sparse(logits, teacher, targets, spec, factor)
    plain = set(spec.weights) <= {"forward_kl", "cross_entropy"} and spec.temperature == 1.0 and len(teacher) <= 1
    if plain and (not report_kl or "forward_kl" in spec.weights):
        values, gradient = _plain(logits, teacher[0].logits if teacher else None, targets, spec, factor)
        if report_kl and "forward_kl" in values:
            values["kl"] = values["forward_kl"]
        return values, gradient
    return _general(logits, teacher, targets, spec, factor, taid_t, report_kl)


def finish_logits(logits: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Bias, scale and soft cap, in place."""
    if bias is not None:
        logits.add_(bias.detach().to(logits.dtype))
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _plain(logits: Tensor, teacher: Tensor | None, targets: Tensor, spec: LossSpec, factor: Tensor) -> Found:
    """Forward KL and cross-entropy at T = 1, in place, with one exponential a distribution.

    KL = Σ p (t − z) − log Σ eᵗ + log Σ eᶻ, gradient q − p; cross-entropy likewise with p a single token.
    """
    values: dict[str, Tensor] = {}
    kl_weight, ce_weight = spec.weights.get("forward_kl", 0.0), spec.weights.get("cross_entropy", 0.0)
    logits.sub_(logits.amax(-1, keepdim=True))
    at_target = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) if ce_weight else None
    weighted = None
    if teacher is not None and kl_weight:
        vocab = teacher.shape[-1]
        teacher.sub_(teacher.amax(-1, keepdim=True))
        p = teacher.exp()
        total = p.sum(-1)
        weighted = teacher.sub_(logits[:, :vocab]).mul_(p).sum(-1) / total - total.log()
    gradient = logits.exp_()
    norm = gradient.sum(-1)
    log_norm = norm.log()
    gradient.mul_(((kl_weight + ce_weight) * factor / norm).unsqueeze(-1))
    if weighted is not None:
        values["forward_kl"] = weighted + log_norm
        gradient[:, :vocab].addcmul_(p, (-kl_weight * factor / total).unsqueeze(-1))
    if at_target is not None:
        values["cross_entropy"] = log_norm - at_target
        _take_target(gradient, targets, ce_weight * factor)
    return values, gradient


def _general(
    logits: Tensor, teachers: Sequence[Dense], targets: Tensor, spec: LossSpec, factor: Tensor, taid_t: float,
    report_kl: bool,
) -> Found:  # fmt: skip
    """Any mix, by the table of divergences."""
    temperature, rows = spec.temperature, logits.shape[-1]
    values: dict[str, Tensor] = {}
    gradient: Tensor | None = None
    log_q, q = _normalised(logits if temperature == 1.0 else logits / temperature)
    pair = _pair(log_q, q, teachers, temperature) if teachers else None
    for name, weight in spec.weights.items():
        if name == "cross_entropy":
            continue
        assert pair is not None
        used = _moved(pair, spec.vocab, taid_t) if name == "taid" else pair
        if name == "reverse_kl" and spec.vocab < rows:  # over the real tokens alone
            real, real_q = _normalised(log_q[:, : spec.vocab].clone())
            value, part = DIVERGENCES[name](used._replace(log_q=real, q=real_q), 0.0)
            part = torch.nn.functional.pad(part, (0, rows - spec.vocab))
        else:
            value, part = DIVERGENCES[name](used, spec.parameter(name))
        part.mul_((factor * (weight * temperature)).unsqueeze(-1))
        gradient = part if gradient is None else gradient.add_(part)
        values[name] = value * temperature**2
    if "cross_entropy" in spec.weights or report_kl:
        log_q1, q1 = (log_q, q) if temperature == 1.0 else _normalised(logits)
        if "cross_entropy" in spec.weights:
            weight = spec.weights["cross_entropy"]
            values["cross_entropy"] = -log_q1.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            part = q1 * (weight * factor).unsqueeze(-1)
            _take_target(part, targets, weight * factor)
            gradient = part if gradient is None else gradient.add_(part)
        if report_kl:
            at_one = pair if temperature == 1.0 else _pair(log_q1, q1, teachers, 1.0)
            assert at_one is not None
            values["kl"] = at_one.neg_entropy - (at_one.p * log_q1).sum(-1)
    assert gradient is not None
    return values, gradient


def _sparse(logits: Tensor, given: SparseTargets, targets: Tensor, spec: LossSpec, factor: Tensor) -> Found:
    """Forward KL to some of the teacher's probabilities, never made dense, and cross-entropy.

    A sample: −Σ τ log q less the teacher's entropy (or the sample's own), gradient q·Στ − τ. With a tail, KL over the
    kept tokens and "any other": gradient q − p on those kept and q (1 − p_tail / q_tail) on the others.
    """
    temperature, exact = spec.temperature, logits.dtype
    values: dict[str, Tensor] = {}
    kl_weight, ce_weight = spec.weights.get("forward_kl", 0.0), spec.weights.get("cross_entropy", 0.0)
    gradient: Tensor | None = None
    if kl_weight:
        weight = factor * (kl_weight * temperature)
        if temperature != 1.0:
            scaled = logits / temperature
        else:  # overwritten, so cross-entropy needs its own
            scaled = logits.clone() if ce_weight else logits
        log_q, q = _normalised(scaled)
        kept = given.weights.to(exact)
        at = log_q.gather(-1, given.ids)
        own = torch.xlogy(kept, kept).sum(-1) if given.entropy is None else -given.entropy.to(exact)
        value = own - (kept * at).sum(-1)
        if given.tail is None:
            gradient = q.mul_((kept.sum(-1) * weight).unsqueeze(-1))
            gradient.scatter_add_(-1, given.ids, kept * -weight.unsqueeze(-1))
        else:
            tail, used = given.tail.to(exact), (kept > 0).to(exact)
            q_kept = at.exp() * used
            q_tail = (1.0 - q_kept.sum(-1)).clamp_min(torch.finfo(exact).eps)
            value = value + torch.xlogy(tail, tail) - tail * q_tail.log()
            others = 1.0 - tail / q_tail
            gradient = q.mul_((others * weight).unsqueeze(-1))
            gradient.scatter_add_(-1, given.ids, (q_kept * (1.0 - others.unsqueeze(-1)) - kept) * weight.unsqueeze(-1))
        values["forward_kl"] = value * temperature**2
    if ce_weight:
        log_q1, q1 = _normalised(logits)
        values["cross_entropy"] = -log_q1.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        part = q1.mul_((ce_weight * factor).unsqueeze(-1))
        _take_target(part, targets, ce_weight * factor)
        gradient = part if gradient is None else gradient.add_(part)
    assert gradient is not None
    return values, gradient


def _take_target(gradient: Tensor, targets: Tensor, weight: Tensor) -> None:
    """Subtract each token's weight [n] at its target, in place."""
    gradient.scatter_add_(-1, targets.clamp_min(0).unsqueeze(-1), -weight.to(gradient.dtype).unsqueeze(-1))


def _normalised(s: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax (in the place of `s`) and softmax, with one exponential."""
    s.sub_(s.amax(-1, keepdim=True))
    p = s.exp()
    total = p.sum(-1, keepdim=True)
    return s.sub_(total.log()), p.div_(total)


def _pair(log_q: Tensor, q: Tensor, teachers: Sequence[Dense], temperature: float) -> Pair:
    """Student and teachers side by side; p is zero on rows that the teachers do not have."""
    rows = q.shape[-1]
    if len(teachers) == 1:
        t = teachers[0].logits
        # at T = 1 nobody reads these logits after
        log_p, p = _normalised(t if temperature == 1.0 else t / temperature)
    else:
        p = torch.softmax(teachers[0].logits / temperature, -1).mul_(teachers[0].share)
        for each in teachers[1:]:
            p.add_(torch.softmax(each.logits / temperature, -1), alpha=each.share)
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    neg_entropy = (p * log_p).sum(-1)
    wide = p if p.shape[-1] == rows else torch.nn.functional.pad(p, (0, rows - p.shape[-1]))
    return Pair(log_q, q, log_p, wide, neg_entropy)


def _moved(pair: Pair, vocab: int, taid_t: float) -> Pair:
    """TAID's teacher: softmax of the logits a share `taid_t` of the way from student to teacher (Shing et al. 2025)."""
    log_p, p = _normalised(torch.lerp(pair.log_q[:, :vocab], pair.log_p, taid_t))
    neg_entropy = (p * log_p).sum(-1)
    rows = pair.q.shape[-1]
    wide = p if vocab == rows else torch.nn.functional.pad(p, (0, rows - vocab))
    return Pair(pair.log_q, pair.q, log_p, wide, neg_entropy)
