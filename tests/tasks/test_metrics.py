"""Scores against slow, obvious references."""

from __future__ import annotations

import numpy as np
import torch

from edgedistill.tasks.metrics import TokenScores


def test_scores_against_the_formula():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 12, generator=g) * 3
    teacher = torch.randn(30, 10, generator=g) * 3
    targets = torch.randint(0, 10, (30,), generator=g)
    log_p = torch.log_softmax(teacher, -1)
    scores = TokenScores()
    scores.add(logits, log_p, targets)
    q = torch.softmax(logits.double(), -1)
    p = torch.softmax(teacher.double(), -1)
    kl = (p * (p.log() - q[:, :10].log())).sum(-1)
    np.testing.assert_allclose(scores.kl[0], kl.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.nll[0], -q.log()[torch.arange(30), targets].numpy(), rtol=1e-4)
    assert scores.correct[0].tolist() == (logits.argmax(-1) == targets).tolist()
    assert scores.agree[0].tolist() == (logits.argmax(-1) == teacher.argmax(-1)).tolist()


def test_a_model_against_itself_has_no_kl_and_full_agreement():
    logits = torch.randn(200, 40)
    scores = TokenScores()
    scores.add(logits, torch.log_softmax(logits, -1), torch.zeros(200, dtype=torch.long))
    assert scores.kl[0].max() < 1e-6
    assert scores.agree[0].all()
