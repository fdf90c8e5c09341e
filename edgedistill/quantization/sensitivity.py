"""What quantizing each part of a model costs, and the smallest mix of types that keeps what is asked for.

One algorithm for GGUF types and ONNX nodes: a format gives its groups of tensors with the types that each may get, and
a function that measures a mix on text. Nothing here knows a format.

1. Every group is quantized alone, the rest in floating point: its cost. What it would cost at a higher type is
   predicted from the rounding errors of the two types.
2. Were costs to add up, the cheapest mix of every size would be known: a knapsack, solved exactly.
3. They do not quite, so the mixes are measured: the smallest one in that order which keeps enough.
4. Whatever was raised and turns out not to be needed is lowered again, measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, log

import numpy as np

from edgedistill.errors import UserError
from edgedistill.progress import QUIET, Progress
from edgedistill.records.artifact import Sensitivity, SensitivityRow
from edgedistill.statistics import Estimate

# Sizes that are told apart: finer ones would cost measurements and save less than a four-thousandth of the choice.
MOST_SIZES = 4096

# Group → step on its ladder. A group that is not named computes in floating point.
Steps = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors whose type is chosen together, and their ladder: from what the quantization gives to the highest offered.

    `types` of the steps in words; `bytes`, ascending; `errors`: the squared rounding error of the weights, descending,
    in any unit of the group's own. `float_bytes`: unquantized. One step alone: there is nothing to choose.
    """

    name: str
    types: tuple[str, ...]
    bytes: tuple[int, ...]
    errors: tuple[float, ...]
    float_bytes: int

    def __post_init__(self) -> None:
        steps = len(self.types)
        if not steps or len(self.bytes) != steps or len(self.errors) != steps:
            raise ValueError(f"{self.name}: {steps} types, {len(self.bytes)} sizes, {len(self.errors)} errors")
        if list(self.bytes) != sorted(set(self.bytes)):
            raise ValueError(f"{self.name}: sizes {self.bytes} do not ascend")


@dataclass(frozen=True)
class Measured:
    """What a mix costs against the float model (in the metric's unit, 0 at best) and the retention it has."""

    cost: Estimate
    retention: float


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The step of every group that was chosen, what was measured on the way, and the record of it."""

    steps: dict[str, int]
    bytes: int
    record: Sensitivity


Measure = Callable[[Steps], Measured]


def find_mix(
    groups: Sequence[Group],
    measure: Measure,
    *,
    target: float,
    metric: str,
    source: str,
    examples: int,
    documents: int,
    remedy: str = "",
    progress: Progress = QUIET,
) -> Mix:
    """The smallest mix found whose measured retention is at least `target`, and the table it was chosen from.

    Where costs add up and errors predict them, it is the smallest there is (but for `MOST_SIZES`). Whatever they do,
    the mix was measured whole and keeps enough, and no group of it could be lowered by itself. Deterministic, where
    `measure` is. Raises UserError, before the table is made, where even the highest types keep less than `target`.
    """
    tried: dict[tuple[int, ...], Measured] = {}

    def measured(steps: Sequence[int]) -> Measured:
        key = tuple(steps)
        if key not in tried:
            tried[key] = measure({group.name: step for group, step in zip(groups, key, strict=True)})
            size = sum(group.bytes[step] for group, step in zip(groups, key, strict=True))
            progress.say(f"sensitivity: {size:,} bytes keep {tried[key].retention:.4f}", level=2)
        return tried[key]

    lowest, highest = [0] * len(groups), [len(group.types) - 1 for group in groups]
    if measured(lowest).retention < target and measured(highest).retention < target:
        raise UserError(
            f"export.mixed_retention is {target:g}, but retention on the {source} is {measured(highest).retention:.4f}"
            f" with every layer at the highest type ({_kinds(groups, highest)}), and"
            f" {measured(lowest).retention:.4f} as it is",
            remedy or "lower export.mixed_retention, or choose a larger quantization",
        )
    alone = []
    for number, group in enumerate(groups, 1):
        alone.append(measure({group.name: 0}))
        progress.step("sensitivity", number, len(groups), group=group.name, cost=f"{alone[-1].cost.value:.3g}")
    costs = [_predicted(group, found.cost.value) for group, found in zip(groups, alone, strict=True)]
    steps = lowest
    if measured(lowest).retention < target:
        steps = _search(groups, costs, measured, target, highest)
        steps = _lower_again(groups, measured, target, steps)
    chosen = measured(steps)
    return Mix(
        steps={group.name: step for group, step in zip(groups, steps, strict=True)},
        bytes=_bytes(groups, steps),
        record=Sensitivity(
            metric=metric,
            source=source,
            examples=examples,
            documents=documents,
            rows=_rows(groups, alone, steps),
            target=target,
            reached=chosen.retention,
            as_quantized=measured(lowest).retention,
            bytes_added=_bytes(groups, steps) - _bytes(groups, lowest),
        ),
    )


def cheapest_mixes(bytes_: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> list[tuple[int, ...]]:
    """Steps of each group of the cheapest mix of every size, from the smallest to the cheapest; sizes ascend, costs
    (added up) descend.

    Exact where the sizes' common divisor tells at most `MOST_SIZES` of them apart; else sizes are rounded up to that
    many, and what is added last may be bought too dear by one such unit a group.
    """
    added = [[size - of_group[0] for size in of_group] for of_group in bytes_]
    total = sum(of_group[-1] for of_group in added)
    if total == 0:
        return [(0,) * len(added)]
    unit = gcd(*(size for of_group in added for size in of_group))
    if total // unit > MOST_SIZES:
        unit = -(-total // MOST_SIZES)
    units = [[-(-size // unit) for size in of_group] for of_group in added]
    sizes = sum(of_group[-1] for of_group in units)
    # best[u]: the least cost of the groups so far with at most u units added; choice[group][u]: that group's step
    best = np.zeros(sizes + 1)
    choice = np.zeros((len(added), sizes + 1), dtype=np.int16)
    for group, (of_group, cost) in enumerate(zip(units, costs, strict=True)):
        found = best + cost[0]
        for step in range(1, len(of_group)):
            shifted = np.full(sizes + 1, np.inf)
            shifted[of_group[step] :] = best[: sizes + 1 - of_group[step]] + cost[step]
            better = shifted < found
            found = np.where(better, shifted, found)
            choice[group][better] = step
        best = found
    mixes: list[tuple[int, ...]] = []
    least = np.inf
    for size in range(sizes + 1):
        if best[size] >= least:
            continue
        least, left, steps = best[size], size, []
        for group in reversed(range(len(added))):
            steps.append(int(choice[group][left]))
            left -= units[group][steps[-1]]
        mixes.append(tuple(reversed(steps)))
    return mixes


def say_result(record: Sensitivity, progress: Progress) -> None:
    """What was chosen, as a line of a log."""
    raised = sum(row.type != row.chosen for row in record.rows)
    progress.say(
        f"sensitivity: {raised} of {len(record.rows)} groups raised ({record.bytes_added:,} bytes more): retention"
        f" {record.reached:.4f} instead of {record.as_quantized:.4f} on the {record.source}; asked: {record.target:g}"
    )


def _predicted(group: Group, cost: float) -> list[float]:
    """Cost at each step: the measured one, times how much smaller the weights' squared error is there.

    KL and cosine are quadratic in small errors, so costs go as the squared error. A step of no error costs nothing.
    """
    first = group.errors[0]
    return [cost * (error / first if first > 0 else 0.0) for error in group.errors]


def _search(
    groups: Sequence[Group],
    costs: Sequence[Sequence[float]],
    measured: Callable[[Sequence[int]], Measured],
    target: float,
    highest: Sequence[int],
) -> list[int]:
    """The smallest of the cheapest mixes that keeps `target`, by interpolation and bisection in turns."""
    mixes = cheapest_mixes([group.bytes for group in groups], costs)
    if mixes[-1] != tuple(highest):
        mixes.append(tuple(highest))  # known to keep enough, whatever the predictions say
    predicted = [sum(cost[step] for cost, step in zip(costs, mix, strict=True)) for mix in mixes]
    low, high = 0, len(mixes) - 1
    losses = {low: _loss(measured(mixes[low])), high: _loss(measured(mixes[high]))}
    bisect = False
    while high - low > 1:
        middle = (low + high) // 2
        if not bisect and losses[low] > losses[high]:
            share = (-log(target) - losses[high]) / (losses[low] - losses[high])
            wanted = predicted[high] + share * (predicted[low] - predicted[high])
            middle = next((i for i in range(low + 1, high) if predicted[i] <= wanted), high - 1)
        bisect = not bisect
        found = measured(mixes[middle])
        losses[middle] = _loss(found)
        if found.retention >= target:
            high = middle
        else:
            low = middle
    return list(mixes[high])


def _lower_again(
    groups: Sequence[Group], measured: Callable[[Sequence[int]], Measured], target: float, steps: Sequence[int]
) -> list[int]:
    """The mix with what is not needed lowered, the largest saving first, until no group can be lowered by itself."""
    steps = list(steps)

    def lowered(index: int) -> list[int]:
        return [*steps[:index], steps[index] - 1, *steps[index + 1 :]]

    def saving(index: int) -> int:
        return groups[index].bytes[steps[index]] - groups[index].bytes[steps[index] - 1]

    changed = True
    while changed:
        changed = False
        for index in sorted((i for i, step in enumerate(steps) if step), key=lambda i: (-saving(i), groups[i].name)):
            while steps[index] and measured(lowered(index)).retention >= target:
                steps = lowered(index)
                changed = True
    return steps


def _loss(found: Measured) -> float:
    return -log(max(found.retention, 1e-300))


def _bytes(groups: Sequence[Group], steps: Sequence[int]) -> int:
    return sum(group.bytes[step] for group, step in zip(groups, steps, strict=True))


def _kinds(groups: Sequence[Group], steps: Sequence[int]) -> str:
    words = {word for group, step in zip(groups, steps, strict=True) for word in group.types[step].split(", ")}
    return ", ".join(sorted(words))


def _rows(groups: Sequence[Group], alone: Sequence[Measured], steps: Sequence[int]) -> list[SensitivityRow]:
    rows = [
        SensitivityRow(
            group=group.name,
            type=group.types[0],
            cost=found.cost.value,
            cost_ci95=found.cost.ci95,
            documents=found.cost.units,
            effective_documents=found.cost.effective_units,
            bytes_saved=group.float_bytes - group.bytes[0],
            chosen=group.types[step],
        )
        for group, found, step in zip(groups, alone, steps, strict=True)
    ]
    # A group that saves nothing has nothing to lose either
    return sorted(rows, key=lambda row: (-row.cost / row.bytes_saved if row.bytes_saved > 0 else 0.0, row.group))
