"""Per-token scores of one rung against the teacher, and paired bootstraps over documents.

Legend: N tokens, V vocabulary, D documents, B bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray
from torch import Tensor  # noqa: TID253

Floats = NDArray[np.float64]
MIN_VALUES_FOR_P99 = 100
QUANTILE = 0.99


@dataclass
class TokenScores:
    """What is kept of every scored token: numbers, never logits."""

    nll: list[NDArray[np.float32]] = field(default_factory=list)
    correct: list[NDArray[np.bool_]] = field(default_factory=list)
    kl: list[NDArray[np.float32]] = field(default_factory=list)
    agree: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, logits: Tensor, teacher_log_p: Tensor, targets: Tensor, teacher_choice: Tensor | None = None) -> None:
        """Score `logits` [N, V'] against targets [N], the teacher's log-probabilities [N, V] and its likeliest tokens.

        Perplexity counts all of the artifact's own rows, padding included: that is what a sampler sees.
        KL(teacher ‖ artifact) runs over the V tokens that both know. `teacher_choice` [N] is the teacher's likeliest
        token where that may be one that a trimmed vocabulary lacks (V and above): a disagreement. Nats. Ties go to the
        lowest id.
        """
        if teacher_choice is None:
            teacher_choice = teacher_log_p.argmax(-1)
        vocab = teacher_log_p.shape[-1]
        log_q = torch.log_softmax(logits.float(), dim=-1)
        choice = log_q.argmax(-1)
        self.nll.append(-log_q.gather(1, targets[:, None])[:, 0].numpy())
        self.correct.append((choice == targets).numpy())
        kl = torch.nn.functional.kl_div(log_q[:, :vocab], teacher_log_p, reduction="none", log_target=True).sum(-1)
        self.kl.append(kl.clamp_min(0.0).numpy())
        self.agree.append((choice == teacher_choice).numpy())


ROWS = 512  # of logits compared at a time: a large vocabulary's float32 rows are not held three times over


@dataclass
class PairScores:
    """Two rungs against each other, of every scored token."""

    kl: list[NDArray[np.float32]] = field(default_factory=list)
    agree: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, above: Tensor, below: Tensor) -> None:
        """Logits [N, V] and [N, V'] of the same tokens: KL(above ‖ below) over the tokens that both have, in nats."""
        vocab = min(above.shape[-1], below.shape[-1])
        for start in range(0, len(above), ROWS):
            p, q = above[start : start + ROWS], below[start : start + ROWS]
            log_p = torch.log_softmax(p[:, :vocab].double(), dim=-1)
            log_q = torch.log_softmax(q[:, :vocab].double(), dim=-1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            self.kl.append(kl.clamp_min(0.0).float().numpy())
            self.agree.append((log_p.argmax(-1) == log_q.argmax(-1)).numpy())


def document_draws(documents: int, samples: int, seed: int) -> NDArray[np.int32]:
    """[B, D] how often each document stands in each bootstrap draw; one table for all rungs: paired."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(documents, np.full(documents, 1.0 / documents), size=samples).astype(np.int32)


def interval(values: Floats) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Summary:
    """A figure over all tokens, and the same figure in every bootstrap draw."""

    value: float
    draws: Floats

    @property
    def ci95(self) -> tuple[float, float]:
        return interval(self.draws)


def mean_over_tokens(values: NDArray[np.generic], document: NDArray[np.int64], draws: NDArray[np.int32]) -> Summary:
    """Token mean, resampled by document."""
    numbers = values.astype(np.float64)
    sums = np.bincount(document, weights=numbers, minlength=draws.shape[1])
    counts = np.bincount(document, minlength=draws.shape[1]).astype(np.float64)
    return Summary(value=float(numbers.mean()), draws=(draws @ sums) / (draws @ counts))


def perplexity_of(mean_nll: Summary) -> Summary:
    """exp of a mean negative log-likelihood."""
    return Summary(value=float(np.exp(mean_nll.value)), draws=np.exp(mean_nll.draws))


def p99_over_tokens(
    values: NDArray[np.generic], document: NDArray[np.int64], draws: NDArray[np.int32]
) -> Summary | None:
    """99th percentile over tokens (the smallest value that 99 % do not exceed), resampled by document.

    None for fewer than 100 values: there is no such percentile then.
    """
    if len(values) < MIN_VALUES_FOR_P99:
        return None
    order = np.argsort(values, kind="stable")[::-1]
    ordered, owner = values[order].astype(np.float64), document[order]
    counts = np.bincount(document, minlength=draws.shape[1])
    found = np.empty(len(draws))
    # Only the top tokens can be the 99th percentile of a draw: walk down from the largest.
    for number, draw in enumerate(draws):
        above = int(np.floor((1 - QUANTILE) * (draw @ counts)))
        reach = min(len(ordered), 8 * above + 64)
        while True:
            taken = np.cumsum(draw[owner[:reach]])
            if taken[-1] > above or reach == len(ordered):
                break
            reach = min(len(ordered), 2 * reach)
        found[number] = ordered[min(int(np.searchsorted(taken, above, side="right")), reach - 1)]
    whole = int(np.floor((1 - QUANTILE) * len(values)))
    return Summary(value=float(ordered[whole]), draws=found)
