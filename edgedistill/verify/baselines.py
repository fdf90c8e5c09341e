"""What a model must beat to prove anything: a uniform guess, and the text's own word counts.

Legend: N scored tokens, D documents, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Pseudo-counts of a token. The best for the text is taken, so that the baseline is as strong as its kind can be; the
# largest of them makes it a uniform guess.
SMOOTHINGS = tuple(10.0**power for power in range(-4, 9))


@dataclass(frozen=True)
class Unigram:
    """`nll` [N] in nats; `smoothing`: the pseudo-count that was best."""

    nll: NDArray[np.float64]
    smoothing: float


def unigram(targets_N: NDArray[np.int64], document_N: NDArray[np.int64], vocab: int) -> Unigram:
    """The additively smoothed counts of all other documents, for each token: p = (c + a) / (n + a V).

    A document never counts for its own tokens: counts that hold the token itself would know the answer.
    """
    pairs, place, own = np.unique(
        document_N * vocab + targets_N, return_inverse=True, return_counts=True
    )  # how often a document has a token
    in_all = np.bincount(targets_N, minlength=vocab)
    elsewhere = (in_all[pairs % vocab] - own)[place].astype(np.float64)
    lengths = np.bincount(document_N)
    others = (len(targets_N) - lengths[document_N]).astype(np.float64)
    best: Unigram | None = None
    for smoothing in SMOOTHINGS:
        nll = np.log(others + smoothing * vocab) - np.log(elsewhere + smoothing)
        if best is None or nll.mean() < best.nll.mean():
            best = Unigram(nll, smoothing)
    assert best is not None
    return best
