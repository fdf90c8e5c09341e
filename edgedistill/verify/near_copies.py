"""Documents that are one document over again, with a number, a line or an ending of their own: they count as one.

An interval is over independent documents. Sixty copies of a page that differ in a date say as much as one of them.

Legend: T tokens of a document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RUN_TOKENS = 13
SHARED = 0.5  # of the runs of the shorter one: what two documents of one kind have in common, a licence, is less
MOST_HOLDERS = 64  # of one run: beyond that it is a phrase of the corpus


def units_of(documents: Sequence[NDArray[np.int32]]) -> list[int]:
    """The unit of each document, numbered from 0: near copies share one.

    Two are near copies where half of the runs of 13 tokens of the shorter one stand in the other. One without such a
    run is a unit of its own.
    """
    parents = list(range(len(documents)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    holders: dict[bytes, list[int]] = {}
    sizes: list[int] = []
    for number, ids_T in enumerate(documents):
        runs = _runs(ids_T)
        sizes.append(len(runs))
        shared: Counter[int] = Counter()
        for run in runs:
            held = holders.setdefault(run, [])
            shared.update(held)
            if len(held) < MOST_HOLDERS:
                held.append(number)
        for other, count in shared.items():
            if count >= SHARED * min(len(runs), sizes[other]):
                parents[root(number)] = root(other)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(number), len(numbers)) for number in range(len(documents))]


def _runs(ids_T: NDArray[np.int32]) -> set[bytes]:
    raw, width = np.ascontiguousarray(ids_T).tobytes(), ids_T.itemsize
    return {raw[width * start : width * (start + RUN_TOKENS)] for start in range(len(ids_T) - RUN_TOKENS + 1)}
