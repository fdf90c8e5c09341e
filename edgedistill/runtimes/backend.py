"""What a runtime must do in the child process. T: tokens of one sequence, V: vocabulary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Backend(Protocol):
    """A runtime with an artifact open."""

    vocab_size: int
    context_tokens: int

    def info(self) -> dict[str, Any]:
        """runtime, runtime_version, vocab_size, context_tokens, options."""

    def logits(self, tokens_T: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        """Blocks of rows of [T, V], in order, from an empty KV cache."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def timed(self, tokens_T: NDArray[np.int32], new_tokens: int) -> dict[str, Any]:
        """Greedy decoding from an empty KV cache: `tokens` (the new ones), `ttft_ms` (prompt and first
        token), `token_ms` (each later one: new_tokens - 1 of them)."""


@runtime_checkable
class Embedder(Protocol):
    """A runtime that turns a sequence into one vector."""

    def embedding(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]: ...


def greedy_timed(
    step: Callable[[Sequence[int]], NDArray[np.float32]], tokens: Sequence[int], new_tokens: int
) -> dict[str, Any]:
    """Time `step` (tokens in, the last one's logits out, cache kept) over a prompt and its greedy continuation."""
    clock = time.perf_counter_ns
    started = clock()
    found = [int(np.argmax(step(tokens)))]
    previous = clock()
    ttft_ms = (previous - started) / 1e6
    token_ms = []
    while len(found) < new_tokens:
        found.append(int(np.argmax(step(found[-1:]))))
        now = clock()
        token_ms.append((now - previous) / 1e6)
        previous = now
    return {"tokens": found, "ttft_ms": ttft_ms, "token_ms": token_ms}
