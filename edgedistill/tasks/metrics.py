"""Per-token scores of one rung against the teacher, and of two rungs against each other.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray
from torch import Tensor  # noqa: TID253


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
