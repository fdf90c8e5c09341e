"""Muon in float32 is torch's Muon but for rounding, and leaves the same state."""

from __future__ import annotations

import pytest
import torch
from training_models import settings

from edgedistill.config.recipe import Training
from edgedistill.machine import facts
from edgedistill.training.muon import FloatMuon, orthogonalized
from edgedistill.training.optimizers import make_optimizers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def stepped(kind, shape, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = kind([weight], lr=0.02, weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator, dtype=dtype)
        optimizer.step()
    return weight.detach(), optimizer.state_dict()


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_it_is_torchs_muon_but_for_rounding(shape):
    ours, our_state = stepped(FloatMuon, shape)
    theirs, their_state = stepped(torch.optim.Muon, shape)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert (ours - theirs).norm() <= 0.02 * (theirs - start).norm()
    assert torch.equal(our_state["state"][0]["momentum_buffer"], their_state["state"][0]["momentum_buffer"])
    assert our_state["param_groups"] == their_state["param_groups"]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_it_orthogonalizes_as_the_singular_values_say(shape):
    """The iteration is a polynomial of the singular values alone: p(s) = a s + b s³ + c s⁵, five times."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalized(matrix, COEFFICIENTS, 5, 1e-7), u @ torch.diag(s) @ v, atol=1e-10)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalized(torch.zeros(4, 6), COEFFICIENTS, 5, 1e-7), torch.zeros(4, 6))


def test_the_precision_chooses():
    def model():
        return torch.nn.ModuleDict(
            {"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})}
        )

    assert isinstance(make_optimizers(model(), settings(precision="fp32"))[0], FloatMuon)
    assert type(make_optimizers(model(), settings(precision="bf16"))[0]) is torch.optim.Muon


@pytest.mark.parametrize(("flags", "expected"), [(["avx2"], "fp32"), (["avx2", "avx512_bf16"], "bf16")])
def test_auto_is_what_this_machine_is_fast_in(monkeypatch, flags, expected):
    monkeypatch.setattr(facts, "_cpu", lambda: ("a CPU", flags))
    monkeypatch.setattr(facts, "_gpus", list)
    assert Training().precision == Training(precision="auto").precision == expected
    assert Training(precision="bf16").precision == "bf16"
    monkeypatch.setattr(facts, "_gpus", lambda: ["a GPU"])
    assert Training().precision == "bf16"
