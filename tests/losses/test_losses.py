"""The head loss against the plain formulas in float64 autograd, on random inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.losses import block_losses, losses
from edgedistill.losses.divergences import DIVERGENCES
from edgedistill.losses.losses import (
    IGNORED,
    NAMES,
    Head,
    LossSpec,
    SparseTargets,
    TeacherHead,
    TeacherLogits,
    head_loss,
)

TINY = 1e-300


def logits_of(hidden, head, rows=None):
    z = hidden @ head.weight.T
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z if rows is None else z[:, :rows]


def kl(p, q):
    return (torch.xlogy(p, p) - torch.where(p > 0, p * q.clamp_min(TINY).log(), torch.zeros_like(p))).sum(-1)


def reference(hidden, head, teacher, targets, spec, valid_total, taid_t=1.0):
    """Full logits, one formula after another, gradients by autograd. Returns the loss and each term."""
    z = logits_of(hidden, head)
    valid = targets != IGNORED
    T, V = spec.temperature, spec.vocab

    def probabilities(temperature):
        if isinstance(teacher, TeacherLogits):
            parts = [(teacher.logits, 1.0)]
        else:
            each = teacher if isinstance(teacher, tuple) else ((teacher, 1.0),)
            parts = [(logits_of(t.hidden, t.head, V), share) for t, share in each]
        p = sum(share * torch.softmax(t / temperature, -1) for t, share in parts)
        return torch.nn.functional.pad(p, (0, z.shape[-1] - V))

    def q_at(temperature, rows=None):
        return torch.softmax((z if rows is None else z[:, :rows]) / temperature, -1)

    def divergence(name):
        p, q = probabilities(T), q_at(T)
        if name == "forward_kl":
            return kl(p, q)
        if name == "reverse_kl":
            return kl(q_at(T, V), p[:, :V])
        if name == "jsd":
            m = spec.jsd_beta * p + (1 - spec.jsd_beta) * q
            return spec.jsd_beta * kl(p, m) + (1 - spec.jsd_beta) * kl(q, m)
        if name == "skewed_kl":
            return kl(p, spec.skew * p + (1 - spec.skew) * q)
        if name == "skewed_reverse_kl":
            return kl(q, (1 - spec.skew) * p + spec.skew * q)
        if name == "total_variation":
            return 0.5 * (p - q).abs().sum(-1)
        assert name == "taid"
        moved = (1 - taid_t) * z.detach()[:, :V] / T + taid_t * p[:, :V].log()
        return kl(torch.nn.functional.pad(torch.softmax(moved, -1), (0, z.shape[-1] - V)), q)

    terms = {}
    for name in spec.weights:
        if name == "cross_entropy":
            value = -torch.log_softmax(z, -1)[torch.arange(len(z)), targets.clamp_min(0)]
        elif isinstance(teacher, SparseTargets):
            kept, at = teacher.weights, torch.gather(torch.log_softmax(z / T, -1), -1, teacher.ids)
            value = (torch.xlogy(kept, kept) - kept * at).sum(-1)
            if teacher.tail is not None:
                rest = 1 - (at.exp() * (kept > 0)).sum(-1)
                missed = torch.where(
                    teacher.tail > 0, teacher.tail * rest.clamp_min(TINY).log(), torch.zeros_like(rest)
                )
                value = value + torch.xlogy(teacher.tail, teacher.tail) - missed
            value = value * T**2
        else:
            value = divergence(name) * T**2
        terms[name] = value[valid].sum() / valid_total
    kl_at_one = None
    if teacher is not None and not isinstance(teacher, SparseTargets):
        kl_at_one = (kl(probabilities(1.0), q_at(1.0))[valid].sum() / valid_total).item()
    return sum(spec.weights[name] * term for name, term in terms.items()), terms, kl_at_one


def build(
    seed, *, tokens=24, vocab=20, student_rows=23, teacher_rows=26, form="head", dtype=torch.float64, extras=False,
    scale=1.0, temperature=1.0,
):  # fmt: skip
    """Random student, teacher and targets. `extras`: bias, scale and soft cap on both heads."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape, by=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * by).to(dtype)

    def head(rows, width):
        return Head(
            random(rows, width, by=scale),
            bias=random(rows) if extras else None,
            scale=0.7 if extras else 1.0,
            softcap=5.0 if extras else None,
        )

    hidden, student = random(tokens, 12), head(student_rows, 12)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < 0.25] = IGNORED
    one = TeacherHead(random(tokens, 16), head(teacher_rows, 16))
    if form == "head":
        teacher = one
    elif form == "logits":
        teacher = TeacherLogits(random(tokens, vocab, by=2.0))
    elif form == "mix":
        teacher = ((one, 0.3), (TeacherHead(random(tokens, 9), head(teacher_rows, 9)), 0.7))
    else:
        p = torch.softmax(random(tokens, vocab, by=2.0).double() / temperature, -1)
        if form == "sampled":
            counts = torch.zeros_like(p)
            counts.scatter_add_(
                -1, torch.multinomial(p, 20, replacement=True, generator=g), torch.ones(tokens, 20).double()
            )
            weights, ids = (counts / 20).topk(min(vocab, 20))
            teacher = SparseTargets(ids, weights.to(dtype))
        else:
            weights, ids = p.topk(min(5, vocab))
            tail = (1 - weights.sum(-1)).clamp_min(0) if vocab > 5 else torch.zeros(tokens, dtype=torch.float64)
            teacher = SparseTargets(ids, weights.to(dtype), tail.to(dtype))
    return hidden, student, teacher, targets


def leaf(head):
    bias = None if head.bias is None else head.bias.detach().clone().requires_grad_(True)
    return Head(head.weight.detach().clone().requires_grad_(True), bias, head.scale, head.softcap)


def doubled(teacher):
    def head(h):
        return Head(h.weight.double(), None if h.bias is None else h.bias.double(), h.scale, h.softcap)

    if isinstance(teacher, TeacherHead):
        return TeacherHead(teacher.hidden.double(), head(teacher.head))
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.double())
    if isinstance(teacher, SparseTargets):
        return SparseTargets(
            teacher.ids, teacher.weights.double(), None if teacher.tail is None else teacher.tail.double()
        )
    return tuple((doubled(t), share) for t, share in teacher)


def both(hidden, head, teacher, targets, spec, *, taid_t=1.0, low=False, chunk=None, upstream=3.0, report=True):
    """(loss, terms, gradients) of the fast path and of the reference in float64."""
    total = max(1, int((targets != IGNORED).sum()))
    h, student = hidden.detach().clone().requires_grad_(True), leaf(head)
    loss, terms = head_loss(
        h, student, teacher, targets, spec, valid_total=total, low_precision=low, taid_t=taid_t, report_kl=report,
        chunk_bytes=chunk,
    )  # fmt: skip
    (upstream * loss).backward()
    h64 = hidden.detach().double().requires_grad_(True)
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_(True)
    exact = Head(head.weight.detach().double().requires_grad_(True), bias, head.scale, head.softcap)
    expected, parts, kl_at_one = reference(
        h64, exact, doubled(teacher) if teacher else None, targets, spec, total, taid_t
    )
    (upstream * expected).backward()
    fast = [h.grad, student.weight.grad, None if student.bias is None else student.bias.grad]
    slow = [h64.grad, exact.weight.grad, None if bias is None else bias.grad]
    return loss, terms, fast, expected, parts, slow, kl_at_one


def compare(result, *, rtol, atol):
    loss, terms, fast, expected, parts, slow, kl_at_one = result
    assert loss.item() == pytest.approx(expected.item(), rel=rtol, abs=atol)
    for name, value in parts.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=rtol, abs=atol), name
    if "kl" in terms:
        assert terms["kl"].item() == pytest.approx(kl_at_one, rel=rtol, abs=atol)
    for ours, exact in zip(fast, slow, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), exact, rtol=max(rtol, 1e-7), atol=atol)


mixes = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.3, 1.0, 2.0]), min_size=1, max_size=3)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 4.0])
forms = st.sampled_from(["head", "logits", "mix", "sampled", "topk"])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(1, 60), vocab=st.integers(2, 40), padding=st.integers(0, 7),
    teacher_padding=st.integers(0, 7), mix=mixes, temperature=temperatures, form=forms, extras=st.booleans(),
    chunk=st.sampled_from([1, 1 << 12, None]), taid_t=st.sampled_from([0.0, 0.4, 1.0]),
    beta=st.sampled_from([0.1, 0.5, 0.9]), skew=st.sampled_from([0.1, 0.7]),
)  # fmt: skip
def test_value_and_gradients_equal_autograd_in_float64(
    seed, tokens, vocab, padding, teacher_padding, mix, temperature, form, extras, chunk, taid_t, beta, skew
):
    if form in ("sampled", "topk"):
        mix = {name: weight for name, weight in mix.items() if name in ("forward_kl", "cross_entropy")} or {
            "forward_kl": 1.0
        }
    spec = LossSpec(mix, temperature=temperature, vocab=vocab, jsd_beta=beta, skew=skew)
    inputs = build(
        seed, tokens=tokens, vocab=vocab, student_rows=vocab + padding, teacher_rows=vocab + teacher_padding, form=form,
        extras=extras, temperature=temperature,
    )  # fmt: skip
    compare(both(*inputs, spec, taid_t=taid_t, chunk=chunk), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["head", "logits", "mix"])
@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 2e-4, 2e-5), (torch.bfloat16, 0.05, 0.02)])
def test_every_loss_in_every_dtype(name, form, dtype, rtol, atol):
    for seed in range(3):
        inputs = build(seed, tokens=64, form=form, dtype=dtype, scale=0.3)
        spec = LossSpec({name: 1.0}, temperature=2.0, vocab=20)
        compare(both(*inputs, spec, taid_t=0.5, low=dtype == torch.bfloat16), rtol=rtol, atol=atol)


def test_products_in_bf16_stay_near_fp32():
    hidden, head, teacher, targets = build(6, tokens=256, dtype=torch.float32, scale=0.3)
    spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=20)
    results = [both(hidden, head, teacher, targets, spec, low=low) for low in (False, True)]
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=0.03)
    for exact, rounded in zip(results[0][2][:2], results[1][2][:2], strict=True):
        assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.998


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_teacher_against_itself_is_zero_with_no_gradient(name, temperature):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=g).double().requires_grad_(True)
    weight = torch.randn(30, 16, generator=g).double().requires_grad_(True)
    spec = LossSpec({name: 1.0}, temperature=temperature, vocab=30)
    teacher = TeacherHead(hidden.detach(), Head(weight.detach()))
    loss, _ = head_loss(
        hidden, Head(weight), teacher, torch.zeros(50, dtype=torch.long), spec, valid_total=50, low_precision=False,
        taid_t=0.5,
    )  # fmt: skip
    loss.backward()
    assert abs(loss.item()) < 1e-12
    if name != "total_variation":  # whose gradient is a sign, undefined at equality
        assert hidden.grad.abs().max() < 1e-12
        assert weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize("form", ["head", "logits", "mix", "sampled", "topk"])
def test_chunks_and_splits_of_a_batch_change_nothing(form):
    hidden, head, teacher, targets = build(5, tokens=64, form=form)
    spec = LossSpec({"forward_kl": 1.0, "cross_entropy": 0.5}, temperature=2.0, vocab=20)
    total = int((targets != IGNORED).sum())

    def part_of(each, s):
        if isinstance(each, TeacherHead):
            return TeacherHead(each.hidden[s], each.head)
        if isinstance(each, TeacherLogits):
            return TeacherLogits(each.logits[s])
        if isinstance(each, SparseTargets):
            return SparseTargets(each.ids[s], each.weights[s], None if each.tail is None else each.tail[s])
        return tuple((part_of(t, s), share) for t, share in each)

    def run(slices, chunk):
        h, student = hidden.clone().requires_grad_(True), leaf(head)
        value = 0.0
        for s in slices:
            loss, _ = head_loss(
                h[s], student, part_of(teacher, s), targets[s], spec, valid_total=total, low_precision=False,
                chunk_bytes=chunk,
            )  # fmt: skip
            loss.backward()
            value += loss.item()
        return value, h.grad, student.weight.grad

    whole = run([slice(0, 64)], None)
    for slices, chunk in (
        ([slice(0, 64)], 1), ([slice(0, 64)], 3000), ([slice(0, 10), slice(10, 64)], None),
    ):  # fmt: skip
        value, by_hidden, by_weight = run(slices, chunk)
        assert value == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(by_hidden, whole[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(by_weight, whole[2], rtol=1e-10, atol=1e-12)


def test_blocks_within_a_chunk_change_nothing(monkeypatch):
    inputs = build(8, tokens=40)
    spec = LossSpec({"forward_kl": 1.0, "cross_entropy": 1.0}, temperature=1.0, vocab=20)
    whole = both(*inputs, spec)
    monkeypatch.setattr(losses, "BLOCK_BYTES", 1)
    single = both(*inputs, spec)
    assert single[0].item() == pytest.approx(whole[0].item(), rel=1e-12)
    torch.testing.assert_close(single[2][0], whole[2][0], rtol=1e-10, atol=1e-12)


def test_masked_tokens_count_for_nothing():
    hidden, head, teacher, targets = build(2, tokens=30)
    spec = LossSpec({"forward_kl": 1.0, "jsd": 1.0, "cross_entropy": 1.0}, temperature=1.0, vocab=20)
    keep = targets != IGNORED
    all_in = both(hidden, head, teacher, targets, spec)
    only = both(hidden[keep], head, TeacherHead(teacher.hidden[keep], teacher.head), targets[keep], spec)
    assert all_in[0].item() == pytest.approx(only[0].item(), rel=1e-12)
    assert (all_in[2][0][~keep] == 0).all()
    torch.testing.assert_close(all_in[2][1], only[2][1], rtol=1e-10, atol=1e-12)


def test_a_batch_without_valid_tokens_is_zero_and_not_nan():
    hidden, head, teacher, targets = build(2, tokens=30)
    spec = LossSpec({"forward_kl": 1.0, "cross_entropy": 1.0}, temperature=2.0, vocab=20)
    loss, _, fast, *_ = both(hidden, head, teacher, torch.full_like(targets, IGNORED), spec)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in fast[:2])


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_extreme_logits_stay_finite(name):
    hidden, head, teacher, targets = build(1, tokens=16, dtype=torch.float32, scale=300.0)
    spec = LossSpec({name: 1.0}, temperature=1.0, vocab=20)
    loss, _, fast, *_ = both(hidden, head, teacher, targets, spec, taid_t=0.5)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in fast[:2])


def allocated(head, hidden, teacher, targets, spec):
    """Bytes of tensors as large as the head that the forward and backward passes allocate."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            if isinstance(out, torch.Tensor) and out.shape == head.weight.shape and "zeros" in str(function):
                sizes.append(out.nbytes)
            return out

    with Watch():
        loss, _ = head_loss(hidden, head, teacher, targets, spec, valid_total=10, low_precision=False)
        loss.backward()
    return sum(sizes)


def test_a_frozen_head_gets_no_gradient_and_no_buffer():
    hidden, head, teacher, targets = build(4, tokens=10)
    spec = LossSpec({"forward_kl": 1.0, "cross_entropy": 1.0}, temperature=1.0, vocab=20)
    hidden = hidden.requires_grad_(True)
    assert allocated(head, hidden, teacher, targets, spec) == 0
    assert hidden.grad is not None
    assert head.weight.grad is None
    assert allocated(leaf(head), hidden, teacher, targets, spec) > 0


# ---- the field's mistakes -------------------------------------------------------------------------------------------


def test_forward_kl_is_not_the_cross_entropy_to_the_teacher():
    """torchtune's is, and so is not zero at a perfect match; ours differs from it by the teacher's entropy."""
    hidden, head, teacher, targets = build(3)
    spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=20)
    _, terms, *_ = both(hidden, head, teacher, targets, spec)
    p = torch.softmax(logits_of(teacher.hidden, teacher.head, 20), -1)
    valid = targets != IGNORED
    cross = -(p * torch.log_softmax(logits_of(hidden, head), -1)[:, :20]).sum(-1)[valid].mean()
    entropy = -torch.xlogy(p, p).sum(-1)[valid].mean()
    assert entropy > 0.1
    assert terms["forward_kl"].item() == pytest.approx((cross - entropy).item(), rel=1e-9)


def test_the_loss_is_a_mean_over_tokens_not_over_the_vocabulary_or_the_batch():
    """ModelOpt's default and BabyLlama average over the vocabulary or the batch: twice the rows, half the loss."""
    hidden, head, teacher, targets = build(3, student_rows=20, teacher_rows=20)
    spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=20)
    once = both(hidden, head, teacher, targets, spec)[0].item()
    twice = both(
        hidden.repeat(2, 1), head, TeacherHead(teacher.hidden.repeat(2, 1), teacher.head), targets.repeat(2), spec
    )[0].item()
    assert twice == pytest.approx(once, rel=1e-12)
    # rows that neither can reach change nothing either
    bottom = torch.full((40, 12), 0.0, dtype=torch.float64)
    wide = Head(torch.cat([head.weight, bottom]), torch.cat([torch.zeros(20), torch.full((40,), -1e4)]).double())
    assert both(hidden, wide, teacher, targets, spec)[0].item() == pytest.approx(once, rel=1e-9)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_t_squared_stands_on_loss_and_gradient_alike(name):
    """axolotl puts it on the reported loss alone. Scaling logits by T at temperature T gives T² times the loss."""
    hidden, head, teacher, targets = build(3, form="logits")
    for t in (2.0, 4.0):
        plain = both(hidden, head, teacher, targets, LossSpec({name: 1.0}, temperature=1.0, vocab=20), taid_t=0.5)
        scaled_head = Head(head.weight * t)
        scaled = TeacherLogits(teacher.logits * t)
        hot = both(hidden, scaled_head, scaled, targets, LossSpec({name: 1.0}, temperature=t, vocab=20), taid_t=0.5)
        assert hot[0].item() == pytest.approx(t**2 * plain[0].item(), rel=1e-9)
        torch.testing.assert_close(hot[2][0], t**2 * plain[2][0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_the_temperature_reaches_every_divergence(name):
    """TRL's GKD had an option that never did."""
    inputs = build(3)
    values = [
        both(*inputs, LossSpec({name: 1.0}, temperature=t, vocab=20), taid_t=0.5)[0].item() / t**2
        for t in (1.0, 2.0, 5.0)
    ]
    assert values[0] > 1.05 * values[1] > 1.05**2 * values[2] > 0


def test_padding_rows_of_the_teacher_carry_no_mass_and_the_students_are_driven_down():
    """Liger pads a larger vocabulary with zeros, which are probability mass; here padding is nothing."""
    hidden, head, teacher, targets = build(3, student_rows=26, teacher_rows=24)
    for name in DIVERGENCES:
        spec = LossSpec({name: 1.0}, temperature=1.0, vocab=20)
        once = both(hidden, head, teacher, targets, spec, taid_t=0.5)
        weight = torch.cat([teacher.head.weight[:20], 100 * teacher.head.weight[20:]])
        again = both(hidden, head, TeacherHead(teacher.hidden, Head(weight)), targets, spec, taid_t=0.5)
        assert again[0].item() == once[0].item()
    z = logits_of(hidden, head).clone()
    t = logits_of(teacher.hidden, teacher.head, 20).clone()
    spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=20)
    _, gradient = block_losses._plain(z, t, targets, spec, torch.ones(len(z), dtype=torch.float64))
    assert (gradient[:, 20:] > 0).all()


@pytest.mark.parametrize(
    ("weights", "match"),
    [({"forward_kl": 0.0}, "weight above 0"), ({"forward_lk": 1.0}, "unknown losses")],
)
def test_a_mix_that_means_nothing_is_refused(weights, match):
    with pytest.raises(ValueError, match=match):
        LossSpec(weights, temperature=1.0, vocab=3)


def test_what_does_not_fit_is_refused():
    hidden, head, teacher, targets = build(3)
    kl_spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=20)
    sparse = build(3, form="sampled")[2]
    for wrong, match in (
        (
            lambda: head_loss(hidden, head, None, targets, kl_spec, valid_total=1, low_precision=False),
            "needs a teacher",
        ),
        (lambda: head_loss(hidden, head, teacher, targets[1:], kl_spec, valid_total=1, low_precision=False), "targets"),
        (
            lambda: head_loss(
                hidden, head, sparse, targets, LossSpec({"jsd": 1.0}, temperature=1.0, vocab=20), valid_total=1,
                low_precision=False,
            ),
            "sparse targets serve",
        ),
        (
            lambda: head_loss(
                hidden, head, teacher, targets, LossSpec({"jsd": 1.0}, temperature=1.0, vocab=25), valid_total=1,
                low_precision=False,
            ),
            "student's head has 23 rows",
        ),
        (
            lambda: head_loss(
                hidden[1:], head, teacher, targets[1:], kl_spec, valid_total=1, low_precision=False
            ),
            "teacher's hidden states",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            wrong()
