"""What another graph of the same model loses, output by output, by what an output holds (tasks.CLASSES, ...).

classes, places: cost is the KL divergence of the softmax in nats, retention the smaller of the share of likeliest ones
that stay and exp(-cost). labels: cost is the KL of each label's own yes or no, summed, retention the smaller of the
share of decisions that stay and exp(-cost). scores (a regression, a reranker): cost is the squared error over the
variance of the reference, retention 1 - cost, the R². vectors: cost is 1 - cosine, retention 1 - cost.

Rows: an input, or a token where an output has an axis of tokens; padding is none. V values a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgedistill.onnx.inputs import Batch
from edgedistill.onnx.model_inputs import MASK
from edgedistill.onnx.tasks import CLASSES, DERIVED, LABELS, PLACES, SCORES, VECTORS
from edgedistill.records.artifact import TensorSpec
from edgedistill.statistics import ByUnit, by_unit

METRICS = {
    CLASSES: "mean KL from the float graph, nats",
    PLACES: "mean KL from the float graph over the places in the text, nats",
    LABELS: "mean KL from the float graph, over labels, nats",
    SCORES: "squared error over the variance of the float graph's scores",
    VECTORS: "1 - cosine to the float graph's outputs",
}
# A place that is padding: its share of a softmax is 0.
NOWHERE = -1e30


@dataclass(frozen=True)
class Rows:
    """An output of one batch: values [R, V], and the input of the batch [R] that each row belongs to."""

    values: NDArray[np.float64]
    owner: NDArray[np.int64]


@dataclass(frozen=True)
class Scored:
    """`cost` by input, its mean the cost of the graph; `retention`: of the output that kept least."""

    cost: ByUnit
    retention: float


def meanings_of(outputs: Sequence[TensorSpec], known: Mapping[str, str]) -> dict[str, str]:
    """Output → what it holds, without those that another output says already.

    Of a module that says nothing, `logits` of several values are classes, and what has one value a row is a score.
    """
    found = {}
    for spec in outputs:
        one = len(spec.shape) < 2 or spec.shape[-1] == 1
        guessed = SCORES if one else CLASSES if spec.name == "logits" else VECTORS
        meaning = known.get(spec.name, guessed)
        if meaning != DERIVED:
            found[spec.name] = meaning
    return found


def rows_of(values: NDArray[np.floating], batch: Batch, meaning: str) -> Rows:
    """The rows of an output; what is computed for padding is left out."""
    mask = batch.get(MASK)
    found = values.astype(np.float64)
    count = len(found)
    per_token = mask is not None and found.shape[:2] == mask.shape
    if meaning == PLACES:
        flat = found.reshape(count, -1)
        if mask is not None and flat.shape == mask.shape:
            flat = np.where(mask > 0, flat, NOWHERE)
        return Rows(flat, np.arange(count))
    if per_token and mask is not None and (found.ndim == 3 or meaning == SCORES):
        real = mask > 0
        return Rows(found[real].reshape(int(real.sum()), -1), np.nonzero(real)[0])
    return Rows(found.reshape(count, -1), np.arange(count))


def score(
    meanings: Mapping[str, str],
    references: Sequence[Mapping[str, Rows]],
    found: Iterable[Mapping[str, Rows]],
    documents: Sequence[int],
) -> Scored:
    """Another graph's outputs of the same batches against the references'. `documents`: inputs of each batch.

    Several outputs: their costs add up, and the retention is the smallest of theirs.
    """
    kept = list(found)
    starts = np.concatenate([[0], np.cumsum(documents)[:-1]])
    parts, retentions = [], []
    for name, meaning in meanings.items():
        owner = np.concatenate([start + part[name].owner for start, part in zip(starts, references, strict=True)])
        variance_V = _variance([part[name].values for part in references]) if meaning == SCORES else None
        costs, same = [], []
        for reference, other in zip(references, kept, strict=True):
            cost, stays = _costs(reference[name].values, other[name].values, meaning, variance_V)
            costs.append(cost)
            same.append(stays)
        of = by_unit(np.concatenate(costs), owner)
        parts.append(of)
        retentions.append(_retention(of.mean, float(np.mean(np.concatenate(same))), meaning))
    return Scored(parts[0] if len(parts) == 1 else _together(parts), min(retentions))


def _together(parts: Sequence[ByUnit]) -> ByUnit:
    """The sum of several costs, an input counting once: one has a row for it, another one for each token."""
    means = np.sum([part.sums / part.counts for part in parts], axis=0)
    return ByUnit(means, np.ones_like(means))


def _retention(cost: float, same: float, meaning: str) -> float:
    if meaning in (CLASSES, PLACES, LABELS):
        return min(same, float(np.exp(-cost)))
    return max(0.0, 1.0 - cost)


def _costs(
    reference: NDArray[np.float64], found: NDArray[np.float64], meaning: str, variance_V: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[R] costs, and [R] shares of what is decided alike."""
    if meaning in (CLASSES, PLACES):
        same = (reference.argmax(-1) == found.argmax(-1)).astype(np.float64)
        return _kl(_log_softmax(reference), _log_softmax(found)), same
    if meaning == LABELS:
        same = ((reference > 0) == (found > 0)).mean(-1)
        yes = _kl(_log_sigmoid(reference), _log_sigmoid(found), terms=True)
        no = _kl(_log_sigmoid(-reference), _log_sigmoid(-found), terms=True)
        return (yes + no).sum(-1).clip(min=0.0), same
    if meaning == SCORES:
        assert variance_V is not None
        error = np.square(found - reference) / variance_V
        return error.mean(-1), np.ones(len(error))
    norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(found, axis=-1)
    cosine = (reference * found).sum(-1) / np.maximum(norms, 1e-30)
    return np.clip(1.0 - cosine, 0.0, None), np.ones(len(cosine))


def _variance(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """[V] of each score over all rows; of one that never changes its own square, so that a cost stays a share."""
    together_RV = np.concatenate(values)
    spread: NDArray[np.float64] = together_RV.var(0)
    square = np.square(together_RV).mean(0)
    never = spread <= 1e-12 * square
    return np.maximum(np.where(never, square, spread), 1e-30)


def _kl(p: NDArray[np.float64], q: NDArray[np.float64], *, terms: bool = False) -> NDArray[np.float64]:
    """Σ exp(p)(p - q) of logarithms p and q; `terms`: not summed."""
    each: NDArray[np.float64] = np.exp(p) * (p - q)
    return each if terms else each.sum(-1).clip(min=0.0)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def _log_sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = -np.logaddexp(0.0, -logits)
    return found
