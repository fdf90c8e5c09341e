"""How golden logits are kept, held to a sort of the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from edgedistill.bundle.golden_rules import BLOCK_ROWS, _log_sum, compact
from edgedistill.records.golden import TOP_IDS


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2 * BLOCK_ROWS + 3, 1000), (3, 50_000)])
@pytest.mark.parametrize("digits", [None, 1, 0])
@pytest.mark.parametrize("odd", [None, np.nan, np.inf, -np.inf])
def test_the_best_ids_are_those_of_a_stable_sort(shape: tuple[int, int], digits: int | None, odd: float | None) -> None:
    logits_RV = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if digits is not None:  # many that are equal
        logits_RV = np.round(logits_RV, digits)
    if odd is not None:
        logits_RV[0, :: max(1, shape[1] // 7)] = odd
    top = min(TOP_IDS, shape[1])
    assert (compact(logits_RV).ids_RK == np.argsort(-logits_RV, axis=1, kind="stable")[:, :top]).all()


def test_the_sum_of_exponentials_is_that_of_all_rows_at_once() -> None:
    logits_RV = np.random.default_rng(1).standard_normal((2 * BLOCK_ROWS + 3, 5000)).astype(np.float32)
    rows = logits_RV.astype(np.float64)
    largest = rows.max(axis=1, keepdims=True)
    assert (_log_sum(logits_RV) == np.log(np.exp(rows - largest).sum(axis=1)) + largest[:, 0]).all()
