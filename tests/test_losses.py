"""The head loss against the plain formula in float64 autograd, on random inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.distill import losses
from edgedistill.distill.losses import IGNORED, LossSpec, TeacherHead, head_loss


def reference(hidden, weight, teacher_hidden, teacher_weight, targets, spec, valid_total):
    """Full logits, autograd, no cleverness."""
    z = hidden @ weight.T
    valid = targets != IGNORED
    total = torch.zeros((), dtype=z.dtype)
    if spec.forward_kl > 0:
        p = torch.softmax((teacher_hidden @ teacher_weight.T)[:, : spec.vocab] / spec.temperature, -1)
        log_q = torch.log_softmax(z / spec.temperature, -1)[:, : spec.vocab]
        kl = (p * (p.log() - log_q)).sum(-1) * spec.temperature**2
        total = total + spec.forward_kl * kl[valid].sum() / valid_total
    if spec.cross_entropy > 0:
        ce = torch.nn.functional.cross_entropy(z[valid], targets[valid], reduction="sum")
        total = total + spec.cross_entropy * ce / valid_total
    return total


def inputs(seed, tokens, vocab, student_rows, teacher_rows, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 12, generator=g, requires_grad=True)
    weight = (torch.randn(student_rows, 12, generator=g) * scale).requires_grad_(True)
    teacher = TeacherHead(torch.randn(tokens, 20, generator=g), torch.randn(teacher_rows, 20, generator=g) * scale)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < 0.2] = IGNORED
    return hidden, weight, teacher, targets


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 200),
    vocab=st.integers(2, 40),
    student_padding=st.integers(0, 7),
    teacher_padding=st.integers(0, 7),
    kl=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    ce=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    chunk=st.sampled_from([1, 1 << 14, 1 << 28]),
)
def test_loss_and_gradients_equal_autograd(
    seed, tokens, vocab, student_padding, teacher_padding, kl, ce, temperature, chunk
):
    if kl == ce == 0:
        kl = 1.0
    spec = LossSpec(forward_kl=kl, cross_entropy=ce, temperature=temperature, vocab=vocab)
    hidden, weight, teacher, targets = inputs(seed, tokens, vocab, vocab + student_padding, vocab + teacher_padding)
    total = max(1, int((targets != IGNORED).sum()))
    kept, losses.CHUNK_BYTES = losses.CHUNK_BYTES, chunk
    try:
        loss, terms = head_loss(hidden, weight, teacher, targets, spec, valid_total=total, low_precision=False)
    finally:
        losses.CHUNK_BYTES = kept
    (3.0 * loss).backward()
    slow = [t.detach().double().requires_grad_(True) for t in (hidden, weight)]
    expected = reference(*slow, teacher.hidden.double(), teacher.weight.double(), targets, spec, total)
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5, abs=2e-6)
    assert kl * terms["kl"] + ce * terms["ce"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for fast, exact in ((hidden, slow[0]), (weight, slow[1])):
        torch.testing.assert_close(fast.grad.double(), exact.grad, rtol=2e-4, atol=2e-5)


def test_kl_of_a_teacher_with_itself_is_zero():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=g, requires_grad=True)
    weight = torch.randn(30, 16, generator=g, requires_grad=True)
    spec = LossSpec(forward_kl=1.0, cross_entropy=0.0, temperature=2.0, vocab=30)
    head = TeacherHead(hidden.detach(), weight.detach())
    loss, _ = head_loss(
        hidden, weight, head, torch.zeros(50, dtype=torch.long), spec, valid_total=50, low_precision=False
    )
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_padding_rows_of_the_teacher_carry_no_mass_and_the_students_are_driven_down():
    """Liger pads a larger vocabulary with zeros, which are probability mass; here padding is nothing."""
    hidden, weight, teacher, targets = inputs(3, 40, 20, 26, 24)
    spec = LossSpec(forward_kl=1.0, cross_entropy=0.0, temperature=1.0, vocab=20)
    loss, _ = head_loss(hidden, weight, teacher, targets, spec, valid_total=40, low_precision=False)
    huge = TeacherHead(teacher.hidden, torch.cat([teacher.weight[:20], 100 * teacher.weight[20:]]))
    same, _ = head_loss(hidden, weight, huge, targets, spec, valid_total=40, low_precision=False)
    assert same.item() == loss.item()
    z = (hidden @ weight.T).detach().requires_grad_(True)
    t = teacher.hidden @ teacher.weight[:20].T
    _, _, gradient = losses.token_losses(z, t, targets, spec)
    assert (gradient[targets != IGNORED][:, 20:] > 0).all()


def test_frozen_head_gets_no_gradient():
    hidden, weight, teacher, targets = inputs(4, 10, 8, 8, 8)
    frozen = weight.detach()
    spec = LossSpec(forward_kl=1.0, cross_entropy=1.0, temperature=1.0, vocab=8)
    loss, _ = head_loss(hidden, frozen, teacher, targets, spec, valid_total=10, low_precision=False)
    loss.backward()
    assert hidden.grad is not None
    assert frozen.grad is None


def test_splitting_a_batch_changes_nothing():
    hidden, weight, teacher, targets = inputs(5, 64, 30, 30, 30)
    spec = LossSpec(forward_kl=1.0, cross_entropy=0.5, temperature=2.0, vocab=30)
    total = int((targets != IGNORED).sum())
    whole, _ = head_loss(hidden, weight, teacher, targets, spec, valid_total=total, low_precision=False)
    parts = [
        head_loss(
            hidden[s], weight, TeacherHead(teacher.hidden[s], teacher.weight), targets[s], spec,
            valid_total=total, low_precision=False,
        )[0]
        for s in (slice(0, 10), slice(10, 64))
    ]  # fmt: skip
    assert sum(p.item() for p in parts) == pytest.approx(whole.item(), rel=1e-5)


def test_bf16_stays_near_fp32():
    hidden, weight, teacher, targets = inputs(6, 128, 50, 50, 50, scale=0.3)
    spec = LossSpec(forward_kl=1.0, cross_entropy=0.0, temperature=1.0, vocab=50)
    results = []
    for low in (False, True):
        hidden.grad = None
        loss, _ = head_loss(hidden, weight, teacher, targets, spec, valid_total=100, low_precision=low)
        loss.backward()
        results.append((loss.item(), hidden.grad.clone()))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.03)
    cosine = torch.nn.functional.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), dim=0)
    assert cosine > 0.995


@pytest.mark.parametrize("bad", [{"forward_kl": 0.0, "cross_entropy": 0.0}])
def test_a_loss_without_weights_is_refused(bad):
    with pytest.raises(ValueError, match="weight"):
        LossSpec(temperature=1.0, vocab=3, **bad)
