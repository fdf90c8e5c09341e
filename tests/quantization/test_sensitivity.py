"""The search for a mix against all mixes: where costs add up it finds the smallest, and it never promises too much."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import UserError
from edgedistill.quantization.sensitivity import MOST_SIZES, Group, Measured, Mix, cheapest_mixes, find_mix
from edgedistill.statistics import Estimate

TYPES = ("INT2", "INT4", "INT8", "INT16")


class Problem:
    """Random groups whose costs add up, but for what pairs of them cost together; counts what is measured."""

    def __init__(
        self, seed: int, groups: int, *, together: float = 0.0, largest: int = 40, misled: float = 0.0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.groups = []
        self.costs: dict[str, list[float]] = {}
        for number in range(groups):
            steps = int(rng.integers(1, len(TYPES) + 1))
            sizes = np.sort(rng.choice(np.arange(10, 10 + largest), steps, replace=False))
            errors = np.sort(rng.uniform(0.01, 1, steps))[::-1]
            name = f"layer {number}"
            self.groups.append(
                Group(
                    name=name,
                    types=TYPES[:steps],
                    bytes=tuple(int(size) for size in sizes),
                    errors=tuple(float(error) for error in errors),
                    float_bytes=10 + largest,
                )
            )
            true = errors * np.exp(rng.normal(0, misled, steps)) if misled else errors
            self.costs[name] = [float(c) for c in rng.lognormal(-4, 1.5) * true / true[0]]
        self.together = together
        self.calls = 0

    def loss(self, steps: Mapping[str, int]) -> float:
        alone = [self.costs[name][step] for name, step in steps.items()]
        pairs = sum(math.sqrt(a * b) for a, b in itertools.combinations(alone, 2))
        return sum(alone) + self.together * pairs

    def measure(self, steps: Mapping[str, int]) -> Measured:
        self.calls += 1
        loss = self.loss(steps)
        return Measured(Estimate(loss, (0.9 * loss, 1.1 * loss), 9, 8.5), math.exp(-loss))

    def retention(self, steps: Sequence[int]) -> float:
        return math.exp(-self.loss({g.name: s for g, s in zip(self.groups, steps, strict=True)}))

    def all(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(len(group.types)) for group in self.groups)))

    def bytes(self, steps: Sequence[int]) -> int:
        return sum(group.bytes[step] for group, step in zip(self.groups, steps, strict=True))

    def target(self, share: float) -> float:
        """Between what the lowest and the highest types keep."""
        low = self.retention([0] * len(self.groups))
        high = self.retention([len(group.types) - 1 for group in self.groups])
        return low + share * (high - low)


def solve(problem: Problem, target: float, **changes: Any) -> Mix:
    settings: dict[str, Any] = {"metric": "loss", "source": "text", "examples": 100, "documents": 7}
    return find_mix(problem.groups, problem.measure, target=target, **settings | changes)


@pytest.mark.parametrize("seed", range(40))
def test_where_costs_add_up_it_is_the_smallest_of_all_mixes(seed: int) -> None:
    problem = Problem(seed, groups=2 + seed % 4)
    for share in (0.05, 0.5, 0.9, 0.999):
        target = problem.target(share)
        mix = solve(problem, target)
        enough = [steps for steps in problem.all() if problem.retention(steps) >= target]
        assert mix.bytes == min(problem.bytes(steps) for steps in enough)
        steps = [mix.steps[group.name] for group in problem.groups]
        assert problem.bytes(steps) == mix.bytes
        assert mix.record.reached == problem.retention(steps) >= target
        assert mix.record.bytes_added == mix.bytes - problem.bytes([0] * len(steps))


@pytest.mark.parametrize("seed", range(20))
def test_every_cheapest_mix_is_the_cheapest_of_its_size(seed: int) -> None:
    problem = Problem(seed, groups=4)
    costs = [problem.costs[group.name] for group in problem.groups]
    mixes = cheapest_mixes([group.bytes for group in problem.groups], costs)

    def cost(steps: Sequence[int]) -> float:
        return sum(of_group[step] for of_group, step in zip(costs, steps, strict=True))

    assert mixes[0] == (0,) * 4
    assert [problem.bytes(m) for m in mixes] == sorted({problem.bytes(m) for m in mixes})
    for mix in mixes:
        assert cost(mix) == min(cost(s) for s in problem.all() if problem.bytes(s) <= problem.bytes(mix))


@pytest.mark.parametrize("seed", range(40))
def test_where_costs_do_not_add_up_the_mix_keeps_enough_and_nothing_in_it_is_idle(seed: int) -> None:
    problem = Problem(seed, groups=6, together=0.3, misled=0.2)
    target = problem.target(0.6)
    mix = solve(problem, target)
    steps = [mix.steps[group.name] for group in problem.groups]
    assert problem.retention(steps) >= target
    highest = [len(group.types) - 1 for group in problem.groups]
    assert mix.bytes <= problem.bytes(highest)
    for index, step in enumerate(steps):
        if step:
            assert problem.retention([*steps[:index], step - 1, *steps[index + 1 :]]) < target, (index, steps)
    enough = min(problem.bytes(s) for s in problem.all() if problem.retention(s) >= target)
    assert mix.bytes <= 1.2 * enough


def test_sizes_without_a_common_divisor_are_rounded_up_and_nearly_as_small() -> None:
    problem = Problem(3, groups=6, largest=10_000_019)
    assert math.gcd(*(size - group.bytes[0] for group in problem.groups for size in group.bytes)) == 1
    target = problem.target(0.7)
    mix = solve(problem, target)
    smallest = min(problem.bytes(steps) for steps in problem.all() if problem.retention(steps) >= target)
    total = problem.bytes([len(g.types) - 1 for g in problem.groups]) - problem.bytes([0] * 6)
    assert smallest <= mix.bytes <= smallest + 6 * (total / MOST_SIZES + 1)


def test_it_measures_each_group_once_and_few_mixes() -> None:
    problem = Problem(1, groups=60)
    mix = solve(problem, problem.target(0.97))
    raised = sum(1 for step in mix.steps.values() if step)
    assert raised > 10
    assert problem.calls <= 60 + 2 + 2 * math.log2(MOST_SIZES) + 2 * raised


def test_the_table_is_in_the_order_of_cost_a_byte() -> None:
    problem = Problem(5, groups=5)
    mix = solve(problem, problem.target(0.5))
    rows = mix.record.rows
    ratio = [row.cost / row.bytes_saved for row in rows]
    assert ratio == sorted(ratio, reverse=True)
    by_name = {group.name: group for group in problem.groups}
    for row in rows:
        group = by_name[row.group]
        assert (row.type, row.chosen) == (group.types[0], group.types[mix.steps[row.group]])
        assert row.bytes_saved == group.float_bytes - group.bytes[0]
        assert row.cost == problem.costs[row.group][0] and (row.documents, row.effective_documents) == (9, 8.5)
        assert row.cost_ci95 is not None and row.cost_ci95[0] < row.cost < row.cost_ci95[1]
    assert (mix.record.metric, mix.record.examples, mix.record.documents) == ("loss", 100, 7)
    assert mix.record.as_quantized == problem.retention([0] * 5) < mix.record.target <= mix.record.reached


def test_nothing_is_raised_where_the_quantization_itself_keeps_enough() -> None:
    problem = Problem(2, groups=4)
    mix = solve(problem, problem.retention([0] * 4))
    assert set(mix.steps.values()) == {0} and mix.record.bytes_added == 0
    assert len(mix.record.rows) == 4 and mix.record.reached == mix.record.as_quantized
    assert problem.calls == 1 + 4  # the table is made all the same


def test_what_no_mix_keeps_is_refused_with_the_figures() -> None:
    problem = Problem(2, groups=4)
    highest = problem.target(1.0)
    with pytest.raises(UserError) as refused:
        solve(problem, highest + 1e-4, remedy="ask for less")
    assert f"is {highest:.4f} with every layer at the highest type (INT" in refused.value.cause
    assert f"{problem.target(0.0):.4f} as it is" in refused.value.cause
    assert refused.value.remedy == "ask for less"
    assert problem.calls == 2  # before the table


@pytest.mark.parametrize("sizes", [(10, 10), (20, 10)])
def test_a_ladder_that_does_not_ascend_is_a_bug(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        Group(name="g", types=("a", "b"), bytes=sizes, errors=(1.0, 0.5), float_bytes=30)
