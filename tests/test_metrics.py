"""Scores and intervals against slow, obvious references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.verify.metrics import (
    TokenScores,
    document_draws,
    mean_over_tokens,
    p99_over_tokens,
    perplexity_of,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), documents=st.integers(2, 9), tokens=st.integers(100, 800), ties=st.booleans())
def test_p99_equals_the_sorted_reference_in_every_draw(seed, documents, tokens, ties):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, tokens).astype(np.float32) if ties else rng.random(tokens).astype(np.float32)
    owner = rng.integers(0, documents, tokens)
    owner[:documents] = np.arange(documents)
    draws = document_draws(documents, 50, seed)
    found = p99_over_tokens(values, owner, draws)
    assert found is not None

    def reference(numbers):
        ordered = np.sort(numbers)[::-1]
        return float(ordered[math.floor((1 - 0.99) * len(ordered))])

    assert found.value == reference(values)
    for draw, value in zip(draws, found.draws, strict=True):
        assert value == reference(np.concatenate([np.repeat(values[owner == d], n) for d, n in enumerate(draw) if n]))


def test_p99_of_fewer_than_100_values_is_none():
    assert p99_over_tokens(np.ones(99), np.zeros(99, dtype=np.int64), document_draws(1, 10, 0)) is None


def test_mean_and_perplexity_are_token_weighted_and_paired():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    owner = np.array([0, 0, 0, 1])
    draws = np.array([[1, 1], [2, 0], [0, 2]], dtype=np.int32)
    mean = mean_over_tokens(values, owner, draws)
    assert mean.value == 2.5
    assert mean.draws.tolist() == [2.5, 2.0, 4.0]
    assert perplexity_of(mean).value == pytest.approx(math.exp(2.5))


def test_draws_are_one_table_that_depends_on_the_seed_alone():
    assert (document_draws(7, 20, 3) == document_draws(7, 20, 3)).all()
    assert (document_draws(7, 20, 3) != document_draws(7, 20, 4)).any()
    assert (document_draws(7, 20, 3).sum(1) == 7).all()


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        documents = rng.normal(3.0, 1.0, 60)
        owner = np.repeat(np.arange(60), 20)
        values = documents[owner] + rng.normal(0, 0.5, len(owner))
        low, high = mean_over_tokens(values, owner, document_draws(60, 400, trial)).ci95
        covered += low <= 3.0 <= high
    assert 180 <= covered <= 198


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
